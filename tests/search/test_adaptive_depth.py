"""Laws of depth="adaptive": exact where it says so, never worse, and only as deep as it has to be."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.release.calibrated import Calibration, Weight
from namr.search import certainty, first_stage, stages
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.search.stages import Neighbours
from namr.sides import SIDES, Side
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe, Vectors

DIM, ROWS, DEPTH = 16, 120, 10
KEYS = ["Flat", "IVF8,Flat", "IVF8,PQ8x4fs"]
QUERIES = small_release.random_vectors(25, DIM, seed=99)


def open_release(
    root: Path, key: str, calibration: Calibration | None = None, *, nprobe: int = 1, depth: int = DEPTH
) -> Searcher:
    """A release of 354 items, six of its entries dead."""
    recipe = Recipe(rows_per_shard=ROWS, dim=DIM, index_key=key, dead=[0, 1, 2, 3, 4, 5])
    release = small_release.publish(root, recipe)
    manifest = replace(release.manifest, depth=depth, nprobe=nprobe, calibration=calibration)
    cache = Cache(root / "cache", 1 << 30)
    return Searcher.of(replace(release, manifest=manifest), cache=cache, query_model=None, num_threads=1)


@pytest.fixture(scope="module")
def searchers(tmp_path_factory: pytest.TempPathFactory) -> "functools._lru_cache_wrapper[Searcher]":
    """searchers(index_key): a release that proves what it can and has calibrated nothing."""
    return functools.cache(lambda key: open_release(tmp_path_factory.mktemp("release"), key))


def found_by(searcher: Searcher, **options: object) -> Neighbours:
    return searcher.search_arrays(*QUERIES, options=SearchOptions(**options))


def everything_calibrates(nprobe: int, *, k: int = 10) -> Calibration:
    """Weights of the first level only, so large that every answer is called calibrated."""
    weights = tuple(Weight(side=side, k=k, depth=DEPTH, nprobe=nprobe, weight=1e6) for side in SIDES)
    return Calibration(num_queries=999, rate=0.001, adaptive_rate=0.005, weights=weights)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("key", KEYS)
def test_what_an_adaptive_search_proves_is_exact_and_nothing_is_worse_than_the_fixed_depth(
    searchers, key: str, side: Side
) -> None:
    searcher = searchers(key)
    fixed = found_by(searcher, k=4, side=side)
    adaptive = found_by(searcher, k=4, side=side, depth="adaptive")
    exact = found_by(searcher, k=4, side=side, exact=True)
    assert (adaptive.distances <= fixed.distances * (1 + 1e-6)).all()
    assert (adaptive.proved | ~fixed.proved).all()
    np.testing.assert_allclose(
        adaptive.distances[adaptive.proved], exact.distances[adaptive.proved], rtol=2e-3
    )
    np.testing.assert_array_equal(adaptive.ids[adaptive.proved], exact.ids[adaptive.proved])
    if key == "Flat":
        assert adaptive.proved.all() or side != "none"
        assert adaptive.proved.sum() > fixed.proved.sum() or side == "none"
    if key == "IVF8,Flat":  # eight lists are all of them after three doublings
        assert adaptive.proved.sum() > fixed.proved.sum() == 0
    if key == "IVF8,PQ8x4fs":
        assert not adaptive.proved.any()
        assert (adaptive.distances < fixed.distances * (1 - 1e-6)).any()


def spread_out(num: int, dim: int, *, seed: int) -> Vectors:
    rng = np.random.default_rng(seed)
    x, s = rng.standard_normal((num, dim)), rng.uniform(0.5, 1.5, (num, dim))
    return Vectors(x.astype(np.float32), s.astype(np.float32))


def test_a_neighbour_that_more_lists_crowd_out_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of half a bit an axis order badly: some of the first candidates are none of twice as many."""
    monkeypatch.setattr(small_release, "random_vectors", spread_out)
    searcher = open_release(tmp_path, "IVF16,PQ2x4fs", depth=2)
    queries = spread_out(400, DIM, seed=3)
    fixed, adaptive = (
        searcher.search_arrays(*queries, options=SearchOptions(k=2, side="none", depth=depth))
        for depth in (None, "adaptive")
    )
    assert (adaptive.distances <= fixed.distances * (1 + 1e-6)).all()
    monkeypatch.setattr(stages.rerank, "merged", lambda one, *_, **__: one)
    forgetful = searcher.search_arrays(*queries, options=SearchOptions(k=2, side="none", depth="adaptive"))
    assert (forgetful.distances > fixed.distances * (1 + 1e-6)).any()


