"""How long single queries take, in the release that serves and in the next, in turns.

Each release is asked by images of its own, as it would be searched. They are stored already, so no model
takes part. A query is asked twice and its shorter time counts, so that neither release pays for what the
other has brought into memory.

Not covered: queries in batches (`assessment`), and HTTP with many clients at once (`serve`).
"""

import time
from typing import NamedTuple

import numpy as np

from namr.release.releases import ReleaseManifest
from namr.search import queries, stages
from namr.search.answers import SearchOptions
from namr.search.queries import Queries
from namr.search.searcher import Searcher
from namr.search.stages import Plan

_K = 10
_NUM_QUERIES = 30
_SEED = 0


class Latency(NamedTuple):
    """Of single queries for the ten nearest, by the side of the release, in milliseconds."""

    p50_ms: float
    p95_ms: float


class Latencies(NamedTuple):
    """Of two releases, measured in turns."""

    num_queries: int
    here: Latency
    then: Latency | None
    """of the release that serves; None where none does"""


def measured(draft: Searcher, manifest: ReleaseManifest, serving: Searcher | None) -> Latencies:
    """manifest: the draft's, with how far it is searched."""
    sides = [_Asked.of(draft, manifest)]
    if serving:
        sides.append(_Asked.of(serving, serving.manifest))
    took_s: list[list[float]] = [[] for _ in sides]
    for number in range(_NUM_QUERIES):
        for took, side in list(zip(took_s, sides, strict=True))[:: 1 if number % 2 else -1]:
            took.append(side.took_s(number))
    here, then = (_of(took_s[0]), _of(took_s[1]) if serving else None)
    return Latencies(_NUM_QUERIES, here, then)


def _of(took_s: list[float]) -> Latency:
    p50, p95 = np.quantile(took_s, (0.5, 0.95)).tolist()
    return Latency(1e3 * p50, 1e3 * p95)


class _Asked(NamedTuple):
    """A release with the queries that it is asked."""

    searcher: Searcher
    queries: Queries
    plan: Plan

    @classmethod
    def of(cls, searcher: Searcher, manifest: ReleaseManifest) -> "_Asked":
        ids = searcher.items.draw_ids(_NUM_QUERIES, seed=_SEED)
        plan = stages.plan_of(SearchOptions(k=_K), manifest)
        return cls(searcher, queries.stored(ids, searcher.vectors), plan)

    def took_s(self, number: int) -> float:
        """The shorter time of two; who has fewer images than are asked begins anew with the first."""
        at = number % len(self.queries.x)
        return min(self._once_s(at), self._once_s(at))

    def _once_s(self, at: int) -> float:
        asked, began = self.queries.rows(slice(at, at + 1)), time.perf_counter()
        self.searcher.neighbours(asked, self.plan)
        return time.perf_counter() - began
