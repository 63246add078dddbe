"""The stages of one search, as arrays: the index, then the order by structure, and what that proves.

Candidates of a compressed index are ordered by the stored vectors for every side, "none" too: reading these
is what refines them, and the adaptive distance comes with it. No model and no items here. `first_stage` and
`rerank` do the work.

Legend: Q queries, K neighbours.
"""

import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.data.shards import among
from namr.errors import ShapeError
from namr.index import ivf
from namr.release.releases import ReleaseManifest
from namr.search import first_stage, rerank
from namr.search.answers import SearchOptions, Timings
from namr.search.queries import Queries
from namr.search.rerank import Ranked, Stop
from namr.search.vectors import GalleryVectors
from namr.sides import Side

_FEW_ALLOWED = 8192
"""items that are compared in about the time that a search of the index takes"""
_MORE_LISTS = 4
"""under a filter, beside those that hold enough entries"""

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Neighbours(NamedTuple):
    """Neighbours of Q queries as arrays; id -1 and distance inf where there are fewer than K."""

    ids: Ids
    """(Q, K)"""
    distances: Floats
    """(Q, K) ascending"""
    plain_distances: Floats
    """(Q, K) Euclidean, whatever the order is by"""
    proved: npt.NDArray[np.bool_]
    """(Q,)"""


class Plan(NamedTuple):
    """A search's options, with the release's own for those not given."""

    k: int
    side: Side
    depth: int
    nprobe: int
    exact: bool
    is_widened: bool = False
    """whether more lists are searched where few items are allowed"""


def plan_of(options: SearchOptions, own: ReleaseManifest) -> Plan:
    """What a search does: what it was asked for, and what the release has for the rest."""
    return Plan(
        k=options.k,
        side=own.structure_side if options.side is None else options.side,
        depth=own.depth if options.depth is None else options.depth,
        nprobe=own.nprobe if options.nprobe is None else options.nprobe,
        exact=options.exact,
        is_widened=options.nprobe is None,
    )


class Stages:
    """Index and vectors of one gallery. Safe to use from several threads at once."""

    def __init__(self, index: ivf.Index, vectors: GalleryVectors, *, gallery_min: float) -> None:
        """gallery_min: no structure weight of the gallery is below it."""
        self._index, self._vectors, self._gallery_min = index, vectors, gallery_min

    def search(
        self,
        asked: Queries,
        plan: Plan,
        *,
        hidden: Ids,
        num_items: int,
        allowed: Ids | None = None,
        stop: Stop,
    ) -> tuple[Neighbours, Timings]:
        """hidden: ids, ascending, that nobody may find; num_items: how many there are without them.

        allowed: of these, ids, ascending, of those that this search may find; None: all. Few are compared
        one by one.
        """
        k, side = plan.k, plan.side
        q, s_q, own_ids = asked
        if side in ("query", "both") and s_q is None:
            raise ShapeError(
                f"side {side!r} needs structures with the embeddings; or ask for side 'none' or 'scale'"
            )
        num_others = _num_others(num_items, allowed, own_ids)
        began = time.perf_counter()
        if plan.exact or (allowed is not None and len(allowed) <= _FEW_ALLOWED):
            ranked = rerank.nearest_exact(
                q,
                s_q,
                self._vectors,
                k=k,
                side=side,
                hidden=hidden,
                own_ids=own_ids,
                allowed=allowed,
                stop=stop,
            )
            timings = Timings(0.0, (time.perf_counter() - began) * 1e3, 0.0)
            return _neighbours(ranked, np.ones(len(q), np.bool_), num_others), timings
        refines = side != "none" or self._index.is_compressed
        num = max(k, plan.depth) if refines else k
        nprobe = self._nprobe(plan, allowed)
        first = first_stage.candidates(
            self._index,
            q.numpy(),
            num,
            nprobe=nprobe,
            hidden=hidden,
            own_ids=own_ids,
            allowed=allowed,
            stop=stop,
        )
        between = time.perf_counter()
        proved = np.full(len(q), first_stage.is_exact(self._index, nprobe))
        ranked = first
        if refines:
            ranked = rerank.rerank(q, s_q, first.ids, self._vectors, k=k, side=side, stop=stop)
        if side != "none" and proved.any():
            proved &= rerank.is_proved(
                ranked.squared[:, -1],
                first.squared[:, -1],
                q,
                s_q,
                side=side,
                gallery_min=self._gallery_min,
            )
        ended = time.perf_counter()
        timings = Timings(0.0, (between - began) * 1e3, (ended - between) * 1e3)
        return _neighbours(ranked, proved, num_others), timings

    def _nprobe(self, plan: Plan, allowed: Ids | None) -> int:
        """As many lists as hold as many allowed entries as the plan's would hold of all, and few more.

        Those that are allowed lie farther apart, across more borders of lists: where few are probed, that
        takes recall away.
        """
        if allowed is None or not plan.is_widened:
            return plan.nprobe
        as_many = -(-plan.nprobe * self._index.num_vectors // len(allowed))
        return min(max(1, self._index.num_lists), as_many + _MORE_LISTS)


def _num_others(num_items: int, allowed: Ids | None, own_ids: Ids | None) -> Ids:
    """How many items there are for each query to find, (Q,) or ()."""
    if allowed is None:
        return np.asarray(num_items - (own_ids is not None))
    return np.asarray(len(allowed) - (0 if own_ids is None else among(own_ids, allowed).astype(np.int64)))


def _neighbours(ranked: Ranked, proved: npt.NDArray[np.bool_], num_others: Ids) -> Neighbours:
    """num_others: what could be found; an answer that has fewer, and fewer than k, proves nothing."""
    num_hits = (ranked.ids >= 0).sum(axis=1)
    return Neighbours(
        ids=ranked.ids,
        distances=np.sqrt(ranked.squared).astype(np.float32),
        plain_distances=np.sqrt(ranked.plain_squared).astype(np.float32),
        proved=proved & (num_hits >= np.minimum(ranked.ids.shape[1], num_others)),
    )
