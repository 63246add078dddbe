"""One page that shows what a model finds: facts, tables, plots and retrieval grids in a single HTML file.

The page needs nothing beside itself (pictures are data URIs, plots are SVG), runs no script, follows the
reader's light or dark setting and fits a phone. A plot's `svg` is also a picture file of its own.

Not covered: interactive plots; choosing which queries to show (the caller does).
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from namr.data import images
from namr.errors import ImageRefused, ShapeError

_TEMPLATE = Path(__file__).with_name("report.html")
_THUMBNAIL_PX = 144
_TINY_PX = 48
_NUM_BINS = 48
_LONGEST_NUMBER = 32
"""characters of a cell that is still set as a number"""
# Colours that read on white and on black; ink and grid are stand-ins that the page replaces by its own.
_SERIES = ("#4f6bed", "#e0702a", "#17998a", "#b455b8", "#c9a227", "#7b8794")
_INK, _GRID = "#010203", "#040506"
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.labelpad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "text.color": _INK,
    "xtick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.color": _GRID,
    "ytick.labelcolor": _INK,
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One number or name of the summary."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first column names the row, the others are set as numbers, or as words where any is
    long."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    emphasis: Sequence[int] = ()
    """Numbers of the rows to stand out."""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ShapeError(
                    f"table {self.title!r}: {len(row)} cells in {tuple(row)}; expected {len(self.columns)}"
                )

    @property
    def wordy_columns(self) -> set[int]:
        """Numbers of the columns that are set as words, in lines as long as there is room for."""
        return {at for row in self.rows for at, cell in enumerate(row) if at and len(cell) > _LONGEST_NUMBER}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn figure; made by `curves`, `bars`, `histogram` or `ellipse`."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as it is stored, and for a neighbour its distance and whether it is right (None: unknown)."""

    image: bytes
    label: str | None
    distance: float | None = None
    correct: bool | None = None


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """A query with its neighbours, nearest first, by plain and by adaptive distance."""

    query: Picture
    plain: Sequence[Picture]
    adaptive: Sequence[Picture] = ()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Some queries and what was found for them."""

    title: str
    rows: Sequence[GridRow]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page with a heading of its own, and sentences below it."""

    title: str
    text: Sequence[str] = ()
    summary: Sequence[Fact] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    grids: Sequence[Grid] = ()


@dataclass(frozen=True, kw_only=True)
class ReportPage:
    """All that a page shows, in its order."""

    title: str
    subtitle: str = ""
    summary: Sequence[Fact] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    grids: Sequence[Grid] = ()
    sections: Sequence[Section] = ()


