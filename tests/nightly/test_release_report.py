"""What a release is measured by, and the page that shows it: real answers of a small release."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from namr.measure import report
from namr.measure.report import Section
from namr.nightly import assessment, release_report, structure_section
from namr.nightly.assessment import AssessmentConfig
from namr.nightly.release_report import ReleaseReport
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.store import manifests
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe


def searcher_of(root: Path, index_key: str) -> Searcher:
    release = small_release.publish(root, Recipe(index_key=index_key))
    return Searcher.of(release, cache=Cache(root / "cache", 1 << 30), query_model=None)


def page_of(
    searcher: Searcher, num_queries: int, sections: Sequence[Section] = ()
) -> release_report.ReportPage:
    keys = assessment.held_out_keys(searcher, num_queries, seed=0)
    measured = ReleaseReport(
        counts=searcher.manifest.counts,
        index_key=searcher.manifest.index_key,
        num_parts=1,
        imbalance=1.0,
        build_s=1.0,
        assessment=assessment.assess(searcher, keys, AssessmentConfig(depth=30)),
    )
    return release_report.page("a release", searcher.manifest, measured, [], sections)


def test_the_queries_shown_are_spread_over_the_gallery(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, "Flat")
    keys = [f"digit/{row}" for row in range(120)]
    grid = release_report.retrieval_grid(searcher, keys)
    shown = [small_release.digit(row) for row in range(0, 120, 15)]
    assert [row.query.image for row in grid.rows] == shown
    few = release_report.retrieval_grid(searcher, keys[:3])
    assert [row.query.image for row in few.rows] == [small_release.digit(row) for row in range(3)]


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


def test_filters_have_a_table_by_what_they_let_through(tmp_path: Path) -> None:
    page = page_of(searcher_of(tmp_path, "IVF4,Flat"), 24)
    (_, table) = page.tables
    assert table.title == "Plain search under a filter"
    assert [row[0] for row in table.rows[:3]] == ["all", "50 %", "10 %"]
    assert table.rows[1][2] == "100.0"


def test_a_report_of_a_namr_that_measured_no_filters_has_no_table_of_them(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, "Flat")
    measured = ReleaseReport(
        counts=searcher.manifest.counts,
        index_key="Flat",
        num_parts=1,
        imbalance=1.0,
        build_s=1.0,
        assessment=assessment.assess(searcher, ["digit/1"], AssessmentConfig()),
    )
    before = json.loads(manifests.encode_manifest(measured))
    del before["assessment"]["filtered"]
    read = manifests.decode_manifest(json.dumps(before).encode(), ReleaseReport, "report.json")
    assert read.assessment.filtered == ()
    assert len(release_report.page("a release", searcher.manifest, read, []).tables) == 1


def test_the_page_ends_with_what_the_structure_embedding_says(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, "Flat")
    section = structure_section.section(searcher, assessment.held_out_keys(searcher, 24, seed=0))
    html = report.render(page_of(searcher, 24, [section]))
    told = html.index(f"<h2>{structure_section.TITLE}</h2>")
    assert html.index("Recall@1 by what orders the candidates") < told < html.index("<h3>The weights</h3>")


def test_the_queries_shown_probe_as_many_lists_as_the_release_will(tmp_path: Path) -> None:
    """A draft that is being measured has an nprobe of its own, 1."""
    searcher, keys = searcher_of(tmp_path, "IVF8,Flat"), [f"digit/{row}" for row in range(8)]
    exact = searcher.search(keys=keys, options=SearchOptions(k=6, side="none", exact=True))
    true = [hit.distance for answer in exact for hit in answer.hits]
    few, all_lists = (
        [
            picture.distance
            for row in release_report.retrieval_grid(searcher, keys, nprobe=nprobe).rows
            for picture in row.plain
        ]
        for nprobe in (1, 8)
    )
    assert all_lists == pytest.approx(true, rel=1e-2)
    assert few != all_lists
