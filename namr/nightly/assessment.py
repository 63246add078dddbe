"""What a release that is not published yet would answer, measured on held-out images.

The queries are items whose vectors the template was not trained on, and each is left out of its own answer,
so no number is flattered by an image that finds itself. All of it goes through the very `Searcher` that will
serve. The loss of each stage is told apart: the index against exact plain search, the depth of the re-rank
against exact adaptive search, and, where images have labels, what structure does to Recall@1.

Not covered: whether the numbers are good enough (`gate` decides), the method on unseen classes
(`evaluation`).
"""

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from namr import checks
from namr.errors import ConfigError
from namr.model.distances import Side
from namr.nightly import tuning
from namr.release import held_out
from namr.search.answers import Answer, SearchOptions
from namr.search.items import Items
from namr.search.searcher import Searcher

_K = 10
_SIDES: tuple[Side, ...] = ("none", "scale", "query", "both")
_BLOCK = 256
_MOST_DEEPER = 16
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
    depth: int
    queries_per_s: float
    """of plain search at `nprobe`, by key, in batches of 256"""

    @property
    def probed(self) -> str:
        """How much of the index a query looks at, in words."""
        return f"{self.nprobe} of {self.num_lists} lists" if self.num_lists else "all images compared"

    def result(self, side: Side) -> SideResult:
        """The result of one side."""
        return next(result for result in self.sides if result.side == side)


def held_out_keys(searcher: Searcher, num: int, *, seed: int) -> list[str]:
    """Keys of the items that the template was not trained on, about `num`; of any where that leaves none."""
    share = held_out.share(num, searcher.manifest.counts.num_samples)
    keys: list[str] = []
    for file in searcher.items.files:
        rows = np.flatnonzero(held_out.mask(file.ids, share=share, seed=seed))
        keys += [file.key(row) for row in rows.tolist()]
    if keys:
        return keys
    return [item.key for item in itertools.islice(searcher.items, num)]


def assess(searcher: Searcher, keys: Sequence[str], config: AssessmentConfig) -> Assessment:
    """Measure a release by the keys of its held-out items; at least one, else ConfigError."""
    if not keys:
        raise ConfigError("no held-out items to query with: the dataset has no image that was embedded")
    truth = _answers(searcher, keys, side="none", exact=True)
    seconds: dict[tuple[int, int], float] = {}

    def recall_of(nprobe: int, depth: int) -> float:
        began = time.perf_counter()
        answers = _answers(searcher, keys, side="none", nprobe=nprobe, depth=depth)
        seconds[nprobe, depth] = time.perf_counter() - began
        return _agreement(answers, truth)

    points = tuning.tuned(
        recall_of,
        num_lists=searcher.index.num_lists,
        target=config.target_recall,
        depth=config.depth,
        max_depth=_MOST_DEEPER * config.depth if searcher.index.is_compressed else config.depth,
    )
    nprobe, depth, recall = points[-1]
    labels = _Labels.of(searcher.items, keys)
    return Assessment(
        num_queries=len(keys),
        num_labelled=len(labels.by_query),
        num_items=len(searcher.items),
        nprobe=nprobe,
        num_lists=searcher.index.num_lists,
        recall_at_10=recall,
        recall_by_nprobe=tuple(sorted((point.nprobe, point.recall) for point in points)),
        sides=tuple(_side_result(searcher, keys, labels, side, nprobe, depth) for side in _SIDES),
        depth=depth,
        queries_per_s=len(keys) / seconds[nprobe, depth],
    )


class _Labels(NamedTuple):
    """Labels of the queries, by their place, where another item has the same."""

    by_query: dict[int, str]

    @classmethod
    def of(cls, items: Items, keys: Sequence[str]) -> "_Labels":
        num: Counter[str] = Counter()
        for file in items.files:
            num.update(file.label_counts())
        found = ((at, items.by_key(key)) for at, key in enumerate(keys))
        labels = ((at, item.label) for at, item in found if item)
        return cls({at: label for at, label in labels if label is not None and num[label] > 1})

    def recall_at_1(self, answers: Sequence[Answer]) -> float | None:
        right = [
            answers[at].hits[0].label == label for at, label in self.by_query.items() if answers[at].hits
        ]
        return sum(right) / len(self.by_query) if self.by_query else None


def _side_result(
    searcher: Searcher, keys: Sequence[str], labels: _Labels, side: Side, nprobe: int, depth: int
) -> SideResult:
    answers = _answers(searcher, keys, side=side, nprobe=nprobe, depth=depth)
    return SideResult(
        side=side,
        recall_at_1=labels.recall_at_1(answers),
        recall_at_10=_agreement(answers, _answers(searcher, keys, side=side, exact=True)),
        proved=sum(answer.certainty == "proved" for answer in answers) / len(answers),
    )


def _answers(searcher: Searcher, keys: Sequence[str], *, side: Side, **how: Any) -> list[Answer]:
    answers: list[Answer] = []
    for start in range(0, len(keys), _BLOCK):
        some = keys[start : start + _BLOCK]
        answers += searcher.search(keys=some, options=SearchOptions(k=_K, side=side, **how))
    return answers


def _agreement(answers: Sequence[Answer], truth: Sequence[Answer]) -> float:
    """Share of the true neighbours that were found, by id: of items at one distance only the true ones."""
    right = total = 0
    for answer, true in zip(answers, truth, strict=True):
        total += len(true.hits)
        right += len({hit.id for hit in true.hits} & {hit.id for hit in answer.hits})
    return right / total if total else 1.0
