"""Tables on disk: Parquet files with fixed schemas, memory-mapped columns, and the tables that users bring.

Two schemas exist: the samples of a shard and the embeddings of a shard. User fields travel as JSON text, one
object a row, so that shards of different years need no common schema. Tables for people are columns by name.
Items of a release: `item_files`.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet as pq

from namr.errors import ManifestError, ShapeError, StorageError
from namr.store import scratch

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float16] | npt.NDArray[np.float32]

_ROWS_AT_ONCE = 1 << 16
_COMPUTE_DTYPE = b"namr.compute_dtype"
_SAMPLES = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("fields", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """The samples of one shard, in row order.

    `offsets` and `sizes` are those of the image's bytes in the tar; size 0 marks an erased row.
    """

    ids: Ids
    """(n,)"""
    keys: list[str]
    labels: list[str | None]
    fields: list[str]
    """JSON objects as text, "{}" where the user gave none"""
    offsets: Ids
    """(n,)"""
    sizes: Ids
    """(n,)"""

    def __post_init__(self) -> None:
        lengths = {len(column) for column in vars(self).values()}
        if len(lengths) > 1:
            raise ShapeError(f"columns of a sample table have {sorted(lengths)} rows; expected one length")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class EmbeddingTable:
    """What a model made of one shard: the vectors of n images, and m images refused with a reason."""

    ids: Ids
    """(n,)"""
    keys: list[str]
    labels: list[str | None]
    embeddings: Vectors
    """(n, D), as the model returns x"""
    structures: Vectors
    """(n, D)"""
    refused_ids: Ids
    """(m,)"""
    refused_keys: list[str]
    refused_reasons: list[str]
    compute_dtype: str = "float32"
    """that the model was run in"""

    def __post_init__(self) -> None:
        num = len(self.ids)
        if self.embeddings.ndim != 2 or self.embeddings.shape != self.structures.shape:
            raise ShapeError(
                f"embeddings are {self.embeddings.shape} and structures {self.structures.shape}; "
                "expected (n, D) both"
            )
        if not num == len(self.keys) == len(self.labels) == len(self.embeddings):
            raise ShapeError(
                f"{num} ids, {len(self.keys)} keys, {len(self.embeddings)} embeddings; expected as many"
            )
        if not len(self.refused_ids) == len(self.refused_keys) == len(self.refused_reasons):
            raise ShapeError(f"{len(self.refused_ids)} refused ids, {len(self.refused_reasons)} reasons")
        if self.embeddings.dtype != self.structures.dtype or self.embeddings.dtype not in (
            np.float16,
            np.float32,
        ):
            raise ShapeError(
                f"embeddings are {self.embeddings.dtype}; expected float16 or float32, both alike"
            )


class VectorTable(NamedTuple):
    """What an index is built of: an `EmbeddingTable` without what is there for people to read."""

    ids: Ids
    """(n,)"""
    embeddings: Vectors
    """(n, D)"""
    structures: Vectors | None
    """(n, D), None where they were not asked for"""
    refused_ids: Ids
    """(m,)"""


def encode_samples(table: SampleTable) -> bytes:
    """The Parquet file of a sample table."""
    texts: dict[str, Sequence[str | None]] = {
        "key": table.keys,
        "label": table.labels,
        "fields": table.fields,
    }
    numbers = {"id": table.ids, "offset": table.offsets, "size": table.sizes}
    columns = {name: pa.array(column, pa.int64()) for name, column in numbers.items()}
    columns |= {name: _texts(column, name) for name, column in texts.items()}
    return _encode(pa.table([columns[name] for name in _SAMPLES.names], schema=_SAMPLES))


def decode_samples(data: bytes) -> SampleTable:
    """The sample table in a Parquet file; ManifestError if it is none."""
    table = _decode(data, _SAMPLES.names)
    return SampleTable(
        ids=_numbers(table, "id"),
        keys=table["key"].to_pylist(),
        labels=table["label"].to_pylist(),
        fields=table["fields"].to_pylist(),
        offsets=_numbers(table, "offset"),
        sizes=_numbers(table, "size"),
    )


def rows_of(table: SampleTable, rows: Ids) -> SampleTable:
    """Some rows of a sample table, in the order of `rows`."""
    return SampleTable(
        ids=table.ids[rows],
        keys=[table.keys[row] for row in rows],
        labels=[table.labels[row] for row in rows],
        fields=[table.fields[row] for row in rows],
        offsets=table.offsets[rows],
        sizes=table.sizes[rows],
    )


def encode_embeddings(table: EmbeddingTable) -> bytes:
    """The Parquet file of an embedding table; refused images are rows of NaN, with a reason.

    What float32 made says nothing of it, as files of before.

    Vectors are never null and have no dictionary: read in a sixth of the time, for 3 % more bytes.
    """
    num, num_refused = len(table.ids), len(table.refused_ids)
    reasons = _texts([*[None] * num, *table.refused_reasons], "reason")
    return _encode(
        pa.table(
            {
                "id": pa.array(np.concatenate([table.ids, table.refused_ids]), pa.int64()),
                "key": _texts(table.keys + table.refused_keys, "key"),
                "label": _texts(table.labels + [None] * num_refused, "label"),
                "embedding": _vectors_column(table.embeddings, num_refused),
                "structure": _vectors_column(table.structures, num_refused),
                "refused": reasons,
            }
        ).replace_schema_metadata(
            {_COMPUTE_DTYPE: table.compute_dtype} if table.compute_dtype != "float32" else None
        ),
        use_dictionary=["key", "label", "refused"],
    )


def decode_embeddings(data: bytes) -> EmbeddingTable:
    """The embedding table in a Parquet file; ManifestError if it is none."""
    table = _decode(data, ["id", "key", "label", "embedding", "structure", "refused"])
    is_refused = pc.is_valid(table["refused"])
    kept, refused = table.filter(pc.invert(is_refused)), table.filter(is_refused)
    return EmbeddingTable(
        ids=_numbers(kept, "id"),
        keys=kept["key"].to_pylist(),
        labels=kept["label"].to_pylist(),
        embeddings=_vectors(kept["embedding"]),
        structures=_vectors(kept["structure"]),
        refused_ids=_numbers(refused, "id"),
        refused_keys=refused["key"].to_pylist(),
        refused_reasons=refused["refused"].to_pylist(),
        compute_dtype=(table.schema.metadata or {}).get(_COMPUTE_DTYPE, b"float32").decode(),
    )


def decode_vectors(data: bytes, *, structures: bool) -> VectorTable:
    """The vectors in a Parquet file of an embedding table; other columns are not decoded."""
    names = ["id", "embedding", "refused"] + ["structure"] * structures
    table = _decode(data, names)
    ids, is_refused = _numbers(table, "id"), pc.is_valid(table["refused"]).to_numpy()
    columns = [_vectors(table[name]) for name in ("embedding", "structure") if name in names]
    if is_refused.any():
        columns = [column[~is_refused] for column in columns]
    return VectorTable(ids[~is_refused], columns[0], columns[1] if structures else None, ids[is_refused])


def encode_columns(columns: Mapping[str, npt.NDArray[Any] | Sequence[str | None]]) -> bytes:
    """The Parquet file of columns of one length: arrays as they are, and texts, null where they are None."""
    made = {
        name: pa.array(column) if isinstance(column, np.ndarray) else _texts(column, name)
        for name, column in columns.items()
    }
    return _encode(pa.table(made))


def write_columns(folder: Path, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write columns that `open_columns` maps; the folder appears whole or not at all, and stays if there."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch.sweep(folder.parent)
    with scratch.folder_beside(folder) as temporary:
        for name, column in columns.items():
            np.save(temporary / f"{name}.npy", column)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise


def open_columns(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """Columns written by `write_columns`, memory-mapped for reading."""
    paths = sorted(folder.glob("*.npy"))
    if not paths:
        raise StorageError(f"{folder} holds no columns; write them first")
    return {path.stem: np.load(path, mmap_mode="r") for path in paths}


def read_rows(path: Path) -> Iterator[dict[str, list[Any]]]:
    """The columns of a user's CSV (with a header) or Parquet file, some rows at a time; first of no row.

    Every value of a CSV is text, an empty field of it None. ManifestError if the file can't be read as what
    its suffix says.
    """
    try:
        for batch in _batches(path):
            yield cast(dict[str, list[Any]], pa.Table.from_batches([batch]).to_pydict())
    except (pa.ArrowException, OSError, UnicodeEncodeError) as error:
        raise ManifestError(f"{str(path)!a} can't be read as a table: {error}") from error


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix.lower() in (".parquet", ".pq"):
        dataset = pyarrow.dataset.dataset(path, format="parquet", partitioning="hive")
        schema = dataset.schema
        batches = dataset.to_batches(batch_size=_ROWS_AT_ONCE, batch_readahead=2, fragment_readahead=1)
    else:
        names = pyarrow.csv.open_csv(path).schema.names
        options = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        )
        batches = pyarrow.csv.open_csv(path, convert_options=options)
        schema = batches.schema
    yield pa.RecordBatch.from_pylist([], schema=schema)
    yield from batches


def fields_text(fields: Mapping[str, Any]) -> str:
    """User fields as the JSON text that sample tables keep; ManifestError for what can't be kept."""
    try:
        text = json.dumps(fields, ensure_ascii=False, sort_keys=True, default=str)
        text.encode()
    except RecursionError:
        raise ManifestError("fields of a sample are nested too deep; expected a few levels") from None
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"fields of a sample have half a character (a lone surrogate) in {text[:80]!a}; expected Unicode"
        ) from error
    return text


