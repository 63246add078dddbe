"""The picture of the frontier: every library named at its line, and no two names on each other."""

import itertools
from pathlib import Path

import pytest

from tests import frontier_plot


def test_every_library_with_points_is_named_in_the_picture(tmp_path: Path) -> None:
    curves = {"namr": [(0.9, 100.0), (0.99, 50.0)], "other": [(0.9, 90.0), (0.99, 49.0)], "none": []}
    frontier_plot.draw(tmp_path / "plot.svg", curves, title="10 vectors of 2")
    svg = (tmp_path / "plot.svg").read_text()
    for text in ("10 vectors of 2", ">namr<", ">other<"):
        assert text in svg
    assert ">none<" not in svg


@pytest.mark.parametrize("heights", [[0.5, 0.51, 0.1], [0.2, 0.2, 0.2], [0.9, 0.1], []])
def test_names_keep_their_order_and_their_distance(heights: list[float]) -> None:
    placed = frontier_plot.spread_out(heights)
    order = sorted(range(len(heights)), key=lambda at: heights[at])
    for below, above in itertools.pairwise(order):
        assert placed[above] - placed[below] >= frontier_plot.LEAST_GAP - 1e-6
    assert sum(placed) == pytest.approx(sum(heights))
