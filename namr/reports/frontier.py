"""Recall against latency: what each way of searching finds, and how long a query takes then.

The points are those that were tried to find how far the release is searched; a release that keeps that of an
earlier one shows the earlier one's, and says so.

Not covered: choosing (`nightly.tuning`), and how long single queries take.
"""

from dataclasses import dataclass
from typing import NamedTuple

from namr.measure import report
from namr.measure.report import Section, Table
from namr.release.releases import ReleaseManifest

TITLE = "Recall against latency"


class Point(NamedTuple):
    """One way of searching by plain distance."""

    nprobe: int
    depth: int
    recall_at_10: float
    ms_per_query: float
    """in batches of 256"""


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What was tried."""

    release_id: str
    """of the release that it was measured on"""
    num_queries: int
    points: tuple[Point, ...]
    """the one that was chosen last"""


def section(frontier: Frontier | None, manifest: ReleaseManifest) -> Section:
    """What the page shows of it; None: an earlier namr measured."""
    if frontier is None:
        return Section(title=TITLE, text=["It was not measured: an earlier namr chose how far is searched."])
    points = sorted(frontier.points)
    chosen = points.index(frontier.points[-1])
    text = [
        f"{frontier.num_queries:,} held-out images asked in batches of 256, by plain distance. The release "
        "is searched as in the line that stands out."
    ]
    if frontier.release_id != manifest.release_id:
        text.append(
            f"Measured on release {frontier.release_id}, whose template and way of searching this one keeps."
        )
    by_effort = [(point.ms_per_query, point.recall_at_10) for point in points]
    return Section(
        title=TITLE,
        text=text,
        tables=[
            Table(
                title="What was tried",
                columns=["lists probed", "candidates compared", "recall@10", "ms a query", "queries/s"],
                rows=[
                    [
                        "all images" if manifest.index_key == "Flat" else f"{point.nprobe:,}",
                        f"{point.depth:,}",
                        f"{point.recall_at_10:.3f}",
                        f"{point.ms_per_query:.3g}",
                        f"{1e3 / point.ms_per_query:,.0f}",
                    ]
                    for point in points
                ],
                emphasis=[chosen],
            )
        ],
        plots=[
            report.curves(
                TITLE, {"recall@10": by_effort}, x_label="milliseconds a query", y_label="recall@10"
            )
        ]
        if len(points) > 1
        else [],
    )
