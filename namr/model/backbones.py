"""Backbones: networks of timm by name, their weights loaded strictly, their input size and pixel settings.

A backbone is any timm model made without its classifier, so that it turns (B, 3, H, W) into (B, F).

Not covered: networks from elsewhere; checkpoints of training jobs (`model` saves and loads whole models).
"""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import safetensors.torch
import timm
import timm.data
import timm.models
import timm.optim
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from namr.errors import ConfigError, ManifestError, ModelMismatch

_optim: Any = timm.optim  # exports without saying so


class PixelSettings(NamedTuple):
    """How a backbone was trained to see: of RGB values in 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]


def create(name: str, *, pretrained: bool) -> nn.Module:
    """A timm model without classifier, drawn from torch's global generator, or with timm's own weights.

    ConfigError for a name that timm doesn't know (with the nearest ones) or weights that can't be had.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"perhaps you meant {' or '.join(near)}" if near else "timm.list_models() has the names"
        raise ConfigError(f"backbone {name!r} is not known to timm; {hint}")
    try:
        backbone: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not pretrained:
            raise ConfigError(f"timm can't make backbone {name!r}: {reason}") from error
        raise ConfigError(
            f"the pre-trained weights of backbone {name!r} can't be had from timm: {reason} "
            "Without a way to the internet, give weights as the URI of a .safetensors file"
        ) from error
    return backbone


def num_features(backbone: Any) -> int:
    """F."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)


def pixel_settings(backbone: nn.Module) -> PixelSettings:
    """Mean, standard deviation and interpolation that the backbone's weights were trained with."""
    settings: dict[str, Any] = timm.data.resolve_model_data_config(backbone)  # type: ignore[no-untyped-call, attr-defined]
    red, green, blue = (float(value) for value in settings["mean"])
    red_std, green_std, blue_std = (float(value) for value in settings["std"])
    return PixelSettings(
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
    )


def load_weights(backbone: Any, data: bytes, origin: str) -> None:
    """Load a .safetensors file with timm's keys, strictly, its classifier dropped.

    `origin` is for the messages. ManifestError if it is no safetensors file, ModelMismatch if it doesn't fit.
    """
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ManifestError(f"{origin} is no safetensors file: {error}; check weights") from error
    classifier = backbone.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    dropped = tuple(f"{name}." for name in names)
    load_strictly(backbone, {name: t for name, t in state.items() if not name.startswith(dropped)}, origin)


def encode_weights(state: Mapping[str, Tensor]) -> bytes:
    """The .safetensors file of tensors under timm's keys, which `load_weights` takes."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load all tensors with their shapes, or raise ModelMismatch, which says what doesn't fit."""
    expected = module.state_dict()
    faults = {
        "missing": [name for name in expected if name not in state],
        "not expected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} where {tuple(tensor.shape)} is expected"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise ModelMismatch(f"{origin} doesn't fit the model: {told}; check the name of the backbone")
    module.load_state_dict(state)


def set_input_size(backbone: Any, size_px: int) -> None:
    """Give a network with one input size (a vision transformer) another; the others take any.

    What depends on the size is resampled, so this comes after the weights of the original size are loaded.
    """
    settings = backbone.pretrained_cfg
    native = settings["input_size"][-1]
    if not settings.get("fixed_input_size") or size_px == native:
        return
    if not hasattr(backbone, "set_input_size"):
        raise ConfigError(f"image_size_px is {size_px}; {settings['architecture']} only takes {native}")
    try:
        backbone.set_input_size(img_size=(size_px, size_px))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"image_size_px is {size_px}, which {settings['architecture']} can't take: {error}; try {native}"
        ) from error


def layers_of(backbone: Any) -> dict[str, int]:
    """By the name of a parameter the number of its layer, from 0 at the pixels, as timm counts them.

    ConfigError for a network whose layers timm doesn't know.
    """
    if not hasattr(backbone, "group_matcher"):
        raise ConfigError(f"timm doesn't know the layers of {type(backbone).__name__}; leave them alike")
    numbers: dict[str, int] = timm.models.group_parameters(
        backbone, backbone.group_matcher(coarse=False), reverse=True
    )
    return numbers


def parameter_groups(
    module: nn.Module, *, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """What is trained of a network or its heads, in groups with `params`, `weight_decay` and `lr_scale`.

    Norms, biases and what a backbone says of itself (positions) have no decay. lr_scale: layer_decay to the
    number of layers that come after, 1 without it.
    """
    asked: dict[str, Any] = {"weight_decay": weight_decay}
    own: Any = getattr(module, "no_weight_decay", None)
    if own is not None:
        asked["no_weight_decay_list"] = own()
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = _optim.param_groups_weight_decay(module, **asked)
        return [{"lr_scale": 1.0, **group} for group in groups]
    layers_of(module)  # says what is wrong where timm would guess
    groups = _optim.param_groups_layer_decay(module, layer_decay=layer_decay, **asked)
    return groups


def with_shared_batchnorm(backbone: nn.Module) -> nn.Module:
    """The same network whose BatchNorms share their statistics over all ranks (on GPUs only)."""
    shared: nn.Module = convert_sync_batchnorm(backbone)  # type: ignore[no-untyped-call]
    return shared


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
