"""Which of a release's weights an answer is held against."""

import pytest

from namr.release.calibrated import Calibration, Weight


def weight(k: int, depth: int, nprobe: int, value: float) -> Weight:
    return Weight(side="both", k=k, depth=depth, nprobe=nprobe, weight=value)


KEPT = Calibration(
    num_queries=500,
    rate=1 / 501,
    adaptive_rate=5 / 501,
    weights=(
        weight(10, 100, 4, 0.8),
        weight(100, 100, 4, 0.6),
        weight(10, 200, 8, 0.9),
        weight(10, 200, 4, 0.85),
    ),
)


@pytest.mark.parametrize(
    ("k", "depth", "nprobe", "expected"),
    [
        (10, 100, 4, 0.8),
        (1, 199, 4, 0.8),
        (11, 100, 4, 0.6),
        (10, 200, 4, 0.85),
        (11, 500, 4, 0.6),
        (10, 200, 8, 0.9),
        (10, 10**6, 8, 0.9),
        (10, 99, 4, None),
        (101, 100, 4, None),
        (10, 200, 5, None),
        (11, 200, 8, None),
    ],
)
def test_the_deepest_way_of_these_lists_counts_and_then_the_nearest_k(
    k: int, depth: int, nprobe: int, expected: float | None
) -> None:
    found = KEPT.weight(side="both", k=k, depth=depth, nprobe=nprobe)
    assert (found and found.weight) == expected
    assert KEPT.weight(side="query", k=k, depth=depth, nprobe=nprobe) is None
