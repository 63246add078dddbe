"""Weights of made-up galleries, against loops, and what they claim on queries that they never saw."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from namr.nightly import calibration, truth
from namr.nightly.calibration import Calibrated
from namr.release.calibrated import Calibration
from namr.search.answers import Answer, SearchOptions
from namr.search.searcher import Searcher
from namr.sides import SIDES
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe, Vectors, ids_of

DIM, NUM, ROWS, DEPTH = 12, 3, 200, 16


def near_and_far(num: int, dim: int, *, seed: int) -> Vectors:
    """Points of few axes, so that the tenth is much nearer than the hundredth, and varied weights."""
    rng = np.random.default_rng(seed)
    axes = np.random.default_rng(1000).standard_normal((4, dim))
    x = rng.standard_normal((num, 4)) @ axes + 0.1 * rng.standard_normal((num, dim))
    return Vectors(x.astype(np.float32), rng.uniform(0.6, 1.4, (num, dim)).astype(np.float32))


def released(root: Path, index_key: str) -> Searcher:
    recipe = Recipe(num_shards=NUM, rows_per_shard=ROWS, dim=DIM, index_key=index_key, dead=[7, 8])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_release, "random_vectors", near_and_far)
        release = small_release.publish(root, recipe)
    return Searcher.of(release, cache=Cache(root / "cache", 1 << 30), query_model=None)


class Measured(NamedTuple):
    searcher: Searcher
    found: Calibrated


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> "functools._lru_cache_wrapper[Measured]":
    """measured(index_key): a release, measured with half of its items as if they had been held out."""

    @functools.cache
    def of(key: str) -> Measured:
        searcher = released(tmp_path_factory.mktemp("released"), key)
        return Measured(
            searcher,
            calibration.calibrate(
                searcher, truth.of_items(searcher, ids_of(searcher, KEYS)), depth=DEPTH, nprobe=2
            ),
        )

    return of


KEYS = [f"digit/{row}" for row in range(9, NUM * ROWS, 2)]
OTHERS = [f"digit/{row}" for row in range(10, NUM * ROWS, 2)]


def test_a_ratio_is_of_the_nearest_neighbour_that_was_left_out() -> None:
    squared = np.array([[1.0, 2, 3], [1, 2, 4], [1, 2, np.inf], [0, 2, 3], [1, 2, 3]])
    true_ids = np.array([[1, 2, 3], [4, 5, 6], [7, 8, -1], [9, 10, 11], [1, 2, 3]])
    candidates = np.array([[3, 1, 8], [6, 4, 5], [8, 7, -1], [1, 2, 3], [4, 5, 6]])
    lacks = calibration.left_out(true_ids, candidates)
    assert lacks.tolist() == [[False, True, False], [False] * 3, [False] * 3, [True] * 3, [True] * 3]
    found = calibration.ratios(squared, lacks, np.array([8.0, 8, 8, 8, 0]))
    assert found.tolist() == [2 / 8, np.inf, np.inf, 0.0, np.inf]


@pytest.mark.parametrize(("num", "below"), [(1, 0), (998, 0), (999, 0), (1999, 1), (2998, 1), (2999, 2)])
def test_a_weight_has_at_most_a_thousandth_of_ratios_below_it_and_is_at_most_one(
    num: int, below: int
) -> None:
    ratios = np.random.default_rng(0).permutation(num) / num / 2
    assert calibration.quantile(ratios) == np.sort(ratios)[below]
    assert calibration.quantile(np.full(num, np.inf)) == 1.0


@pytest.mark.parametrize("key", ["Flat", "IVF8,PQ6x4fs"])
def test_what_is_kept_is_the_lowest_ratio_of_all_by_loops(measured, key: str) -> None:
    """So few queries that a weight is the smallest ratio there is."""
    searcher, (kept, _) = measured(key)
    assert (kept.num_queries, kept.rate) == (len(KEYS), 1 / (len(KEYS) + 1))
    assert kept.adaptive_rate == 5 * kept.rate
    sides = {weight.side for weight in kept.weights}
    assert sides == ({"none"} if searcher.index.is_compressed else set()) | {"query", "both", "scale"}
    items = [searcher.items.by_key(each) for each in KEYS]
    ids = np.array([item.id for item in items if item])
    x, s = (each.double().numpy() for each in searcher.vectors.both(np.array([i.id for i in searcher.items])))
    at = {item.id: row for row, item in enumerate(searcher.items)}
    weight = kept.weight(side="query", k=10, depth=DEPTH, nprobe=2 if searcher.index.num_lists else 0)
    assert weight is not None and weight.depth == DEPTH
    asked = np.stack([x[at[each]] for each in ids]).astype(np.float32)
    _, found = searcher.index.search(asked, DEPTH + 3, 2)
    lowest = 1.0
    for query, own in enumerate(ids.tolist()):
        candidates = [each for each in found[query].tolist() if each not in (own, 7, 8, -1)][:DEPTH]
        plain = ((x - x[at[own]]) ** 2).sum(axis=1)
        adaptive = ((x - x[at[own]]) ** 2 * s[at[own]]).sum(axis=1)
        adaptive[at[own]] = np.inf
        last = plain[at[candidates[-1]]]
        for row in np.argsort(adaptive)[:10]:
            if row not in [at[each] for each in candidates]:
                lowest = min(lowest, adaptive[row] / last)
    assert weight.weight == pytest.approx(lowest, rel=1e-3)
    assert lowest < 1


def asked_of(searcher: Searcher, kept: Calibration | None, side: str, k: int, depth: object) -> list[Answer]:
    """What a release with this calibration answers to the queries that it was not taken from."""
    manifest = replace(searcher.manifest, depth=DEPTH, nprobe=2, calibration=kept)
    release = replace(searcher.release, manifest=manifest)
    cache = Cache(Path(searcher.release.releases_uri).parent / "cache", 1 << 30)
    served = Searcher.of(release, cache=cache, query_model=None)
    return served.search(keys=OTHERS, options=SearchOptions(k=k, side=side, depth=depth))


def is_right(answers: list[Answer], true: list[Answer]) -> np.ndarray:
    return np.array(
        [
            np.allclose([hit.distance for hit in one.hits], [hit.distance for hit in other.hits], rtol=1e-5)
            for one, other in zip(answers, true, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("key", "side", "k"),
    [("Flat", "both", 12), ("Flat", "query", 20), ("IVF8,PQ6x4fs", "both", 10), ("IVF8,PQ6x4fs", "none", 5)],
)
def test_calibrated_answers_are_right_as_often_as_claimed_on_queries_not_seen(
    measured, key: str, side: str, k: int
) -> None:
    searcher, (kept, _) = measured(key)
    true = searcher.search(keys=OTHERS, options=SearchOptions(k=k, side=side, exact=True))
    for depth in (None, 2 * DEPTH, "adaptive"):
        answers = asked_of(searcher, kept, side, k, depth)
        is_calibrated = np.array([answer.certainty == "calibrated" for answer in answers])
        right = is_right(answers, true)
        claimed = kept.adaptive_rate if depth == "adaptive" else kept.rate
        assert (is_calibrated & ~right).mean() <= claimed
        nothing_known = asked_of(searcher, None, side, k, depth)
        assert {answer.certainty for answer in nothing_known} <= {"proved", "unproved"}
        for one, other in zip(answers, nothing_known, strict=True):
            assert other.certainty != "proved" or one.certainty == "proved" or one.depth < other.depth
    assert is_calibrated.mean() > 0.15
    careless = replace(kept, weights=tuple(replace(each, weight=1.0) for each in kept.weights))
    answers = asked_of(searcher, careless, side, k, "adaptive")
    is_calibrated = np.array([answer.certainty == "calibrated" for answer in answers])
    assert (is_calibrated & ~is_right(answers, true)).mean() > 2 * kept.adaptive_rate


@pytest.mark.parametrize("key", ["Flat", "IVF8,PQ6x4fs"])
def test_a_report_tells_what_was_said_and_how_deep_it_took(measured, key: str) -> None:
    _, (_, report) = measured(key)
    assert [(each.side, each.is_adaptive) for each in report.shares] == [
        (side, is_adaptive) for side in SIDES for is_adaptive in (False, True)
    ]
    for fixed, adaptive in zip(report.shares[::2], report.shares[1::2], strict=True):
        assert fixed.mean_depth == (10 if fixed.side == "none" and key == "Flat" else DEPTH)
        assert fixed.mean_depth <= adaptive.mean_depth <= 16 * DEPTH
        assert adaptive.unproved <= fixed.unproved
        for each in (fixed, adaptive):
            assert each.proved + each.calibrated + each.unproved == pytest.approx(1)
            assert (each.right is None) == (each.calibrated == 0)
            assert each.right is None or each.right > 0.97


def test_few_queries_calibrate_nothing(measured) -> None:
    searcher, _ = measured("Flat")
    for num in (1, 2, 199):
        found = calibration.calibrate(
            searcher, truth.of_items(searcher, ids_of(searcher, KEYS[:num])), depth=DEPTH, nprobe=1
        )
        assert found.calibration is None
        assert (found.report.num_queries, found.report.rate) == (num, None)
        assert {each.calibrated for each in found.report.shares} == {0.0}
    assert (
        calibration.calibrate(
            searcher, truth.of_items(searcher, ids_of(searcher, KEYS[:200])), depth=DEPTH, nprobe=1
        ).calibration
        is not None
    )
