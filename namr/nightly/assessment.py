"""What a release that is not published yet would answer, measured on held-out images.

The queries are items whose vectors the template was not trained on, and each is left out of its own answer,
so no number is flattered by an image that finds itself. All of it goes through the stages of the very
`Searcher` that will serve; `truth` says what they should find, `selectivity` asks under filters. The loss of
each stage is told apart: the index against exact plain search, the depth of the re-rank against exact
adaptive search, and, where images have labels, what structure does to Recall@1.

Not covered: whether the numbers are good enough (`gate` decides), the method on unseen classes
(`evaluation`).
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr import checks
from namr.model.distances import Side
from namr.nightly import selectivity, truth, tuning
from namr.nightly.selectivity import FilteredResult
from namr.nightly.truth import HeldOut
from namr.release import held_out
from namr.reports import frontier
from namr.reports.frontier import Frontier
from namr.search.answers import Item
from namr.search.items import Items
from namr.search.searcher import Searcher
from namr.search.stages import Neighbours, Plan

Ids = npt.NDArray[np.int64]

_K = truth.K_OF_RECALL
_SIDES: tuple[Side, ...] = ("none", "scale", "query", "both")
OF_ALL, OF_OLD, OF_NEW = "recall@10", "recall@10 of images from before", "recall@10 of new images"
_FEWEST_NEW, _MOST_NEW = 50, 100
"""new items that query: recall@10 is then known to one point or two"""
MOST_DEEPER = 16
"""times the depth of the config"""


@dataclass(frozen=True, kw_only=True)
class AssessmentConfig:
    """How a release is measured before it is published."""

    target_recall: float = 0.95
    """lists are probed until this recall@10 of exact search is reached, or all are"""
    depth: int = 100
    """candidates that are re-ranked, at least; more where a compressed index needs them for its recall"""

    def __post_init__(self) -> None:
        checks.in_range(self, "depth", at_least=1)
        checks.in_range(self, "target_recall", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class SideResult:
    """What one way of ordering answers, with the same candidates."""

    side: Side
    recall_at_1: float | None
    """share of labelled queries whose first answer has their label; None where there are none"""
    recall_at_10: float
    """share of the ten that exact search by this side finds"""
    proved: float
    """share of answers that are proved"""


class Age(NamedTuple):
    """Held-out queries that came into the gallery together."""

    num_queries: int
    recall_at_10: float
    error: float
    """mean squared distance to the nearest centre of a list; 0 where there are no lists"""


class ByAge(NamedTuple):
    """Images that an earlier release had, and those that were added to it."""

    old: Age
    new: Age


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What was measured."""

    num_queries: int
    num_labelled: int
    """queries whose label another item has too"""
    num_items: int
    nprobe: int
    """the fewest probed lists that reach the target"""
    num_lists: int
    recall_at_10: float
    """of plain search at `nprobe` and `depth` against exact search"""
    recall_by_nprobe: tuple[tuple[int, float], ...]
    sides: tuple[SideResult, ...]
    """every side; of a release that was added to another only the plain one and its own"""
    depth: int
    queries_per_s: float
    """of plain search at `nprobe`, by items, in batches of 256"""
    by_age: ByAge | None = None
    """None where all was built at once, or nothing came"""
    filtered: tuple[FilteredResult, ...] = ()
    """of plain search under filters, the least selective first; none where an earlier namr measured"""
    frontier: Frontier | None = None
    """what was tried to choose `nprobe` and `depth`, of this release or of the one whose way of searching it
    keeps; None where an earlier namr chose"""

    @property
    def recalls(self) -> dict[str, float]:
        """Recall@10 of all queries, and of those of each age, by name."""
        named = {OF_ALL: self.recall_at_10}
        if self.by_age:
            named |= {OF_OLD: self.by_age.old.recall_at_10, OF_NEW: self.by_age.new.recall_at_10}
        return named

    @property
    def probed(self) -> str:
        """How much of the index a query looks at, in words."""
        return f"{self.nprobe} of {self.num_lists} lists" if self.num_lists else "all images compared"

    def result(self, side: Side) -> SideResult:
        """The result of one side."""
        return next(result for result in self.sides if result.side == side)


class Effort(NamedTuple):
    """How far a search looks."""

    nprobe: int
    depth: int


def held_out_ids(searcher: Searcher, num: int, *, seed: int) -> Ids:
    """Ids of the items that the template was not trained on, about `num`, ascending; of any if none is left.

    Of a smaller `num` they are some of those of a larger one.
    """
    share, items = held_out.share(num, searcher.manifest.counts.num_samples), searcher.items
    of_files = [file.ids[held_out.mask(file.ids, share=share, seed=seed)] for file in items.files]
    ids = np.concatenate([np.empty(0, np.int64), *of_files])
    ids = ids[items.are_known(ids)]
    return ids if len(ids) else np.array([item.id for item in itertools.islice(items, num)], np.int64)


