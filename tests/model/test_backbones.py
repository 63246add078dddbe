"""Backbones by name: their weights, loaded strictly, their input size and pixel settings."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from namr.data import images
from namr.errors import ConfigError, ManifestError, ModelMismatch, ObjectMissing
from namr.model import model
from namr.model.model import ModelConfig


def config(**changes: object) -> ModelConfig:
    tiny = ModelConfig(
        backbone="test_resnet", weights="none", embedding_dim=8, structure_hidden_dim=16, image_size_px=32
    )
    return replace(tiny, **changes)  # type: ignore[arg-type]


def pixels(n: int, *, size_px: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 3, size_px, size_px), dtype=np.uint8)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_an_unknown_backbone_gets_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"'resnet_50' is not known to timm; perhaps you meant .*resnet50"):
        model.build(config(backbone="resnet_50"), seed=0)
    with pytest.raises(ConfigError, match="has the names"):
        model.build(config(backbone="&&&"), seed=0)


def backbone_file(path: Path, *, changes: dict[str, torch.Tensor | None] | None = None) -> str:
    """Weights of the tiny backbone as timm saves them, classifier included."""
    tensors = state(model.build(config(), seed=9).backbone)
    tensors |= {"fc.weight": torch.zeros(1000, 4), "fc.bias": torch.zeros(1000)}
    for name, tensor in (changes or {}).items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    path.write_bytes(safetensors.torch.save({name: each.contiguous() for name, each in tensors.items()}))
    return str(path)


def test_weights_from_a_uri_are_loaded_strictly_without_their_classifier(tmp_path: Path) -> None:
    uri = backbone_file(tmp_path / "w.safetensors")
    one = model.build(config(weights=uri), seed=0)
    expected = state(model.build(config(), seed=9).backbone)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in one.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv1.0.weight": None}, r"1 missing: conv1\.0\.weight"),
        ({"extra.weight": torch.zeros(1)}, r"1 not expected: extra\.weight"),
        ({"conv1.0.weight": torch.zeros(1, 2)}, r"1 of another shape: conv1\.0\.weight \(1, 2\) where"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    uri = backbone_file(tmp_path / "w.safetensors", changes=changes)
    with pytest.raises(ModelMismatch, match=message):
        model.build(config(weights=uri), seed=0)


def test_weights_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(ObjectMissing, match=r"w\.safetensors"):
        model.build(config(weights=str(path)), seed=0)
    path.write_bytes(b"no weights")
    with pytest.raises(ManifestError, match="is no safetensors file"):
        model.build(config(weights=str(path)), seed=0)


def test_pretrained_weights_that_cannot_be_had_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that has none, and one whose weights are neither in the cache nor within reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for backbone in ("darknet17", "resnet10t"):
        with pytest.raises(
            ConfigError, match=rf"pre-trained weights of backbone '{backbone}' can't be had.*URI"
        ):
            model.build(config(backbone=backbone, weights="timm"), seed=0)


def test_a_vision_transformer_takes_another_size_and_comes_back(tmp_path: Path) -> None:
    native = model.build(config(backbone="test_vit", image_size_px=160), seed=0)
    one = model.build(config(backbone="test_vit", image_size_px=96), seed=0)
    assert one.backbone.pos_embed.shape != native.backbone.pos_embed.shape  # type: ignore[union-attr]
    model.save(one, tmp_path)
    back = model.load(tmp_path)
    shown = pixels(2, size_px=96)
    expected = model.embed(one, shown, batch_size=2, device="cpu")
    assert np.array_equal(model.embed(back, shown, batch_size=2, device="cpu"), expected)
    with pytest.raises(ConfigError, match="image_size_px is 96; mixer_s16_224 only takes 224"):
        model.build(config(backbone="mixer_s16_224", image_size_px=96), seed=0)


def test_pixel_settings_are_the_backbones_own() -> None:
    vit = model.build(config(backbone="test_vit", image_size_px=160), seed=0).preprocessing
    resnet = model.build(config(backbone="resnet10t"), seed=0).preprocessing
    assert vit.mean == (0.5, 0.5, 0.5) and vit.interpolation == "bicubic" and vit.size_px == 160
    assert resnet.mean == (0.485, 0.456, 0.406) and resnet.std == (0.229, 0.224, 0.225)
    assert resnet.interpolation in get_args(images.Interpolation)


def test_the_shared_weights_see(shared_weights: Path, shared_data: Path) -> None:
    """Real weights from a URI, on real images: neighbours by cosine mostly share their class."""
    lite = ModelConfig(
        backbone="tf_efficientnet_lite0",
        weights=str(shared_weights / "tf_efficientnet_lite0.safetensors"),
        embedding_dim=16,
        image_size_px=96,
    )
    one = model.build(lite, seed=0).eval()
    assert one.preprocessing.mean == one.preprocessing.std == (0.5, 0.5, 0.5)
    folders = sorted((shared_data / "grocery81" / "test").iterdir())[::5]
    paths = [path for folder in folders for path in sorted(folder.glob("*.jpg"))[:6]]
    shown = np.stack([images.prepare(path.read_bytes(), one.preprocessing) for path in paths])
    with torch.inference_mode():
        features = nn.functional.normalize(one.features(torch.from_numpy(shown)))
    similarity = (features @ features.T).fill_diagonal_(-1)
    labels = np.array([path.parent.name for path in paths])
    recall = (labels == labels[similarity.argmax(dim=1)]).mean()
    assert recall > 0.85
