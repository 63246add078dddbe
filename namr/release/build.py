"""All that a release lists of an index, from the embeddings of a dataset version: built by Ray tasks.

    embeddings -> segment (`segments`)
    embeddings -> re-rank vectors, in the order of the segment's lists;  sample indexes -> files of items

Tombstoned rows are left out everywhere. What comes out is what a release lists: objects under their digests,
written once.

Every step is a function of the one before, and what it made is found again under the digest of all that
decides it (`<work>/<build>/`): a run that was killed goes on from there, and gives the same release. The ids
in the segment are compared with the ids in the embeddings, not only their number.

Not covered: adding a small segment to what is there, measuring recall (the release does, on held-out
queries), and deleting work that is done with.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from namr import checks, ray_connection
from namr.data.datasets import Dataset, ShardEntry
from namr.embed import embeddings
from namr.embed.embeddings import EmbeddingFile
from namr.errors import ConfigError, ManifestError
from namr.index import planning
from namr.index.ivf import IndexInfo
from namr.index.planning import Considered
from namr.model.distances import Metric
from namr.release import build_steps, held_out, places, segments, vector_steps
from namr.release.build_steps import (
    HeldOut,
    ItemsTask,
    VectorSource,
)
from namr.release.releases import Counts, Segment, StoredVectors
from namr.release.vector_steps import Placed, PlaceTask, ShardVectors, SortTask
from namr.store import storage
from namr.store.manifests import StoredObject

_ITEMS_PER_FILE = 1 << 18
"""few files to map, and about 150 MB in the task that writes one"""
_LARGEST_SEED = (1 << 31) - 1
"""FAISS takes no larger one"""

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How to build an index."""

    index_key: str = "auto"
    """auto: Flat for few images, else IVF<lists>,PQ<pieces>x4fs with the most exact codes that fit
    max_index_bytes (SQ8 where the dimension has no even pieces). Or by name Flat, IVF<lists>,Flat,
    IVF<lists>,SQ8, IVF<lists>,PQ<pieces>x4fs; or IVF<lists>,PQ<bytes>x8, which is slower than all of them"""
    num_parts: int = 4
    """parts to build side by side; large indexes take more"""
    max_index_bytes: int = 16 << 30
    """what the index may take in the memory of a serving node; decides the codes of "auto\""""
    seed: int = 0
    """of the sample, of the template's training, and of what is held out"""
    num_held_out: int = 500
    """images that the template is not trained on, to measure the index with; never more than a fifth"""
    use_gpu: bool = False
    """train the centroids on a GPU of the cluster; what they are then depends on it in their last bits"""
    work_uri: str | None = None
    """where parts are kept until they are merged; <releases_uri>/building where none is named"""

    def __post_init__(self) -> None:
        checks.in_range(self, "num_parts", "max_index_bytes", "num_held_out", at_least=1)
        checks.in_range(self, "seed", at_least=0, at_most=_LARGEST_SEED)


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a release lists of an index, and how it came about."""

    model_digest: str
    dataset: Dataset
    index_key: str
    template: StoredObject
    template_hash: str
    metric: Metric
    embedding_dim: int
    counts: Counts
    segments: tuple[Segment, ...]
    vectors: StoredVectors
    items: tuple[StoredObject, ...]
    num_parts: int
    imbalance: float
    """1 for lists of equal length; a search takes about that many times as long"""
    considered: tuple[Considered, ...]
    """what else could have been built, and why it was not"""
    seconds: float


def build(
    dataset: Dataset,
    embeddings_uri: str,
    releases_uri: str,
    config: BuildConfig,
    *,
    model_digest: str,
    metric: Metric,
) -> BuildReport:
    """Build the index of a dataset version from the embeddings of one model.

    The samples that `held_out` chooses by their ids are kept out of the template's training; they are in the
    index. Raises ManifestError if the dataset version is not embedded, if anything stored is
    damaged, or if the ids in the segment are not those of the live embeddings; ConfigError for a key that is
    not offered, or for use_gpu where there is none; ShapeError where there are too few vectors for the key.
    """
    started = time.monotonic()
    root = storage.absolute(releases_uri)
    storage.check_writable(root)
    embedding_set = embeddings.open_set(storage.absolute(embeddings_uri), model_digest, dataset)
    described = embedding_set.manifest
    plan = planning.plan(
        described.num_embedded,
        described.embedding_dim,
        key=config.index_key,
        num_parts=config.num_parts,
        max_index_bytes=config.max_index_bytes,
    )
    held = HeldOut(held_out.share(config.num_held_out, dataset.version.num_samples), config.seed)
    work = storage.join(
        storage.absolute(config.work_uri or storage.join(root, "building")),
        _digest_of(
            *(dataset.digest, model_digest, described.files, metric, config.seed, plan, held),
            *(["gpu"] if config.use_gpu else []),  # others keep the names they had
        ),
    )
    ray_connection.connect()
    if config.use_gpu and ray_connection.total_gpus() < 1:
        raise ConfigError("use_gpu is set, and this Ray has no GPU; leave it out, or connect to one that has")
    source = VectorSource(embeddings_uri=embedding_set.root_uri, dead=dataset.tombstones, metric=metric)
    made = segments.build(
        source,
        described.files,
        plan,
        held,
        seed=config.seed,
        use_gpu=config.use_gpu,
        work_uri=work,
        releases_uri=root,
    )
    segment = made.segment
    placed, vectors, shards = store_vectors(
        source,
        dataset.shards,
        described.files,
        segment=segment.stored,
        dim=described.embedding_dim,
        work_uri=work,
        releases_uri=root,
    )
    counts = _reconcile(dataset, segment.info, shards)
    num_indexed = [shard.num_indexed for shard in shards]
    item_tasks = items_tasks(dataset.uri, dataset.shards, num_indexed, placed=placed, releases_uri=root)
    items = ray_connection.in_order("storing items", build_steps.store_items, item_tasks)
    return BuildReport(
        model_digest=model_digest,
        dataset=dataset,
        index_key=plan.key,
        template=made.stored_template,
        template_hash=made.template.hash,
        metric=metric,
        embedding_dim=described.embedding_dim,
        counts=counts,
        segments=(Segment(file=segment.stored, num_entries=segment.info.num_vectors),),
        vectors=vectors,
        items=tuple(items),
        num_parts=plan.num_parts,
        imbalance=segment.info.imbalance,
        considered=tuple(
            planning.considered(
                described.num_embedded,
                described.embedding_dim,
                chosen=plan.key,
                key=config.index_key,
                max_index_bytes=config.max_index_bytes,
            )
        ),
        seconds=time.monotonic() - started,
    )


def items_tasks(
    dataset_uri: str,
    entries: Sequence[ShardEntry],
    num_indexed: Sequence[int],
    *,
    placed: Placed,
    releases_uri: str,
) -> list[ItemsTask]:
    """One for each file of items: whole shards, and not many items a file; num_indexed: of each shard."""
    tasks, first = [], 0
    num_samples = sum(entry.num_samples for entry in entries)
    for start, stop in groups(num_indexed, _ITEMS_PER_FILE):
        some = list(entries[start:stop])
        num = sum(entry.num_samples for entry in some)
        rows = placed.span(first, num, of=num_samples, root_uri=releases_uri)
        tasks.append(ItemsTask(dataset_uri, some, rows, placed.num_rows, releases_uri))
        first += num
    return tasks


def _digest_of(*decisive: object) -> str:
    return storage.sha256(json.dumps(decisive, default=vars).encode())[:32]


class InOrder(Protocol):
    """How the steps of a build are run: each argument's result, in the order of the arguments."""

    def __call__(self, what: str, function: Callable[[A], R], arguments: Sequence[A], /) -> list[R]: ...


