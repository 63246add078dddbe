"""Items by id and key, and what is left when some are hidden."""

import json

import numpy as np
import pytest

from namr.data import shards
from namr.search import items
from namr.search.items import Items
from namr.store import tables
from namr.store.tables import SampleTable
from tests import small_release

IDS = np.array([3, 5, 8, (1 << 32) + 2])


def table(ids: np.ndarray) -> SampleTable:
    return SampleTable(
        ids=ids,
        keys=[f"key/{item_id}" for item_id in ids],
        labels=[None if item_id == 5 else "a" for item_id in ids],
        fields=[json.dumps({"row": row}) for row in range(len(ids))],
        offsets=100 * np.arange(len(ids)),
        sizes=10 + np.arange(len(ids)),
    )


def in_files(of: SampleTable, *, cut: int = 2) -> Items:
    """In two files, the first of `cut` rows."""
    rows = np.arange(len(of))
    return small_release.as_items(tables.rows_of(of, rows[:cut]), tables.rows_of(of, rows[cut:]))


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_items_are_found_by_id_and_key(cut: int) -> None:
    of = in_files(table(IDS), cut=cut)
    item = of.by_id(5)
    assert item is not None
    assert item == of.by_key("key/5")
    assert (item.id, item.key, item.label, item.fields) == (5, "key/5", None, {"row": 1})
    assert of.place(8) == items.PictureRange(200, 12)
    assert len(of) == 4


@pytest.mark.parametrize("item_id", [0, 4, 6, (1 << 32) + 3, -1, 2**63, 2**70])
def test_an_id_of_no_item_is_none(item_id: int) -> None:
    of = in_files(table(IDS))
    assert of.by_id(item_id) is None
    assert of.place(item_id) is None
    assert of.by_key(f"key/{item_id}") is None


def test_of_no_items_none_is_found() -> None:
    of = in_files(table(IDS[:0]))
    assert (len(of), of.by_id(3), of.draw(5, seed=0)) == (0, None, [])
    assert len(of.without(IDS)) == 0


def test_items_are_drawn_by_seed() -> None:
    of = in_files(table(np.arange(100)), cut=70)
    drawn = of.draw(20, seed=1)
    assert len({item.id for item in drawn}) == 20
    assert drawn == of.draw(20, seed=1) != of.draw(20, seed=2)
    assert {item.id for item in of.draw(500, seed=0)} == set(range(100))


def test_items_are_drawn_of_those_that_are_allowed() -> None:
    of = in_files(table(np.arange(100)), cut=70)
    allowed = np.array([3, 8, 69, 70, 99])
    few = of.draw(3, seed=1, allowed=allowed)
    assert len({item.id for item in few} & set(allowed.tolist())) == 3
    assert few == of.draw(3, seed=1, allowed=allowed)
    drawn = [[item.id for item in of.draw(50, seed=seed, allowed=allowed)] for seed in range(5)]
    assert all(sorted(ids) == allowed.tolist() for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) > 1  # in random order
    assert of.draw(5, seed=0, allowed=allowed[:0]) == []


@pytest.mark.parametrize("cut", [0, 37, 70])
def test_rows_are_taken_in_blocks_over_all_files(cut: int) -> None:
    of = in_files(table(np.arange(100)), cut=cut)

    def spread(of: Items, num_blocks: int, num_rows: int) -> list[int]:
        return [int(item_id) for file, rows in of.spread(num_blocks, num_rows) for item_id in file.ids[rows]]

    assert spread(of, 4, 2) == [0, 1, 25, 26, 50, 51, 75, 76]
    assert spread(of, 3, 33) == [n for n in range(100) if n % 34 < 33]
    assert spread(of, 10, 10) == spread(of, 1, 500) == list(range(100))
    assert spread(of.without(np.array([25, 51])), 4, 2) == [0, 1, 26, 50, 75, 76]
    assert spread(of.without(np.arange(100)), 4, 2) == spread(in_files(table(IDS[:0])), 4, 2) == []


def test_hidden_items_are_as_unknown_as_any() -> None:
    whole = in_files(table(IDS))
    left = whole.without(np.array([5, 77, (1 << 32) + 2, 5]))
    assert len(left) == 2
    for gone in (5, (1 << 32) + 2):
        assert (left.by_id(gone), left.by_key(f"key/{gone}"), left.place(gone)) == (None, None, None)
        assert whole.by_id(gone) is not None
    assert [item.id for item in left.draw(10, seed=0)] in ([3, 8], [8, 3])
    assert [item.id for item in left] == [3, 8]
    assert left.by_key("key/8") == whole.by_key("key/8")
    assert len(left.without(np.array([3]))) == 3  # of all items, not of those that were left


def test_membership_keeps_the_shape_of_what_is_asked() -> None:
    asked = np.array([[1, 3], [8, 9]])
    assert shards.among(asked, IDS).tolist() == [[False, True], [True, False]]
    assert not shards.among(asked, IDS[:0]).any()


def test_ids_are_told_from_those_of_no_item_and_have_their_labels() -> None:
    of = in_files(table(IDS)).without(np.array([5]))
    asked = np.array([[-1, 3, 5], [8, 9, 1 << 40]])
    assert of.are_known(asked).tolist() == [
        [of.by_id(each) is not None for each in row] for row in asked.tolist()
    ]
    labels = [item.label if (item := of.by_id(each)) else None for each in asked.ravel().tolist()]
    assert of.labels(asked.ravel()) == labels
    assert len(set(labels)) > 1
    assert in_files(table(IDS[:0])).labels(asked[0]) == [None] * 3


def test_drawn_ids_are_those_of_drawn_items() -> None:
    table = SampleTable(
        ids=np.arange(9, dtype=np.int64),
        keys=[str(at) for at in range(9)],
        labels=[None] * 9,
        fields=["{}"] * 9,
        offsets=np.zeros(9, np.int64),
        sizes=np.ones(9, np.int64),
    )
    items = small_release.as_items(table).without(np.array([2, 3], np.int64))
    drawn = items.draw_ids(5, seed=1)
    assert drawn.tolist() == [item.id for item in items.draw(5, seed=1)]
    assert len(items.draw_ids(20, seed=1)) == 7


def test_labels_are_those_of_the_ids_in_any_order_and_as_often_as_asked() -> None:
    of = in_files(table(IDS)).without(np.array([8]))
    assert of.labels(np.array([(1 << 32) + 2, 5, 3, 8, 4, 3, -1])) == ["a", None, "a", None, None, "a", None]
    assert of.labels(IDS[:0]) == []


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_items_since_an_id_are_that_one_and_those_after_it_but_no_hidden_ones(cut: int) -> None:
    of = in_files(table(IDS), cut=cut).without(np.array([8]))
    for first, expected in ((0, [3, 5, IDS[3]]), (5, [5, IDS[3]]), (6, [IDS[3]]), (int(IDS[3]) + 1, [])):
        assert of.since(first).tolist() == expected
