"""Small pictures of noise, in folders and in tars."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, kind: str = "PNG", *, size: int = 12) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def folder_of(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def tar_of(path: Path, *entries: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
