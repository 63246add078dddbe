"""The stored vectors of a gallery, that candidates are compared by: embeddings and structures.

They are few float16 files, mapped into memory, where the two vectors of an item lie side by side and items in
the order of the index's lists: what one query compares is read together.

Not covered: writing them (`release.vector_steps`), and what they are compared for (`rerank`).
Legend: n ids, D dimension, N rows of a file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from namr.errors import ManifestError
from namr.release import arrays
from namr.release.places import Places
from namr.search import kernel

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.void]
"""(N,) vectors or pairs of them, each one item that numpy moves without looking into it"""

_BLOCK_ROWS = 8192


class Block(NamedTuple):
    """Some rows as they lie in a file."""

    ids: Ids
    """(n,)"""
    x: Tensor
    """(n, D) float16 embeddings"""
    s: Tensor
    """(n, D) float16 structures"""


def blocks_of(path: Path, ids: Ids, *, dim: int, start: int, num_rows: int | None = None) -> Iterator[Block]:
    """The rows of a file of vectors from `start` on, one for each of ids (n,), up to num_rows at once."""
    file = arrays.map_array(path, np.float16, (None, 2, dim))
    step = num_rows or _BLOCK_ROWS
    for first in range(0, len(ids), step):
        some = ids[first : first + step]
        rows = torch.from_numpy(file[start + first : start + first + len(some)])
        yield Block(some, rows[:, 0], rows[:, 1])


class GalleryVectors:
    """Both vectors of every item, mapped into memory: opening reads a header a file and no vector.

    ManifestError for a file that is not (N, 2, D) float16. num_threads: of one comparison, see `rerank`.
    """

    def __init__(self, paths: Sequence[Path], places: Places, *, dim: int, num_threads: int = 1) -> None:
        self.dim, self.num_threads, self._places = dim, num_threads, places
        files = [arrays.map_array(path, np.float16, (None, 2, dim)) for path in paths]
        halves = [file.view(np.dtype((np.void, 2 * dim))).reshape(len(file), 2) for file in files]
        self._embeddings, self._structures = ([each[:, at] for each in halves] for at in (0, 1))
        self._pairs = [
            file.reshape(len(file), 2 * dim).view(np.dtype((np.void, 4 * dim)))[:, 0] for file in files
        ]
        self._starts = np.cumsum([0, *(len(file) for file in files)])
        self._num_rows = self._starts[-1].astype(np.uint64)
        addresses = np.array([file.ctypes.data for file in files], np.int64)
        self.table = kernel.Table(places.starts, places.sizes, places.rows, addresses, self._starts)
        self.nearest = kernel.nearest(places.rows.dtype)

    def embeddings(self, ids: Ids) -> Tensor:
        """(n,) ids -> (n, D) float16; ManifestError for an id that has no row."""
        return self._as_vectors(self._gather(ids, self._embeddings))

    def structures(self, ids: Ids) -> Tensor:
        """(n,) ids -> (n, D) float16."""
        return self._as_vectors(self._gather(ids, self._structures))

    def both(self, ids: Ids) -> tuple[Tensor, Tensor]:
        """(n,) ids -> embeddings and structures, (n, D) float16."""
        return self._as_both(self._gather(ids, self._pairs))

    def ids(self) -> Ids:
        """(N,) of all rows, one file after the other."""
        return self._places.ids(int(self._starts[-1]))

    def blocks(self, *, num_rows: int | None = None, first_row: int = 0) -> Iterator[Block]:
        """All rows from first_row on, as they lie in the files, up to num_rows at once."""
        ids, step = self.ids(), num_rows or _BLOCK_ROWS
        for file, first in zip(self._pairs, self._starts.tolist(), strict=False):
            for start in range(max(0, first_row - first), len(file), step):
                x, s = self._as_both(file[start : start + step])
                yield Block(ids[first + start : first + start + len(x)], x, s)

    def _gather(self, ids: Ids, files: Sequence[Rows]) -> Rows:
        """(n,) ids -> (n,) what they have in these files."""
        rows = self._places.of(ids)
        is_there = rows.view(np.uint64) < self._num_rows  # -1 is the largest of all
        if not is_there.all():
            raise ManifestError(f"item {ids[~is_there][0]} has no re-rank vector; build the release anew")
        if len(files) == 1:
            return files[0][rows]
        if not files:
            return np.empty(0, np.void)
        gathered = np.empty(len(ids), files[0].dtype)
        of_files = np.searchsorted(self._starts, rows, side="right") - 1
        for number, file in enumerate(files):
            mine = np.flatnonzero(of_files == number)
            gathered[mine] = file[rows[mine] - self._starts[number]]
        return gathered

    def _as_vectors(self, rows: Rows) -> Tensor:
        return torch.from_numpy(rows.view(np.float16).reshape(len(rows), self.dim))

    def _as_both(self, rows: Rows) -> tuple[Tensor, Tensor]:
        both = rows.view(np.float16).reshape(len(rows), 2, self.dim)
        return torch.from_numpy(both[:, 0]), torch.from_numpy(both[:, 1])