@pytest.mark.parametrize("key", KEYS)
def test_a_query_goes_on_only_while_it_is_not_sure(searchers, key: str) -> None:
    """One at a time a query gets the depth and the answer that it gets among others."""
    searcher = searchers(key)
    together = found_by(searcher, k=4, side="both", depth="adaptive")
    depths = set(together.depths.tolist())
    assert depths <= {DEPTH << doublings for doublings in range(certainty.NUM_DOUBLINGS + 1)}
    assert len(depths) > 1 or key == "IVF8,PQ8x4fs"
    for row in range(25):
        x, s = QUERIES.embeddings[[row]], QUERIES.structures[[row]]
        alone = searcher.search_arrays(x, s, options=SearchOptions(k=4, side="both", depth="adaptive"))
        assert alone.depths[0] == together.depths[row]
        np.testing.assert_array_equal(alone.ids[0], together.ids[row])
        if together.proved[row] and together.depths[row] > DEPTH and key == "Flat":
            half = SearchOptions(k=4, side="both", depth=int(together.depths[row]) // 2)
            assert not searcher.search_arrays(x, s, options=half).proved[0]


def test_what_is_sure_at_once_costs_one_search(searchers, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[tuple[int, int]] = []
    candidates = first_stage.candidates

    def noted(index, q, num, **how):
        searched.append((len(q), num))
        return candidates(index, q, num, **how)

    monkeypatch.setattr(stages.first_stage, "candidates", noted)
    found_by(searchers("Flat"), k=4, side="none", depth="adaptive")
    assert searched == [(25, 4)]
    searched.clear()
    found = found_by(searchers("Flat"), k=4, side="both", depth="adaptive")
    assert searched[0] == (25, DEPTH)
    for (num, depth), (_, before) in zip(searched[1:], searched, strict=False):
        assert (num, depth) == (int((found.depths > before).sum()), 2 * before)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("key", KEYS)
def test_a_calibrated_answer_is_as_it_is_and_goes_no_deeper(tmp_path: Path, key: str, side: Side) -> None:
    searcher = open_release(tmp_path, key, everything_calibrates(nprobe=0 if key == "Flat" else 1))
    fixed, adaptive = (found_by(searcher, k=4, side=side, depth=depth) for depth in (None, "adaptive"))
    if side == "none" and key != "IVF8,PQ8x4fs":
        assert not adaptive.calibrated.any()  # candidates are the answer: there is nothing to compare with
        return
    assert (fixed.proved | fixed.calibrated).all() and not (fixed.proved & fixed.calibrated).any()
    assert set(adaptive.depths) == {DEPTH}
    for one, other in zip(fixed, adaptive, strict=True):
        np.testing.assert_array_equal(one, other)
    words = {
        answer.certainty for answer in searcher.search(keys=["digit/9"], options=SearchOptions(side=side))
    }
    assert words <= {"proved", "calibrated"}


def test_calibrated_is_said_of_what_was_measured_only(tmp_path: Path) -> None:
    """Not of more neighbours, fewer candidates, other lists, a filter, or less than there is."""
    searcher = open_release(tmp_path, "IVF8,Flat", everything_calibrates(nprobe=2), nprobe=2)
    assert found_by(searcher, k=10, side="both").calibrated.all()
    assert found_by(searcher, k=10, side="both", depth=50).calibrated.all()
    for other in ({"k": 11}, {"depth": 9, "k": 3}, {"nprobe": 1}, {"nprobe": 3}, {"side": "none"}):
        found = found_by(searcher, **{"k": 10, "side": "both", **other})
        assert not found.calibrated.any() and not found.proved.any(), other
    exact = found_by(searcher, k=10, side="both", exact=True, depth="adaptive")
    assert exact.proved.all() and not exact.calibrated.any()
    few = searcher.search(keys=["digit/9"], options=SearchOptions(side="both", filter={"row": {"min": 100}}))
    assert few[0].certainty == "proved"


def test_under_a_filter_that_lets_many_through_nothing_is_calibrated_and_it_deepens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_FEW_ALLOWED", 10)
    searcher = open_release(tmp_path, "Flat", everything_calibrates(nprobe=0))
    allowed = {"row": {"min": 60}}
    options = SearchOptions(k=4, side="both", depth="adaptive", filter=allowed)
    found = searcher.search_arrays(*QUERIES, options=options)
    exact = found_by(searcher, k=4, side="both", filter=allowed, exact=True)
    assert not found.calibrated.any() and found.proved.any() and found.depths.max() > DEPTH
    np.testing.assert_array_equal(found.ids[found.proved], exact.ids[found.proved])


@pytest.mark.parametrize("key", KEYS)
def test_own_and_hidden_items_are_found_at_no_depth(tmp_path: Path, key: str) -> None:
    searcher = open_release(tmp_path, key)
    options = SearchOptions(k=4, side="query", depth="adaptive")
    before = searcher.search(keys=["digit/50"], options=options)[0]
    gone = before.hits[0].id
    searcher.hide(np.array([gone]))
    after = searcher.search(keys=["digit/50"], options=options)[0]
    assert [hit.key for hit in after.hits][:3] == [hit.key for hit in before.hits][1:]
    whole = searcher.search(keys=["digit/50"], options=replace(options, k=400))[0]
    assert {gone, before.hits[0].id, 0, 5}.isdisjoint({hit.id for hit in whole.hits})
    assert "digit/50" not in [hit.key for hit in whole.hits]
    if key == "Flat":
        assert (len(whole.hits), whole.certainty, whole.depth) == (len(searcher.items) - 1, "proved", 400)


def test_more_neighbours_than_the_depth_take_as_many_candidates_once(searchers) -> None:
    searcher = searchers("Flat")
    found = found_by(searcher, k=70, side="both", depth="adaptive")
    fixed = found_by(searcher, k=70, side="both")
    assert set(fixed.depths) == {70}
    assert set(found.depths) <= {70, 80, 160}
    assert (found.distances <= fixed.distances * (1 + 1e-6)).all()
