"""A tiny saved model, and pictures for it."""

import io
from pathlib import Path

from PIL import Image

from namr.model import model
from namr.model.model import ModelConfig


def save_model(folder: Path, *, seed: int) -> Path:
    config = ModelConfig(backbone="test_resnet", weights="none", embedding_dim=8, image_size_px=32)
    model.save(model.build(config, seed=seed), folder, extra={"job": "seed = 1\n"})
    return folder


def picture(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "PNG")
    return buffer.getvalue()
