"""Queries as they are searched with: checked vectors, given or those of the gallery's own items.

Legend: Q queries, D dimension.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from namr.errors import ManifestError, ShapeError
from namr.model import distances
from namr.search.vectors import GalleryVectors
from namr.sides import Metric

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_MOST_VALUE = 1e14
"""of an embedding: no sum of its squares, however weighted, leaves float32"""
_MOST_WEIGHT = 65504.0
"""of a structure: the largest that a gallery can hold, as float16"""


class Queries(NamedTuple):
    """Some queries; those that are items of the gallery have their ids with them."""

    x: Floats
    """(Q, D), of unit length for cosine"""
    s: Floats | None
    """(Q, D)"""
    own_ids: Ids | None
    """(Q,) what each must not find"""

    def rows(self, some: slice | Ids) -> "Queries":
        """Some of them."""
        return Queries(
            self.x[some],
            None if self.s is None else self.s[some],
            None if self.own_ids is None else self.own_ids[some],
        )


def given(embeddings: Floats | None, structures: Floats | None, *, dim: int, metric: Metric) -> Queries:
    """Queries of (Q, D) arrays as the model returns them; ShapeError for what can't be compared."""
    x = _checked("embeddings", embeddings, dim, most=_MOST_VALUE)
    s = None
    if structures is not None:
        s = _checked("structures", structures, dim, most=_MOST_WEIGHT)
        if s.shape != x.shape:
            raise ShapeError(f"{len(s)} structures for {len(x)} embeddings; expected one each")
        if s.min() <= 0:
            raise ShapeError(f"structures hold {float(s.min()):g}; weights have to be above 0")
    if metric == "cosine":
        x = distances.for_search(torch.from_numpy(x), metric).numpy()
    return Queries(x, s, None)


def stored(ids: Ids, vectors: GalleryVectors) -> Queries:
    """The vectors of items of the gallery; ManifestError where they are damaged or missing."""
    x, s = (of_all.float() for of_all in vectors.both(ids))
    usable = torch.isfinite(x).all(dim=1) & (torch.isfinite(s) & (s > 0)).all(dim=1)
    if not usable.all():
        raise ManifestError(
            f"the re-rank vectors of item {ids[~usable.numpy()][0]} are damaged; restore them or build the "
            "release anew"
        )
    return Queries(x.numpy(), s.numpy(), ids)


def _checked(name: str, given: Floats | None, dim: int, *, most: float) -> Floats:
    array = np.asarray(given, np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise ShapeError(f"{name} are {array.shape}; the release wants (Q, {dim})")
    if not len(array):
        raise ShapeError(f"{name} are {array.shape}: an empty batch; expected at least one query")
    if not np.vdot(array, array) <= most * most:  # NaN isn't either; where it is, no value is above `most`
        _check_values(name, array, most)
    return array


def _check_values(name: str, array: Floats, most: float) -> None:
    largest = np.abs(array).max(axis=1)
    if not np.isfinite(largest).all():
        raise ShapeError(f"{name}: row {int(np.argmin(np.isfinite(largest)))} holds NaN or infinity")
    if largest.max() > most:
        row = int(np.argmax(largest))
        raise ShapeError(
            f"{name}: row {row} holds a value of size {largest[row]:g}; the largest that can be "
            f"compared is {most:g}"
        )
