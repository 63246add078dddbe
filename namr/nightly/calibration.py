"""How sure the answers of a release are: weights measured on held-out queries, and tried on others.

`release.calibrated` says what a weight is and what may be claimed with it. Here the held-out queries are
split in two halves. Each gives weights of its own, and these are tried on the other half, by the very stages
that will serve: how many answers are proved, calibrated or neither, and how many of the calibrated ones equal
exact search. The release keeps the lower of the two halves' weights: it claims no more than what was tried.

Not covered: the lists and the depth of the release (`assessment`), and answers under a filter, which are
compared one by one or never calibrated.
Legend: Q queries, T true neighbours of a query, K neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from namr.data.shards import among
from namr.nightly import truth
from namr.nightly.truth import HeldOut
from namr.release.calibrated import Calibration, Weight
from namr.search import certainty, first_stage
from namr.search.certainty import Flags, Level
from namr.search.exact import Exact
from namr.search.queries import Queries
from namr.search.rerank import Doubles, Ids, go_on
from namr.search.searcher import Searcher
from namr.search.stages import Plan, Stages
from namr.sides import SIDES, Side

_KS = (10, truth.K)
"""neighbours that weights are measured for; who asks for fewer gets the next of them"""
_QUANTILE = 0.001
_LEAST_QUERIES = 100
"""of a half: with fewer, more than one answer in a hundred might be called calibrated and be wrong"""
_SAME = 1e-5
"""by what share two distances may differ that were summed in float32 and in float64"""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What was said of the ten nearest, ordered by one side."""

    side: Side
    is_adaptive: bool
    """whether depth="adaptive" was asked for; else the release's depth"""
    proved: float
    """share of the answers"""
    calibrated: float
    right: float | None
    """share of the calibrated answers that equal exact search; None where there is none"""
    mean_depth: float
    """candidates of a query, in the end"""

    @property
    def unproved(self) -> float:
        """Share of the answers of which nothing is known."""
        return max(0.0, 1 - self.proved - self.calibrated)


@dataclass(frozen=True, kw_only=True)
class CertaintyReport:
    """How sure answers are, tried on queries that the weights were not taken from."""

    num_queries: int
    rate: float | None
    """see `Calibration`; None: too few queries were held out, and no answer is calibrated"""
    adaptive_rate: float | None
    shares: tuple[Shares, ...]


class Calibrated(NamedTuple):
    """What a release keeps, and what its report says."""

    calibration: Calibration | None
    report: CertaintyReport


def calibrate(searcher: Searcher, held: HeldOut, *, depth: int, nprobe: int) -> Calibrated:
    """Measure how sure answers of a release are that looks so far, by its held-out items."""
    measured, num_queries = _Measured(searcher, held.asked, held.truth.of_all), len(held.items)
    levels = list(dict.fromkeys(certainty.levels(depth, nprobe, num_lists=searcher.index.num_lists)))
    table = measured.table(levels)
    halves = [rows for first in (0, 1) if len(rows := np.arange(first, num_queries, 2))]
    is_enough = num_queries >= 2 * _LEAST_QUERIES
    of_halves = [_weights(table, rows) if is_enough else () for rows in halves]
    shares = []
    for side in SIDES:
        for is_adaptive in (False, True):
            plan = Plan(
                k=_KS[0],
                side=side,
                depth=depth,
                nprobe=nprobe,
                exact=False,
                is_widened=True,
                is_adaptive=is_adaptive,
            )
            tried = [
                measured.tried(plan, rows, weights)
                for rows, weights in zip(halves, reversed(of_halves), strict=True)
            ]
            shares.append(_Tried(*map(np.concatenate, zip(*tried, strict=True))).shares(plan))
    kept = _lower(table, halves, of_halves) if is_enough else None
    report = CertaintyReport(
        num_queries=num_queries,
        rate=None if kept is None else kept.rate,
        adaptive_rate=None if kept is None else kept.adaptive_rate,
        shares=tuple(shares),
    )
    return Calibrated(kept, report)


def left_out(true_ids: Ids, candidate_ids: Ids) -> Flags:
    """(Q, T) True for true neighbours that are no candidates (Q, M) of their query; -1 is none."""
    ordered = np.sort(candidate_ids, axis=1)
    is_known = np.stack([among(*row) for row in zip(true_ids, ordered, strict=True)])
    return (true_ids >= 0) & ~is_known


