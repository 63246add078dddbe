"""Arrays as .npy files: encoded, decoded, and mapped into memory.

A file that is not what its manifest says, by type, shape or size, is a ManifestError that names both.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from namr.errors import ManifestError

Array = npt.NDArray[Any]


def encode_array(array: Array) -> bytes:
    """The .npy file of an array."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def decode_array(data: bytes, dtype: npt.DTypeLike) -> Array:
    """The array of a .npy file; ManifestError if it is none or of another type."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise ManifestError(f"not a .npy file ({len(data)} bytes): {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise ManifestError(
            f"expected a .npy file of {np.dtype(dtype)}, got {getattr(array, 'dtype', 'none')}"
        )
    return array


def map_array(path: Path, dtype: npt.DTypeLike, shape: Sequence[int | None]) -> Array:
    """The array of a .npy file, mapped copy-on-write: only its header is read now. None: of any length."""
    try:
        mapped = np.lib.format.open_memmap(path, mode="c")
    except ValueError as error:
        raise ManifestError(f"{path} is no whole .npy file: {error}") from error
    fits = len(mapped.shape) == len(shape) and all(
        wanted in (None, actual) for wanted, actual in zip(shape, mapped.shape, strict=True)
    )
    if mapped.dtype != dtype or not fits or not mapped.flags.c_contiguous:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ManifestError(
            f"{path} holds {mapped.shape} {mapped.dtype}; expected ({wanted}) {np.dtype(dtype)}"
        )
    num_bytes = mapped.offset + mapped.nbytes
    if path.stat().st_size != num_bytes:
        raise ManifestError(f"{path} has {path.stat().st_size} bytes; its header says {num_bytes}")
    return np.asarray(mapped)  # a plain array is indexed in a third of the time
