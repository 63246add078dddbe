"""The stored vectors of a gallery, that candidates are compared by: embeddings and structures.

They are float16 files, one pair a shard, mapped into memory and addressed by id (row = id & 0xffffffff).

Not covered: writing them (`release.releases`), and what they are compared for (`rerank`).
Legend: n ids, D dimension, N rows of a shard.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from namr.errors import ManifestError

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.void]
"""(n,) vectors, each one item of 2 D bytes"""

_BLOCK_ROWS = 8192
_NO_ROWS = np.empty(0, np.void)


class VectorPaths(NamedTuple):
    """The two files of a shard."""

    embedding: Path
    structure: Path


class GalleryVectors:
    """Both vectors of every item, mapped into memory: opening reads a header a file and no vector."""

    def __init__(self, paths: Mapping[int, VectorPaths], *, dim: int) -> None:
        self.dim = dim
        self._embeddings = {number: _as_rows(_map(of.embedding, dim)) for number, of in paths.items()}
        self._structures = {number: _as_rows(_map(of.structure, dim)) for number, of in paths.items()}

    def embeddings(self, ids: Ids) -> Tensor:
        """(n,) ids -> (n, D) float16; ManifestError for an id that has no row."""
        return self._gather(ids, self._embeddings)[0]

    def structures(self, ids: Ids) -> Tensor:
        """(n,) ids -> (n, D) float16."""
        return self._gather(ids, self._structures)[0]

    def both(self, ids: Ids) -> tuple[Tensor, Tensor]:
        """(n,) ids -> embeddings and structures, (n, D) float16."""
        x, s = self._gather(ids, self._embeddings, self._structures)
        return x, s

    def blocks(self) -> Iterator[tuple[Ids, Tensor, Tensor]]:
        """Ids (n,), embeddings and structures (n, D) of all rows by ascending id, in pieces."""
        for number in sorted(self._embeddings):
            x, s = (self._as_vectors(of[number]) for of in (self._embeddings, self._structures))
            for start in range(0, len(x), _BLOCK_ROWS):
                stop = min(start + _BLOCK_ROWS, len(x))
                yield (number << 32) + np.arange(start, stop), x[start:stop], s[start:stop]

    def _gather(self, ids: Ids, *kinds: Mapping[int, Rows]) -> list[Tensor]:
        """Sorted by id first, so that each file is visited once and its pages in order."""
        order = np.argsort(ids, kind="stable")
        in_order = ids[order]
        numbers, at = in_order >> 32, in_order & 0xFFFFFFFF
        ends = np.flatnonzero(np.diff(numbers, append=-1)) + 1
        gathered = [np.empty(len(ids), np.dtype((np.void, 2 * self.dim))) for _ in kinds]
        start = 0
        for stop in ends.tolist():
            number, places = int(numbers[stop - 1]), order[start:stop]
            for rows, files in zip(gathered, kinds, strict=True):
                file = files.get(number, _NO_ROWS)
                if at[stop - 1] >= len(file):
                    raise ManifestError(
                        f"item {in_order[stop - 1]} has no re-rank vector: shard {number} holds {len(file)}; "
                        "build the release anew"
                    )
                rows[places] = file[at[start:stop]]
            start = stop
        return [self._as_vectors(rows) for rows in gathered]

    def _as_vectors(self, rows: Rows) -> Tensor:
        return torch.from_numpy(rows.view(np.float16).reshape(len(rows), self.dim))


def _as_rows(vectors: Tensor) -> Rows:
    """(n, D) as (n,) whole rows, which numpy moves one by one without looking into them."""
    return vectors.numpy().view(np.dtype((np.void, 2 * vectors.shape[1]))).reshape(len(vectors))


def _map(path: Path, dim: int) -> Tensor:
    """(N, D) float16, mapped copy-on-write. torch closes the file after mapping it, numpy would keep it open:
    a release of 10,000 shards must not need 20,000 file descriptors."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
            shape, fortran, dtype = reader(file) if reader else ((), True, None)
        except ValueError as error:
            raise ManifestError(f"{path} is no .npy file: {error}") from error
        header_bytes = file.tell()
    if dtype != np.float16 or fortran or len(shape) != 2 or shape[1] != dim:
        raise ManifestError(f"{path} holds {shape} {dtype}; expected (rows, {dim}) float16")
    num_values = header_bytes // 2 + shape[0] * dim
    if path.stat().st_size != 2 * num_values:
        raise ManifestError(f"{path} has {path.stat().st_size} bytes; its header says {2 * num_values}")
    values = torch.from_file(str(path), shared=False, size=num_values, dtype=torch.float16)
    return values[header_bytes // 2 :].view(shape[0], dim)
