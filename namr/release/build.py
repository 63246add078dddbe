"""The embeddings of a dataset version into one segment, built in parts by Ray tasks.

    sample of all embeddings -> template -> parts, in parallel -> segment (merged, reconciled)
    embeddings -> re-rank vectors, in the order of the segment's lists;  sample indexes -> files of items

Parts are equal ranges of the embedded rows, whatever the sizes of the shards. Tombstoned rows are left out
everywhere. What comes out is what a release lists: objects under their digests, written once.

Every step is a function of the one before, and what it made is found again under the digest of all that
decides it (`<work>/<build>/`): a run that was killed goes on from there, and gives the same release. The ids
in the segment are compared with the ids in the embeddings, not only their number.

Not covered: adding a small segment to what is there, measuring recall (the release does, on held-out
queries), GPU training, and deleting work that is done with.
"""

import bisect
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from namr import checks, progress, ray_connection
from namr.data.datasets import Dataset
from namr.embed import embeddings
from namr.embed.embeddings import EmbeddingFile, SetManifest
from namr.errors import ManifestError
from namr.index import ivf, planning
from namr.index.ivf import IndexInfo, Template
from namr.index.planning import Considered, IndexPlan
from namr.model.distances import Metric
from namr.release import build_steps, held_out, places, releases, vector_steps
from namr.release.build_steps import (
    HeldOut,
    ItemsTask,
    MergeTask,
    PartTask,
    RowRange,
    SampleTask,
    StoreSampleTask,
    TrainTask,
    VectorSource,
)
from namr.release.releases import Counts, Segment, StoredVectors
from namr.release.vector_steps import Placed, PlaceTask, ShardVectors, SortTask
from namr.store import storage
from namr.store.manifests import StoredObject

_FILES_PER_SAMPLE_TASK = 16
_ITEMS_PER_FILE = 1 << 18
"""few files to map, and about 150 MB in the task that writes one"""
_LARGEST_SEED = (1 << 31) - 1
"""FAISS takes no larger one"""