def ratios(true_squared: Doubles, is_left_out: Flags, last_squared: Doubles) -> Doubles:
    """(Q,) squared distance of the nearest true neighbour that was left out, over `last_squared` (Q,).

    true_squared, is_left_out (Q, T), ascending. inf where nothing was left out, or where no candidate is at
    a distance.
    """
    nearest = np.where(is_left_out, true_squared, np.inf).min(axis=1)
    has_last = last_squared > 0
    return np.where(has_last, nearest / np.where(has_last, last_squared, 1), np.inf)


def quantile(ratios: Doubles) -> float:
    """A weight: the ratio that at most a thousandth are below, the smallest of fewer than 2,000; at most 1.

    A further ratio is below the i-th smallest of n with a probability of at most i / (n + 1), whatever they
    are like (split conformal prediction).
    """
    return min(1.0, float(np.sort(ratios)[_num_below(len(ratios))]))


def _num_below(num: int) -> int:
    return max(1, int(_QUANTILE * (num + 1))) - 1


_Table = Mapping[tuple[Side, int, Level], Doubles]
"""Ratios (Q,) by side, K and level."""


def _weights(table: _Table, rows: Ids) -> tuple[Weight, ...]:
    """Those of some of the queries."""
    return tuple(
        Weight(side=side, k=k, depth=level.depth, nprobe=level.nprobe, weight=quantile(of_all[rows]))
        for (side, k, level), of_all in table.items()
    )


def _lower(table: _Table, halves: Sequence[Ids], of_halves: Sequence[tuple[Weight, ...]]) -> Calibration:
    """The lower of each two weights; no more ratios of both halves are below it than of each together."""
    num_queries = sum(map(len, halves))
    num_levels = len({level for _, _, level in table})
    rate = (sum(_num_below(len(rows)) for rows in halves) + 1) / (num_queries + 1)
    return Calibration(
        num_queries=num_queries,
        rate=rate,
        adaptive_rate=min(1.0, num_levels * rate),
        weights=tuple(min(pair, key=lambda each: each.weight) for pair in zip(*of_halves, strict=True)),
    )


class _Tried(NamedTuple):
    """What was said of some queries, (Q,) each."""

    proved: Flags
    calibrated: Flags
    right: Flags
    depths: Ids

    def shares(self, plan: Plan) -> Shares:
        """Of all of them."""
        return Shares(
            side=plan.side,
            is_adaptive=plan.is_adaptive,
            proved=float(self.proved.mean()),
            calibrated=float(self.calibrated.mean()),
            right=float(self.right[self.calibrated].mean()) if self.calibrated.any() else None,
            mean_depth=float(self.depths.mean()),
        )


@dataclass(frozen=True)
class _Measured:
    """Held-out queries and their true neighbours."""

    searcher: Searcher
    asked: Queries
    true: Exact
    """(S, Q, T)"""

    def table(self, levels: Sequence[Level]) -> _Table:
        """The ratios of all queries; none for a side whose answers are the candidates themselves."""
        index, (q, _, own_ids) = self.searcher.index, self.asked
        table = {}
        for level in levels:
            first = first_stage.candidates(
                index,
                q,
                level.depth,
                nprobe=max(1, level.nprobe),
                hidden=self.searcher.hidden,
                own_ids=own_ids,
            )
            last = certainty.last_squared(
                first, level.depth, q, self.searcher.vectors, is_compressed=index.is_compressed
            )
            for side in SIDES if index.is_compressed else SIDES[1:]:
                squared = self.true.squared[SIDES.index(side)]
                lacks = left_out(self.true.of(side), first.ids)
                for k in _KS:
                    table[side, k, level] = ratios(squared[:, :k], lacks[:, :k], last)
        return table

    def tried(self, plan: Plan, rows: Ids, weights: tuple[Weight, ...]) -> _Tried:
        """Some of the queries, answered as by a release with these weights."""
        searcher = self.searcher
        stages = Stages(
            searcher.index,
            searcher.vectors,
            gallery_min=searcher.manifest.gallery_min_structure,
            calibration=Calibration(num_queries=1, rate=1.0, adaptive_rate=1.0, weights=weights),
        )
        found, _ = stages.search(
            self.asked.rows(rows), plan, hidden=searcher.hidden, num_items=len(searcher.items), stop=go_on
        )
        true = np.sqrt(self.true.squared[SIDES.index(plan.side)][rows, : plan.k])
        is_same = np.isclose(found.distances, true, rtol=_SAME, atol=_SAME * _SAME)
        return _Tried(found.proved, found.calibrated, np.asarray(is_same.all(axis=1)), found.depths)
