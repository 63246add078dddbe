import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow as pa
import pyarrow.parquet
import pyarrow.parquet as pq
import pytest

from namr.errors import ManifestError, ShapeError, StorageError
from namr.store import tables
from namr.store.tables import EmbeddingTable, SampleTable


def sample_table(num: int) -> SampleTable:
    return SampleTable(
        ids=np.arange(num) + (7 << 32),
        keys=[f"schlüssel-{row}" for row in range(num)],
        labels=[None if row % 2 else "a" for row in range(num)],
        fields=[tables.fields_text({"price": row, "name": "ä"}) for row in range(num)],
        offsets=np.arange(num) * 512,
        sizes=np.full(num, 100),
    )


def embedding_table(num: int, num_refused: int, dtype: type) -> EmbeddingTable:
    rng = np.random.default_rng(0)
    return EmbeddingTable(
        ids=np.arange(num),
        keys=[str(row) for row in range(num)],
        labels=[None if row % 2 else "a" for row in range(num)],
        embeddings=rng.normal(size=(num, 4)).astype(dtype),
        structures=rng.normal(size=(num, 4)).astype(dtype),
        refused_ids=np.arange(num_refused) + num,
        refused_keys=[f"bad-{row}" for row in range(num_refused)],
        refused_reasons=["truncated"] * num_refused,
    )


def assert_equal(one: object, other: object) -> None:
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)
        if isinstance(value, np.ndarray):
            assert value.dtype == getattr(other, name).dtype