def some_since(searcher: Searcher, first_new_id: int) -> Ids:
    """Ids of some of the items that came with this one or after it, at even steps, ascending.

    A twentieth, at least 50 where there are as many: each is compared with everything, and a night should
    take as long as there is new. 100 at most.
    """
    new = searcher.items.since(first_new_id)
    return new[held_out.spread_evenly(len(new), max(_FEWEST_NEW, min(_MOST_NEW, len(new) // 20)))]


def assess(
    searcher: Searcher,
    held: HeldOut,
    config: AssessmentConfig,
    *,
    effort: Effort | None = None,
    first_new_id: int | None = None,
) -> Assessment:
    """Measure a release by its held-out items.

    effort: that of the release before, which is kept; None: the least that reaches the target. first_new_id:
    of what was added to the release before.
    """
    items, asked, (true, of_shares) = held
    seconds: dict[tuple[int, int], float] = {}
    plain: dict[tuple[int, int], Neighbours] = {}

    def found_by(side: Side, nprobe: int, depth: int) -> Neighbours:
        return searcher.neighbours(asked, Plan(k=_K, side=side, depth=depth, nprobe=nprobe, exact=False))

    def recall_of(nprobe: int, depth: int) -> float:
        began = time.perf_counter()
        found = plain[nprobe, depth] = found_by("none", nprobe, depth)
        seconds[nprobe, depth] = time.perf_counter() - began
        return truth.recall(found.ids, true.of("none")[:, :_K])

    if effort:
        points = [tuning.Point(*effort, recall_of(*effort))]
    else:
        points = tuning.tuned(
            recall_of,
            num_lists=searcher.index.num_lists,
            target=config.target_recall,
            depth=config.depth,
            max_depth=MOST_DEEPER * config.depth if searcher.index.is_compressed else config.depth,
        )
    nprobe, depth, recall = points[-1]
    labels = _Labels.of(searcher.items, items)
    asked_by = ("none", searcher.manifest.structure_side) if effort else _SIDES
    sides: dict[Side, Neighbours] = {"none": plain[nprobe, depth]}
    sides |= {side: found_by(side, nprobe, depth) for side in asked_by if side not in sides}
    return Assessment(
        num_queries=len(items),
        num_labelled=len(labels.by_query),
        num_items=len(searcher.items),
        nprobe=nprobe,
        num_lists=searcher.index.num_lists,
        recall_at_10=recall,
        recall_by_nprobe=tuple(sorted((point.nprobe, point.recall) for point in points)),
        sides=tuple(
            SideResult(
                side=side,
                recall_at_1=labels.recall_at_1(searcher.items, found.ids),
                recall_at_10=truth.recall(found.ids, true.of(side)[:, :_K]),
                proved=float(found.proved.mean()),
            )
            for side, found in sides.items()
        ),
        depth=depth,
        queries_per_s=len(items) / seconds[nprobe, depth],
        by_age=_by_age(searcher, held, sides["none"], first_new_id) if first_new_id else None,
        filtered=selectivity.measured(searcher, asked, of_shares, k=_K, nprobe=nprobe, depth=depth),
        frontier=None if effort else _frontier(searcher, len(items), points, seconds),
    )


def _frontier(
    searcher: Searcher,
    num_queries: int,
    points: Sequence[tuning.Point],
    seconds: Mapping[tuple[int, int], float],
) -> Frontier:
    return Frontier(
        release_id=searcher.manifest.release_id,
        num_queries=num_queries,
        points=tuple(
            frontier.Point(nprobe, depth, recall, 1e3 * seconds[nprobe, depth] / num_queries)
            for nprobe, depth, recall in points
        ),
    )


def _by_age(searcher: Searcher, held: HeldOut, found: Neighbours, first_new_id: int) -> ByAge | None:
    is_new = np.array([item.id >= first_new_id for item in held.items])
    if is_new.all() or not is_new.any():
        return None
    x, true = held.asked.x, held.truth.of_all.of("none")[:, :_K]
    error = searcher.index.squared_to_centre(x)
    old, new = (
        Age(int(some.sum()), truth.recall(found.ids[some], true[some]), float(error[some].mean()))
        for some in (~is_new, is_new)
    )
    return ByAge(old, new)


class _Labels(NamedTuple):
    """Labels of the queries, by their place, where another item has the same."""

    by_query: dict[int, str]

    @classmethod
    def of(cls, items: Items, asked: Sequence[Item]) -> "_Labels":
        num = items.label_counts()
        labels = ((at, item.label) for at, item in enumerate(asked))
        return cls({at: label for at, label in labels if label is not None and num[label] > 1})

    def recall_at_1(self, items: Items, ids: Ids) -> float | None:
        """ids (Q, K), nearest first."""
        if not self.by_query:
            return None
        found = items.labels(ids[list(self.by_query), 0])
        right = [label == first for label, first in zip(self.by_query.values(), found, strict=True)]
        return sum(right) / len(right)
