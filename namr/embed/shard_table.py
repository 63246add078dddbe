"""The table of one shard, filled batch by batch: every row embedded, as it is stored, or refused and why.

Not covered: where batches come from (`decoding`), and what a file has to have (`embeddings`).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from namr.data.datasets import Dataset, ShardEntry
from namr.data.reading import StreamedSample
from namr.embed.decoding import Batch
from namr.errors import ShapeError
from namr.store.tables import EmbeddingTable

ERASED = "erased"


class Refused(NamedTuple):
    """A row without an embedding, and why."""

    id: int
    key: str
    reason: str


class ShardTable:
    """Vectors are narrowed to their storage type as they come, so that memory has them once."""

    def __init__(self, dataset: Dataset, entry: ShardEntry, *, dim: int, storage_dtype: str) -> None:
        self._samples: list[StreamedSample] = []
        self._refused = _erased(dataset, entry)
        self._vectors = np.empty((2, entry.num_samples, dim), storage_dtype)

    def add(self, batch: Batch, x: npt.NDArray[np.float32], s: npt.NDArray[np.float32]) -> None:
        """The next rows, with their embeddings and structures, (n, D) each.

        ShapeError, naming the sample, for NaN and for what the storage type can't hold.
        """
        rows = slice(len(self._samples), len(self._samples) + len(batch.samples))
        for out, vectors, what in zip(self._vectors, (x, s), ("embedding", "structure"), strict=True):
            out[rows] = _narrowed(vectors, self._vectors.dtype, batch.samples, what)
        self._samples += batch.samples
        self._refused += [Refused(sample.id, sample.key, reason) for sample, reason in batch.refused]

    def finished(self, *, compute_dtype: str) -> EmbeddingTable:
        """The table, when all rows are in it; compute_dtype is what the model was run in."""
        x, s = self._vectors[:, : len(self._samples)]
        return EmbeddingTable(
            ids=np.array([sample.id for sample in self._samples], np.int64),
            keys=[sample.key for sample in self._samples],
            labels=[sample.label for sample in self._samples],
            embeddings=x,
            structures=s,
            refused_ids=np.array([row.id for row in self._refused], np.int64),
            refused_keys=[row.key for row in self._refused],
            refused_reasons=[row.reason for row in self._refused],
            compute_dtype=compute_dtype,
        )


def _erased(dataset: Dataset, entry: ShardEntry) -> list[Refused]:
    """Rows that were emptied on purpose; they don't count as bad."""
    table = dataset.samples(entry)
    return [Refused(int(table.ids[row]), table.keys[row], ERASED) for row in np.flatnonzero(table.sizes == 0)]


def _narrowed(
    x: npt.NDArray[np.float32], dtype: np.dtype[Any], samples: list[StreamedSample], what: str
) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        narrow = x.astype(dtype)
    sound = np.isfinite(narrow).all(axis=1)
    if not sound.all():
        row = int(np.argmin(sound))
        is_nan = np.isnan(x[row]).any()
        reason = "is NaN" if is_nan else f"reaches {np.abs(x[row]).max():g}, too large for {dtype}"
        raise ShapeError(
            f"the {what} of sample {samples[row].key!r} {reason} ({int((~sound).sum())} of {len(x)} in its "
            "batch): the model has diverged, or its scale was not folded; train again"
        )
    return narrow
