"""Recall against latency: the points that were tried, and whose they are."""

from pathlib import Path

from namr.measure import report
from namr.measure.report import ReportPage
from namr.reports import frontier
from namr.reports.frontier import Frontier, Point
from tests import planted

TRIED = Frontier(
    release_id="first",
    num_queries=500,
    points=(Point(1, 100, 0.8, 0.05), Point(4, 100, 0.99, 0.2), Point(2, 100, 0.955, 0.1)),
)


def test_every_point_is_told_and_the_chosen_one_stands_out_and_whose_they_are(tmp_path: Path) -> None:
    manifest = planted.searcher_of(tmp_path, index_key="IVF4,Flat").manifest
    section = frontier.section(TRIED, manifest)
    (table,) = section.tables
    assert table.rows[1] == ["2", "100", "0.955", "0.1", "10,000"] and list(table.emphasis) == [1]
    assert len(section.text) == 1 and len(section.plots) == 1
    assert "milliseconds a query" in report.render(ReportPage(title="t", sections=[section]))
    section = frontier.section(Frontier(release_id="before", num_queries=5, points=TRIED.points), manifest)
    assert section.text[-1].startswith("Measured on release before, whose template")


def test_one_point_is_no_curve_and_none_is_said(tmp_path: Path) -> None:
    manifest = planted.searcher_of(tmp_path).manifest
    one = Frontier(release_id="first", num_queries=5, points=TRIED.points[:1])
    section = frontier.section(one, manifest)
    assert not section.plots and section.tables[0].rows[0][0] == "all images"
    assert "earlier namr" in frontier.section(None, manifest).text[0]
