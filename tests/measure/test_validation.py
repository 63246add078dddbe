"""Unseen classes, the ways of searching, and when one of them is recommended; the same over several ranks."""

from typing import Any

import numpy as np
import pytest

from namr.data.sampling import ClassIndex
from namr.measure import metrics, protocols, validation
from namr.measure.metrics import RetrievalMetrics
from namr.model.model import SearchDefaults
from tests.ranks import Results, on_ranks

NUM, DIM = 31, 6
LABELS = np.arange(NUM, dtype=np.int64) % 5
SPLITS = protocols.one_a_class(LABELS, num_draws=3, seed=0)


def vectors() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((NUM, DIM)).astype(np.float32) + LABELS[:, None] * 0.5
    return x.astype(np.float32), draw.uniform(0.5, 1.5, (NUM, DIM)).astype(np.float32)


def metrics_of(wins: float, *, num_classes: int = 20, per_class: int = 10) -> RetrievalMetrics:
    """Of queries half of which score 1; `wins` of all are 1 where they would be 0, evenly over classes."""
    score_of_row = np.tile(np.arange(per_class) < per_class // 2, num_classes).astype(np.float64)
    losers = np.flatnonzero(score_of_row == 0)
    turned = losers[:: max(1, round(len(losers) / (abs(wins) * len(score_of_row))))] if wins > 0 else []
    score_of_row[turned] = 1
    return RetrievalMetrics(
        recall_at_k={1: float(score_of_row.mean())}, map_at_r=0, r_precision=0,
        num_queries=len(score_of_row), num_skipped=0, scores=score_of_row,
        classes=np.repeat(np.arange(num_classes), per_class),
    )  # fmt: skip


def test_the_ways_start_with_the_distance_that_was_trained() -> None:
    assert [validation.name_of(way) for way in validation.ways("l2")] == [
        "l2", "cosine", "scale-l2", "query-l2", "both-l2",
    ]  # fmt: skip
    assert validation.ways("cosine")[:2] == (
        SearchDefaults(metric="cosine", structure_side="none"),
        SearchDefaults(metric="l2", structure_side="none"),
    )


@pytest.mark.parametrize(
    ("wins", "chosen"),
    [
        ([0, 0, 0, 0, 0], "l2"),  # a tie
        ([0, 0.05, 0, 0, 0.05], "cosine"),  # 10 of 200 queries, in as many classes, none lost
        ([0, 0.05, 0, 0, 0.2], "both-l2"),
        ([0, 0, 0, 0, 0.05], "both-l2"),
        ([0, 0, 0.1, 0.1, 0.1], "scale-l2"),
    ],
)
def test_a_way_is_recommended_where_it_is_clearly_better_than_the_simpler(
    wins: list[float], chosen: str
) -> None:
    ways = validation.ways("l2")
    results = {way: metrics_of(share) for way, share in zip(ways, wins, strict=True)}
    assert validation.name_of(validation.choose(results, ways)) == chosen


def test_a_gain_in_one_class_alone_is_noise() -> None:
    ways = validation.ways("l2")
    results = {way: metrics_of(0) for way in ways}
    lucky = metrics_of(0)
    lucky.scores[:10] = 1  # five queries of the first class
    assert validation.choose(results | {ways[1]: lucky}, ways) == ways[0]


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
    by_name = {validation.name_of(way): of_way for way, of_way in results.items()}
    way = SearchDefaults(metric="l2", structure_side="both")
    drawn = validation.measure(x, s, LABELS, ways=[way], splits=SPLITS, ks=(1, 3))
    return by_name | {"drawn": drawn[way]}


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
        draws = [
            metrics.retrieval_sums(
                x, LABELS, structures=s, side="both", ks=(1, 3), query_rows=queries, gallery_rows=gallery
            )
            for queries, gallery in SPLITS
        ]
        assert of_ways["drawn"] == metrics.combine(draws)
        assert of_ways["drawn"].num_queries == 3 * (NUM - 5)
