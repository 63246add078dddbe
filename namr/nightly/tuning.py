"""How much of an index a query has to look at: the fewest lists, and candidates, that reach a recall.

More probed lists find more of the nearest vectors; where codes are compressed, some of these fall behind the
last candidate that is compared by its stored vector, which only more candidates mend. What recall is, and
how it is measured, is the caller's.

Not covered: the kind of index and its codes (`index.planning`).
"""

from collections.abc import Callable
from typing import NamedTuple

_HALVINGS = 2
"""between the last power of two that did not reach the target and the first that did"""


class Point(NamedTuple):
    """One way of looking, and what it finds."""

    nprobe: int
    depth: int
    recall: float


def tuned(
    recall_of: Callable[[int, int], float], *, num_lists: int, target: float, depth: int, max_depth: int
) -> list[Point]:
    """Every point that was measured with the depth that was chosen, by nprobe; the chosen one is last.

    recall_of(nprobe, depth) grows with both. Depth is doubled, up to max_depth, only where probing all lists
    doesn't reach the target. Where nothing does, all lists with the fewest candidates that find the most.
    """
    while True:
        points = _by_lists(recall_of, num_lists=num_lists, target=target, depth=depth)
        if points[-1].recall >= target:
            return points
        deepest = points[-1]
        for deeper in _doublings(depth, max_depth):
            point = Point(deepest.nprobe, deeper, recall_of(deepest.nprobe, deeper))
            if point.recall > deepest.recall:
                deepest = point
            if point.recall >= target:
                break
        if deepest.depth == depth:
            return points
        if deepest.recall < target:
            return [*_at(recall_of, points[:-1], deepest.depth), deepest]
        depth = deepest.depth


def _by_lists(
    recall_of: Callable[[int, int], float], *, num_lists: int, target: float, depth: int
) -> list[Point]:
    """Powers of two up to the first that reaches the target, or all lists, then halvings below that one."""
    points: dict[int, Point] = {}

    def reaches(nprobe: int) -> bool:
        points[nprobe] = Point(nprobe, depth, recall_of(nprobe, depth))
        return points[nprobe].recall >= target

    below, nprobe = 0, 1
    while not reaches(nprobe) and nprobe < num_lists:
        below, nprobe = nprobe, min(2 * nprobe, num_lists)
    if points[nprobe].recall >= target:
        for _ in range(_HALVINGS):
            between = (below + nprobe) // 2
            if between in (below, nprobe):
                break
            if reaches(between):
                nprobe = between
            else:
                below = between
    return [point for at, point in sorted(points.items()) if at != nprobe] + [points[nprobe]]


def _doublings(depth: int, max_depth: int) -> list[int]:
    deeper = []
    while (depth := 2 * depth) <= max_depth:
        deeper.append(depth)
    return deeper


def _at(recall_of: Callable[[int, int], float], points: list[Point], depth: int) -> list[Point]:
    return [Point(point.nprobe, depth, recall_of(point.nprobe, depth)) for point in points]
