"""The first stage: the nearest entries of the index, without those that may not be found.

Hidden entries stay in the index until it is built anew, so a search goes deeper where they crowd out the
others. Arrays only: no model, no items.

Legend: Q queries, M candidates of a query.
"""

from typing import Any, NamedTuple

import numpy as np

from namr.data.shards import among
from namr.index import index_files, ivf
from namr.index.ivf import Floats, Ids
from namr.search.rerank import Ranked, Stop, go_on

_PRODUCTS = 1 << 33
"""multiplications between two looks at `stop`: about a second of one core"""
_CELLS = 1 << 22
"""neighbours that are asked for at once: 50 MB"""
FEW_OF = 4
"""allowed ids are few where they are less than one of so many; else the index is searched so much deeper"""
_NO_ID = np.iinfo(np.int64).max


class Candidates(NamedTuple):
    """Nearest first as the index sees it; where there are fewer than M: id -1, distance inf."""

    ids: Ids
    """(Q, M)"""
    squared: Floats
    """(Q, M) squared distance, of codes where the index is compressed"""

    def ranked(self) -> Ranked:
        """Themselves as an answer."""
        squared = self.squared.astype(np.float64)
        return Ranked(self.ids, squared, squared)


def is_exact(index: ivf.Index, nprobe: int) -> bool:
    """Whether nothing nearer than the last candidate is ever left out."""
    return not index.is_compressed and nprobe >= index.num_lists


def times_as_deep(num_allowed: int, num_vectors: int) -> int:
    """How many times as many entries the index is asked for where only some are allowed."""
    return 1 if num_allowed * FEW_OF <= num_vectors else FEW_OF


def candidates(
    index: ivf.Index,
    q: Floats,
    num: int,
    *,
    nprobe: int,
    hidden: Ids,
    own_ids: Ids | None = None,
    allowed: Ids | None = None,
    stop: Stop = go_on,
) -> Candidates:
    """The num nearest entries, without hidden ones (ids, ascending) and without each query's own (Q,).

    allowed: ids, ascending, of which none is hidden; no others are found. Where they are many the index is
    searched deeper and the others are dropped, since FAISS's own selection hashes every id for each search.
    """
    depth, selector = num + min(num, len(hidden)), None
    if allowed is not None:
        deeper = times_as_deep(len(allowed), index.num_vectors)
        depth = num * deeper
        selector = index_files.selector(allowed) if deeper == 1 else None
    depth += own_ids is not None
    squared, ids = _Stage(index, num, nprobe, hidden, allowed, selector, stop).nearest(q, own_ids, depth)
    return Candidates(ids, squared)


class _Stage(NamedTuple):
    """One search of the index."""

    searched: ivf.Index
    num: int
    nprobe: int
    hidden: Ids
    allowed: Ids | None
    selector: Any
    stop: Stop

    def nearest(self, q: Floats, own_ids: Ids | None, depth: int) -> tuple[Floats, Ids]:
        """(Q, num) squared distances and ids; as many queries at once as `stop` and memory allow."""
        index = self.searched
        share = min(1.0, self.nprobe / index.num_lists) if index.num_lists else 1.0
        per_query = max(1.0, index.num_vectors * share * index.dim)
        step = max(1, min(int(_PRODUCTS / per_query), _CELLS // depth))
        if len(q) <= step:
            self.stop()
            return self._at_once(q, own_ids, depth)
        squared = np.empty((len(q), self.num), np.float32)
        ids = np.empty((len(q), self.num), np.int64)
        for start in range(0, len(q), step):
            self.stop()
            part = slice(start, start + step)
            own = None if own_ids is None else own_ids[part]
            squared[part], ids[part] = self._at_once(q[part], own, depth)
        return squared, ids

    def _at_once(self, q: Floats, own_ids: Ids | None, depth: int) -> tuple[Floats, Ids]:
        total = max(1, self.searched.num_vectors)
        squared, ids = self.searched.search(q, min(depth, total), self.nprobe, allowed=self.selector)
        may_hide = own_ids is not None or self.allowed is not None or len(self.hidden) > 0
        if not may_hide and depth == self.num <= total and self.searched.is_compressed:
            return squared, ids
        is_last = (depth >= total) | (ids[:, -1] < 0)  # a deeper search would bring nothing more
        hides = may_hide and self._hide(squared, ids, own_ids)
        if hides or not self.searched.is_compressed:  # those of codes are ordered anew anyway
            order = np.lexsort((np.where(ids < 0, _NO_ID, ids), squared), axis=-1)[:, : self.num]
            rows = np.arange(len(order))[:, None]
            squared, ids = squared[rows, order], ids[rows, order]
        squared, ids = squared[:, : self.num], ids[:, : self.num]
        if ids.shape[1] < self.num:
            missing = ((0, 0), (0, self.num - ids.shape[1]))
            squared = np.pad(squared, missing, constant_values=np.inf)
            ids = np.pad(ids, missing, constant_values=-1)
        if not hides:
            return squared, ids
        lacking = np.flatnonzero((ids[:, -1] < 0) & ~is_last)
        if len(lacking):
            own = None if own_ids is None else own_ids[lacking]
            squared[lacking], ids[lacking] = self.nearest(q[lacking], own, 2 * depth)
        return squared, ids

    def _hide(self, squared: Floats, ids: Ids, own_ids: Ids | None) -> bool:
        """Strike out what may not be found; whether there was any."""
        is_hidden = among(ids, self.hidden) if self.allowed is None else ~among(ids, self.allowed)
        if own_ids is not None:
            is_hidden |= ids == own_ids[:, None]
        squared[is_hidden], ids[is_hidden] = np.inf, -1
        return bool(is_hidden.any())
