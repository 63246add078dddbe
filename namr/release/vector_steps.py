"""The steps that store the re-rank vectors in the order of the segment's lists: place, sort, join.

    segment                  -> places: the row of every sample
    embeddings, some shards  -> a piece: their vectors by ascending row, in the work folder
    pieces                   -> files: rows one after the other, in the releases

What a search compares lies near each other then, in few large files. A task holds one piece, or few that are
read ahead, and writes its file through the page cache. A file that is recorded is not joined again; pieces
are named by their digests, and deleted when all files are there.

Not covered: which tasks there are (`build`), and reading the files (`search.vectors`).
Legend: n items, D dimension.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from namr.embed import embeddings
from namr.embed.embeddings import EmbeddingFile
from namr.errors import ManifestError, ObjectMissing, ShapeError
from namr.index import index_files
from namr.model import distances
from namr.model.distances import Metric
from namr.release import arrays, build_steps, places, releases
from namr.release.build_steps import VectorSource
from namr.release.places import Places, Rows
from namr.release.releases import VectorFile
from namr.store import manifests, read_ahead, scratch, storage
from namr.store.manifests import StoredObject
from namr.store.storage import Range
from namr.store.tables import Vectors

FILE_BYTES = 4 << 30
"""of one file of vectors, at most"""
PIECE_BYTES = 64 << 20
"""of one piece, more only where a shard is larger; sorting it takes four times as much memory"""
_NUM_READERS = 3
"""pieces that are read ahead while one is written"""

Ids = npt.NDArray[np.int64]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The places of a segment's ids, as the work folder remembers them."""

    FORMAT: ClassVar[str] = "namr-places"
    FORMAT_VERSION: ClassVar[int] = 1

    shards: StoredObject
    rows: StoredObject
    num_rows: int

    def span(self, first: int, num: int, *, of: int, root_uri: str) -> Range:
        """Where `num` of all `of` rows lie in their file, from the one in place `first` on."""
        width = np.dtype(places.dtype_of(self.num_rows)).itemsize
        start = self.rows.size_bytes - width * (of - first)
        return Range(storage.join(root_uri, self.rows.name), start, start + width * num)


class PlaceTask(NamedTuple):
    """A segment, and all shards of its dataset: (S, 2) number and how many samples."""

    segment: StoredObject
    shards: Ids
    work_uri: str
    releases_uri: str


def place(task: PlaceTask) -> Placed:
    """Store which row each sample gets: its place in the lists of the segment, in Flat among the ids."""
    root = task.releases_uri

    def make() -> Placed:
        with scratch.folder("place-") as folder:
            ids = index_files.ids_in(build_steps.fetched(root, task.segment, folder))
        rows = places.rows_of(ids, task.shards)
        return Placed(
            shards=releases.store(root, "vector-shards.npy", arrays.encode_array(task.shards)),
            rows=releases.store(root, "vector-rows.npy", arrays.encode_array(rows)),
            num_rows=len(ids),
        )

    def is_there(placed: Placed) -> bool:
        return all(releases.is_there(root, of) for of in (placed.shards, placed.rows))

    return manifests.recorded(storage.join(task.work_uri, "places.json"), Placed, make, holds=is_there)


class SortTask(NamedTuple):
    """Some shards in a row, and where their samples belong."""

    source: VectorSource
    files: list[EmbeddingFile]
    shards: Ids
    """(S, 2) of these files"""
    rows: Range
    """of the table of rows"""
    num_rows: int
    rows_per_file: int
    work_uri: str
    number: int


class ShardVectors(NamedTuple):
    """What was stored of a shard: how much, and no list of it, so that it can go through the driver."""

    num_indexed: int
    ids_sum: int
    """of these, see `index_files.sum_of_ids`"""
    num_refused: int


class Piece(NamedTuple):
    """The vectors of some shards, by ascending row."""

    stored: StoredObject
    bounds: list[int]
    """its records that belong to file i begin at i, and end at i + 1"""
    shards: list[ShardVectors]
    min_structure: float
    """the smallest weight in it; 1 where it has no vector"""


