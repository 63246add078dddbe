"""The items of a release on disk: Arrow files with real columns, mapped into memory and never decoded whole.

A file holds one record batch, rows by ascending id:

    id, offset, size: int64    key: text    label: text or null
    field:<name>               each user field as text, int64, float64 or bool; null where an image lacks it
    key_hash, key_row          64-bit hashes of all keys, ascending, and the row of each

A field's type is that of its values in one file. Whole numbers among others become float64. Where an image
has text and another a number, or a boolean, the values are kept as JSON: they are shown as they were packed,
and can't be filtered by. A field that is null in a whole file has no column there.

Not covered: which files a release has (`release.releases`), and lookups over several (`search.items`).
Legend: n items of a file.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from namr.errors import ManifestError
from namr.store.tables import SampleTable

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Scalar = str | int | float | bool | None
Kind = Literal["text", "number", "boolean", "mixed"]
"""mixed: values of several kinds, which can be shown and not compared"""

_FIELD = "field:"
_MIXED = {b"kind": b"mixed"}
_TYPES = {
    "id": pa.int64(),
    "key": pa.large_string(),
    "label": pa.large_string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "key_hash": pa.uint64(),
    "key_row": pa.int32(),
}
_INT64 = np.iinfo(np.int64)
_EXACT_IN_FLOAT64 = 1 << 53


class AnyOf(NamedTuple):
    """A value is one of these; None stands for no value."""

    values: tuple[Scalar, ...]


class Between(NamedTuple):
    """A value is at least `min` and at most `max`; None is no bound. Text goes by code points."""

    min: Scalar
    max: Scalar


Condition = AnyOf | Between


class ItemFile:
    """One file of items. Python objects are made of the rows that are asked for, and of no others."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        for name, wanted in _TYPES.items():
            at = batch.schema.get_field_index(name)
            if at < 0 or batch.schema.field(at).type != wanted:
                raise ManifestError(
                    f"a file of items has no column {name!r} of {wanted}; build the release anew"
                )
        self._columns = {field.name: batch.column(at) for at, field in enumerate(batch.schema)}
        self._kinds = {field.name: _kind_of(field) for field in batch.schema if field.name.startswith(_FIELD)}

    def __len__(self) -> int:
        return len(self._columns["id"])

    @functools.cached_property
    def ids(self) -> Ids:
        """(n,) mapped."""
        return self._numbers("id")

    @functools.cached_property
    def offsets(self) -> Ids:
        """(n,) of the image's bytes in the tar."""
        return self._numbers("offset")

    @functools.cached_property
    def sizes(self) -> Ids:
        """(n,) bytes of the image; 0 where it was erased."""
        return self._numbers("size")

    @property
    def kinds(self) -> dict[str, Kind]:
        """What kind of values the user's fields hold."""
        return {name.removeprefix(_FIELD): kind for name, kind in self._kinds.items()}

    def key(self, row: int) -> str:
        """The key of a row."""
        return str(self._columns["key"][row].as_py())

    def label(self, row: int) -> str | None:
        """The label of a row."""
        label: str | None = self._columns["label"][row].as_py()
        return label

    def fields(self, row: int) -> dict[str, Any]:
        """The user's fields of a row, those that are not null."""
        shown = {}
        for name, kind in self._kinds.items():
            value = self._columns[name][row].as_py()
            if value is not None:
                shown[name.removeprefix(_FIELD)] = json.loads(value) if kind == "mixed" else value
        return shown

    def row_of_key(self, key: str) -> int | None:
        """The row with this key, None if there is none."""
        wanted = np.uint64(hash_of(key))
        start, stop = (int(np.searchsorted(self.hashes, wanted, side)) for side in ("left", "right"))
        rows = (int(row) for row in self.rows_by_hash[start:stop])
        return next((row for row in rows if self.key(row) == key), None)

    def label_counts(self) -> dict[str, int]:
        """How many items have each label; one entry a label."""
        counted = pc.value_counts(self._columns["label"]).to_pylist()
        return {each["values"]: each["counts"] for each in counted if each["values"] is not None}

    def values(self, name: str | None, rows: Ids) -> list[Any]:
        """The label (name None), or a field as it is stored, of some rows; None where there is no value."""
        column = self._columns.get("label" if name is None else _FIELD + name)
        return [None] * len(rows) if column is None else column.take(pa.array(rows)).to_pylist()

    def mask(self, name: str | None, condition: Condition) -> Mask:
        """(n,) whether the label (name None), or a field, is as `condition` has it."""
        column = self._columns.get("label" if name is None else _FIELD + name)
        if column is None:
            return np.full(len(self), isinstance(condition, AnyOf) and None in condition.values)
        found = _any_of(column, condition) if isinstance(condition, AnyOf) else _between(column, condition)
        mask: Mask = pc.fill_null(found, False).to_numpy(zero_copy_only=False)
        return mask

    @functools.cached_property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """(n,) of the keys, ascending."""
        return np.asarray(self._columns["key_hash"].to_numpy())

    @functools.cached_property
    def rows_by_hash(self) -> npt.NDArray[np.int32]:
        """(n,) the row of each of `hashes`."""
        return np.asarray(self._columns["key_row"].to_numpy())

    def _numbers(self, name: str) -> Ids:
        return np.asarray(self._columns[name].to_numpy())


def open_file(path: Path) -> ItemFile:
    """A local file, mapped; nothing is read but its schema, and no file descriptor stays open."""
    with pa.memory_map(str(path)) as file:
        return _read(file, str(path))


def decode(data: bytes) -> ItemFile:
    """A file from its bytes; ManifestError where they are none."""
    return _read(pa.BufferReader(data), f"{len(data)} bytes")