@pytest.mark.parametrize("num", [0, 1, 5])
def test_sample_tables_read_back_equal(num: int) -> None:
    table = sample_table(num)
    assert_equal(table, tables.decode_samples(tables.encode_samples(table)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("num", "num_refused"), [(3, 2), (3, 0), (0, 2), (0, 0)])
def test_embedding_tables_read_back_equal(num: int, num_refused: int, dtype: type) -> None:
    table = embedding_table(num, num_refused, dtype)
    assert_equal(table, tables.decode_embeddings(tables.encode_embeddings(table)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("num", "num_refused"), [(3, 2), (3, 0), (0, 2), (0, 0)])
def test_vectors_alone_are_those_of_the_whole_table(num: int, num_refused: int, dtype: type) -> None:
    data = tables.encode_embeddings(embedding_table(num, num_refused, dtype))
    whole = tables.decode_embeddings(data)
    for structures in (True, False):
        alone = tables.decode_vectors(data, structures=structures)
        for name in ("ids", "embeddings", "refused_ids"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(whole, name))
        assert alone.embeddings.dtype == dtype
        if structures:
            np.testing.assert_array_equal(alone.structures, whole.structures)
        else:
            assert alone.structures is None


def test_columns_that_nobody_asked_for_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked, file = tables.encode_embeddings(embedding_table(3, 1, np.float16)), [], pq.ParquetFile

    class Watched(file):
        def read(self, columns: list[str], use_threads: bool) -> pa.Table:
            asked.append(columns)
            return super().read(columns=columns, use_threads=use_threads)

    monkeypatch.setattr(tables.pq, "ParquetFile", Watched)
    tables.decode_vectors(data, structures=False)
    assert asked == [["id", "embedding", "refused"]]


def test_a_file_from_before_vectors_were_written_without_dictionary_is_read_as_well() -> None:
    table = embedding_table(3, 2, np.float16)
    stored = pq.read_table(io.BytesIO(tables.encode_embeddings(table)))
    for name in ("embedding", "structure"):
        nullable = pa.FixedSizeListArray.from_arrays(stored[name].combine_chunks().flatten(), 4)
        stored = stored.set_column(stored.schema.get_field_index(name), name, nullable)
    sink = io.BytesIO()
    pq.write_table(stored, sink, compression="zstd")
    assert_equal(table, tables.decode_embeddings(sink.getvalue()))
    np.testing.assert_array_equal(
        tables.decode_vectors(sink.getvalue(), structures=False).embeddings, table.embeddings
    )


def test_rows_of_a_table_are_those_asked_for_in_that_order() -> None:
    some = tables.rows_of(sample_table(5), np.array([3, 1]))
    assert (some.ids.tolist(), some.keys) == ([(7 << 32) + 3, (7 << 32) + 1], ["schlüssel-3", "schlüssel-1"])
    assert (some.labels, some.offsets.tolist(), some.sizes.tolist()) == (
        [None, None],
        [1536, 512],
        [100, 100],
    )
    assert some.fields == [sample_table(5).fields[3], sample_table(5).fields[1]]


def test_the_same_table_has_the_same_bytes() -> None:
    assert tables.encode_embeddings(embedding_table(9, 2, np.float16)) == tables.encode_embeddings(
        embedding_table(9, 2, np.float16)
    )


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[1, 2\]"):
        SampleTable(
            ids=np.arange(2), keys=["a"], labels=[None, None], fields=["{}", "{}"],
            offsets=np.arange(2), sizes=np.arange(2),
        )  # fmt: skip


def test_what_is_no_such_table_is_refused() -> None:
    data = tables.encode_samples(sample_table(3))
    with pytest.raises(ManifestError, match="not a Parquet file"):
        tables.decode_samples(data[:-20])
    with pytest.raises(ManifestError, match=r"lacks the columns \['embedding', 'refused', 'structure'\]"):
        tables.decode_embeddings(data)


def test_columns_are_mapped_and_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "columns"
    tables.write_columns(folder, {"a": np.arange(5), "b": np.zeros((2, 3), np.float16)})
    tables.write_columns(folder, {"a": np.arange(9)})
    columns = tables.open_columns(folder)
    assert isinstance(columns["a"], np.memmap)
    np.testing.assert_array_equal(columns["a"], np.arange(5))
    assert not columns["a"].flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["columns"]


def test_missing_columns_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no columns"):
        tables.open_columns(tmp_path / "none")


def test_every_value_of_a_csv_is_text(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('path,label,sku\na.jpg,,007\n"b,c.jpg",cat,12\n')
    assert list(tables.read_rows(path)) == [
        {"path": [], "label": [], "sku": []},
        {"path": ["a.jpg", "b,c.jpg"], "label": [None, "cat"], "sku": ["007", "12"]},
    ]


def test_a_parquet_of_the_users_keeps_its_types(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a"], "price": [1.5]}), tmp_path / "t.parquet")
    nothing, rows = tables.read_rows(tmp_path / "t.parquet")
    assert (nothing, rows) == ({"path": [], "price": []}, {"path": ["a"], "price": [1.5]})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_large_table_comes_some_rows_at_a_time(suffix: str, tmp_path: Path) -> None:
    texts, path = [f"{row:08d}.jpg" for row in range(200_000)], tmp_path / f"t.{suffix}"
    if suffix == "csv":
        path.write_text("path\n" + "\n".join(texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"path": texts}), path)
    sizes, found = [], []
    for columns in tables.read_rows(path):
        sizes.append(len(columns["path"]))
        found += columns["path"]
    assert found == texts
    assert max(sizes) <= 1 << 17


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_an_unreadable_table_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"a,b\n1\n")
    with pytest.raises(ManifestError, match=name):
        list(tables.read_rows(path))


@pytest.mark.parametrize("column", ["key", "label", "field"])
def test_half_a_character_is_refused_by_name(column: str) -> None:
    half = "fuß-\ud800"
    with pytest.raises(ManifestError, match=r"half a character \(a lone surrogate\) in '.*fu.*\\ud800"):
        tables.encode_samples(
            SampleTable(
                ids=np.arange(1),
                keys=[half if column == "key" else "k"],
                labels=[half if column == "label" else None],
                fields=[tables.fields_text({"name": half if column == "field" else "n"})],
                offsets=np.arange(1),
                sizes=np.arange(1),
            )
        )


def test_fields_that_are_nested_absurdly_deep_are_refused() -> None:
    fields: dict[str, object] = {}
    for _ in range(50_000):
        fields = {"a": fields}
    with pytest.raises(ManifestError, match="nested too deep"):
        tables.fields_text(fields)


@pytest.mark.parametrize("name", ["a\0b.csv", "a\0b.parquet", "\ud800.csv", "\ud800.parquet"])
def test_a_table_whose_name_is_no_text_is_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="can't be read as a table"):
        list(tables.read_rows(Path(name)))


def test_columns_for_people_keep_their_types_with_and_without_rows() -> None:
    for num in (2, 0):
        columns = {"id": np.arange(num), "far": np.arange(num) / 2, "label": [None, "schön"][:num]}
        read = pq.read_table(io.BytesIO(tables.encode_columns(columns)))
        assert [str(field.type) for field in read.schema] == ["int64", "double", "string"]
        assert read.to_pydict() == {name: list(column) for name, column in columns.items()}
    with pytest.raises(ManifestError, match="a label has half a character"):
        tables.encode_columns({"label": ["\ud800"]})


def test_what_a_model_ran_in_is_kept_and_float32_changes_no_byte() -> None:
    """Files of before say nothing, and are found again by their digests."""
    table = embedding_table(3, 1, np.float16)
    lower = replace(table, compute_dtype="bfloat16")
    assert tables.decode_embeddings(tables.encode_embeddings(lower)).compute_dtype == "bfloat16"
    plain = tables.encode_embeddings(table)
    assert tables.decode_embeddings(plain).compute_dtype == "float32"
    assert set(pq.read_metadata(io.BytesIO(plain)).metadata) == {b"ARROW:schema"}
