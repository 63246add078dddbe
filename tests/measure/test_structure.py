"""Each look at the structure embeddings beside two loops over a few points; numbers by hand; corner cases."""

import math

import numpy as np
import pytest

from namr.errors import ConfigError, ShapeError
from namr.measure import structure
from namr.sides import SIDES, Side
from tests import small_release

Floats = np.ndarray


def points(num: int = 40, dim: int = 6, *, seed: int = 0) -> tuple[Floats, Floats]:
    return small_release.random_vectors(num, dim, seed=seed)


def two_loops(x: Floats, s: Floats, *, k: int, side: Side, depth: int) -> tuple[Floats, Floats]:
    """Plain and adaptive rankings by the definitions, one pair at a time in float64."""

    def squared(q: int, other: int, how: Side) -> float:
        weights = {
            "none": [1.0] * x.shape[1],
            "query": s[q],
            "both": [(one + two) / 2 for one, two in zip(s[q].tolist(), s[other].tolist(), strict=True)],
            "scale": [math.sqrt(sum(s[other].tolist()) / x.shape[1])] * x.shape[1],
        }[how]
        return sum(float(w) * float(a - b) ** 2 for w, a, b in zip(weights, x[q], x[other], strict=True))

    plain, adaptive = [], []
    for q in range(len(x)):
        others = sorted((o for o in range(len(x)) if o != q), key=lambda o: squared(q, o, "none"))
        plain.append(others[:k])
        adaptive.append(sorted(others[:depth], key=lambda o: squared(q, o, side))[:k])
    return np.array(plain), np.array(adaptive)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("depth", [8, 30, 100])
def test_rankings_are_those_of_two_loops(side: Side, depth: int) -> None:
    x, s = points(60)
    plain, adaptive = two_loops(x, s, k=5, side=side, depth=depth)
    ranked = structure.rankings(x, s, k=5, side=side, depth=depth)
    assert (ranked.plain == plain).all() and (ranked.adaptive == adaptive).all()
    assert (plain != adaptive).any() == (side != "none")


def test_blocks_of_any_size_give_the_same_and_copies_come_by_row_number() -> None:
    x, s = points(50, 16)
    x, s = np.tile(x, (6, 1)) + np.float32(3), np.tile(s, (6, 1))
    once = structure.rankings(x, s, k=9, side="both", depth=20, block_rows=len(x))
    for block_rows in (1, 7, 128):
        again = structure.rankings(x, s, k=9, side="both", depth=20, block_rows=block_rows)
        assert (again.plain == once.plain).all() and (again.adaptive == once.adaptive).all()
    assert once.plain[0, :5].tolist() == once.adaptive[0, :5].tolist() == [50, 100, 150, 200, 250]


def test_more_copies_than_candidates_come_by_row_number_too() -> None:
    x, s = points(90)
    x[::2] = x[0]
    for block_rows in (1, 90):
        ranked = structure.rankings(x, s, k=3, side="none", depth=3, block_rows=block_rows)
        assert ranked.plain[0].tolist() == [2, 4, 6] and ranked.plain[4].tolist() == [0, 2, 6]


def test_fewer_others_than_k_are_all_there_is() -> None:
    x, s = points(4)
    ranked = structure.rankings(x, s, k=10, side="both", depth=100)
    assert ranked.plain.shape == (4, 3) and sorted(ranked.adaptive[1].tolist()) == [0, 2, 3]
    alone = structure.rankings(x[:1], s[:1], k=10, side="both", depth=100)
    assert alone.plain.shape == (1, 0)
    assert structure.agreement(s[:1], alone.plain, seed=0).neighbours.shape == (0,)


def test_constant_weights_change_no_order() -> None:
    x, _ = points()
    ranked = structure.rankings(x, np.full_like(x, 1.2), k=5, side="both", depth=20)
    assert (ranked.plain == ranked.adaptive).all()


def test_rankings_of_what_does_not_fit_are_refused() -> None:
    x, s = points()
    with pytest.raises(ShapeError, match=r"structures \(40, 5\) must have the shape of embeddings \(40, 6\)"):
        structure.rankings(x, s[:, :5], k=5, side="both", depth=9)
    with pytest.raises(ConfigError, match="k 0, depth 9"):
        structure.rankings(x, s, k=0, side="both", depth=9)
    with pytest.raises(ShapeError, match=r"expected \(N, D\) with N >= 1, got \(0, 6\)"):
        structure.rankings(x[:0], s[:0], k=5, side="both", depth=9)


