"""How embeddings lie, by numbers that are known of made-up ones."""

from pathlib import Path

import numpy as np
import pytest

from namr.nightly import drift
from namr.search.searcher import Searcher
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe


def normal(num: int, *, seed: int, mean: float = 0.0, sd: float = 1.0) -> np.ndarray:
    return (mean + sd * np.random.default_rng(seed).standard_normal((num, 8))).astype(np.float32)


def test_the_shift_of_two_samples_of_one_distribution_is_about_three_in_their_number() -> None:
    shifts = [drift.shift(normal(1000, seed=seed), normal(1000, seed=seed + 100)) for seed in range(30)]
    assert np.mean(shifts) == pytest.approx(3 / 1000, rel=0.2)
    assert drift.shift(normal(50, seed=0), normal(50, seed=0)) == 0


@pytest.mark.parametrize(("mean", "sd", "expected"), [(1.0, 1.0, 1.0), (0.5, 1.0, 0.25), (0.0, 3.0, 4.0)])
def test_the_shift_is_the_formula(mean: float, sd: float, expected: float) -> None:
    found = drift.shift(normal(40_000, seed=1), normal(40_000, seed=2, mean=mean, sd=sd))
    assert found == pytest.approx(expected, rel=0.05)


def test_from_embeddings_that_were_all_one_anything_is_infinitely_far() -> None:
    one = np.ones((5, 3), np.float32)
    assert drift.shift(one, one) == 0
    assert drift.shift(one, one + 1) == np.inf


def test_flat_axes_and_norms_are_counted() -> None:
    x = normal(500, seed=3)
    x[:, 2], x[:, 5] = 4.0, 1e-5 * x[:, 0]
    found = drift.spread(x)
    assert (found.num_images, found.num_flat_axes) == (500, 2)
    assert found.mean_norm == pytest.approx(np.sqrt((x.astype(np.float64) ** 2).sum(1)).mean())
    assert found.effective_rank == pytest.approx(6, abs=0.1)
    assert drift.spread(np.ones((5, 3), np.float32)).num_flat_axes == 3


def test_spaces_of_two_models_are_not_compared(tmp_path: Path) -> None:
    def opened(name: str, **recipe: object) -> Searcher:
        release = small_release.publish(tmp_path / name, Recipe(**recipe))
        return Searcher.of(release, cache=Cache(tmp_path / "cache", 10**9), query_model=None)

    serving, draft = opened("one", num_shards=2), opened("two")
    found = drift.measured(draft, serving)
    assert found is not None and found.then is not None and found.shift is not None
    assert (found.dim, found.here.num_images, found.then.num_images) == (16, 120, 80)
    assert 0 < found.shift < 0.1
    other = drift.measured(opened("three", model_digest="1" * 64), serving)
    assert other is not None and other.then == found.then and other.shift is None
    alone = drift.measured(draft, None)
    assert alone == (16, found.here, None, None)
    assert drift.measured(opened("four", num_shards=1, rows_per_shard=1), None) is None
