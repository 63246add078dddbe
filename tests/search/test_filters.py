"""Filters: what one says, what is none; a filtered search is brute force over what it lets through."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from namr.data.shards import make_id
from namr.errors import ConfigError
from namr.search import filters, first_stage, stages
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.sides import SIDES, Side
from namr.store.item_files import AnyOf, Between
from tests.search.test_rerank import brute
from tests.search.test_searcher import QUERIES, open_release, truth
from tests.small_release import Recipe

KINDS: dict[str, Any] = {"price": "number", "brand": "text", "used": "boolean", "size": "mixed"}


def test_a_filter_is_conditions_by_field() -> None:
    given = {
        "label": {"in": ["cat", None]},
        "price": {"min": 1, "max": 5.5},
        "brand": "x",
        "used": None,
    }
    assert filters.parse(given, KINDS) == {
        "label": AnyOf(("cat", None)),
        "price": Between(1, 5.5),
        "brand": AnyOf(("x",)),
        "used": AnyOf((None,)),
    }
    assert filters.parse({"brand": {"min": "a"}, "used": {"in": []}}, KINDS) == {
        "brand": Between("a", None),
        "used": AnyOf(()),
    }
    assert filters.parse({}, KINDS) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"filter is \[\]; expected conditions by field"),
        ("label", "filter is 'label'; expected conditions"),
        ({"prise": 1}, "no item of this release has a field 'prise': perhaps you meant 'price'"),
        ({"zzz": 1}, "a field 'zzz': expected one of brand, label, price, size, used"),
        ({"price": "5"}, "price is '5'; expected a finite number"),
        ({"price": True}, "price is True; expected a finite number"),
        ({"price": float("nan")}, "price is nan; expected a finite number"),
        ({"price": {"max": 10**400}}, r"price\.max is 1000.*; expected a finite number"),
        ({"price": {"in": [1, "a"]}}, r"price\.in is 'a'; expected a finite number"),
        ({"price": [1, 2]}, r"price is \[1, 2\]; expected a finite number"),
        ({"brand": 5}, "brand is 5; expected text"),
        ({"brand": "\ud800"}, "brand is .*; expected text"),
        ({"label": False}, "label is False; expected text"),
        ({"used": 1}, "used is 1; expected true or false"),
        ({"used": {"min": False}}, "'used' is true or false and has no min and max"),
        ({"brand": {"in": "x"}}, r"brand\.in is 'x'; expected a list of values"),
        ({"brand": {"like": "x"}}, r"brand is {'like': 'x'}; expected a value, null, {\"in\": "),
        ({"price": {"min": 1, "in": [2]}}, "price is .*; expected a value, null"),
        ({"price": {}}, "price is {}; expected a value, null"),
        ({"size": "L"}, "'size' can't be filtered by: it holds values of several kinds"),
    ],
)
def test_what_is_no_filter_is_refused_with_what_is_wrong(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        filters.parse(given, KINDS)


RECIPE = Recipe(
    refused=[make_id(0, 3)], tombstoned=[make_id(1, 0)], dead=[make_id(1, 7), make_id(0, 0)], num_segments=2
)
TAKEN_DOWN = np.array([make_id(0, 12), make_id(2, 5)])


def row_of(item_id: int) -> int:
    return (item_id >> 32) * 40 + (item_id & 0xFFFFFFFF)


FILTERS: list[tuple[dict[str, Any], Callable[[int], bool]]] = [
    ({"row": {"min": 10, "max": 49}}, lambda row: 10 <= row <= 49),
    ({"row": {"min": 12, "max": 12.9}}, lambda row: row == 12),
    ({"row": {"in": [5, 12, 85, 86, 119, 7.5]}}, lambda row: row in (5, 12, 85, 86, 119)),
    ({"label": None}, lambda row: row % 10 == 9),
    ({"label": None, "row": {"max": 50}}, lambda row: row % 10 == 9 and row <= 50),
    ({"row": {"min": 3}}, lambda row: row >= 3),
    ({"row": -1}, lambda _: False),
    ({}, lambda _: True),
]


@pytest.fixture(scope="module", params=["Flat", "IVF4,Flat", "IVF4,PQ8x4fs"])
def searcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    recipe = Recipe(**{**vars(RECIPE), "index_key": request.param})
    opened = open_release(tmp_path_factory.mktemp("release"), recipe)
    opened.hide(TAKEN_DOWN)
    return opened


@pytest.mark.parametrize("few_allowed", [0, 8192])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("wanted", "matches"), FILTERS, ids=lambda each: str(each) if isinstance(each, dict) else "rows"
)
def test_a_filtered_search_is_brute_force_over_what_matches(
    searcher: Searcher,
    wanted: dict[str, Any],
    matches: Callable[[int], bool],
    side: Side,
    few_allowed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As deep as there are items; taken-down and dead ones are hidden whatever the filter says."""
    monkeypatch.setattr(stages, "_FEW_ALLOWED", few_allowed)
    of = truth(RECIPE)
    kept = np.array([matches(row_of(each)) and each not in TAKEN_DOWN for each in of.ids.tolist()])
    options = {"k": 7, "side": side, "filter": wanted}
    for how in ({"depth": 200, "nprobe": 4}, {"exact": True}):
        found = searcher.search_arrays(*QUERIES, options=SearchOptions(**options, **how))
        by_index = side == "none" and kept.sum() > few_allowed and "depth" in how
        x = of.indexed if by_index and not searcher.index.is_compressed else of.x
        squared = brute(QUERIES.embeddings, QUERIES.structures, x[kept], of.s[kept], side)
        order = np.argsort(squared, axis=1)[:, :7]
        num = order.shape[1]
        np.testing.assert_array_equal(found.ids[:, :num], of.ids[kept][order])
        np.testing.assert_allclose(
            found.distances[:, :num], np.sqrt(np.take_along_axis(squared, order, 1)), rtol=1e-4
        )
        assert (found.ids[:, num:] == -1).all()
        assert found.proved.all() or searcher.index.is_compressed


