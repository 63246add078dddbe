"""The items of a release: what an id or a user's key stands for, and where the picture lies.

They stay in the files of the release, mapped into memory; Python objects are made of what is shown.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.data.shards import among
from namr.search.answers import Item
from namr.search.filters import LABEL, Filter
from namr.store import item_files
from namr.store.item_files import ItemFile

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class PictureRange(NamedTuple):
    """The bytes of an item's picture in the tar of its shard."""

    offset: int
    size: int


class Items:
    """Items by id and by key; of files whose ids ascend over all of them."""

    def __init__(self, files: Sequence[ItemFile]) -> None:
        self.files = [file for file in files if len(file)]
        self._last_ids = np.array([file.ids[-1] for file in self.files], np.int64)
        self._ends = np.cumsum([len(file) for file in self.files], dtype=np.int64)
        self._num = sum(len(file) for file in self.files)
        self._hidden = np.empty(0, np.int64)
        self.kinds = item_files.joined_kinds(self.files)
        """what kind of values each field of the user's holds"""

    def without(self, hidden_ids: Ids) -> "Items":
        """All items of the files but these, which are then as unknown as any id that never was."""
        fewer = Items(self.files)
        known = [among(hidden_ids, file.ids) for file in self.files]
        fewer._hidden = np.unique(hidden_ids[np.any(known, axis=0)]) if known else fewer._hidden
        return fewer

    def are_known(self, ids: Ids) -> Mask:
        """Which of some ids, of any shape, are items."""
        known = np.zeros(ids.shape, np.bool_)
        for file in self.files:
            known |= among(ids, file.ids)
        return known & ~among(ids, self._hidden)

    def __len__(self) -> int:
        return self._num - len(self._hidden)

    def __iter__(self) -> Iterator[Item]:
        """All items, by ascending id."""
        for file in self.files:
            for row in np.flatnonzero(~among(file.ids, self._hidden)).tolist():
                yield _item(file, row)

    def by_id(self, item_id: int) -> Item | None:
        """The item with this id, None if there is none."""
        place = self._place_of_id(item_id)
        return None if place is None else _item(*place)

    def by_key(self, key: str) -> Item | None:
        """The item with this key, None if there is none."""
        for file in self.files:
            row = file.row_of_key(key)
            if row is not None and not self._is_hidden(file.ids[row]):
                return _item(file, row)
        return None

    def place(self, item_id: int) -> PictureRange | None:
        """Where the picture of the item with this id lies, None if there is no such item."""
        place = self._place_of_id(item_id)
        if place is None:
            return None
        file, row = place
        return PictureRange(int(file.offsets[row]), int(file.sizes[row]))

    def matching(self, wanted: Filter) -> Ids:
        """(n,) ids of the items that a filter lets through, ascending."""
        ids = [np.empty(0, np.int64)]
        for file in self.files:
            mask = np.ones(len(file), np.bool_)
            for name, condition in wanted.items():
                mask &= file.mask(None if name == LABEL else name, condition)
            ids.append(file.ids[mask])
        found = np.concatenate(ids)
        return found[~among(found, self._hidden)]

    def since(self, first_id: int) -> Ids:
        """(n,) ids of the items from this one on, ascending."""
        of_files = [file.ids[np.searchsorted(file.ids, first_id) :] for file in self.files]
        ids = np.concatenate([np.empty(0, np.int64), *of_files])
        return ids[~among(ids, self._hidden)]

    def labels(self, ids: Ids) -> list[str | None]:
        """Of each of some ids (n,); None where it has none, or there is no such item."""
        labels: list[str | None] = [None] * len(ids)
        for file in self.files:
            at = np.flatnonzero(among(ids, file.ids) & ~among(ids, self._hidden))
            found = file.values(None, np.searchsorted(file.ids, ids[at]))
            for place, label in zip(at.tolist(), found, strict=True):
                labels[place] = label
        return labels

    def label_counts(self) -> dict[str, int]:
        """How many items have each label; one entry a label."""
        counts: Counter[str] = Counter()
        for file in self.files:
            counts.update(file.label_counts())
            hidden = np.flatnonzero(among(file.ids, self._hidden))
            counts.subtract(label for label in file.values(None, hidden) if label is not None)
        return counts

    def spread(self, num_blocks: int, num_rows: int) -> Iterator[tuple[ItemFile, Ids]]:
        """Files with some of their rows, ascending: of all items up to num_blocks blocks of num_rows."""
        total = len(self) + len(self._hidden)
        step = max(num_rows, -(-total // num_blocks))
        places = (np.arange(0, total, step)[:, None] + np.arange(num_rows)).ravel()
        for file, end in zip(self.files, self._ends.tolist(), strict=True):
            rows = places[slice(*np.searchsorted(places, [end - len(file), end]))] - (end - len(file))
            rows = rows[~among(file.ids[rows], self._hidden)]
            if len(rows):
                yield file, rows

    def draw(self, num: int, *, seed: int, allowed: Ids | None = None) -> list[Item]:
        """Up to `num` different items at random, in random order.

        allowed: ids that may be drawn, as `matching` returns them; None: all.
        """
        ids = (
            self.draw_ids(num, seed=seed)
            if allowed is None
            else np.random.default_rng(seed).choice(allowed, min(num, len(allowed)), False)
        )
        return [item for each in ids.tolist() if (item := self.by_id(each)) is not None]

    def draw_ids(self, num: int, *, seed: int) -> Ids:
        """(n,) the ids of what `draw` returns.

        Few are hidden, so that mostly twice as many as are wanted hold enough that aren't.
        """
        total, ids = len(self) + len(self._hidden), np.empty(0, np.int64)
        for most in (2 * num, num + len(self._hidden)):
            drawn = np.random.default_rng(seed).choice(total, min(most, total), False)
            ids = self._ids_at(drawn)
            ids = ids[~among(ids, self._hidden)][:num]
            if len(ids) == num:
                break
        return ids

    def _ids_at(self, places: Ids) -> Ids:
        """Of all files' rows, one after the other, the ids of those with these numbers."""
        ids = np.empty(len(places), np.int64)
        for file, end in zip(self.files, self._ends.tolist(), strict=True):
            rows = places - (end - len(file))
            mine = (rows >= 0) & (rows < len(file))
            ids[mine] = file.ids[rows[mine]]
        return ids

    def _place_of_id(self, item_id: int) -> tuple[ItemFile, int] | None:
        if not 0 <= item_id < 2**63:
            return None
        at = int(np.searchsorted(self._last_ids, item_id))
        if at == len(self.files):
            return None
        file = self.files[at]
        row = int(np.searchsorted(file.ids, item_id))
        known = file.ids[row] == item_id and not self._is_hidden(file.ids[row])
        return (file, row) if known else None

    def _is_hidden(self, item_id: np.int64) -> bool:
        return bool(among(np.asarray(item_id), self._hidden))


def _item(file: ItemFile, row: int) -> Item:
    return Item(int(file.ids[row]), file.key(row), file.label(row), file.fields(row))
