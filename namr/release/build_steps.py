"""The steps of an index build, each the work of one task: sample, train, part, merge, items.

A part and the segment are remembered by a record written last, in the work folder, which is named by all that
decides them; what is recorded is not made again. Everything else is written under its own digest. So any
attempt at a step may be killed, repeated or run twice at once, and the first record counts.

Not covered: the vectors that candidates are compared by (`vector_steps`), which steps there are, and running
them in parallel (`build`).
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from namr.data import datasets, shards
from namr.data.datasets import ShardEntry
from namr.embed import embeddings
from namr.embed.embeddings import EmbeddingFile
from namr.errors import ManifestError
from namr.index import ivf
from namr.index.ivf import IndexInfo, Template
from namr.model import distances
from namr.model.distances import Metric
from namr.release import arrays, held_out, places, releases
from namr.store import item_files, manifests, read_ahead, scratch, storage, tables
from namr.store.manifests import StoredObject
from namr.store.storage import Range

MOST_TRAINING_THREADS = 8
SEGMENT_NAME = "index.faiss"
_MOST_MERGING_THREADS = 4

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
A = TypeVar("A")
R = TypeVar("R")


class InOrder(Protocol):
    """How the steps of a build are run: each argument's result, in the order of the arguments."""

    def __call__(self, what: str, function: Callable[[A], R], arguments: Sequence[A], /) -> list[R]: ...


def here(_: str, function: Callable[[A], R], arguments: Sequence[A]) -> list[R]:
    """In this process, one after the other: for what is less work than to start tasks."""
    return [function(each) for each in arguments]


@dataclass(frozen=True, kw_only=True)
class VectorSource:
    """Where tasks find vectors, and which of them count."""

    embeddings_uri: str
    dead: Ids
    """tombstones, ascending"""
    metric: Metric

    def of(self, files: Iterable[EmbeddingFile]) -> "VectorSource":
        """The same for the task that reads these files alone: it carries the tombstones of no other shard."""
        bounds = [
            np.searchsorted(self.dead, [shards.make_id(number, 0), shards.make_id(number + 1, 0)])
            for number in sorted({file.number for file in files})
        ]
        of_files = [self.dead[start:stop] for start, stop in bounds]
        return replace(self, dead=np.concatenate([np.empty(0, np.int64), *of_files]))

    def live(self, ids: Ids) -> Mask:
        """(n,) True for the ids that are not tombstoned."""
        return ~shards.among(ids, self.dead)

    def read(self, file: EmbeddingFile, rows: slice | Ids) -> tuple[Floats, Ids]:
        """Of these embedded rows the live ones: vectors as they are searched (n, D), ids (n,)."""
        table = embeddings.read_vectors(self.embeddings_uri, file, structures=False)
        live = self.live(table.ids[rows])
        x = torch.from_numpy(table.embeddings[rows][live])
        return distances.for_search(x, self.metric).numpy(), table.ids[rows][live]


class RowRange(NamedTuple):
    """Rows start (included) to stop (excluded) of the embedded rows of one shard."""

    file: EmbeddingFile
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class IndexFile:
    """A part or a segment that is done, as the work folder remembers it."""

    FORMAT: ClassVar[str] = "namr-index-file"
    FORMAT_VERSION: ClassVar[int] = 1

    stored: StoredObject
    info: IndexInfo


class HeldOut(NamedTuple):
    """Which ids the template must not see: see `held_out.mask`."""

    share: float
    seed: int


class SampleTask(NamedTuple):
    """Some rows of some files."""

    source: VectorSource
    held: HeldOut
    picks: list[tuple[EmbeddingFile, Ids]]
    work_uri: str


class Sampled(NamedTuple):
    """Vectors (n, D) float32 as a .npy file in the work folder."""

    stored: StoredObject
    num_rows: int


def sample(task: SampleTask) -> Sampled:
    """Store the vectors of these rows that are live and not held out."""
    taught = []
    for file, rows in task.picks:
        x, ids = task.source.read(file, rows)
        taught.append(x[~held_out.mask(ids, share=task.held.share, seed=task.held.seed)])
    data = arrays.encode_array(np.concatenate(taught))
    digest = storage.sha256(data)
    stored = manifests.write_object(task.work_uri, f"sample-{digest[:24]}.npy", data, sha256=digest)
    return Sampled(stored, sum(map(len, taught)))


class TrainTask(NamedTuple):
    """A template to be trained on what was sampled, of dimension dim."""

    sampled: list[Sampled]
    dim: int
    key: str
    seed: int
    work_uri: str
    use_gpu: bool = False


def train(task: TrainTask) -> Template:
    """The template; on CPUs the same for any number of threads, so it takes what the node has."""
    x, stop = np.empty((sum(some.num_rows for some in task.sampled), task.dim), np.float32), 0
    for some in task.sampled:
        start, stop = stop, stop + some.num_rows
        x[start:stop] = arrays.decode_array(manifests.read_object(task.work_uri, some.stored), np.float32)
    num_threads = _threads(MOST_TRAINING_THREADS)
    return ivf.train_template(x, task.key, seed=task.seed, num_threads=num_threads, on_gpus=task.use_gpu)


