"""The section about the structure embedding: of small real releases, and its words by the numbers."""

from pathlib import Path

import numpy as np
import pytest

from namr.measure import report
from namr.measure.report import ReportPage, Section
from namr.measure.structure import Agreement, Changes, Hubs
from namr.reports import structure_section
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe, Vectors

KEYS = [f"digit/{row}" for row in range(120)]
UNLABELLED = KEYS[9::10]


def searcher_of(root: Path, recipe: Recipe, **more: object) -> Searcher:
    release = small_release.publish(root, recipe, **more)
    return Searcher.of(release, cache=Cache(root / "cache", 1 << 30), query_model=None)


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return searcher_of(tmp_path_factory.mktemp("release"), Recipe())


@pytest.fixture(scope="module")
def section(searcher: Searcher) -> Section:
    return structure_section.section(searcher, KEYS)


def test_a_release_has_words_a_table_plots_and_the_queries_that_changed_sides(section: Section) -> None:
    told = " ".join(section.text)
    assert "all 120 images" in told and "side 'both'." in told and "mended" in told
    assert len(section.tables[0].rows) == 2 and len(section.plots) == 3
    html = report.render(ReportPage(title="t", sections=[section]))
    assert f">{structure_section.TITLE}</h2>" in html and "<h3>A neighbourhood on two axes</h3>" in html


def test_the_pictures_are_of_queries_that_were_mended_and_spoiled(
    searcher: Searcher, section: Section
) -> None:
    firsts = [
        [answer.hits[0].label for answer in searcher.search(keys=KEYS, options=SearchOptions(k=6, side=side))]
        for side in ("none", "both")
    ]
    labels = [
        None if key in UNLABELLED else str(small_release._digits()[1][row]) for row, key in enumerate(KEYS)
    ]
    changed = [
        sum(
            label is not None and (one == label, other == label) == sides
            for label, one, other in zip(labels, *firsts, strict=True)
        )
        for sides in ((False, True), (True, False))
    ]
    assert min(changed) > 0
    assert f"Of 108 queries with a label, re-ranking mended {changed[0]} " in section.text[-1]
    assert f"spoiled {changed[1]};" in section.text[-1]
    for grid, num, first_is_right in zip(section.grids, changed, (False, True), strict=True):
        assert grid.title.endswith(f", {min(4, num)} of {num}")
        for row in grid.rows:
            assert row.adaptive[0].correct == (not first_is_right)
            assert (row.plain[0].correct or False) == first_is_right


def test_a_release_without_structure_says_that_there_is_none(tmp_path: Path) -> None:
    def plain(pictures: list[bytes]) -> Vectors:
        x = small_release.random_vectors(len(pictures), 16, seed=0).embeddings
        return Vectors(x, np.ones_like(x))

    searcher = searcher_of(tmp_path, Recipe(num_shards=1, structure_side="none"), of_images=plain)
    section = structure_section.section(searcher, KEYS[:40])
    assert section.text == ["There is none: every weight is 1, so the adaptive distance is the plain one."]
    assert not section.plots and not section.tables and not section.grids
    assert "There is none" in report.render(ReportPage(title="t", sections=[section]))


def test_queries_without_labels_leave_the_pictures_out_and_say_so(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, Recipe(structure_side="none"))
    section = structure_section.section(searcher, UNLABELLED)
    assert section.grids == [] and section.text[-1].startswith("No query has a label")
    assert "the release itself orders by plain distance" in section.text[0]


def test_two_images_are_too_few(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, Recipe(num_shards=1, rows_per_shard=2))
    section = structure_section.section(searcher, KEYS[:2])
    assert section.text == ["Of 2 images there is nothing to say."]


def test_three_images_are_enough(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, Recipe(num_shards=1, rows_per_shard=3))
    section = structure_section.section(searcher, KEYS[:3])
    assert "among the 2 nearest" in section.tables[0].title and len(section.plots) == 3


def test_a_sample_is_drawn_of_many_images_and_told(searcher: Searcher) -> None:
    one, other = (structure_section.section(searcher, UNLABELLED, most_images=50) for _ in range(2))
    assert "50 of 120 images, drawn at random" in one.text[0]
    assert one == other


def changes(mended: int, spoiled: int) -> Changes:
    return Changes(np.arange(mended), np.arange(spoiled), num_labelled=100, num_right_before=50)


@pytest.mark.parametrize(
    ("mended", "spoiled", "end"),
    [
        (0, 0, "No first hit changed sides."),
        (5, 5, "That is a draw."),
        (6, 5, "So few may be chance."),
        (30, 5, "That is a gain."),
        (5, 30, "That is a loss: search this gallery by plain distance."),
        (5, 6, "More were spoiled than mended, though so few may be chance."),
    ],
)
def test_a_loss_is_told_as_one(mended: int, spoiled: int, end: str) -> None:
    told = structure_section.told_changes(changes(mended, spoiled))
    assert told.endswith(end) and f"{50 + mended - spoiled} are now" in told


@pytest.mark.parametrize(
    ("after", "words"), [(1.0, "evens that out"), (1.52, "leaves that as it was"), (2.0, "makes that worse")]
)
def test_hubs_that_get_worse_are_told(after: float, words: str) -> None:
    told = structure_section.told_hubs(Hubs(1.5, 0.1, 9), Hubs(after, 0.1, 9))
    assert words in told and f"from 1.50 to {after:.2f}" in told


def test_neighbours_that_share_no_more_than_chance_are_told() -> None:
    near, far = np.full(10, 0.01), np.full(10, -0.001)
    assert "says nothing of its neighbours" in structure_section.told_agreement(Agreement(near, far))
    told = structure_section.told_agreement(Agreement(near + 0.5, far))
    assert "describes a neighbourhood" in told and "at random 0.00" in told
