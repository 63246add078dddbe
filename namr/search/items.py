"""The items of a release: what an id or a user's key stands for, and where the picture lies.

Held in memory, about 300 bytes an item; keys are hashed when the first one is asked for.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from namr.store.tables import SampleTable


@dataclass(frozen=True)
class Item:
    """One image of the gallery."""

    id: int
    key: str
    label: str | None
    fields: dict[str, Any]


class Place(NamedTuple):
    """The bytes of an item's picture in the tar of its shard."""

    offset: int
    size: int


class Items:
    """Items by id and by key; of a table with ascending ids."""

    def __init__(self, table: SampleTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def by_id(self, item_id: int) -> Item | None:
        """The item with this id, None if there is none."""
        row = self._row_of_id(item_id)
        return None if row is None else self._at(row)

    def by_key(self, key: str) -> Item | None:
        """The item with this key, None if there is none."""
        row = self._row_of_key.get(key)
        return None if row is None else self._at(row)

    def place(self, item_id: int) -> Place | None:
        """Where the picture of the item with this id lies, None if there is no such item."""
        row = self._row_of_id(item_id)
        return None if row is None else Place(int(self._table.offsets[row]), int(self._table.sizes[row]))

    def draw(self, num: int, *, seed: int) -> list[Item]:
        """Up to `num` different items at random, in random order."""
        rows: npt.NDArray[np.int64] = np.random.default_rng(seed).choice(
            len(self), min(num, len(self)), False
        )
        return [self._at(int(row)) for row in rows]

    def _row_of_id(self, item_id: int) -> int | None:
        row = int(np.searchsorted(self._table.ids, item_id))
        return row if row < len(self) and self._table.ids[row] == item_id else None

    @functools.cached_property
    def _row_of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self._table.keys)}

    def _at(self, row: int) -> Item:
        table = self._table
        return Item(int(table.ids[row]), table.keys[row], table.labels[row], json.loads(table.fields[row]))
