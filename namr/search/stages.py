"""The stages of one search, as arrays: the index, then the order by structure, and what that proves.

Candidates of a compressed index are ordered by the stored vectors for every side, "none" too: reading these
is what refines them, and the adaptive distance comes with it. Of several queries at once an adaptive search
goes on with those only whose answer isn't sure yet, and never forgets a neighbour that it had. No model and
no items here. `first_stage`, `rerank` and `certainty` do the work.

Legend: Q queries, K neighbours.
"""

import functools
import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.data.shards import among
from namr.errors import ShapeError
from namr.index import ivf
from namr.release.calibrated import Calibration, Weight
from namr.release.releases import ReleaseManifest
from namr.search import certainty, first_stage, rerank
from namr.search.answers import Certainty, SearchOptions, Timings
from namr.search.certainty import Flags, Level
from namr.search.first_stage import Candidates
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
    proved: Flags
    """(Q,)"""
    calibrated: Flags
    """(Q,) of those that are not proved"""
    depths: Ids
    """(Q,) candidates that they are the nearest of"""

    def certainty(self, row: int) -> Certainty:
        """How sure the answer of one query is, in a word."""
        return "proved" if self.proved[row] else "calibrated" if self.calibrated[row] else "unproved"


class Plan(NamedTuple):
    """A search's options, with the release's own for those not given."""

    k: int
    side: Side
    depth: int
    nprobe: int
    exact: bool
    is_widened: bool = False
    """whether more lists are searched where few items are allowed, or answers are not sure"""
    is_adaptive: bool = False
    """whether `depth` is only where a search begins"""


def plan_of(options: SearchOptions, own: ReleaseManifest) -> Plan:
    """What a search does: what it was asked for, and what the release has for the rest."""
    is_adaptive = options.depth == "adaptive"
    return Plan(
        k=options.k,
        side=own.structure_side if options.side is None else options.side,
        depth=own.depth if options.depth is None or options.depth == "adaptive" else options.depth,
        nprobe=own.nprobe if options.nprobe is None else options.nprobe,
        exact=options.exact,
        is_widened=options.nprobe is None,
        is_adaptive=is_adaptive,
    )


def refines(index: ivf.Index, side: Side) -> bool:
    """Whether candidates are compared by their stored vectors; else the order is the index's own."""
    return side != "none" or index.is_compressed


def compares_all(plan: Plan, num_allowed: int | None) -> bool:
    """Whether all that may be found is compared one by one; num_allowed: by a filter, None without one."""
    return plan.exact or (num_allowed is not None and num_allowed <= _FEW_ALLOWED)


class _Step(NamedTuple):
    """A level of a search, and what can be said of its answers."""

    level: Level
    is_exact: bool
    """whether the index leaves out nothing that is nearer"""
    weight: Weight | None
    """None: no answer is calibrated"""


class _Task(NamedTuple):
    """What a search is for; see `Stages.search`."""

    asked: Queries
    plan: Plan
    hidden: Ids
    num_items: int
    allowed: Ids | None
    stop: Stop

    @property
    def num_allowed(self) -> int | None:
        return None if self.allowed is None else len(self.allowed)

    def num_others(self) -> Ids:
        """How many items there are for each query to find, (Q,)."""
        (q, _, own_ids), allowed = self.asked, self.allowed
        if allowed is None:
            return np.full(len(q), self.num_items - (own_ids is not None))
        return len(allowed) - (np.zeros(len(q), np.int64) if own_ids is None else among(own_ids, allowed))

    def lacks_none(self, ranked: Ranked) -> Flags:
        """(Q,) False for an answer of fewer items than could be found, and than k: it proves nothing."""
        num_hits = (ranked.ids >= 0).sum(axis=1)
        return np.asarray(num_hits >= np.minimum(ranked.ids.shape[1], self.num_others()))


class _Found(NamedTuple):
    """What a search knows of some queries after a level."""

    ranked: Ranked
    proved: Flags
    calibrated: Flags
    depths: Ids

    def ranked_of(self, rows: Ids) -> Ranked:
        """The neighbours of some of the queries."""
        ids, squared, plain_squared = self.ranked
        return Ranked(ids[rows], squared[rows], plain_squared[rows])

    def put(self, rows: Ids, more: "_Found") -> None:
        """Know `more` of some of the queries from now on."""
        for whole, part in zip((*self.ranked, *self[1:]), (*more.ranked, *more[1:]), strict=True):
            whole[rows] = part

    def neighbours(self) -> Neighbours:
        """As they are answered."""
        ids, squared, plain_squared = self.ranked
        distances, plain_distances = np.sqrt(squared), np.sqrt(plain_squared)
        return Neighbours(
            ids,
            distances.astype(np.float32),
            plain_distances.astype(np.float32),
            self.proved,
            self.calibrated,
            self.depths,
        )


