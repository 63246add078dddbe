"""Images that a source offers, in a file: a driver holds few of them at a time, however many they are.

The file is a temporary SQLite database, which goes with the object; its cache takes 64 MB. What orders images
is hashes of their names and a seed, so no list of them is ever shuffled.

Not covered: where images come from (`sources`), and the bytes of those that lie elsewhere.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from namr.data.shards import Scalar, make_id
from namr.errors import ConfigError
from namr.store.tables import SampleTable

Order = Literal["class", "shuffled"]

_SETUP = """
    pragma journal_mode = off;
    pragma synchronous = off;
    pragma cache_size = -65536;
    create table image (
        key text primary key, location text, label text, fields text, num_bytes integer, data blob,
        old_id integer, is_same integer, was_there integer
    ) without rowid;
"""
_COLUMNS = "key, location, label, fields, num_bytes, data"
_MET_LIVE = """
    update image
    set old_id = ?1, is_same = label is ?2 and (data is not null or ifnull(num_bytes, ?4) = ?4)
    where key = ?3
"""
_MET_DEAD = "update image set was_there = 1 where key = ?"
_GROUP = {"class": "label", "shuffled": "null"}


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """An image that is offered: who it is, and where its bytes are."""

    key: str
    location: str
    """path or URI; of images that a library holds in memory, a name for messages"""
    label: str | None = None
    fields: Mapping[str, Scalar] = field(default_factory=dict)
    num_bytes: int | None = None
    """None where it would take a request to know"""
    data: bytes | None = None
    """the bytes, where they are not to be read from `location`"""


class Placed(NamedTuple):
    """An image in the order in which it is packed."""

    image: SourceImage
    group: str | None
    """the label, where classes lie together"""
    group_bytes: int
    """of all images of the group"""


class Offered:
    """Images by ascending key, each key once."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("")  # a file that nobody else sees
        self._db.executescript(_SETUP)

    @classmethod
    def of(cls, images: Iterable[SourceImage], *, source: str) -> Self:
        """What a source has; ConfigError for a key that is there twice."""
        offered = cls()
        for image in images:
            offered._add(image, source)
        return offered

    def _add(self, image: SourceImage, source: str) -> None:
        fields = json.dumps(dict(image.fields)) if image.fields else None
        row = image.key, image.location, image.label, fields, image.num_bytes, image.data
        try:
            self._db.execute(f"insert into image ({_COLUMNS}) values (?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError as error:
            (other,) = self._row("select location from image where key = ?", image.key)
            raise ConfigError(
                f"{source}: {other} and {image.location} have the same key {image.key!r}; a key is one "
                "image's identity, rename one"
            ) from error

    def __len__(self) -> int:
        return self._number("select count(*) from image")

    def __iter__(self) -> Iterator[SourceImage]:
        return map(_image, self._db.execute(f"select {_COLUMNS} from image order by key"))

    def __getitem__(self, place: int) -> SourceImage:
        row = self._row(f"select {_COLUMNS} from image order by key limit 1 offset ?", place)
        return _image(row)

    @property
    def num_bytes(self) -> int:
        """Of all whose size is known."""
        return self._number("select coalesce(sum(num_bytes), 0) from image")

    def labels(self) -> Iterator[str]:
        """Each once, ascending."""
        rows = self._db.execute("select distinct label from image where label is not null order by label")
        return (label for (label,) in rows)

    def keep_labels(self, first: str, last: str) -> None:
        """Only images whose label is one of these, or between them, stay."""
        self._db.execute("delete from image where label is null or label < ? or label > ?", (first, last))

    def meet(self, samples: SampleTable, *, live: npt.NDArray[np.bool_]) -> None:
        """Note which images a shard of the dataset has: as they are offered, others, or taken out."""
        rows = zip(samples.ids.tolist(), samples.labels, samples.keys, samples.sizes.tolist(), strict=True)
        for is_live, row in zip(live.tolist(), rows, strict=True):
            if is_live:
                self._db.execute(_MET_LIVE, row)
            else:
                self._db.execute(_MET_DEAD, (row[2],))

    def set_taken_out(self, is_taken_out: Callable[[str], bool]) -> None:
        """Note that the dataset had those with such a key, which it no longer tells."""
        self._db.create_function("is_taken_out", 1, is_taken_out, deterministic=True)
        self._db.execute("update image set was_there = 1 where is_taken_out(key)")

    def same_in(self, shard_number: int) -> Iterator[SourceImage]:
        """Images in files that seem to be as that shard has them, by ascending key."""
        self._db.execute("create index if not exists by_old_id on image (old_id)")
        rows = self._db.execute(
            f"select {_COLUMNS} from image where old_id between ? and ? and is_same and data is null",
            (make_id(shard_number, 0), make_id(shard_number + 1, 0) - 1),
        )
        return map(_image, rows)

    def set_changed(self, keys: Iterable[str]) -> None:
        """These are not as the dataset has them."""
        self._db.executemany("update image set is_same = 0 where key = ?", ((key,) for key in keys))

    def remove_known(self) -> int:
        """Take out what is in the dataset as it is, and what was taken out of it; how many."""
        ran = self._db.execute("delete from image where is_same or (old_id is null and was_there)")
        return ran.rowcount

    def old_ids(self, keys: Iterable[str]) -> Iterator[int]:
        """The ids that those of these images have in the dataset which it has otherwise."""
        for key in keys:
            rows = self._db.execute("select old_id from image where key = ? and old_id is not null", (key,))
            yield from (old_id for (old_id,) in rows)

    def of_unknown_size(self) -> Iterator[str]:
        """Locations by ascending key."""
        rows = self._db.execute("select location from image where num_bytes is null order by key")
        return (location for (location,) in rows)

    def set_unknown_sizes(self, num_bytes: int) -> None:
        """To the same number for all."""
        self._db.execute("update image set num_bytes = ? where num_bytes is null", (num_bytes,))

    def in_order(self, order: Order, *, seed: int, more_bytes: int) -> Iterator[Placed]:
        """All in the order of packing: shuffled, or class by class and those without a label last.

        more_bytes: what each takes beside its own.
        """

        def turn(name: str | None) -> int:
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            return int.from_bytes(digest, "big") >> 1

        self._db.create_function("turn", 1, turn, deterministic=True)
        group = _GROUP[order]
        rows = self._db.execute(
            f"""
            select {_COLUMNS}, {group}, sum(ifnull(num_bytes, 0) + ?) over (partition by {group}) from image
            order by {group} is null, turn('class ' || {group}), {group}, turn('image ' || key), key
            """,
            (more_bytes,),
        )
        for *row, of_group, group_bytes in rows:
            yield Placed(_image(row), of_group, group_bytes)

    def _row(self, statement: str, *values: str | int) -> tuple[Any, ...]:
        row: tuple[Any, ...] | None = self._db.execute(statement, values).fetchone()
        if row is None:
            raise IndexError(f"no image {values}")
        return row

    def _number(self, statement: str) -> int:
        return int(self._row(statement)[0])


def _image(row: Any) -> SourceImage:
    key, location, label, fields, num_bytes, data = row
    return SourceImage(
        key=key,
        location=location,
        label=label,
        fields=json.loads(fields) if fields else {},
        num_bytes=num_bytes,
        data=data,
    )
