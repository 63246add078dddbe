"""The model: a timm backbone and twin heads, with the preprocessing and the way of searching it belongs to.

    pixels (B, 3, H, W) uint8 --backbone--> features (B, F) --heads--> embedding x (B, D), structure s (B, D)

A saved model is a folder: `model.safetensors`, and last `model.json` with config, preprocessing, search
defaults and the digest that names its embedding space.

Not covered: which parts are trained (`train.optimiser`), models whose features are not one vector per image.
Legend: B batch, F features, D embedding dimension.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from namr import checks
from namr.data import images
from namr.data.images import Fit, Preprocessing
from namr.errors import ConfigError, ManifestError, ShapeError
from namr.model import backbones
from namr.model.distances import Metric, Side
from namr.model.heads import Embeddings, TwinHeads
from namr.store import manifests, storage

BatchNormPolicy = Literal["frozen", "sync", "local"]
StructureBatchNormPolicy = Literal["local", "frozen"]
ComputeDtype = Literal["float32", "float16", "bfloat16"]

WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is built from."""

    backbone: str
    """Name of a timm model, for example tf_efficientnet_lite0 or resnet50.a1_in1k."""
    weights: str = "timm"
    """"timm" downloads timm's pre-trained weights, "none" starts untrained, else the URI of a .safetensors
    file with the keys of this timm model (a classifier in it is dropped)."""
    embedding_dim: int = 512
    """Numbers in an embedding, and in a structure embedding."""
    structure_hidden_dim: int = 512
    """Width between the two linear layers of the structure head."""
    structure_range: float = 0.5
    """r: structure embeddings lie in 1 - r .. 1 + r; 0 is the control without structure, s = 1."""
    image_size_px: int = 224
    """Side of the square that the backbone sees."""
    fit: Fit = "squash"
    """"squash" resizes both sides to the square; "crop" takes the largest centred square."""

    def __post_init__(self) -> None:
        if self.weights not in ("timm", "none") and not self.weights.endswith(".safetensors"):
            raise ConfigError(
                f"weights is {self.weights!r}; expected timm, none or the URI of a .safetensors file"
            )
        checks.in_range(self, "embedding_dim", "structure_hidden_dim", "image_size_px", at_least=1)
        checks.in_range(self, "structure_range", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class SearchDefaults:
    """How to search with this model, as its own evaluation recommends; travels with it."""

    metric: Metric = "l2"
    structure_side: Side = "none"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a saved model says of itself, without its weights being read; its `model.json`."""

    FORMAT: ClassVar[str] = "namr-model"
    FORMAT_VERSION: ClassVar[int] = 1

    config: ModelConfig
    preprocessing: Preprocessing
    search: SearchDefaults
    digest: str
    weights_sha256: str
    extra: Mapping[str, str] = field(default_factory=dict)
    """Texts that travel along (the training job's config, say)."""


class NamrModel(nn.Module):
    """Backbone and heads; made by `build` or `load`."""

    def __init__(self, config: ModelConfig, backbone: nn.Module) -> None:
        super().__init__()
        pixels = backbones.pixel_settings(backbone)
        self.config = config
        self.preprocessing = Preprocessing(
            size_px=config.image_size_px,
            mean=pixels.mean,
            std=pixels.std,
            interpolation=pixels.interpolation,
            fit=config.fit,
            draft_factor=images.DRAFT_FACTOR,
        )
        self.search = SearchDefaults()
        self.batchnorm: BatchNormPolicy = "local"
        self.structure_batchnorm: StructureBatchNormPolicy = "local"
        self.backbone = backbone.to(memory_format=torch.channels_last)  # as the fast convolutions want it
        self.heads = TwinHeads(
            backbones.num_features(backbone),
            config.embedding_dim,
            hidden_dim=config.structure_hidden_dim,
            structure_range=config.structure_range,
        )

    def features(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, F), float32 or what autocast makes of it."""
        if self.batchnorm == "sync" and self.training and not pixels.is_cuda:
            raise ConfigError("batchnorm is 'sync', which needs a GPU; expected 'frozen' or 'local' on a CPU")
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.backbone(images.normalise(pixels, self.preprocessing))
        return features

    def forward(self, pixels: Tensor) -> Embeddings:
        """uint8 (B, 3, H, W) -> x and s, both (B, D)."""
        embeddings: Embeddings = self.heads(self.features(pixels))
        return embeddings

    def train(self, mode: bool = True) -> "NamrModel":
        """As in torch, except that frozen BatchNorms keep using their stored statistics."""
        super().train(mode)
        for part, policy in (
            (self.backbone, self.batchnorm),
            (self.heads, self.structure_batchnorm),
        ):
            for module in part.modules():
                if policy == "frozen" and isinstance(module, _BatchNorm):
                    module.eval()
        return self


def build(config: ModelConfig, *, seed: int) -> NamrModel:
    """A new model; the seed decides every weight that is not pre-trained.

    Mean, standard deviation and interpolation come from the backbone's own settings in timm. ConfigError for
    an unknown backbone or weights that can't be had, ModelMismatch for weights of another architecture.
    """
    model = _assemble(config, pretrained=config.weights == "timm", seed=seed)
    if config.weights not in ("timm", "none"):
        backbones.load_weights(model.backbone, storage.read(config.weights), config.weights)
    backbones.set_input_size(model.backbone, config.image_size_px)
    return model


def set_batchnorm_policy(
    model: NamrModel, policy: BatchNormPolicy, *, of_structure: StructureBatchNormPolicy = "local"
) -> None:
    """What the BatchNorms of the backbone, and of the structure head, do in training.

    "frozen" uses the stored statistics and leaves them alone (their scale and shift still learn), "sync"
    shares statistics over all ranks (GPU), "local" is each rank's own.
    """
    if policy not in ("frozen", "sync", "local"):
        raise ConfigError(f"batchnorm is {policy!r}; expected frozen, sync or local")
    if policy == "sync":
        model.backbone = backbones.with_shared_batchnorm(model.backbone)
    model.batchnorm, model.structure_batchnorm = policy, of_structure
    model.train(model.training)


def fold_scale(model: NamrModel, mean_distance: float) -> None:
    """Divide the sample head by the mean pairwise distance of its embeddings, so that it becomes 1."""
    if not (np.isfinite(mean_distance) and mean_distance > 0):
        raise ConfigError(
            f"mean distance is {mean_distance}; expected a number above 0: the embeddings have collapsed"
        )
    with torch.no_grad():
        model.heads.sample.weight.div_(mean_distance)
        model.heads.sample.bias.div_(mean_distance)


def save(model: NamrModel, folder: Path, *, extra: Mapping[str, str] | None = None) -> None:
    """Write the folder that `load` reads; `extra` are texts to travel along (the job's config, say)."""
    weights = safetensors.torch.save({name: tensor for name, tensor in _tensors(model)})
    description = Description(
        config=model.config,
        preprocessing=model.preprocessing,
        search=model.search,
        digest=digest(model),
        weights_sha256=storage.sha256(weights),
        extra=dict(extra or {}),
    )
    storage.write(str(folder / WEIGHTS_FILE), weights)
    storage.write(str(folder / DESCRIPTION_FILE), manifests.encode_manifest(description))


def describe(folder: Path) -> Description:
    """Read `model.json`; ManifestError if it is missing, damaged, no model's or from a newer namr."""
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise ManifestError(f"{path} is missing, so there is no model here; check the folder")
    try:
        return manifests.decode_manifest(path.read_bytes(), Description, str(path))
    except ConfigError as error:  # a number that no model can have
        raise ManifestError(f"{path} is damaged: {error}; restore it or train anew") from error


def load(folder: Path) -> NamrModel:
    """A saved model, verified, in eval mode; ManifestError if damaged, ModelMismatch if it doesn't fit."""
    description = describe(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ManifestError(f"{path} is missing; restore it or train anew")
    weights = path.read_bytes()
    if storage.sha256(weights) != description.weights_sha256:
        raise ManifestError(
            f"{path} is damaged: its SHA-256 is {storage.sha256(weights)}, {DESCRIPTION_FILE} says "
            f"{description.weights_sha256}; restore it or train anew"
        )
    model = _assemble(description.config, pretrained=False, seed=0)
    backbones.set_input_size(model.backbone, description.config.image_size_px)
    backbones.load_strictly(model, safetensors.torch.load(weights), str(path))
    model.preprocessing, model.search = description.preprocessing, description.search
    if not description.config.structure_range and digest(model) != description.digest:
        # Python's 0 and 0.0 are two texts in the digest; what is read from JSON is always 0.0.
        model.config = replace(description.config, structure_range=0)
    if digest(model) != description.digest:
        raise ManifestError(
            f"{folder} describes another model: its digest is {digest(model)}, {DESCRIPTION_FILE} says "
            f"{description.digest}; restore it or train anew"
        )
    return model.eval()


def digest(model: NamrModel) -> str:
    """SHA-256 over weights, architecture and preprocessing: the identity of the embedding space.

    Two models with one digest make the same vectors. `SearchDefaults` and the origin of the first weights
    are not in it.
    """
    config = {name: value for name, value in asdict(model.config).items() if name != "weights"}
    return _digest(json.dumps([config, images.identity(model.preprocessing)], sort_keys=True), model)


def backbone_digest(model: NamrModel) -> str:
    """SHA-256 over the backbone's weights and the preprocessing: all that an image's features depend on."""
    return _digest(f"{model.config.backbone} {model.preprocessing}", model.backbone)


def embed(
    model: NamrModel,
    pixels: np.ndarray,
    *,
    batch_size: int,
    device: str | torch.device,
    compute_dtype: ComputeDtype = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, 3, H, W) -> x and s, float32 (n, D), computed in eval mode in batches of one size.

    compute_dtype: what autocast makes of the backbone; the heads stay at float32.

    The last batch is padded, because a batch of another size may give other last bits (a batch of 1 or 7
    against 64 does on CPU); so the result of an image depends on `batch_size` and not on its neighbours.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ShapeError(f"pixels are {pixels.dtype} {pixels.shape}; expected uint8 (n, 3, H, W)")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
    was_training = model.training
    model.to(device).eval()
    both = np.empty((2, len(pixels), model.config.embedding_dim), np.float32)
    lower = torch.autocast(
        torch.device(device).type, getattr(torch, compute_dtype), enabled=compute_dtype != "float32"
    )
    with torch.inference_mode(), lower:
        for start in range(0, len(pixels), batch_size):
            rows = pixels[start : start + batch_size]
            batch = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
            batch[: len(rows)] = rows
            for out, tensor in zip(both, model(torch.from_numpy(batch).to(device)), strict=True):
                out[start : start + len(rows)] = tensor[: len(rows)].float().cpu().numpy()
    model.train(was_training)
    return both[0], both[1]


def _assemble(config: ModelConfig, *, pretrained: bool, seed: int) -> NamrModel:
    """The model at the backbone's own input size; with timm's weights in it if asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = backbones.create(config.backbone, pretrained=pretrained)
        return NamrModel(config, backbone)


def _digest(beside: str, module: nn.Module) -> str:
    """SHA-256 over a text, and the name, type, shape and bytes of every tensor."""
    hashed = hashlib.sha256(beside.encode())
    for name, tensor in _tensors(module):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers on the CPU, by name."""
    state = model.state_dict()
    return [(name, state[name].detach().cpu().contiguous()) for name in sorted(state)]
