"""Near-duplicates: those that were planted are found, and no others."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from namr.measure import report
from namr.measure.report import ReportPage
from namr.reports import duplicates
from namr.search.searcher import Searcher
from tests import planted, small_release

COPIES = {100: 3, 60: 41, 61: 60, 119: 118}
"""41, 60 and 61 are one group"""
LABELS = {100: "0", 60: "2", 61: "2", 119: "another"}


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return planted.searcher_of(tmp_path_factory.mktemp("release"), copies=COPIES, labels=LABELS)


@pytest.fixture(scope="module")
def without_copies(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return planted.searcher_of(tmp_path_factory.mktemp("release"))


@pytest.mark.parametrize("index_key", ["Flat", "IVF4,SQ8"])
def test_planted_copies_are_found_exactly_and_grouped_over_others(index_key: str, tmp_path: Path) -> None:
    searcher = planted.searcher_of(tmp_path, copies=COPIES, labels=LABELS, index_key=index_key)
    found = duplicates.among(planted.ask(searcher))
    pairs = set(zip(planted.numbers_of(found.ones), planted.numbers_of(found.others), strict=True))
    assert pairs == {(3, 100), (41, 60), (60, 61), (41, 61), (118, 119)}
    groups = {frozenset(planted.numbers_of(found.group(number))) for number in range(found.num_groups)}
    assert groups == {frozenset({3, 100}), frozenset({41, 60, 61}), frozenset({118, 119})}
    assert (found.distances <= found.limit).all() and found.num_images == 7
    assert found.distances[(found.ones == planted.id_of(3))].tolist() == pytest.approx([0.04], rel=0.2)


def test_all_pairs_are_in_the_table_group_by_group(searcher: Searcher) -> None:
    found = duplicates.among(planted.ask(searcher))
    read = pq.read_table(io.BytesIO(duplicates.table(found, searcher))).to_pylist()
    assert list(read[0]) == [
        *("group", "distance", "key", "other_key", "label", "other_label", "id", "other_id")
    ]
    (pair,) = [row for row in read if row["key"] == "digit/41" and row["other_key"] == "digit/60"]
    assert (pair["label"], pair["other_label"]) == ("2", "2") and pair["other_id"] == planted.id_of(60)
    order = [(row["group"], row["distance"]) for row in read]
    assert order == sorted(order) and {row["group"] for row in read} == {0, 1, 2}


def test_the_page_shows_the_groups_and_which_labels_differ(searcher: Searcher) -> None:
    asked = planted.ask(searcher)
    section = duplicates.section(duplicates.among(asked), asked, searcher)
    assert [fact.value for fact in section.summary] == ["5", "3", "1"]
    (grid,) = section.grids
    shown = {row.query.image: [each.image for each in row.plain] for row in grid.rows}
    assert shown[small_release.digit(41)] == [small_release.digit(60), small_release.digit(61)]
    assert [row.plain[0].correct for row in grid.rows].count(False) == 1
    assert "near-duplicates" in report.render(ReportPage(title="t", sections=[section]))


def test_new_images_are_held_against_old_ones(searcher: Searcher) -> None:
    found = duplicates.among(planted.ask(searcher, first_new=100))
    assert sorted(planted.numbers_of(found.ones)) == [3, 118]


def test_a_gallery_that_holds_everything_twice_is_all_pairs(tmp_path: Path) -> None:
    twice = {number + 10: number for first in range(0, 120, 20) for number in range(first, first + 10)}
    found = duplicates.among(planted.ask(planted.searcher_of(tmp_path, copies=twice)))
    assert found.num_groups == 60 and found.num_images == 120


def test_without_copies_there_are_none_and_no_pictures(without_copies: Searcher) -> None:
    asked = planted.ask(without_copies)
    found = duplicates.among(asked)
    section = duplicates.section(found, asked, without_copies)
    assert found.num_groups == 0 and not section.grids and section.summary[0].value == "0"
    table = pq.read_table(io.BytesIO(duplicates.table(found, without_copies)))
    assert table.num_rows == 0 and str(table.schema.field("key").type) == "string"


def test_where_nobody_asked_that_is_said(searcher: Searcher) -> None:
    asked = planted.ask(searcher, first_new=120)
    found = duplicates.among(asked)
    assert found.limit == 0 and len(found.ones) == 0
    assert duplicates.section(found, asked, searcher).text == ["No image asked, so none is known."]


def test_a_long_chain_is_one_group_whatever_its_order() -> None:
    ids = np.random.default_rng(0).permutation(1000)
    pairs = np.stack([ids[:-1], ids[1:]], axis=1)
    assert (duplicates._joined(pairs) == 0).all()
    apart = np.delete(pairs, 499, axis=0)
    assert set(duplicates._joined(apart)) == {ids[:500].min(), ids[500:].min()}
