"""The steps of an index build, each the work of one task: sample, train, part, merge, re-rank vectors.

A part and the segment are remembered by a record written last, in the work folder; what is recorded is not
made again. Everything else is written under its own digest. So any attempt at a step may be killed, repeated
or run twice at once, and the first record counts.

Not covered: which steps there are, and running them in parallel (`build`).
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from namr.embed import embeddings
from namr.embed.embeddings import EmbeddingFile
from namr.errors import ManifestError
from namr.index import ivf
from namr.index.ivf import IndexInfo, Template
from namr.model import distances
from namr.model.distances import Metric
from namr.release import held_out, releases
from namr.release.releases import VectorShard
from namr.store import manifests, scratch, storage
from namr.store.manifests import StoredObject

_MOST_TRAINING_THREADS = 8

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where tasks find vectors, and which of them count."""

    embeddings_uri: str
    dead: Ids
    """tombstones, ascending"""
    metric: Metric

    def read(self, file: EmbeddingFile, rows: slice | Ids) -> tuple[Floats, Ids]:
        """Of these embedded rows the live ones: vectors as they are searched (n, D), ids (n,)."""
        table = embeddings.read(self.embeddings_uri, file)
        live = ~np.isin(table.ids[rows], self.dead)
        x = torch.from_numpy(table.embeddings[rows][live])
        return distances.for_search(x, self.metric).numpy(), table.ids[rows][live]


class Slice(NamedTuple):
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

    source: Source
    held: HeldOut
    picks: list[tuple[EmbeddingFile, Ids]]


def sample(task: SampleTask) -> Floats:
    """The vectors (n, D) of these rows that are live and not held out."""
    found = []
    for file, rows in task.picks:
        x, ids = task.source.read(file, rows)
        found.append(x[~held_out.mask(ids, share=task.held.share, seed=task.held.seed)])
    return np.concatenate(found)


class TrainTask(NamedTuple):
    """A template to be trained."""

    sample: Floats
    key: str
    seed: int


def train(task: TrainTask) -> Template:
    """The template; the same for any number of threads, so it takes what the node has."""
    num_threads = min(_MOST_TRAINING_THREADS, len(os.sched_getaffinity(0)))
    return ivf.train_template(task.sample, task.key, seed=task.seed, num_threads=num_threads)


class PartTask(NamedTuple):
    """One part: ranges of rows, by ascending id."""

    source: Source
    template: Template
    slices: list[Slice]
    work_uri: str
    number: int


def build_part(task: PartTask) -> IndexFile:
    """Build one part, unless an earlier attempt has."""
    record_uri = storage.join(task.work_uri, f"part-{task.number:05d}.json")
    if not _is_there(record_uri, task.work_uri):
        blocks = (task.source.read(rows.file, slice(rows.start, rows.stop)) for rows in task.slices)
        with scratch.folder("part-") as folder:
            path = Path(folder, "part.faiss")
            info = ivf.build_part(task.template, blocks, path, num_threads=1)
            name = f"part-{task.number:05d}-{storage.sha256_of_file(path)[:12]}.faiss"
            stored = manifests.write_object(task.work_uri, name, path)
        record = manifests.encode_manifest(IndexFile(stored=stored, info=info))
        storage.write_if_absent(record_uri, record)
    return manifests.read_manifest(record_uri, IndexFile)  # of two attempts at once, the first's counts


class MergeTask(NamedTuple):
    """All parts of a segment."""

    template: Template
    parts: list[IndexFile]
    work_uri: str
    releases_uri: str


def merge(task: MergeTask) -> IndexFile:
    """Merge the parts into a segment of the releases, unless an earlier attempt has."""
    record_uri = storage.join(task.work_uri, "segment.json")
    if not _is_there(record_uri, task.releases_uri):
        with scratch.folder("merge-") as folder:
            paths = [_fetched(task.work_uri, part.stored, Path(folder)) for part in task.parts]
            merged = Path(folder, "index.faiss")
            info = ivf.merge_parts(task.template, paths, merged)
            stored = releases.store(task.releases_uri, merged.name, merged)
        storage.write_if_absent(record_uri, manifests.encode_manifest(IndexFile(stored=stored, info=info)))
    return manifests.read_manifest(record_uri, IndexFile)


def _is_there(record_uri: str, root_uri: str) -> bool:
    """Whether a record is there, and the object that it speaks of, too."""
    if not storage.exists(record_uri):
        return False
    stored = manifests.read_manifest(record_uri, IndexFile).stored
    return storage.exists(storage.join(root_uri, stored.name))


def _fetched(root_uri: str, stored: StoredObject, folder: Path) -> Path:
    """A verified local file of a stored object."""
    uri = storage.join(root_uri, stored.name)
    path = storage.local_path(uri) if storage.is_local(uri) else folder / stored.name
    if not storage.is_local(uri):
        storage.download(uri, path)
    if manifests.describe_object(stored.name, path) != stored:
        raise ManifestError(f"{uri} is damaged; delete {root_uri} and build again")
    return path


class VectorsTask(NamedTuple):
    """The re-rank vectors of one shard of num_rows rows."""

    source: Source
    file: EmbeddingFile
    num_rows: int
    releases_uri: str


class ShardVectors(NamedTuple):
    """What was stored of a shard."""

    stored: VectorShard
    indexed: Ids
    """ids, ascending"""
    num_refused: int


def store_vectors(task: VectorsTask) -> ShardVectors:
    """Store the re-rank vectors of the live rows of one shard."""
    table = embeddings.read(task.source.embeddings_uri, task.file)
    live = ~np.isin(table.ids, task.source.dead)
    kept = replace(
        table,
        ids=table.ids[live],
        keys=[""] * int(live.sum()),
        labels=[None] * int(live.sum()),
        embeddings=table.embeddings[live],
        structures=table.structures[live],
    )
    stored = releases.store_vectors(
        task.releases_uri, kept, number=task.file.number, num_rows=task.num_rows, metric=task.source.metric
    )
    num_refused = int((~np.isin(table.refused_ids, task.source.dead)).sum())
    return ShardVectors(stored, kept.ids, num_refused)