class Stages:
    """Index and vectors of one gallery. Safe to use from several threads at once."""

    def __init__(
        self,
        index: ivf.Index,
        vectors: GalleryVectors,
        *,
        gallery_min: float,
        calibration: Calibration | None = None,
    ) -> None:
        """gallery_min: no structure weight of the gallery is below it. calibration: None says nothing."""
        self._index, self._vectors, self._gallery_min = index, vectors, gallery_min
        self._calibration = calibration
        self._steps = functools.lru_cache(maxsize=64)(self._steps_of)

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
        if plan.side in ("query", "both") and asked.s is None:
            raise ShapeError(
                f"side {plan.side!r} needs structures with the embeddings; or ask for side 'none' or 'scale'"
            )
        task = _Task(asked, plan, hidden, num_items, allowed, stop)
        if compares_all(plan, task.num_allowed):
            return self._one_by_one(task)
        first, *deeper = self._steps(plan, task.num_allowed)
        found, timings = self._at(first, task)
        for step in deeper:
            rows = np.flatnonzero(~(found.proved | found.calibrated))
            if not len(rows):
                break
            more, took = self._at(step, task._replace(asked=asked.rows(rows)), found.ranked_of(rows))
            found.put(rows, more)
            timings = timings.plus(took)
        return found.neighbours(), timings

    def _one_by_one(self, task: _Task) -> tuple[Neighbours, Timings]:
        asked, plan, num_others = task.asked, task.plan, task.num_others()
        began = time.perf_counter()
        ranked = rerank.nearest_exact(
            asked.x,
            asked.s,
            self._vectors,
            k=plan.k,
            side=plan.side,
            hidden=task.hidden,
            own_ids=asked.own_ids,
            allowed=task.allowed,
            stop=task.stop,
        )
        found = _Found(ranked, task.lacks_none(ranked), np.zeros(len(num_others), np.bool_), num_others)
        return found.neighbours(), Timings(0.0, (time.perf_counter() - began) * 1e3, 0.0)

    def _at(self, step: _Step, task: _Task, before: Ranked | None = None) -> tuple[_Found, Timings]:
        """The nearest of the level's candidates and of those that were found before."""
        (q, s_q, own_ids), plan, level = task.asked, task.plan, step.level
        began = time.perf_counter()
        first = first_stage.candidates(
            self._index,
            q,
            level.depth,
            nprobe=max(1, level.nprobe),
            hidden=task.hidden,
            own_ids=own_ids,
            allowed=task.allowed,
            stop=task.stop,
        )
        between = time.perf_counter()
        if refines(self._index, plan.side):
            ranked = rerank.rerank(q, s_q, first.ids, self._vectors, k=plan.k, side=plan.side, stop=task.stop)
        else:
            ranked = first.ranked()
        if before is not None:
            ranked = rerank.merged(ranked, before, k=plan.k)
        proved, calibrated = self._sure(first, ranked, step, task)
        found = _Found(ranked, proved, calibrated, np.full(len(q), level.depth))
        ended = time.perf_counter()
        return found, Timings(0.0, (between - began) * 1e3, (ended - between) * 1e3)

    def _sure(self, first: Candidates, ranked: Ranked, step: _Step, task: _Task) -> tuple[Flags, Flags]:
        """(Q,) which answers are proved, and which of the others are calibrated."""
        (q, s_q, _), side, weight = task.asked, task.plan.side, step.weight
        proved, calibrated = np.zeros(len(q), np.bool_), np.zeros(len(q), np.bool_)
        if not step.is_exact and weight is None:
            return proved, calibrated
        kth, has_all = ranked.squared[:, -1], task.lacks_none(ranked)
        if step.is_exact:
            proved = np.ones(len(q), np.bool_)
        if step.is_exact and side != "none":
            least, last = self._gallery_min, first.squared[:, -1].astype(np.float64)
            proved = certainty.is_proved(kth, last, q, s_q, side=side, gallery_min=least)
        if weight is not None:
            last = certainty.last_squared(
                first,
                weight.depth,
                q,
                self._vectors,
                is_compressed=self._index.is_compressed,
                stop=task.stop,
            )
            calibrated = certainty.is_calibrated(kth, last, q, weight=weight.weight) & ~proved
        return proved & has_all, calibrated & has_all

    def _steps_of(self, plan: Plan, num_allowed: int | None) -> list[_Step]:
        """How far the search looks; where it is adaptive, at first and then for those that are not sure."""
        index = self._index
        nprobe = self._nprobe(plan, num_allowed)
        levels = [Level(plan.depth, min(nprobe, index.num_lists))]
        if plan.is_adaptive:
            levels = certainty.levels(plan.depth, nprobe, num_lists=index.num_lists)
        different: dict[tuple[int, int], Level] = {}
        for level in levels:
            depth = max(plan.k, level.depth) if refines(index, plan.side) else plan.k
            lists = level.nprobe if plan.is_widened else levels[0].nprobe
            different.setdefault((min(depth, index.num_vectors), lists), Level(depth, lists))
        return [
            _Step(
                level,
                first_stage.is_exact(index, level.nprobe),
                self._weight(level, plan) if num_allowed is None else None,
            )
            for level in different.values()
        ]

    def _weight(self, level: Level, plan: Plan) -> Weight | None:
        if self._calibration is None or not refines(self._index, plan.side):
            return None
        return self._calibration.weight(side=plan.side, k=plan.k, depth=level.depth, nprobe=level.nprobe)

    def _nprobe(self, plan: Plan, num_allowed: int | None) -> int:
        """As many lists as hold as many allowed entries as the plan's would hold of all, and few more.

        Those that are allowed lie farther apart, across more borders of lists: where few are probed, that
        takes recall away.
        """
        if num_allowed is None or not plan.is_widened:
            return plan.nprobe
        as_many = -(-plan.nprobe * self._index.num_vectors // num_allowed)
        return min(max(1, self._index.num_lists), as_many + _MORE_LISTS)