A = TypeVar("A")
R = TypeVar("R")
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


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
    not offered; ShapeError where there are too few vectors for the key.
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
        _digest_of(dataset.digest, model_digest, described.files, metric, config.seed, plan, held),
    )
    ray_connection.connect()
    files = described.files
    source = VectorSource(embeddings_uri=embedding_set.root_uri, dead=dataset.tombstones, metric=metric)
    template = _template(work, source, described, plan, held, config.seed)
    stored_template = releases.store(root, "template.faiss", template.data)
    part_tasks = [
        PartTask(source.of(rows.file for rows in ranges), template, ranges, work, number)
        for number, ranges in enumerate(cut(files, plan.num_parts))
    ]
    parts = _in_order("building parts", build_steps.build_part, part_tasks)
    (segment,) = _in_order("merging parts", build_steps.merge, [MergeTask(template, parts, work, root)])
    placed = _placed(dataset, segment.stored, work, root)
    vectors, shards = _vectors(dataset, source, described, placed, work, root)
    counts = _reconcile(dataset, segment.info, shards)
    item_tasks = _items_tasks(dataset, placed, shards, root)
    items = _in_order("storing items", build_steps.store_items, item_tasks)
    return BuildReport(
        model_digest=model_digest,
        dataset=dataset,
        index_key=plan.key,
        template=stored_template,
        template_hash=template.hash,
        metric=metric,
        embedding_dim=described.embedding_dim,
        counts=counts,
        segments=(Segment(file=segment.stored, num_entries=segment.info.num_vectors),),
        vectors=vectors,
        items=tuple(items),
        num_parts=len(parts),
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


def cut(files: Sequence[EmbeddingFile], num_parts: int) -> list[list[RowRange]]:
    """The embedded rows of all shards as num_parts ranges, sizes differing by at most one."""
    total = sum(file.num_embedded for file in files)
    bounds = [total * number // num_parts for number in range(num_parts + 1)]
    starts = np.cumsum([0, *(file.num_embedded for file in files)]).tolist()
    parts: list[list[RowRange]] = []
    for lower, upper in itertools.pairwise(bounds):
        some = range(bisect.bisect_right(starts, lower) - 1, bisect.bisect_left(starts, upper))
        ranges = [
            RowRange(files[at], max(lower - starts[at], 0), min(upper - starts[at], files[at].num_embedded))
            for at in some
        ]
        parts.append([rows for rows in ranges if rows.start < rows.stop])
    return parts


def _items_tasks(
    dataset: Dataset, placed: Placed, shards: Sequence[ShardVectors], releases_uri: str
) -> list[ItemsTask]:
    """One for each file of items: whole shards, and not many items a file."""
    tasks, first = [], 0
    num_samples = dataset.version.num_samples
    for start, stop in groups([shard.num_indexed for shard in shards], _ITEMS_PER_FILE):
        entries = list(dataset.shards[start:stop])
        num = sum(entry.num_samples for entry in entries)
        rows = placed.span(first, num, of=num_samples, root_uri=releases_uri)
        tasks.append(ItemsTask(dataset.uri, entries, rows, placed.num_rows, releases_uri))
        first += num
    return tasks


def _in_order(what: str, function: Callable[[A], R], tasks: Sequence[A]) -> list[R]:
    """What Ray tasks made of each argument."""
    results: dict[int, R] = {}
    with progress.shown(what, len(tasks)) as show:
        for at, result in ray_connection.map_tasks(function, tasks):
            results[at] = result
            show(len(results), "")
    return [results[at] for at in range(len(tasks))]


def _digest_of(*decisive: object) -> str:
    return storage.sha256(json.dumps(decisive, default=vars).encode())[:32]


def _template(
    work: str, source: VectorSource, described: SetManifest, plan: IndexPlan, held: HeldOut, seed: int
) -> Template:
    """The template in the work folder, trained now if there is none."""
    uri, files = storage.join(work, "template.faiss"), described.files
    if not storage.exists(uri):
        picks = picked(files, plan.num_training_vectors, seed=seed)
        batches = [
            picks[start : start + _FILES_PER_SAMPLE_TASK]
            for start in range(0, len(picks), _FILES_PER_SAMPLE_TASK)
        ]
        tasks = [
            StoreSampleTask(SampleTask(source.of(file for file, _ in some), held, some), work, number)
            for number, some in enumerate(batches)
        ]
        samples = _in_order("sampling embeddings", build_steps.store_sample, tasks)
        training = TrainTask(samples, described.embedding_dim, plan.key, seed, work)
        (trained,) = _in_order("training", build_steps.train, [training])
        storage.write_if_absent(uri, trained.data)
        for stored in samples:
            storage.delete(storage.join(work, stored.name))
    return ivf.load_template(storage.read(uri))


def picked(files: Sequence[EmbeddingFile], num: int, *, seed: int) -> list[tuple[EmbeddingFile, Ids]]:
    """`num` embedded rows (all where there are fewer), ascending: of each file its share, at random."""
    sizes = [file.num_embedded for file in files]
    shares = np.diff(np.cumsum([0, *sizes]) * min(num, sum(sizes)) // max(1, sum(sizes))).tolist()
    rng = np.random.default_rng(seed)
    return [
        (file, np.sort(rng.choice(file.num_embedded, share, replace=False, shuffle=False)))
        for file, share in zip(files, shares, strict=True)
        if share
    ]


def _placed(dataset: Dataset, segment: StoredObject, work: str, releases_uri: str) -> Placed:
    """Which row each sample has in the order of the segment's lists."""
    sizes = _sizes(dataset)
    (placed,) = _in_order(
        "placing re-rank vectors", vector_steps.place, [PlaceTask(segment, sizes, work, releases_uri)]
    )
    return placed


def _sizes(dataset: Dataset) -> Ids:
    """(S, 2) number and how many samples of each shard."""
    return np.array([(entry.number, entry.num_samples) for entry in dataset.shards], np.int64).reshape(-1, 2)


def _vectors(
    dataset: Dataset,
    source: VectorSource,
    described: SetManifest,
    placed: Placed,
    work: str,
    releases_uri: str,
) -> tuple[StoredVectors, list[ShardVectors]]:
    """The re-rank vectors in the order of the segment's lists, and what each shard brought."""
    sizes = _sizes(dataset)
    files, starts, row_bytes = described.files, places.starts_of(sizes), 4 * described.embedding_dim
    rows_per_file = max(1, vector_steps.FILE_BYTES // row_bytes)
    tasks = []
    for number, (start, stop) in enumerate(
        groups(sizes[:, 1].tolist(), vector_steps.PIECE_BYTES // row_bytes)
    ):
        span = placed.span(
            int(starts[start]),
            int(sizes[start:stop, 1].sum()),
            of=int(sizes[:, 1].sum()),
            root_uri=releases_uri,
        )
        some = list(files[start:stop])
        tasks.append(
            SortTask(
                source.of(some), some, sizes[start:stop], span, placed.num_rows, rows_per_file, work, number
            )
        )
    pieces = _in_order("sorting re-rank vectors", vector_steps.sort, tasks)
    joining = vector_steps.join_tasks(
        pieces,
        num_rows=placed.num_rows,
        rows_per_file=rows_per_file,
        dim=described.embedding_dim,
        work_uri=work,
        releases_uri=releases_uri,
    )
    joined = _in_order("joining re-rank vectors", vector_steps.join, joining)
    for piece in pieces:
        storage.delete(storage.join(work, piece.stored.name))
    stored = StoredVectors(
        files=tuple(joined),
        shards=placed.shards,
        rows=placed.rows,
        min_structure=min((piece.min_structure for piece in pieces), default=1.0),
    )
    return stored, [shard for piece in pieces for shard in piece.shards]


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