def sort(task: SortTask) -> Piece:
    """Store the vectors of the live rows of some shards as a piece.

    Ids that the segment lacks have no place and are left out; the build, which compares the ids, finds them.
    """
    table_of_rows: Rows = np.frombuffer(storage.read_ranges([task.rows])[0], places.dtype_of(task.num_rows))
    of_shards = Places(task.shards, table_of_rows)
    dim = task.files[0].embedding_dim
    records, stored, stop = np.empty(sum(file.num_embedded for file in task.files), _record(dim)), [], 0
    for file in task.files:
        table = embeddings.read_vectors(task.source.embeddings_uri, file, structures=True)
        assert table.structures is not None, "asked for"
        live = task.source.live(table.ids)
        ids, num_refused = table.ids[live], int(task.source.live(table.refused_ids).sum())
        stored.append(ShardVectors(len(ids), index_files.sum_of_ids(ids), num_refused))
        start, stop = stop, stop + len(ids)
        records["row"][start:stop] = of_shards.of(ids)
        x, s, what = table.embeddings[live], table.structures[live], f"shard {file.number}"
        records["vectors"][start:stop] = side_by_side(x, s, metric=task.source.metric, what=what)
    records = records[np.argsort(records["row"][:stop])]
    records = records[np.searchsorted(records["row"], 0) :]
    data = records.tobytes()
    digest = storage.sha256(data)
    name = f"vectors-{task.number:05d}-{digest[:12]}"
    num_files = -(-task.num_rows // task.rows_per_file)
    return Piece(
        stored=manifests.write_object(task.work_uri, name, data, sha256=digest),
        bounds=np.searchsorted(records["row"], task.rows_per_file * np.arange(num_files + 1)).tolist(),
        shards=stored,
        min_structure=float(records["vectors"][:, 1].min()) if len(records) else 1.0,
    )


def side_by_side(x: Vectors, s: Vectors, *, metric: Metric, what: str) -> Halves:
    """Embeddings as the model returned them (n, D), structures (n, D) -> both as they are stored (n, 2, D).

    Embeddings are stored as they are searched. ShapeError for values that float16 can't hold.
    """
    searched = distances.for_search(torch.from_numpy(x), metric).numpy()
    both = np.empty((len(x), 2, x.shape[1]), np.float16)
    for at, (name, vectors) in enumerate((("embedding", searched), ("structure", s))):
        with np.errstate(over="ignore"):
            both[:, at] = vectors
        if not np.isfinite(both[:, at]).all():
            largest = float(np.abs(vectors).max())
            raise ShapeError(
                f"{what}: {name}s up to {largest:g} don't fit float16 (65504); fold the model's scale"
            )
    return both


@dataclass(frozen=True, kw_only=True)
class JoinedFile:
    """A file of vectors that is done, as the work folder remembers it."""

    FORMAT: ClassVar[str] = "namr-vectors-file"
    FORMAT_VERSION: ClassVar[int] = 1

    file: VectorFile


class JoinTask(NamedTuple):
    """Row `first` and the next, num_rows in all, of dimension dim."""

    pieces: list[Range]
    """what of each piece belongs to these rows"""
    first: int
    num_rows: int
    dim: int
    work_uri: str
    releases_uri: str
    number: int


def join_tasks(
    pieces: Sequence[Piece], *, num_rows: int, rows_per_file: int, dim: int, work_uri: str, releases_uri: str
) -> list[JoinTask]:
    """One task for each file that the pieces make together."""
    width = _record(dim).itemsize
    return [
        JoinTask(
            [
                Range(
                    storage.join(work_uri, piece.stored.name),
                    width * piece.bounds[number],
                    width * piece.bounds[number + 1],
                )
                for piece in pieces
            ],
            first,
            min(rows_per_file, num_rows - first),
            dim,
            work_uri,
            releases_uri,
            number,
        )
        for number, first in enumerate(range(0, num_rows, rows_per_file))
    ]


def join(task: JoinTask) -> VectorFile:
    """Write one file of vectors, unless an earlier attempt has. ManifestError if a row is missing."""

    def make() -> JoinedFile:
        ranges = [each for each in task.pieces if each.stop > each.start]
        pieces = read_ahead.in_order(
            lambda one: storage.read_ranges([one])[0], ranges, num_threads=_NUM_READERS
        )
        records = (np.frombuffer(data, _record(task.dim)) for data in pieces)
        blocks = ((of["row"] - task.first, of["vectors"]) for of in records)
        with scratch.folder("join-") as folder:
            path = Path(folder, f"vectors-{task.number:05d}.npy")
            write_file(path, blocks, num_rows=task.num_rows, dim=task.dim)
            stored = releases.store(task.releases_uri, path.name, path, is_done_with=True)
        return JoinedFile(file=VectorFile(file=stored, num_rows=task.num_rows))

    def is_there(made: JoinedFile) -> bool:
        return made.file.num_rows == task.num_rows and releases.is_there(task.releases_uri, made.file.file)

    uri = storage.join(task.work_uri, f"vectors-{task.number:05d}.json")
    try:
        return manifests.recorded(uri, JoinedFile, make, holds=is_there).file
    except ObjectMissing:  # another attempt has joined all files, and deleted the pieces
        return manifests.recorded(uri, JoinedFile, make, holds=is_there).file


def write_file(path: Path, blocks: Iterable[tuple[Ids, Halves]], *, num_rows: int, dim: int) -> None:
    """The .npy file of vectors (num_rows, 2, D) float16, each in its row; ManifestError unless all are there.

    blocks: rows (n,), each once, and their vectors (n, 2, D).
    """
    written = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(num_rows, 2, dim))
    num_written = 0
    for rows, vectors in blocks:
        written[rows] = vectors
        num_written += len(rows)
    written.flush()
    if num_written != num_rows:
        raise ManifestError(
            f"{num_rows} re-rank vectors belong in {path.name}, {num_written} are there; delete the work "
            "folder and build again"
        )


def _record(dim: int) -> np.dtype[Any]:
    """One item in a piece."""
    return np.dtype([("row", np.int64), ("vectors", np.float16, (2, dim))])
