"""The items of a release: what an id or a user's key stands for, and where the picture lies.

Held in memory, about 300 bytes an item; keys are hashed when the first one is asked for.
"""

import functools
import json
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.data.shards import among
from namr.search.answers import Item
from namr.store.tables import SampleTable

Ids = npt.NDArray[np.int64]


class PictureRange(NamedTuple):
    """The bytes of an item's picture in the tar of its shard."""

    offset: int
    size: int


class Items:
    """Items by id and by key; of a table with ascending ids."""

    def __init__(self, table: SampleTable) -> None:
        self._rows = _Rows(table)
        self._hidden = np.empty(0, np.int64)

    def without(self, hidden_ids: Ids) -> "Items":
        """All items of the table but these, which are then as unknown as any id that never was."""
        fewer = Items.__new__(Items)
        fewer._rows = self._rows
        known = among(hidden_ids, self._rows.table.ids)
        fewer._hidden = np.unique(hidden_ids[known])
        return fewer

    def __len__(self) -> int:
        return len(self._rows.table) - len(self._hidden)

    def by_id(self, item_id: int) -> Item | None:
        """The item with this id, None if there is none."""
        row = self._row_of_id(item_id)
        return None if row is None else self._rows.item(row)

    def by_key(self, key: str) -> Item | None:
        """The item with this key, None if there is none."""
        row = self._rows.of_key.get(key)
        return None if row is None or self._is_hidden(row) else self._rows.item(row)

    def place(self, item_id: int) -> PictureRange | None:
        """Where the picture of the item with this id lies, None if there is no such item."""
        row, table = self._row_of_id(item_id), self._rows.table
        return None if row is None else PictureRange(int(table.offsets[row]), int(table.sizes[row]))

    def draw(self, num: int, *, seed: int) -> list[Item]:
        """Up to `num` different items at random, in random order."""
        drawn = np.random.default_rng(seed).choice(len(self), min(num, len(self)), False)
        rows = self._shown_rows[drawn] if len(self._hidden) else drawn
        return [self._rows.item(row) for row in rows.tolist()]

    @functools.cached_property
    def _shown_rows(self) -> Ids:
        return np.flatnonzero(~among(self._rows.table.ids, self._hidden))

    def _row_of_id(self, item_id: int) -> int | None:
        if not 0 <= item_id < 2**63:
            return None
        ids = self._rows.table.ids
        row = int(np.searchsorted(ids, item_id))
        known = row < len(ids) and ids[row] == item_id
        return row if known and not self._is_hidden(row) else None

    def _is_hidden(self, row: int) -> bool:
        return bool(among(self._rows.table.ids[row], self._hidden))


class _Rows:
    """A table, and its rows by key; shared by all views of it."""

    def __init__(self, table: SampleTable) -> None:
        self.table = table

    @functools.cached_property
    def of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.table.keys)}

    def item(self, row: int) -> Item:
        table = self.table
        return Item(int(table.ids[row]), table.keys[row], table.labels[row], json.loads(table.fields[row]))