def test_spread_is_that_of_two_loops() -> None:
    _, s = points(30, 5)
    s[:, 0] = 1.25
    found = structure.spread(s)
    cells = [float(value) for row in s for value in row]
    mean = sum(cells) / len(cells)
    variance = sum((value - mean) ** 2 for value in cells) / len(cells)
    of_axes = []
    for column in s.T.astype(float).tolist():
        middle = sum(column) / len(column)
        of_axes.append(sum((value - middle) ** 2 for value in column) / len(column))
    assert found.mean_offset == pytest.approx(sum(abs(value - 1) for value in cells) / len(cells))
    assert found.between_images == pytest.approx(sum(of_axes) / len(of_axes) / variance)
    of_images = [sum(row) / 5 for row in s.astype(float).tolist()]
    middle = sum(of_images) / 30
    assert found.mean_weights == pytest.approx(sum((m - middle) ** 2 for m in of_images) / 30 / variance)
    assert found.axis_deviations[1] == pytest.approx(math.sqrt(sorted(of_axes)[2]))
    assert found.moving_axes == pytest.approx(4 / 5)
    assert min(cells) <= found.lowest < 0.6 and 1.4 < found.highest <= max(cells)


def test_a_variance_worked_by_hand_is_half_between_images() -> None:
    """Axis means 0.8 and 1.2, and each image 0.2 to one side of them."""
    found = structure.spread(np.array([[0.6, 1.0], [1.0, 1.4]], np.float32))
    assert found.between_images == found.mean_weights == pytest.approx(0.5)
    assert found.mean_offset == pytest.approx(0.2)
    assert found.axis_deviations == pytest.approx((0.2, 0.2, 0.2))


def test_the_same_weights_for_all_images_are_no_difference_between_them() -> None:
    same = np.tile(np.array([0.6, 1.0, 1.4], np.float32), (20, 1))
    assert structure.spread(same).between_images == pytest.approx(0, abs=1e-12)
    assert structure.spread(same).moving_axes == 0
    constant = structure.spread(np.full((20, 3), 1.1, np.float32))
    assert constant.between_images == constant.mean_weights == 0 and constant.mean_offset == pytest.approx(
        0.1
    )


def test_agreement_is_that_of_two_loops() -> None:
    x, s = points(25)
    near = structure.rankings(x, s, k=3, side="none", depth=3).plain
    mean = s.astype(float).mean(0)
    expected = []
    for row, others in enumerate(near):
        for other in others:
            one, two = s[row] - mean, s[other] - mean
            expected.append(float(one @ two) / math.sqrt(float(one @ one) * float(two @ two)))
    found = structure.agreement(s, near, seed=0)
    assert found.neighbours == pytest.approx(expected, abs=1e-6)
    assert len(found.at_random) == 75 and np.abs(found.at_random).max() < 0.9999


def test_an_s_that_is_the_neighbourhoods_agrees_and_a_random_one_does_not() -> None:
    x, s = points(300, 16)
    centre = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    near = structure.rankings(x, s, k=10, side="none", depth=10).plain
    shared = structure.agreement(1 + 0.3 * np.tanh(x @ centre), near, seed=0)
    assert shared.neighbours.mean() > 0.7 and abs(shared.at_random.mean()) < 0.1
    assert abs(structure.agreement(s, near, seed=0).neighbours.mean()) < 0.05


def test_a_constant_s_agrees_with_nothing() -> None:
    x, s = points()
    near = structure.rankings(x, s, k=3, side="none", depth=3).plain
    found = structure.agreement(np.full_like(x, 1.3), near, seed=0)
    assert (found.neighbours == 0).all() and (found.at_random == 0).all()


def test_occurrences_count_who_has_whom() -> None:
    near = np.array([[1, 2], [2, 0], [1, 0], [1, 2]])
    expected = [sum(int(other == image) for row in near for other in row) for image in range(4)]
    assert structure.occurrences(near, num=4).tolist() == expected == [2, 3, 3, 0]


def test_a_skewness_worked_by_hand() -> None:
    """0, 0, 0, 4: mean 1, second moment (1 + 1 + 1 + 9) / 4 = 3, third (-3 + 27) / 4 = 6; 6 / 3^1.5."""
    found = structure.hubs(np.array([0, 0, 0, 4]))
    assert found.skewness == pytest.approx(2 / math.sqrt(3))
    assert (found.anti_hubs, found.largest) == (0.75, 4)


