"""What a filter can name: kinds, values where they are few, and nothing of what is hidden."""

import json
from typing import Any

import numpy as np
import pytest

from namr.search import fields
from namr.search.answers import FieldInfo, FieldValue
from namr.search.items import Items
from namr.store.tables import SampleTable
from tests import small_release


def items_of(*of_items: dict[str, Any], first_id: int = 0) -> SampleTable:
    """Items with these fields; a field "label" is the label."""
    num = len(of_items)
    return SampleTable(
        ids=first_id + np.arange(num),
        keys=[f"key/{first_id + row}" for row in range(num)],
        labels=[given.get("label") for given in of_items],
        fields=[json.dumps({name: given[name] for name in given if name != "label"}) for given in of_items],
        offsets=np.arange(num),
        sizes=np.full(num, 9),
    )


def field_of(items: Items, name: str) -> FieldInfo:
    (found,) = [field for field in fields.described(items).fields if field.name == name]
    return found


def test_kinds_values_and_bounds_over_all_files() -> None:
    first = items_of({"label": "cat", "price": 3, "sold": True}, {"label": "dog", "price": -0.5, "odd": 1})
    second = items_of({"label": "dog", "brand": "x", "odd": "one"}, {}, first_id=2)
    described = fields.described(small_release.as_items(first, second))
    assert described.num_items == 4
    assert described.fields == (
        FieldInfo("label", "text", (FieldValue("dog", 2), FieldValue("cat", 1)), 1, None, None),
        FieldInfo("brand", "text", (FieldValue("x", 1),), 3, None, None),
        FieldInfo("odd", "mixed", (), 0, None, None),
        FieldInfo("price", "number", (FieldValue(-0.5, 1), FieldValue(3.0, 1)), 2, -0.5, 3.0),
        FieldInfo("sold", "boolean", (FieldValue(True, 1),), 3, None, None),
    )


def test_values_that_are_many_or_long_are_not_listed() -> None:
    given = [
        {"few": row % 200, "many": row, "long": "x" * 101, "label": str(row % 201)} for row in range(402)
    ]
    items = small_release.as_items(items_of(*given[:300]), items_of(*given[300:], first_id=300))
    assert len(field_of(items, "few").values) == 200
    for name in ("many", "long", "label"):
        assert field_of(items, name).values == ()
    assert (field_of(items, "many").min, field_of(items, "many").max) == (0, 401)


def test_what_json_cannot_say_is_left_out() -> None:
    items = small_release.as_items(items_of({"x": float("inf")}, {"x": float("nan")}, {"x": 2.5}))
    assert field_of(items, "x") == FieldInfo("x", "number", (FieldValue(2.5, 1),), 0, 2.5, 2.5)
    nothing = small_release.as_items(items_of({"x": float("inf")}))
    assert field_of(nothing, "x") == FieldInfo("x", "number", (), 0, None, None)


def test_hidden_items_tell_nothing() -> None:
    items = small_release.as_items(items_of({"label": "a", "x": 1}, {"label": "secret", "x": 99}))
    left = items.without(np.array([1]))
    assert field_of(left, "label").values == (FieldValue("a", 1),)
    assert field_of(left, "x").max == 1
    assert fields.described(left).num_items == 1
    assert field_of(items.without(np.array([0, 1])), "label").values == ()


def test_of_many_items_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "_NUM_BLOCKS", 4)
    monkeypatch.setattr(fields, "_BLOCK_ROWS", 5)
    items = small_release.as_items(items_of(*({"x": row} for row in range(1000))))
    assert fields.described(items).num_items == 20
    assert [value.value for value in field_of(items, "x").values] == [
        start + row for start in (0, 250, 500, 750) for row in range(5)
    ]