def encode(tables: Iterable[SampleTable]) -> bytes:
    """The file of some samples, whose ids ascend through all tables."""
    numbers: dict[str, list[Ids]] = {"id": [], "offset": [], "size": []}
    keys: list[str] = []
    labels: list[str | None] = []
    fields: dict[str, list[Scalar]] = {}
    for table in tables:
        for name, column in (("id", table.ids), ("offset", table.offsets), ("size", table.sizes)):
            numbers[name].append(column)
        _add_fields(fields, table.fields, num_before=len(keys))
        keys += table.keys
        labels += table.labels
    columns = {
        name: pa.array(np.concatenate([np.empty(0, np.int64), *parts]), pa.int64())
        for name, parts in numbers.items()
    }
    hashes = np.array([hash_of(key) for key in keys], np.uint64)
    order = np.argsort(hashes, kind="stable")
    columns |= {
        "key": pa.array(keys, pa.large_string()),
        "label": pa.array(labels, pa.large_string()),
        "key_hash": pa.array(hashes[order], pa.uint64()),
        "key_row": pa.array(order.astype(np.int32), pa.int32()),
    }
    schema = [pa.field(name, _TYPES[name]) for name in columns]
    for name in sorted(fields):
        values = fields[name] + [None] * (len(keys) - len(fields[name]))
        made = _field_column(_FIELD + name, values)
        if made is not None:
            schema.append(made.field)
            columns[made.field.name] = made.column
    batch = pa.record_batch(list(columns.values()), schema=pa.schema(schema))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def hash_of(key: str) -> int:
    """64 bits of BLAKE2b of a key."""
    data = key.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def joined_kinds(files: Iterable[ItemFile]) -> dict[str, Kind]:
    """What kind of values each field holds in all files."""
    kinds: dict[str, Kind] = {}
    for file in files:
        for name, kind in file.kinds.items():
            kinds[name] = kind if kinds.get(name, kind) == kind else "mixed"
    return kinds


def _read(file: Any, what: str) -> ItemFile:
    try:
        reader = pa.ipc.open_file(file)
        if reader.num_record_batches != 1:
            raise ManifestError(
                f"{what}: {reader.num_record_batches} record batches; a file of items has one"
            )
        return ItemFile(reader.get_batch(0))
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"not a file of items ({what}): {error}; build the release anew") from error


def _add_fields(fields: dict[str, list[Scalar]], texts: Sequence[str], *, num_before: int) -> None:
    """Puts the JSON of each row in the columns; a column ends with the last row that has its field."""
    for row, text in enumerate(texts, start=num_before):
        given: Mapping[str, Scalar] = json.loads(text) if text != "{}" else {}
        for name, value in given.items():
            column = fields.setdefault(name, [])
            column += [None] * (row - len(column))
            column.append(value)


class _Column(NamedTuple):
    """A column with its name and type."""

    field: pa.Field
    column: pa.Array


def _field_column(name: str, values: list[Scalar]) -> _Column | None:
    """The column of a user's field; None where no image has a value."""
    types = {type(value) for value in values} - {type(None)}
    if not types:
        return None
    made: pa.DataType | None = None
    whole = [value for value in values if type(value) is int]
    if types == {bool}:
        made = pa.bool_()
    elif types == {str}:
        made = pa.large_string()
    elif types == {int} and _INT64.min <= min(whole) and max(whole) <= _INT64.max:
        made = pa.int64()
    elif types <= {int, float} and all(abs(value) <= _EXACT_IN_FLOAT64 for value in whole):
        made = pa.float64()
    if made is not None:
        return _Column(pa.field(name, made), pa.array(values, made))
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return _Column(pa.field(name, pa.large_string(), metadata=_MIXED), pa.array(texts, pa.large_string()))


def _kind_of(field: pa.Field) -> Kind:
    if field.metadata and field.metadata.get(b"kind") == b"mixed":
        return "mixed"
    kinds: dict[pa.DataType, Kind] = {
        pa.large_string(): "text", pa.int64(): "number", pa.float64(): "number", pa.bool_(): "boolean",
    }  # fmt: skip
    if field.type not in kinds:
        raise ManifestError(f"a file of items has {field.name!r} of {field.type}; build the release anew")
    return kinds[field.type]


def _any_of(column: pa.Array, condition: AnyOf) -> pa.Array:
    return pc.is_in(column, value_set=pa.array(list(_stored(column, condition.values)), column.type))


def _stored(column: pa.Array, values: Iterable[Any]) -> Iterator[Scalar]:
    """Values as a column may hold them; a number that it can't hold is in no row of it."""
    for value in values:
        if value is None or column.type not in (pa.int64(), pa.float64()):
            yield value
        elif column.type == pa.float64():
            yield float(value)
        elif value == math.floor(value) and _INT64.min <= value <= _INT64.max:
            yield int(value)


def _between(column: pa.Array, condition: Between) -> pa.Array:
    low: Any = condition.min
    high: Any = condition.max
    if column.type == pa.int64():  # compared as whole numbers, exact beyond 2^53 too
        low = None if low is None else math.ceil(low)
        high = None if high is None else math.floor(high)
        if (low is not None and low > _INT64.max) or (high is not None and high < _INT64.min):
            return pa.nulls(len(column), pa.bool_())
        low = None if low is None else max(low, _INT64.min)
        high = None if high is None else min(high, _INT64.max)
    elif column.type == pa.float64():
        low, high = (None if bound is None else float(bound) for bound in (low, high))
    found = pc.is_valid(column)
    if low is not None:
        found = pc.and_(found, pc.greater_equal(column, pa.scalar(low, column.type)))
    if high is not None:
        found = pc.and_(found, pc.less_equal(column, pa.scalar(high, column.type)))
    return found
