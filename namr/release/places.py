"""Where the re-rank vectors of an item lie: a table from id to row, with one entry a sample of the dataset.

    vector-shards.npy   int64 (S, 2): the number of each shard and how many samples it has, by number
    vector-rows.npy     (N,): the row of each sample, shard after shard; -1 where it is not in the index

An id is a shard's number and a row in it, so a row is found by two look-ups and no search. Rows are int32,
4 bytes a sample, and int64 only where there are too many.

Legend: n ids, S shards, N samples of all shards.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from namr.errors import ManifestError
from namr.release import arrays

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.signedinteger]


class Places:
    """The row of every id."""

    def __init__(self, shards: Ids, rows: Rows) -> None:
        """ManifestError unless there are as many rows as the shards have samples."""
        self.shards, self.rows = shards, rows
        if int(shards[:, 1].sum()) != len(rows):
            raise ManifestError(
                f"the shards have {shards[:, 1].sum()} samples, and {len(rows)} places are known; build the "
                "release anew"
            )
        # by the number of the shard; the last stands for all numbers above
        num_known = int(shards[-1, 0]) + 1 if len(shards) else 0
        self.starts = np.zeros(num_known + 1, np.int64)
        """where in `rows` each shard begins, by its number"""
        self.sizes = np.zeros(num_known + 1, np.int64)
        self.starts[shards[:, 0]] = starts_of(shards)
        self.sizes[shards[:, 0]] = shards[:, 1]

    @classmethod
    def open(cls, shards_path: Path, rows_path: Path, *, num_rows: int) -> "Places":
        """The two files, mapped into memory. num_rows: of the vectors."""
        shards = arrays.map_array(shards_path, np.int64, (None, 2))
        return cls(shards, arrays.map_array(rows_path, dtype_of(num_rows), (None,)))

    def of(self, ids: Ids) -> Ids:
        """(n,) ids -> (n,) rows, -1 for what has none."""
        numbers = np.minimum((ids >> 32).view(np.uint64), len(self.sizes) - 1).view(np.int64)
        at = ids & 0xFFFFFFFF
        known = at < self.sizes[numbers]
        at += self.starts[numbers]
        if known.all():
            of_all: Ids = self.rows[at].astype(np.int64)
            return of_all
        rows = np.full(len(ids), -1, np.int64)
        rows[known] = self.rows[at[known]]
        return rows

    def ids(self, num_rows: int) -> Ids:
        """(num_rows,) the id of each row; -1 for a row of no sample."""
        ids = np.full(num_rows, -1, np.int64)
        for (number, size), start in zip(self.shards.tolist(), starts_of(self.shards).tolist(), strict=True):
            of_shard = self.rows[start : start + size]
            placed = np.flatnonzero(of_shard >= 0)
            ids[of_shard[placed]] = (number << 32) + placed
        return ids


def joined(tables: Sequence[Places], nums_rows: Sequence[int]) -> Places:
    """One table over several of different shards, whose vectors lie one after the other: nums_rows each.

    One is as it is, mapped; several are joined in memory.
    """
    if len(tables) == 1:
        return tables[0]
    dtype, rows = dtype_of(sum(nums_rows)), []
    for table, first in zip(tables, np.cumsum([0, *nums_rows]).tolist(), strict=False):
        rows.append(np.where(table.rows >= 0, table.rows + np.array(first, dtype), -1).astype(dtype))
    return Places(np.concatenate([table.shards for table in tables]), np.concatenate(rows))


def rows_of(ids: Ids, shards: Ids) -> Rows:
    """The table (N,) where ids (n,), each once, lie in this order; ManifestError for an id of no sample."""
    size = int(shards[:, 1].sum())
    at = Places(shards, np.arange(size)).of(ids)
    if (at < 0).any():
        raise ManifestError(f"id {ids[at < 0][0]} is of none of the {size} samples; build again")
    rows = np.full(size, -1, dtype_of(len(ids)))
    rows[at] = np.arange(len(ids))
    return rows


def starts_of(shards: Ids) -> Ids:
    """(S,) how many samples lie before each shard."""
    starts: Ids = np.cumsum(shards[:, 1]) - shards[:, 1]
    return starts


def dtype_of(num_rows: int) -> npt.DTypeLike:
    """What a row is stored as."""
    return np.int32 if num_rows <= np.iinfo(np.int32).max else np.int64