class Vectors(NamedTuple):
    """The re-rank vectors of a segment."""

    placed: Placed
    stored: StoredVectors
    shards: list[ShardVectors]
    """what each shard brought"""


def store_vectors(
    source: VectorSource,
    entries: Sequence[ShardEntry],
    files: Sequence[EmbeddingFile],
    *,
    segment: StoredObject,
    dim: int,
    work_uri: str,
    releases_uri: str,
    in_order: InOrder = ray_connection.in_order,
) -> Vectors:
    """Store the re-rank vectors of shards and their embeddings, in the order of the segment's lists."""
    sizes = np.array([(entry.number, entry.num_samples) for entry in entries], np.int64).reshape(-1, 2)
    (placed,) = in_order(
        "placing re-rank vectors", vector_steps.place, [PlaceTask(segment, sizes, work_uri, releases_uri)]
    )
    starts, row_bytes = places.starts_of(sizes), 4 * dim
    rows_per_file = max(1, vector_steps.FILE_BYTES // row_bytes)
    tasks = []
    for number, (start, stop) in enumerate(
        groups(sizes[:, 1].tolist(), vector_steps.PIECE_BYTES // row_bytes)
    ):
        some, of_some = list(files[start:stop]), sizes[start:stop]
        span = placed.span(
            int(starts[start]), int(of_some[:, 1].sum()), of=int(sizes[:, 1].sum()), root_uri=releases_uri
        )
        tasks.append(
            SortTask(source.of(some), some, of_some, span, placed.num_rows, rows_per_file, work_uri, number)
        )
    pieces = in_order("sorting re-rank vectors", vector_steps.sort, tasks)
    joining = vector_steps.join_tasks(
        pieces,
        num_rows=placed.num_rows,
        rows_per_file=rows_per_file,
        dim=dim,
        work_uri=work_uri,
        releases_uri=releases_uri,
    )
    joined = in_order("joining re-rank vectors", vector_steps.join, joining)
    for piece in pieces:
        storage.delete(storage.join(work_uri, piece.stored.name))
    stored = StoredVectors(
        files=tuple(joined),
        shards=placed.shards,
        rows=placed.rows,
        min_structure=min((piece.min_structure for piece in pieces), default=1.0),
    )
    return Vectors(placed, stored, [shard for piece in pieces for shard in piece.shards])


def groups(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Start and stop of neighbours whose sizes add up to no more than `most`, or that are alone."""
    bounds: list[int] = []
    total = 0
    for at, size in enumerate(sizes):
        if not bounds or total + size > most:
            bounds.append(at)
            total = 0
        total += size
    return list(itertools.pairwise([*bounds, len(sizes)]))


def _reconcile(dataset: Dataset, segment: IndexInfo, shards: list[ShardVectors]) -> Counts:
    """Every sample went somewhere, and what is in the segment are the ids that live embeddings have."""
    counts = Counts(
        num_samples=dataset.version.num_samples,
        num_indexed=sum(shard.num_indexed for shard in shards),
        num_refused=sum(shard.num_refused for shard in shards),
        num_tombstoned=len(dataset.tombstones),
    )
    ids_sum = sum(shard.ids_sum for shard in shards) % 2**64
    if (segment.num_vectors, segment.ids_sum) != (counts.num_indexed, ids_sum):
        raise ManifestError(
            f"the segment holds {segment.num_vectors} vectors, {counts.num_indexed} are embedded and live, "
            "or their ids differ; delete the work folder and build again"
        )
    if counts.num_samples != counts.num_indexed + counts.num_refused + counts.num_tombstoned:
        raise ManifestError(f"the counts of the index don't add up: {counts}")
    return counts