def _texts(values: Sequence[str | None], name: str) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"a {name} has half a character (a lone surrogate) in {error.object[:80]!a}; expected Unicode"
        ) from error


def _encode(table: pa.Table, *, use_dictionary: bool | list[str] = True) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=use_dictionary)
    return sink.getvalue()


def _decode(data: bytes, names: Sequence[str]) -> pa.Table:
    """These columns of a Parquet file; no other is read."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        there = file.schema_arrow.names
        if set(names) <= set(there):
            return file.read(columns=list(names), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"not a Parquet file that can be read ({len(data)} bytes): {error}") from error
    raise ManifestError(f"a table lacks the columns {sorted(set(names) - set(there))}; it has {there}")


def _numbers(table: pa.Table, name: str) -> Ids:
    return np.ascontiguousarray(table[name].to_numpy(), dtype=np.int64)


def _vectors_column(vectors: Vectors, num_refused: int) -> pa.FixedSizeListArray:
    """Refused rows are NaN, not null: Parquet readers stumble over null lists of a fixed size."""
    dim = vectors.shape[1]
    flat = pa.array(np.concatenate([vectors, np.full((num_refused, dim), np.nan, vectors.dtype)]).ravel())
    element = pa.field("element", flat.type, nullable=False)
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(element, dim))


def _vectors(column: pa.ChunkedArray) -> Vectors:
    dim = column.type.list_size
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return cast(Vectors, np.ascontiguousarray(flat).reshape(-1, dim))
