"""Files of items: what went in comes out row by row, fields with types of their own, keys by their hash."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from namr.errors import ManifestError
from namr.store import item_files, tables
from namr.store.item_files import AnyOf, Between, Condition, ItemFile
from namr.store.tables import SampleTable


def table(*fields: dict[str, Any], first_id: int = 0) -> SampleTable:
    num = len(fields)
    ids = first_id + np.arange(num)
    return SampleTable(
        ids=ids,
        keys=[f"schlüssel/{each}" for each in ids],
        labels=[None if row % 3 == 2 else f"label {row % 3}" for row in range(num)],
        fields=[tables.fields_text(each) for each in fields],
        offsets=512 * ids,
        sizes=np.full(num, 100),
    )


def file_of(*fields: dict[str, Any]) -> ItemFile:
    return item_files.decode(item_files.encode([table(*fields)]))


def test_a_mapped_file_says_what_went_in(tmp_path: Path) -> None:
    given = [{"price": 1, "name": "ä", "old": True}, {}, {"name": None, "weight": 0.5, "": "no name"}]
    parts = [table(*given), table({"price": -7, "size": "L"}, first_id=1 << 32)]
    data = item_files.encode(parts)
    (tmp_path / "items").write_bytes(data)
    file = item_files.open_file(tmp_path / "items")
    (tmp_path / "items").unlink()  # what is mapped stays
    assert len(file) == 4
    assert file.ids.tolist() == [0, 1, 2, 1 << 32]
    assert [file.key(row) for row in range(4)] == parts[0].keys + parts[1].keys
    assert [file.label(row) for row in range(4)] == ["label 0", "label 1", None, "label 0"]
    assert file.fields(0) == {"price": 1, "name": "ä", "old": True}
    assert (file.fields(1), file.fields(2)) == ({}, {"weight": 0.5, "": "no name"})
    assert file.fields(3) == {"price": -7, "size": "L"}
    assert (file.offsets.tolist(), file.sizes.tolist()) == ([0, 512, 1024, 512 << 32], [100] * 4)
    assert file.label_counts() == {"label 0": 2, "label 1": 1}
    assert item_files.encode(parts) == data


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", None], "text"),
        ([3, -(2**63), 2**63 - 1], "number"),
        ([1, 0.5], "number"),
        ([float("inf"), -0.0], "number"),
        ([True, False, None], "boolean"),
        ([1, "1"], "mixed"),
        ([1, True, 1.0], "mixed"),
        ([2**63, 1], "mixed"),
        ([2**53 + 1, 0.5], "mixed"),
    ],
)
def test_a_field_has_the_type_of_its_values_and_none_is_changed(values: list[Any], kind: str) -> None:
    file = file_of(*({"field": value} for value in values))
    assert file.kinds == {"field": kind}
    shown = [file.fields(row).get("field") for row in range(len(values))]
    assert shown == values
    if kind == "mixed":
        assert list(map(type, shown)) == list(map(type, values))


def test_a_field_that_is_null_everywhere_has_no_column() -> None:
    file = file_of({"note": None}, {})
    assert file.kinds == {}
    assert file.mask("note", AnyOf((None, "a"))).tolist() == [True, True]
    assert file.mask("note", AnyOf(("a",))).tolist() == [False, False]
    assert file.mask("note", Between(None, "z")).tolist() == [False, False]


def test_kinds_of_several_files_are_joined() -> None:
    files = [file_of({"a": 1, "b": "x"}), file_of({"a": 0.5, "b": 2}), file_of({"c": True})]
    assert item_files.joined_kinds(files) == {"a": "number", "b": "mixed", "c": "boolean"}
    assert item_files.joined_kinds([]) == {}


def test_keys_with_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(item_files, "hash_of", lambda _: 2**64 - 1)
        file = file_of({}, {}, {})
        assert [file.row_of_key(f"schlüssel/{row}") for row in range(4)] == [0, 1, 2, None]
    assert file_of({}).row_of_key("half \ud800") is None


VALUES = [3, None, -(2**63), 2**53 + 1, 7, 2**63 - 1]
FLOATS = [0.5, None, float("inf"), -1.0, 7.0, 1e300]
TEXTS = ["b", None, "", "ba", "a", "ä"]


@pytest.mark.parametrize("values", [VALUES, FLOATS, TEXTS, [True, None, False]])
def test_masks_are_what_a_loop_says(values: list[Any]) -> None:
    file = file_of(*({"x": value} for value in values))
    known = [value for value in values if value is not None]
    more = [0.25, -(10**30), 10**30, 6.5] if values in (VALUES, FLOATS) else []
    conditions: list[Condition] = [AnyOf((value,)) for value in [None, *known, *more]]
    conditions += [AnyOf((known[0], None)), AnyOf(()), AnyOf(tuple([*known, *more]))]
    if not isinstance(known[0], bool):
        bounds = [None, *known, *more]
        conditions += [Between(low, high) for low in bounds for high in bounds]
    for condition in conditions:
        if isinstance(condition, AnyOf):
            expected = [value in condition.values for value in values]
        else:
            low, high = condition
            expected = [
                value is not None and (low is None or value >= low) and (high is None or value <= high)
                for value in values
            ]
        assert file.mask("x", condition).tolist() == expected, condition


def test_labels_are_masked_like_any_field() -> None:
    file = file_of({"label 2": 1}, {}, {})
    assert file.mask(None, AnyOf(("label 1", None))).tolist() == [False, True, True]


def test_values_of_some_rows() -> None:
    file = file_of({"a": 1}, {}, {"a": 0.5}, {"a": 2})
    rows = np.array([3, 1, 2])
    assert file.values("a", rows) == [2.0, None, 0.5]
    assert file.values(None, rows) == ["label 0", "label 1", None]
    assert file.values("nosuch", rows) == [None] * 3


def test_what_is_no_file_of_items_is_refused(tmp_path: Path) -> None:
    data = item_files.encode([table({})])
    for damaged in (b"", b"no arrow", data[:-20]):
        with pytest.raises(ManifestError, match="not a file of items"):
            item_files.decode(damaged)
    (tmp_path / "empty").touch()
    with pytest.raises(ManifestError, match="not a file of items"):
        item_files.open_file(tmp_path / "empty")
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"id": pa.array([1], pa.int32())})
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ManifestError, match="no column 'id' of int64"):
        item_files.decode(sink.getvalue().to_pybytes())


def test_of_no_items_a_file_is_empty() -> None:
    file = item_files.decode(item_files.encode([]))
    assert (len(file), file.kinds, file.row_of_key("a"), json.dumps(file.label_counts())) == (
        0,
        {},
        None,
        "{}",
    )
