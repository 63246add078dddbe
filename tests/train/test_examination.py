"""What a checkpoint is worth, and that it comes back from the flat dict that Ray Train keeps."""

import numpy as np
import pytest

from namr.measure import validation
from namr.measure.metrics import RetrievalMetrics
from namr.model.model import SearchDefaults
from namr.train.examination import SCORE, Examination

WAYS = validation.ways("l2")


def examination(*recalls: float) -> Examination:
    """Of 1000 queries in 100 classes; whichever way finds more finds all that the others do."""
    order = np.random.default_rng(0).permutation(1000)
    results = {
        way: RetrievalMetrics(
            recall_at_k={1: recall}, map_at_r=recall / 2, r_precision=0, num_queries=1000, num_skipped=0,
            scores=0.75 * (order < 1000 * recall), classes=np.arange(1000) // 10,
        )
        for way, recall in zip(WAYS, recalls, strict=True)
    }  # fmt: skip
    return Examination.of(results, WAYS, step=20, mean_distance=1.5)


def test_a_checkpoint_is_worth_what_the_way_it_recommends_finds() -> None:
    plain = examination(0.75, 0.75, 0.74, 0.75, 0.7505)
    assert plain.search == SearchDefaults(metric="l2")
    assert plain.score == pytest.approx((0.75 + 0.375) / 2)
    other = examination(0.70, 0.82, 0.70, 0.70, 0.70)
    assert (other.search, other.recommended) == (SearchDefaults(metric="cosine"), (0.82, 0.41))
    assert other.recall_at_1["l2"] == 0.70 and other.map_at_r["cosine"] == 0.41


def test_an_examination_has_what_was_measured_of_each_query_in_the_recommended_way() -> None:
    told = examination(0.70, 0.82, 0.70, 0.70, 0.70)
    assert told.measured is not None
    assert told.measured.recall_at_1 == 0.82
    assert Examination.from_flat(told.to_flat()).measured is None


def test_every_measured_number_has_a_name() -> None:
    named = examination(0.1, 0.2, 0.3, 0.4, 0.5).named
    assert len(named) == 10
    assert named["validation/recall_at_1/both-l2"] == 0.5 and named["validation/map_at_r/l2"] == 0.05


@pytest.mark.parametrize(
    "told", [examination(0.1, 0.2, 0.3, 0.4, 0.5), Examination(step=3, mean_distance=2.0)]
)
def test_what_ray_keeps_comes_back(told: Examination) -> None:
    flat = told.to_flat()
    assert all(isinstance(value, int | float | str) for value in flat.values())
    assert Examination.from_flat(flat) == told


def test_a_checkpoint_that_was_not_measured_is_worth_less_than_any_that_was() -> None:
    unmeasured = Examination(step=3, mean_distance=2.0)
    assert unmeasured.to_flat()[SCORE] == -1.0 < examination(0, 0, 0, 0, 0).score
    assert unmeasured.named == {}
