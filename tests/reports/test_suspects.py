"""Label suspects: labels that were made wrong are found with the right ones, and no others."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from namr.measure import report
from namr.measure.report import ReportPage
from namr.reports import suspects
from namr.sides import Side
from tests import planted, small_release

WRONG = {5: "1", 47: "0", 118: "typo"}


@pytest.mark.parametrize("side", ["none", "both"])
def test_planted_wrong_labels_are_found_exactly_with_the_right_ones(side: Side, tmp_path: Path) -> None:
    searcher = planted.searcher_of(tmp_path, labels=WRONG, side=side)
    asked = planted.ask(searcher)
    found = suspects.among(asked, searcher)
    suggested = zip(planted.numbers_of(asked.ids[found.rows]), found.suggestions, strict=True)
    assert dict(suggested) == {5: "0", 47: "2", 118: "5"} and found.num_labelled == 120
    read = pq.read_table(io.BytesIO(suspects.table(found, asked, searcher))).to_pylist()
    assert list(read[0]) == [
        *("key", "label", "suggestion", "share", "distance", "num_with_label", "num_with_suggestion", "id")
    ]
    (typo,) = [row for row in read if row["key"] == "digit/118"]
    assert (typo["label"], typo["suggestion"], typo["share"]) == ("typo", "5", 1.0)
    assert (typo["num_with_label"], typo["num_with_suggestion"]) == (1, 19)
    own = searcher.search(keys=["digit/118"])[0]
    assert typo["distance"] == pytest.approx(own.hits[0].distance)
    order = [(-row["share"], row["distance"]) for row in read]
    assert order == sorted(order)


def test_the_page_shows_them_with_what_is_suggested_and_of_nobody_there_is_nothing(tmp_path: Path) -> None:
    searcher = planted.searcher_of(tmp_path, labels=WRONG)
    nobody = suspects.among(planted.ask(searcher, first_new=120), searcher)
    assert (len(nobody.rows), nobody.num_labelled) == (0, 0)
    asked = planted.ask(searcher)
    section = suspects.section(suspects.among(asked, searcher), asked, searcher)
    assert section.summary[0].value == "3"
    shown = {row.query.image: row for row in section.grids[0].rows}
    row = shown[small_release.digit(47)]
    assert row.query.label == "0 → 2?" and {each.label for each in row.adaptive} == {"2"}
    assert all(each.correct is False for each in row.adaptive) and not row.plain
    assert "Labels in doubt: 3 of 3" in report.render(ReportPage(title="t", sections=[section]))


def test_unlabelled_neighbours_agree_with_nobody_and_unlabelled_images_are_in_no_doubt(
    tmp_path: Path,
) -> None:
    """Of class 2 ten have no label: seven labelled neighbours of ten are too few."""
    labels = {47: "0"} | dict.fromkeys(range(50, 60))
    searcher = planted.searcher_of(tmp_path, labels=labels)
    found = suspects.among(asked := planted.ask(searcher), searcher)
    near = searcher.items.labels(asked.found.ids[47])
    assert near.count("2") < 8 and len(found.rows) == 0 and found.num_labelled == 110


def test_without_labels_the_page_says_why_there_is_nothing(tmp_path: Path) -> None:
    searcher = planted.searcher_of(tmp_path, labels=dict.fromkeys(range(120)))
    asked = planted.ask(searcher)
    found = suspects.among(asked, searcher)
    section = suspects.section(found, asked, searcher)
    assert len(found.rows) == 0 and not section.grids and not section.summary
    assert section.text == ["No image that asked has a label, so none can be in doubt."]
