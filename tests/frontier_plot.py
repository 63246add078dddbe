"""Recall against queries a second, one line a library, its name at its end: a picture for a README.

White, since a picture file can't know whether the page around it is light or dark.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

INK, GRID = "#24272c", "#e4e6ea"
COLORS = ("#0f766e", "#4f6bed", "#7b8794", "#e0702a", "#b455b8", "#b08900", "#c2304a")
MARKERS = "osD^vP*"
LEAST_GAP = 0.058
"""between two names, of the height of the axes"""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "frontier",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
    "text.color": INK,
}


def draw(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str) -> None:
    """An SVG of lines through (recall, queries/s); a library without a point is left out."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.8), facecolor="white")
        axes = figure.add_axes((0.09, 0.12, 0.65, 0.76))
        axes.set_yscale("log")
        shown = {name: np.asarray(points) for name, points in curves.items() if len(points)}
        for number, (name, points) in enumerate(shown.items()):
            axes.plot(
                *points.T,
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=2.6 if number == 0 else 1.5,
                zorder=4 if number == 0 else 3,
                gid=name,
            )
        axes.grid(visible=True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_locator(LogLocator(10, subs=()))
        axes.margins(x=0.03, y=0.06)
        axes.set_xlabel("recall@10")
        axes.set_title(f"Queries a second at a recall: {title}", loc="left", x=-0.11, fontsize=12)
        figure.draw_without_rendering()  # sets the limits, by which the ends have their places
        ends = [axes.transAxes.inverted().transform(axes.transData.transform(p[-1])) for p in shown.values()]
        heights = spread_out([float(end[1]) for end in ends])
        for number, (name, height) in enumerate(zip(shown, heights, strict=True)):
            color = COLORS[number % len(COLORS)]
            axes.annotate(
                name,
                xy=tuple(ends[number]),
                xycoords="axes fraction",
                xytext=(1.04, height),
                textcoords="axes fraction",
                color=color,
                va="center",
                fontweight="bold" if number == 0 else "normal",
                arrowprops={
                    "arrowstyle": "-",
                    "color": color,
                    "linewidth": 0.7,
                    "relpos": (0, 0.5),
                    "shrinkA": 3,
                    "shrinkB": 4,
                },
            )
        figure.savefig(path, format="svg", metadata={"Date": None})


def spread_out(heights: Sequence[float]) -> list[float]:
    """Nearly the same heights, in the same order, none closer to the next than LEAST_GAP."""
    order = np.argsort(heights, kind="stable")
    placed = np.asarray(heights)[order]
    for _ in range(200):
        for at in range(len(placed) - 1):
            short = LEAST_GAP - (placed[at + 1] - placed[at])
            if short > 1e-9:
                placed[at] -= short / 2
                placed[at + 1] += short / 2
    back = np.empty(len(placed))
    back[order] = placed
    return back.tolist()
