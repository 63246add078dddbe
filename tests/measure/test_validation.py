"""Unseen classes, the ways of searching, and when one of them is recommended; the same over several ranks."""

from typing import Any

import numpy as np
import pytest

from namr.data.sampling import ClassIndex
from namr.measure import metrics, validation
from namr.measure.metrics import RetrievalMetrics
from namr.model.model import SearchDefaults
from tests.ranks import Results, on_ranks

NUM, DIM = 31, 6
LABELS = np.arange(NUM, dtype=np.int64) % 5


def vectors() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((NUM, DIM)).astype(np.float32) + LABELS[:, None] * 0.5
    return x.astype(np.float32), draw.uniform(0.5, 1.5, (NUM, DIM)).astype(np.float32)


def metrics_of(recall: float, num: int = 100) -> RetrievalMetrics:
    return RetrievalMetrics(
        recall_at_k={1: recall}, map_at_r=0, r_precision=0, num_queries=num, num_skipped=0
    )


def test_the_ways_start_with_the_distance_that_was_trained() -> None:
    assert [validation.name_of(way) for way in validation.ways("l2")] == [
        "l2", "cosine", "scale-l2", "query-l2", "both-l2",
    ]  # fmt: skip
    assert validation.ways("cosine")[:2] == (
        SearchDefaults(metric="cosine", structure_side="none"),
        SearchDefaults(metric="l2", structure_side="none"),
    )


@pytest.mark.parametrize(
    ("recalls", "chosen"),
    [
        ([0.5, 0.5, 0.5, 0.5, 0.5], "l2"),  # a tie
        ([0.5, 0.54, 0.5, 0.5, 0.54], "l2"),  # within one standard error, 0.05
        ([0.5, 0.56, 0.5, 0.5, 0.6], "cosine"),  # "both" is not clearly better than cosine
        ([0.5, 0.5, 0.5, 0.5, 0.6], "both-l2"),
        ([0.5, 0.5, 0.6, 0.6, 0.62], "scale-l2"),
    ],
)
def test_a_way_is_recommended_where_it_is_clearly_better_than_the_simpler(
    recalls: list[float], chosen: str
) -> None:
    ways = validation.ways("l2")
    results = {way: metrics_of(recall) for way, recall in zip(ways, recalls, strict=True)}
    assert validation.name_of(validation.choose(results, ways)) == chosen


def test_held_out_classes_stay_when_new_ones_come() -> None:
    few = ClassIndex.from_labels(np.repeat(np.arange(20), 2))
    many = ClassIndex.from_labels(np.repeat(np.arange(30), 2))
    names = [f"class {number}" for number in range(30)]
    held = set(validation.classes_to_hold_out(few, names, share=0.25, seed=1).tolist())
    later = set(validation.classes_to_hold_out(many, names, share=0.25, seed=1).tolist())
    assert len(held) == 5
    assert len(later) == 8
    assert held != set(validation.classes_to_hold_out(few, names, share=0.25, seed=2).tolist())
    assert len(held & later) >= 3
    assert len(validation.classes_to_hold_out(few, names, share=0.01, seed=1)) == 2


def test_classes_with_one_image_are_not_held_out() -> None:
    index = ClassIndex.from_labels(np.array([0, 1, 1, 2, 2, 3]))
    assert validation.classes_to_hold_out(index, list("abcd"), share=0.9, seed=0).tolist() == [1, 2]


def test_an_index_of_some_classes_numbers_them_anew() -> None:
    index = ClassIndex.from_labels(np.array([2, 0, 1, 2, 0, 2]))
    some = validation.only(index, np.array([2, 0]))
    assert some.ids.tolist() == [0, 3, 5, 1, 4]
    assert some.starts.tolist() == [0, 3, 5]
    assert validation.only(index, np.empty(0, np.int64)).num_classes == 0


def measured() -> dict[str, RetrievalMetrics]:
    x, s = vectors()
    results = validation.measure(x, s, LABELS, ways=validation.ways("l2"), depth=10)
    return {validation.name_of(way): of_way for way, of_way in results.items()}


@pytest.fixture(scope="module")
def results() -> Results:
    return on_ranks(measured)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_finds_what_one_process_finds(results: Results, world_size: int) -> None:
    x, s = vectors()

    def alone(**options: Any) -> RetrievalMetrics:
        return metrics.combine([metrics.retrieval_sums(x, LABELS, depth=10, **options)])

    for of_ways in results[world_size]:
        assert of_ways["both-l2"] == alone(structures=s, side="both")
        assert of_ways["cosine"] == alone(metric="cosine")