def render(page: ReportPage) -> str:
    """The page as one HTML text; an image that can't be read leaves an empty frame with the reason."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"thumbnail": _thumbnail, "drawing": _drawing}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(page=page)


def curves(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    note: str = "",
) -> Plot:
    """Lines through (x, y), such as a loss over steps; values that are not finite leave a gap."""
    figure, axes = _canvas()
    for color, (name, points) in zip(_cycle(len(series)), series.items(), strict=False):
        x, y = np.asarray(points, float).reshape(-1, 2).T
        axes.plot(x, y, color=color, label=name, marker="o" if len(x) < 25 else None, markersize=4)
    if all(float(x).is_integer() for points in series.values() for x, _ in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=x_label, ylabel=y_label)
    return _drawn(title, figure, axes, num_series=len(series), note=note)


def bars(title: str, values: Mapping[str, Mapping[str, float]], *, x_label: str, note: str = "") -> Plot:
    """Horizontal bars: for each row (a model, say) one bar a series (plain, re-ranked), if it has a value."""
    names = list(dict.fromkeys(name for row in values.values() for name in row))
    figure, axes = _canvas(height=0.9 + 0.3 * sum(len(row) + 0.8 for row in values.values()))
    decimals = 1 if max((value for row in values.values() for value in row.values()), default=0) >= 10 else 3
    place, ticks = 0.0, []
    for row in values.values():
        for offset, (name, value) in enumerate(row.items()):
            axes.barh(place + offset, value, height=0.86, color=_SERIES[names.index(name) % len(_SERIES)])
            axes.annotate(
                f"{value:.{decimals}f}",
                (value, place + offset),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=_INK,
            )
        ticks.append(place + (len(row) - 1) / 2)
        place += len(row) + 0.8
    for number, name in enumerate(names):
        axes.barh(0, 0, color=_SERIES[number % len(_SERIES)], label=name)
    axes.set(xlabel=x_label)
    axes.set_yticks(ticks, list(values))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(visible=False, axis="y")
    return _drawn(title, figure, axes, num_series=len(names), note=note)


def histogram(
    title: str,
    series: Mapping[str, npt.NDArray[np.floating] | Sequence[float]],
    *,
    x_label: str,
    line_at: float | None = None,
    note: str = "",
) -> Plot:
    """How values are distributed: the share of each series in 48 equal bins; a broken line at `line_at`."""
    arrays = {name: np.asarray(values, np.float64) for name, values in series.items()}
    values = np.concatenate([np.empty(0), *arrays.values()])
    figure, axes = _canvas()
    edges = np.histogram_bin_edges(values, bins=_NUM_BINS) if len(values) else np.linspace(0, 1, 2)
    for color, (name, array) in zip(_cycle(len(arrays)), arrays.items(), strict=False):
        shares = np.histogram(array, edges)[0] / max(1, len(array))
        axes.stairs(100 * shares, edges, color=color, fill=True, alpha=0.25)
        axes.stairs(100 * shares, edges, color=color, label=name, linewidth=1.6)
    if line_at is not None:
        axes.axvline(line_at, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set(xlabel=x_label, ylabel="per cent")
    axes.set_ylim(bottom=0)
    return _drawn(title, figure, axes, num_series=len(arrays), note=note)


def ellipse(
    title: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    circle: tuple[str, float],
    semi_axes: tuple[str, tuple[float, float]],
    x_label: str,
    y_label: str,
    note: str = "",
) -> Plot:
    """Points around an origin, a circle of this name and radius and an ellipse beside it, to one scale."""
    figure, axes = _canvas(height=5.2)
    turn = np.linspace(0, 2 * np.pi, 181)
    round_name, radius = circle
    long_name, (across, along) = semi_axes
    axes.plot(
        radius * np.cos(turn),
        radius * np.sin(turn),
        color=_INK,
        linewidth=1.4,
        linestyle=(0, (4, 3)),
        label=round_name,
    )
    axes.plot(across * np.cos(turn), along * np.sin(turn), color=_SERIES[0], label=long_name)
    for color, marker, (name, places) in zip(_SERIES[1:], "o^sDv", points.items(), strict=False):
        x, y = np.asarray(places, float).reshape(-1, 2).T
        axes.scatter(x, y, color=color, marker=marker, s=34, label=name, zorder=3)
    axes.scatter([0], [0], color=_INK, marker="+", s=90, label="query", zorder=4)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_aspect("equal", adjustable="datalim")
    return _drawn(title, figure, axes, num_series=3 + len(points), note=note, num_columns=2)


def _canvas(height: float = 3.2) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        return figure, figure.add_subplot()


def _drawn(
    title: str, figure: Figure, axes: Axes, *, num_series: int, note: str, num_columns: int = 4
) -> Plot:
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        if num_series > 1:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=min(num_series, num_columns),
                borderaxespad=0.2,
            )
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Plot(title=title, svg=buffer.getvalue(), note=note)


def _cycle(count: int) -> list[str]:
    return [_SERIES[number % len(_SERIES)] for number in range(count)]


def _drawing(plot: Plot) -> str:
    """The <svg> element alone, as wide as the page lets it be, in the page's own ink."""
    element = plot.svg[plot.svg.index("<svg") :]
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = element.replace("<svg", f'<svg role="img" aria-label="{html.escape(plot.title)}"', 1)
    return element.replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")


class _Thumbnail:
    """What the template needs of a picture."""

    def __init__(self, picture: Picture) -> None:
        self.uri, self.refused, self.tiny = "", "", False
        try:
            small = images.thumbnail(picture.image, size_px=_THUMBNAIL_PX)
        except ImageRefused as error:
            self.refused = error.reason
            return
        self.tiny = max(images.decode(small).size) <= _TINY_PX
        self.uri = "data:image/jpeg;base64," + base64.b64encode(small).decode()


_thumbnail = lru_cache(maxsize=512)(_Thumbnail)
