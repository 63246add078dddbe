"""Queries with pictures: which are called best and worst, and what stands beside them."""

from pathlib import Path

import numpy as np
import pytest

from namr.reports import grids
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from tests import planted, small_release

KEYS = [f"digit/{number}" for number in range(planted.NUM)]
WRONG = {5: "1", 47: "0", 118: "typo"}


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return planted.searcher_of(tmp_path_factory.mktemp("release"), labels=WRONG)


def test_labelled_queries_are_ordered_by_how_far_other_labels_are(searcher: Searcher) -> None:
    """5 and 47 have another class's label; nobody else is called "typo", so 118 isn't judged."""
    ranked = grids.best_first(searcher, KEYS, planted.plan_of(searcher))
    assert {"digit/5", "digit/47"} <= set(ranked.keys[-5:]) and len(ranked.keys) == 119
    assert "another label" in ranked.how
    best, worst, drawn = grids.retrieval_grids(searcher, KEYS, planted.plan_of(searcher))
    assert best.title == "Best answered: 3 of 119 queries"
    assert best.rows[0].query.image == small_release.digit(int(ranked.keys[0].removeprefix("digit/")))
    assert worst.rows[0].query.image == small_release.digit(int(ranked.keys[-1].removeprefix("digit/")))
    assert [row.adaptive[0].correct for row in best.rows + worst.rows] == 3 * [True] + 3 * [False]
    assert drawn.title == "Drawn at random: 3 of 120 queries" and "Ordered" not in drawn.note
    shown = [row.query.image for grid in (best, worst, drawn) for row in grid.rows]
    assert len(set(shown)) == len(shown) == 9


def test_a_margin_is_how_much_farther_the_other_labels_are() -> None:
    inf = np.inf
    distances = np.array([[1.0, 2, 4], [1, 2, 4], [1, 2, 4], [1, 2, inf], [inf, inf, inf]])
    is_own = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    assert grids.margins(distances, is_own).tolist() == [3, -3, -3, 1, 0]


def test_without_labels_the_nearest_first_answer_is_best(tmp_path: Path) -> None:
    searcher = planted.searcher_of(tmp_path, labels=dict.fromkeys(range(120)), copies={100: 3})
    ranked = grids.best_first(searcher, KEYS, planted.plan_of(searcher))
    assert set(ranked.keys[:2]) == {"digit/3", "digit/100"} and len(ranked.keys) == 120
    answers = searcher.search(keys=ranked.keys)
    nearest = [answer.hits[0].distance for answer in answers]
    assert nearest == sorted(nearest) and "no query has a label" in ranked.how


@pytest.mark.parametrize(("num", "nums"), [(0, []), (1, [1]), (2, [1, 1]), (5, [2, 2, 1])])
def test_few_queries_are_shown_once_each(num: int, nums: list[int], searcher: Searcher) -> None:
    found = grids.retrieval_grids(searcher, KEYS[:num], planted.plan_of(searcher))
    assert [len(grid.rows) for grid in found] == nums


def test_the_queries_shown_probe_as_many_lists_as_the_plan_says(tmp_path: Path) -> None:
    """A draft that is being measured has an nprobe of its own, 1."""
    searcher = planted.searcher_of(tmp_path, index_key="IVF8,Flat")
    plan = planted.plan_of(searcher)
    exact = searcher.search(keys=KEYS, options=SearchOptions(k=6, side="none", exact=True))
    true = {key: [hit.distance for hit in answer.hits] for key, answer in zip(KEYS, exact, strict=True)}
    key_of = {small_release.digit(number): key for number, key in enumerate(KEYS)}
    few, every = (
        [
            ([picture.distance for picture in row.plain], true[key_of[row.query.image]])
            for grid in grids.retrieval_grids(searcher, KEYS, plan._replace(nprobe=nprobe))
            for row in grid.rows
        ]
        for nprobe in (1, 8)
    )
    for shown, nearest in every:
        assert shown == pytest.approx(nearest, rel=1e-2)
    assert any(shown != pytest.approx(nearest, rel=1e-2) for shown, nearest in few)


def test_a_label_is_right_or_wrong_or_unknown() -> None:
    assert (grids.is_right("a", "a"), grids.is_right("a", "b"), grids.is_right(None, "b")) == (
        True,
        False,
        None,
    )
