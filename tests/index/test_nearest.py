"""The nearest centroid: the true one, and the same in any company and from any product."""

import numpy as np
import pytest

from namr.index import nearest as module
from namr.index.nearest import Floats, nearest


def vectors(num: int, dim: int, *, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)


def on_borders(centroids: Floats, num: int, *, seed: int) -> Floats:
    """Points in the middle between two centroids."""
    one, other = np.random.default_rng(seed).integers(len(centroids), size=(2, num))
    middle: Floats = (centroids[one] + centroids[other]) / 2
    return middle


def by_two_loops(x: Floats, centroids: Floats) -> list[int]:
    found = []
    for vector in x.astype(np.float64):
        distances = [((vector - centroid) ** 2).sum() for centroid in centroids.astype(np.float64)]
        found.append(distances.index(min(distances)))
    return found


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_it_is_the_true_one_on_borders_too(offset: float) -> None:
    centroids = vectors(40, 12) + np.float32(offset)
    x = np.concatenate([on_borders(centroids, 150, seed=1), vectors(50, 12, seed=2) + np.float32(offset)])
    assert nearest(x, centroids).tolist() == by_two_loops(x, centroids)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_it_is_the_same_in_any_company(offset: float) -> None:
    centroids = vectors(300, 48) + np.float32(offset)
    x = on_borders(centroids, 2000, seed=1)
    alone = nearest(x, centroids)
    shuffled = np.random.default_rng(2).permutation(len(x))
    np.testing.assert_array_equal(nearest(x[shuffled], centroids), alone[shuffled])
    few = np.concatenate([nearest(x[start : start + 7], centroids) for start in range(0, 2000, 7)])
    np.testing.assert_array_equal(few, alone)


@pytest.mark.parametrize("seed", range(4))
def test_a_product_whose_last_bits_are_others_changes_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As other kernels give, or the same one for another place in a batch."""
    centroids = vectors(100, 32)
    x = on_borders(centroids, 1000, seed=3)
    expected, matmul = nearest(x, centroids), np.matmul
    bits = np.random.default_rng(seed).choice([-6, 0, 6], size=(len(x), len(centroids)))

    def another(a: Floats, b: Floats, *, out: Floats) -> Floats:
        product = matmul(a, b, out=out)
        product += bits[: len(a)] * np.spacing(np.float32(100.0))
        return product

    plain = (matmul(x, -2 * centroids.T) + np.square(centroids).sum(1)) + bits * np.spacing(np.float32(100))
    assert (plain.argmin(axis=1) != expected).any(), "nothing to decide"
    monkeypatch.setattr(np, "matmul", another)
    np.testing.assert_array_equal(nearest(x, centroids), expected)


def test_of_two_as_near_it_is_the_first() -> None:
    centroids = np.concatenate([vectors(5, 8), vectors(5, 8)])
    found = nearest(vectors(200, 8, seed=1), centroids)
    assert found.max() < 5
    ends = np.array([[3.0], [1.0], [1.0]], np.float32)
    assert nearest(np.array([[2.0], [1.9], [2.1]], np.float32), ends).tolist() == [0, 1, 0]


def test_of_one_centroid_it_is_that_one() -> None:
    np.testing.assert_array_equal(nearest(vectors(30, 4), vectors(1, 4)), np.zeros(30))
    assert nearest(vectors(0, 4), vectors(3, 4)).shape == (0,)


@pytest.mark.parametrize("scale", [1e-25, 1e18, 3e19, 1e30])
def test_squares_that_float32_can_not_hold_are_compared_all_the_same(scale: float) -> None:
    centroids, x = (vectors(num, 6, seed=num) * np.float32(scale) for num in (20, 50))
    assert nearest(x, centroids).tolist() == by_two_loops(x, centroids)


def test_blocks_and_close_calls_may_be_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    centroids = vectors(30, 16)
    x = np.concatenate([vectors(150, 16, seed=4), on_borders(centroids, 150, seed=5)])
    expected = nearest(x, centroids)
    for name, value in (("_FEWEST_ROWS", 7), ("_BLOCK_VALUES", 1), ("_PAIRS", 3)):
        monkeypatch.setattr(module, name, value)
    np.testing.assert_array_equal(nearest(x, centroids), expected)
