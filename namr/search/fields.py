"""What a person can filter by: the label and the fields of the items, with values that they take.

Values are those of up to 65,536 items in blocks spread evenly over all, so that a large gallery is described
as fast as a small one, and `FieldList.num_items` says how many were looked at. A field with more values than
a person would read through, or with long ones, is described by its kind and its least and greatest alone.

Not covered: what a filter may say (`filters`), and which items it lets through (`items`).
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from namr.search.answers import FieldInfo, FieldList, FieldValue
from namr.search.filters import LABEL
from namr.search.items import Ids, Items
from namr.store.item_files import ItemFile, Kind

_NUM_BLOCKS, _BLOCK_ROWS = 64, 1024
_MOST_VALUES = 200
_MOST_CHARACTERS = 100


def described(items: Items) -> FieldList:
    """The label first, then the fields by name; of hidden items nothing is told."""
    looked_at = list(items.spread(_NUM_BLOCKS, _BLOCK_ROWS))
    kinds: dict[str, Kind] = {**items.kinds, LABEL: "text"}
    names = sorted(kinds, key=lambda name: (name != LABEL, name))
    return FieldList(
        tuple(_field(name, kinds[name], looked_at) for name in names),
        num_items=sum(len(rows) for _, rows in looked_at),
    )


def _field(name: str, kind: Kind, looked_at: Sequence[tuple[ItemFile, Ids]]) -> FieldInfo:
    counts: Counter[Any] | None = Counter()
    num_without, least, greatest = 0, None, None
    for file, rows in looked_at if kind != "mixed" else ():
        column = file.values(None if name == LABEL else name, rows)
        known = [value for value in column if value is not None]
        num_without += len(column) - len(known)
        if kind == "number":
            known = [value for value in known if math.isfinite(value)]  # JSON has no word for others
            least = min([*known, *_one(least)], default=None)
            greatest = max([*known, *_one(greatest)], default=None)
        if counts is not None:
            counts.update(known)
            counts = counts if _are_few(counts) else None
    ordered = sorted((counts or {}).items(), key=lambda each: (-each[1], each[0]))
    return FieldInfo(
        name, kind, tuple(FieldValue(*each) for each in ordered), num_without, min=least, max=greatest
    )


def _one(value: Any) -> list[Any]:
    return [] if value is None else [value]


def _are_few(values: Collection[Any]) -> bool:
    return len(values) <= _MOST_VALUES and all(len(str(value)) <= _MOST_CHARACTERS for value in values)