def test_a_filter_that_nothing_matches_gives_an_empty_answer(searcher: Searcher) -> None:
    (answer,) = searcher.search(keys=["digit/1"], options=SearchOptions(filter={"row": 10**6}))
    assert (answer.hits, answer.certainty) == ((), "proved")


@pytest.mark.parametrize("few_allowed", [0, 8192])
def test_a_key_is_searched_among_what_matches_whether_it_does_itself_or_not(
    searcher: Searcher, few_allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_FEW_ALLOWED", few_allowed)
    options = SearchOptions(k=50, depth=200, filter={"row": {"min": 20, "max": 29}})
    inside, outside = searcher.search(keys=["digit/21", "digit/90"], options=options)
    rows = set(range(20, 30))
    assert {hit.fields["row"] for hit in inside.hits} == rows - {21}
    assert {hit.fields["row"] for hit in outside.hits} == rows
    if not searcher.index.is_compressed:
        assert (inside.certainty, outside.certainty) == ("proved", "proved")


def test_a_selective_filter_keeps_the_recall_of_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One list of many is searched, which holds few or none of what matches, unless more are."""
    monkeypatch.setattr(stages, "_FEW_ALLOWED", 0)
    recipe = Recipe(num_shards=3, rows_per_shard=400, index_key="IVF16,Flat")
    searcher = open_release(tmp_path, recipe)
    of = truth(recipe)

    def recall(wanted: dict[str, Any] | None, kept: np.ndarray, **options: Any) -> float:
        how = SearchOptions(k=5, side="none", filter=wanted, **options)
        ids = searcher.search_arrays(QUERIES.embeddings, options=how).ids
        squared = brute(QUERIES.embeddings, QUERIES.structures, of.indexed[kept], of.s[kept], "none")
        true = of.ids[kept][np.argsort(squared, axis=1)[:, :5]]
        return float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(ids, true, strict=True)]))

    rows = (of.ids >> 32) * 400 + (of.ids & 0xFFFFFFFF)
    unfiltered = recall(None, rows >= 0)
    for num in (600, 100, 20):
        wanted = {"row": {"max": num - 1}}
        assert recall(wanted, rows < num) >= unfiltered - 0.02
    assert recall({"row": {"max": 19}}, rows < 20, nprobe=1) < 0.8  # what is asked for is kept to


@pytest.mark.parametrize("few_of", [1, 1000])
def test_dropping_and_selecting_find_the_same(
    searcher: Searcher, few_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_FEW_ALLOWED", 0)
    options = SearchOptions(k=9, depth=15, filter={"row": {"min": 10, "max": 60}})
    usual = searcher.search_arrays(*QUERIES, options=options)
    monkeypatch.setattr(first_stage, "FEW_OF", few_of)
    np.testing.assert_array_equal(searcher.search_arrays(*QUERIES, options=options).ids, usual.ids)