def test_images_that_are_found_alike_have_no_skewness() -> None:
    assert structure.hubs(np.array([3, 3, 3])) == (0.0, 0.0, 3)
    assert structure.hubs(np.array([0])) == (0.0, 1.0, 0)
    with pytest.raises(ShapeError, match="hubs of no images"):
        structure.hubs(np.array([], np.int64))


def test_changes_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    labels, before, after = (rng.integers(-1, 3, 200) for _ in range(3))
    mended = [
        row
        for row in range(200)
        if labels[row] >= 0 and before[row] != labels[row] and after[row] == labels[row]
    ]
    found = structure.changes(labels, before, after)
    assert found.mended.tolist() == mended
    assert structure.changes(labels, after, before).spoiled.tolist() == mended
    known = labels >= 0
    assert found.num_labelled == known.sum()
    assert found.num_right_before == (known & (labels == before)).sum()
    assert found.num_right_after == (known & (labels == after)).sum()


def test_without_labels_and_within_one_class_nothing_changes() -> None:
    none = np.full(5, -1)
    assert structure.changes(none, none, none).num_labelled == 0
    one = structure.changes(none + 1, none + 1, none + 1)
    assert len(one.mended) == len(one.spoiled) == 0 and one.num_right_after == 5
    assert not one.is_clear
    with pytest.raises(ShapeError, match=r"labels \(5,\), before \(4,\)"):
        structure.changes(none, none[:4], none)


@pytest.mark.parametrize(("mended", "spoiled", "clear"), [(9, 4, False), (10, 2, True), (2, 10, True)])
def test_a_clear_change_is_beyond_two_standard_errors_of_a_coin(
    mended: int, spoiled: int, clear: bool
) -> None:
    zeros, ones = np.zeros(mended + spoiled, np.int64), np.ones(mended + spoiled, np.int64)
    before = np.where(np.arange(len(zeros)) < mended, ones, zeros)
    assert structure.changes(zeros, before, 1 - before).is_clear is clear


def test_the_plane_takes_the_axes_that_change_the_distances_most() -> None:
    rng = np.random.default_rng(0)
    x, s = rng.standard_normal((12, 5)).astype(np.float32), np.ones(5, np.float32)
    x *= [1, 3, 1, 3, 0.01]
    s[:] = [1.2, 1.3, 0.9, 0.7, 0.5]
    found = structure.plane(x[0], s, x[1:])
    added = [
        float(s[k] - 1) * sum(float(x[0, k] - x[j, k]) ** 2 for j in range(1, 12)) / 11 for k in range(5)
    ]
    assert found.axes == (added.index(max(added)), added.index(min(added))) == (1, 3)
    assert found.weights == pytest.approx((1.3, 0.7))
    np.testing.assert_allclose(found.points, x[1:, [1, 3]] - x[0, [1, 3]], rtol=1e-6)


def test_points_of_the_ellipse_are_at_one_adaptive_distance() -> None:
    x, s = points(12)
    found = structure.plane(x[0], s[0], x[1:])
    for turn in np.linspace(0, 2 * np.pi, 7):
        other = x[0].astype(float)
        other[list(found.axes)] += np.array([np.cos(turn), np.sin(turn)]) * found.semi_axes
        assert float((s[0] * (other - x[0]) ** 2).sum()) == pytest.approx(found.radius**2)


def test_a_plane_takes_two_different_axes_and_a_neighbour() -> None:
    x, _ = points(12)
    one, other = structure.plane(x[0], np.ones(6, np.float32), x[1:]).axes
    assert one != other
    with pytest.raises(ShapeError, match="11 neighbours of dimension 1"):
        structure.plane(x[0, :1], x[0, :1], x[1:, :1])
    with pytest.raises(ShapeError, match="0 neighbours"):
        structure.plane(x[0], x[0], x[:0])


def test_the_effective_rank_is_the_number_of_directions_that_vectors_differ_in() -> None:
    rng = np.random.default_rng(0)
    even = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    assert structure.effective_rank(even) == pytest.approx(4)
    assert structure.effective_rank(even + 3) == pytest.approx(4)
    line = np.outer(rng.standard_normal(50), rng.standard_normal(6)).astype(np.float32)
    assert structure.effective_rank(line) == pytest.approx(1, abs=1e-4)
    assert structure.effective_rank(np.ones((5, 3), np.float32)) == 0
    two = rng.standard_normal((4000, 2)).astype(np.float32) * np.array([1.0, 3.0], np.float32)
    entropy = -(0.1 * np.log(0.1) + 0.9 * np.log(0.9))
    assert structure.effective_rank(two) == pytest.approx(np.exp(entropy), rel=0.02)
