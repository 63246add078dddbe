"""What a release is measured by, and the page that shows it: real answers of a small release."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from namr.index import planning
from namr.index.planning import Considered
from namr.measure import report
from namr.measure.report import Section
from namr.nightly import assessment, release_report, truth
from namr.nightly.assessment import AssessmentConfig
from namr.nightly.calibration import CertaintyReport, Shares
from namr.nightly.comparison import Compared
from namr.nightly.drift import Drift, Spread
from namr.nightly.latency import Latencies, Latency
from namr.nightly.release_report import ReleaseReport
from namr.reports import structure_section
from namr.search.searcher import Searcher
from namr.store import manifests
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe, ids_of


def searcher_of(root: Path, index_key: str) -> Searcher:
    release = small_release.publish(root, Recipe(index_key=index_key))
    return Searcher.of(release, cache=Cache(root / "cache", 1 << 30), query_model=None)


def measured_of(
    searcher: Searcher,
    keys: Sequence[str],
    considered: Sequence[Considered] = (),
    certainty: CertaintyReport | None = None,
) -> ReleaseReport:
    return ReleaseReport(
        counts=searcher.manifest.counts,
        index_key=searcher.manifest.index_key,
        num_parts=1,
        imbalance=1.0,
        build_s=1.0,
        assessment=assessment.assess(
            searcher, truth.of_items(searcher, ids_of(searcher, keys)), AssessmentConfig(depth=30)
        ),
        considered=tuple(considered),
        certainty=certainty,
    )


def page_of(
    searcher: Searcher,
    num_queries: int,
    sections: Sequence[Section] = (),
    considered: Sequence[Considered] = (),
    certainty: CertaintyReport | None = None,
) -> release_report.ReportPage:
    ids = assessment.held_out_ids(searcher, num_queries, seed=0)
    keys = [item.key for each in ids.tolist() if (item := searcher.items.by_id(each))]
    measured = measured_of(searcher, keys, considered, certainty)
    return release_report.page("a release", searcher.manifest, measured, [], sections)


@pytest.mark.parametrize(
    ("index_key", "words", "num_plots"), [("Flat", "all images compared", 1), ("IVF4,Flat", " of 4 lists", 2)]
)
def test_lists_are_spoken_of_where_there_are_some(
    index_key: str, words: str, num_plots: int, tmp_path: Path
) -> None:
    page = page_of(searcher_of(tmp_path, index_key), 24)
    (recall,) = [fact for fact in page.summary if fact.name == "recall@10"]
    assert recall.note.endswith(words)
    assert len(page.plots) == num_plots


@pytest.mark.parametrize(
    ("rates", "words"),
    [((0.002, 0.01), "at most 0.2 % (adaptive: 1 %)"), ((None, None), "too few to calibrate")],
)
def test_the_page_tells_how_sure_answers_are(
    rates: tuple[float | None, float | None], words: str, tmp_path: Path
) -> None:
    shares = (
        Shares(side="both", is_adaptive=False, proved=0.1, calibrated=0.0, right=None, mean_depth=30.0),
        Shares(side="both", is_adaptive=True, proved=0.2, calibrated=0.7, right=0.995, mean_depth=81.5),
    )
    certainty = CertaintyReport(num_queries=24, rate=rates[0], adaptive_rate=rates[1], shares=shares)
    page = page_of(searcher_of(tmp_path, "Flat"), 24, certainty=certainty)
    (table,) = [table for table in page.tables if table.title.startswith("How sure the ten nearest are")]
    assert words in table.title
    assert table.rows == [
        ["both", "30", "30", "10.0", "0.0", "90.0", ""],
        ["both", "adaptive", "82", "20.0", "70.0", "10.0", "99.50"],
    ]


def test_filters_have_a_table_by_what_they_let_through(tmp_path: Path) -> None:
    page = page_of(searcher_of(tmp_path, "IVF4,Flat"), 24)
    (table,) = [table for table in page.tables if table.title == "Plain search under a filter"]
    assert [row[0] for row in table.rows[:3]] == ["all", "50 %", "10 %"]
    assert table.rows[1][2] == "100.0"


def test_a_report_of_a_namr_that_measured_no_filters_has_no_table_of_them(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, "Flat")
    measured = measured_of(searcher, ["digit/1"])
    before = json.loads(manifests.encode_manifest(measured))
    del before["assessment"]["filtered"]
    read = manifests.decode_manifest(json.dumps(before).encode(), ReleaseReport, "report.json")
    assert read.assessment.filtered == ()
    assert len(release_report.page("a release", searcher.manifest, read, []).tables) == 1


def test_the_page_ends_with_what_the_structure_embedding_says(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, "Flat")
    section = structure_section.section(searcher, [f"digit/{row}" for row in range(0, 120, 5)])
    html = report.render(page_of(searcher, 24, [section]))
    told = html.index(f">{structure_section.TITLE}</h2>")
    assert html.index("Recall@1 by what orders the candidates") < told < html.index("<h3>The weights</h3>")


def test_the_page_says_what_else_was_considered_and_what_it_would_have_taken(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, "IVF4,SQ8")
    considered = planning.considered(120, 16, chosen="IVF4,SQ8", key="IVF4,SQ8", max_index_bytes=1 << 30)
    page = page_of(searcher, 24, considered=considered)
    (table,) = [table for table in page.tables if table.title.startswith("Which index, and why")]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["IVF4,SQ8 (chosen)"][2] == "named by build.index_key"
    assert rows["Flat"][1] == f"{120 * 64 / 1e6:,.2f}"
    assert [row[0] for row in table.rows] == [
        *("Flat", "IVF4,Flat", "IVF4,SQ8 (chosen)", "IVF4,PQ8x4fs", "IVF4,PQ4x4fs", "IVF4,PQ2x4fs")
    ]
    assert "named by build.index_key" in report.render(page)


def test_a_report_of_before_has_nothing_considered_and_no_such_table(tmp_path: Path) -> None:
    page = page_of(searcher_of(tmp_path, "Flat"), 24)
    assert [table.title for table in page.tables if "why" in table.title] == []


def test_what_was_considered_is_read_back_as_it_was_stored(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, "Flat")
    considered = tuple(planning.considered(120, 16, chosen="Flat", max_index_bytes=1 << 30))
    measured = measured_of(searcher, ["digit/3"], considered)
    data = manifests.encode_manifest(measured)
    assert manifests.decode_manifest(data, ReleaseReport, "here") == measured
    before = {name: value for name, value in json.loads(data).items() if name != "considered"}
    assert manifests.decode_manifest(json.dumps(before).encode(), ReleaseReport, "here").considered == ()


def test_the_page_holds_a_release_against_the_one_that_served(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, "Flat")
    measured = measured_of(searcher, ["digit/3"])
    title = "Against the release that served"
    assert title not in report.render(release_report.page("a release", searcher.manifest, measured, []))
    then, here = Spread(100, 1.5, 0, 8.25), Spread(120, 1.25, 2, 7.5)
    measured = replace(
        measured,
        against_current=Compared(9, 0.5, 0.75),
        map_at_r=Compared(8, 0.25, 0.3),
        drift=Drift(16, here, then, 0.125),
        latency=Latencies(30, Latency(1.5, 2.0), Latency(1.0, 3.0)),
    )
    page = release_report.page("a release", searcher.manifest, measured, [])
    (table,) = [table for table in page.tables if table.title == title]
    assert [row[:3] for row in table.rows] == [
        ["Recall@1 (%)", "50.0", "75.0"],
        ["MAP@R (%)", "25.0", "30.0"],
        ["effective rank", "8.2", "7.5"],
        ["flat axes", "0", "2"],
        ["mean norm", "1.5", "1.25"],
        ["shift", "", "0.1250"],
        ["median (ms)", "1.00", "1.50"],
        ["95 % within (ms)", "3.00", "2.00"],
    ]
    data = manifests.encode_manifest(measured)
    assert manifests.decode_manifest(data, ReleaseReport, "here") == measured