class PartTask(NamedTuple):
    """One part: ranges of rows, by ascending id."""

    source: VectorSource
    template: Template
    ranges: list[RowRange]
    work_uri: str
    number: int

    def blocks(self) -> Iterator[tuple[Floats, Ids]]:
        """Vectors and ids, file after file."""
        return (self.source.read(rows.file, slice(rows.start, rows.stop)) for rows in self.ranges)


def build_part(task: PartTask) -> IndexFile:
    """Build one part, unless an earlier attempt has."""

    def build() -> IndexFile:
        with scratch.folder("part-") as folder:
            path, hashed = Path(folder, "part.faiss"), hashlib.sha256()
            info = ivf.build_part(task.template, task.blocks(), path, num_threads=1, told=hashed.update)
            digest = hashed.hexdigest()
            name = f"part-{task.number:05d}-{digest[:12]}.faiss"
            stored = manifests.write_object(task.work_uri, name, path, sha256=digest, is_done_with=True)
            return IndexFile(stored=stored, info=info)

    def is_there(made: IndexFile) -> bool:
        return storage.exists(storage.join(task.work_uri, made.stored.name))

    return _unless_done(f"part-{task.number:05d}", build, task.work_uri, holds=is_there)


class SegmentTask(NamedTuple):
    """The only part of a segment of the releases."""

    part: PartTask
    releases_uri: str


def build_segment(task: SegmentTask) -> IndexFile:
    """Build a segment of one part, which is that part, unless an earlier attempt has."""
    part, root = task.part, task.releases_uri

    def build() -> IndexFile:
        with scratch.folder("segment-") as folder:
            path, digest = Path(folder, SEGMENT_NAME), hashlib.sha256()
            info = ivf.build_part(part.template, part.blocks(), path, num_threads=1, told=digest.update)
            stored = releases.store(root, path.name, path, sha256=digest.hexdigest(), is_done_with=True)
            return IndexFile(stored=stored, info=info)

    return _segment_unless_done(build, part.work_uri, root)


class MergeTask(NamedTuple):
    """All parts of a segment."""

    template: Template
    parts: list[IndexFile]
    work_uri: str
    releases_uri: str


def merge(task: MergeTask) -> IndexFile:
    """Merge the parts into a segment of the releases, unless an earlier attempt has."""

    def merge_parts() -> IndexFile:
        with scratch.folder("merge-") as folder:
            num_threads, digest = _threads(_MOST_MERGING_THREADS), hashlib.sha256()
            merged, stored = Path(folder, SEGMENT_NAME), [part.stored for part in task.parts]
            fetch = functools.partial(fetched, task.work_uri, folder=Path(folder))
            paths = list(read_ahead.in_order(fetch, stored, num_threads=num_threads))
            info = ivf.merge_parts(task.template, paths, merged, num_threads=num_threads, told=digest.update)
            segment = releases.store(
                task.releases_uri, merged.name, merged, sha256=digest.hexdigest(), is_done_with=True
            )
            return IndexFile(stored=segment, info=info)

    return _segment_unless_done(merge_parts, task.work_uri, task.releases_uri)


def _segment_unless_done(make: Callable[[], IndexFile], work_uri: str, releases_uri: str) -> IndexFile:
    def is_there(made: IndexFile) -> bool:
        return releases.is_there(releases_uri, made.stored)

    return _unless_done("segment", make, work_uri, holds=is_there)


def _threads(most: int) -> int:
    return min(most, len(os.sched_getaffinity(0)))


def _unless_done(
    step: str, make: Callable[[], IndexFile], work_uri: str, *, holds: Callable[[IndexFile], bool]
) -> IndexFile:
    """What a step made, or makes now where no attempt has, or where what it made is gone."""
    return manifests.recorded(storage.join(work_uri, f"{step}.json"), IndexFile, make, holds=holds)


def fetched(root_uri: str, stored: StoredObject, folder: Path) -> Path:
    """A verified local file of a stored object."""
    uri = storage.join(root_uri, stored.name)
    path = storage.local_path(uri) if storage.is_local(uri) else folder / stored.name
    if not storage.is_local(uri):
        storage.download(uri, path)
    if not path.is_file() or manifests.describe_object(stored.name, path) != stored:
        raise ManifestError(f"{uri} is missing or damaged; delete {root_uri} and build again")
    return path


class ItemsTask(NamedTuple):
    """The items of one file: those samples of some shards, by ascending number, that are in the index."""

    dataset_uri: str
    entries: list[ShardEntry]
    rows: Range
    """of these shards, in the table of rows (`places`), which says what is in the index"""
    num_rows: int
    """of the whole index"""
    releases_uri: str


def store_items(task: ItemsTask) -> StoredObject:
    """Store what a release says of the items of some shards."""
    rows = np.frombuffer(storage.read_ranges([task.rows])[0], places.dtype_of(task.num_rows))
    ends = np.cumsum([entry.num_samples for entry in task.entries])
    of_shards = np.split(rows, ends[:-1])
    samples = datasets.read_samples(task.dataset_uri, task.entries)
    indexed = (
        tables.rows_of(table, np.flatnonzero(of_shard >= 0))
        for table, of_shard in zip(samples, of_shards, strict=True)
    )
    return releases.store(task.releases_uri, "items.arrow", item_files.encode(indexed))
