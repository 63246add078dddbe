"""What is chosen, for recalls that are known."""

from collections.abc import Callable

import pytest

from namr.nightly.tuning import Point, tuned

LISTS = 64


def measured(needs: int, ceiling: Callable[[int], float] | None = None) -> Callable[[int, int], float]:
    """Recall that grows to what the depth allows with the lists, all of it at `needs`."""
    return lambda nprobe, depth: (ceiling(depth) if ceiling else 1.0) * min(1.0, nprobe / needs)


@pytest.mark.parametrize(
    ("needs", "chosen"), [(1, 1), (2, 2), (3, 3), (9, 10), (13, 14), (16, 16), (17, 20), (64, 64)]
)
def test_lists_are_the_fewest_to_within_an_eighth(needs: int, chosen: int) -> None:
    points = tuned(measured(needs), num_lists=LISTS, target=1.0, depth=100, max_depth=1600)
    assert points[-1] == Point(chosen, 100, 1.0)
    assert chosen <= 1.25 * needs
    assert len({point.nprobe for point in points}) == len(points)


def test_an_index_without_lists_has_nothing_to_choose() -> None:
    assert tuned(measured(1), num_lists=0, target=1.0, depth=100, max_depth=100) == [Point(1, 100, 1.0)]


def test_candidates_are_more_only_where_all_lists_are_not_enough() -> None:
    codes = measured(8, lambda depth: min(1.0, depth / 400))
    points = tuned(codes, num_lists=LISTS, target=1.0, depth=100, max_depth=1600)
    assert points[-1] == Point(8, 400, 1.0)
    assert {point.depth for point in points} == {400}
    assert tuned(codes, num_lists=LISTS, target=0.2, depth=100, max_depth=1600)[-1].depth == 100


def test_a_target_that_nothing_reaches_gets_the_most_that_there_is() -> None:
    codes = measured(8, lambda depth: min(0.9, depth / 400))
    points = tuned(codes, num_lists=LISTS, target=0.95, depth=100, max_depth=1600)
    assert points[-1] == Point(64, 400, 0.9)
    assert {point.depth for point in points} == {400}
    shallow = tuned(codes, num_lists=LISTS, target=0.95, depth=100, max_depth=100)
    assert shallow[-1] == Point(64, 100, 0.25)
