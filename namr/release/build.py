"""The embeddings of a dataset version into one segment, built in parts by Ray tasks.

    sample of all embeddings -> template -> parts, in parallel -> segment (merged, reconciled)
    embeddings -> re-rank vectors, in the order of the segment's lists;  sample indexes -> files of items

Parts are equal ranges of the embedded rows, whatever the sizes of the shards. Tombstoned rows are left out
everywhere. What comes out is what a release lists: objects under their digests, written once.

Every step is a function of the one before, and what it made is found again under the digest of all that
decides it (`<work>/<build>/`): a run that was killed goes on from there, and gives the same release. The ids
in the segment are compared with the ids in the embeddings, not only their number.

Not covered: adding a small segment to what is there, measuring recall (the release does, on held-out
queries), and deleting work that is done with.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from namr import checks, progress, ray_connection
from namr.data.datasets import Dataset, ShardEntry
from namr.embed import embeddings
from namr.embed.embeddings import EmbeddingFile, SetManifest
from namr.errors import ConfigError, ManifestError
from namr.index import ivf, planning
from namr.index.index_files import sum_of_ids
from namr.index.ivf import IndexInfo, Template
from namr.index.planning import IndexPlan
from namr.model.distances import Metric
from namr.release import build_steps, held_out, places, releases, vector_steps
from namr.release.build_steps import (
    HeldOut,
    ItemsTask,
    MergeTask,
    PartTask,
    RowRange,
    SampleTask,
    TrainTask,
    VectorSource,
)
from namr.release.releases import Counts, Segment, StoredVectors
from namr.release.vector_steps import PlaceTask, ShardVectors, SortTask
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
    """auto, or Flat, IVF<lists>,Flat, IVF<lists>,SQ8, IVF<lists>,PQ<pieces>x4fs, IVF<lists>,PQ<bytes>x8"""
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
        _digest_of(dataset.digest, model_digest, described.files, metric, config.seed, plan, held),
    )
    ray_connection.connect()
    if config.use_gpu and ray_connection.total_gpus() < 1:
        raise ConfigError("use_gpu is set, and this Ray has no GPU; leave it out, or connect to one that has")
    files = described.files
    source = VectorSource(embeddings_uri=embedding_set.root_uri, dead=dataset.tombstones, metric=metric)
    template = _template(work, source, described, plan, held, seed=config.seed, use_gpu=config.use_gpu)
    stored_template = releases.store(root, "template.faiss", template.data)
    part_tasks = [
        PartTask(source.of(rows.file for rows in ranges), template, ranges, work, number)
        for number, ranges in enumerate(cut(files, plan.num_parts))
    ]
    parts = _in_order("building parts", build_steps.build_part, part_tasks)
    (segment,) = _in_order("merging parts", build_steps.merge, [MergeTask(template, parts, work, root)])
    vectors, shards = _vectors(dataset, source, described, segment.stored, work, root)
    counts = _reconcile(dataset, segment.info, shards)
    indexed = [(entry, shard.indexed) for entry, shard in zip(dataset.shards, shards, strict=True)]
    item_tasks = [ItemsTask(dataset.uri, some, root) for some in items_cut(indexed)]
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
        seconds=time.monotonic() - started,
    )


def cut(files: Sequence[EmbeddingFile], num_parts: int) -> list[list[RowRange]]:
    """The embedded rows of all shards as num_parts ranges, sizes differing by at most one."""
    total = sum(file.num_embedded for file in files)
    bounds = [total * number // num_parts for number in range(num_parts + 1)]
    starts = np.cumsum([0, *(file.num_embedded for file in files)]).tolist()
    parts: list[list[RowRange]] = []
    for lower, upper in itertools.pairwise(bounds):
        placed = zip(files, starts, strict=False)
        ranges = [
            RowRange(file, max(lower - start, 0), min(upper - start, file.num_embedded))
            for file, start in placed
        ]
        parts.append([rows for rows in ranges if rows.start < rows.stop])
    return parts


def items_cut(indexed: Iterable[tuple[ShardEntry, Ids]]) -> list[list[tuple[ShardEntry, Ids]]]:
    """Shards, each with its ids in the index, as the files of items: whole shards, not many items a file."""
    files: list[list[tuple[ShardEntry, Ids]]] = []
    room = 0
    for entry, ids in indexed:
        if len(ids) > room or not files:
            files.append([])
            room = _ITEMS_PER_FILE
        files[-1].append((entry, ids))
        room -= len(ids)
    return files


def _in_order(what: str, function: Callable[[A], R], tasks: Sequence[A], *, num_gpus: float = 0.0) -> list[R]:
    """What Ray tasks made of each argument."""
    results: dict[int, R] = {}
    with progress.shown(what, len(tasks)) as show:
        for at, result in ray_connection.map_tasks(function, tasks, num_gpus=num_gpus):
            results[at] = result
            show(len(results), "")
    return [results[at] for at in range(len(tasks))]


def _digest_of(*decisive: object) -> str:
    return storage.sha256(json.dumps(decisive, default=vars).encode())[:32]


def _template(
    work: str,
    source: VectorSource,
    described: SetManifest,
    plan: IndexPlan,
    held: HeldOut,
    *,
    seed: int,
    use_gpu: bool,
) -> Template:
    """The template in the work folder, trained now if there is none."""
    uri, files = storage.join(work, "template.faiss"), described.files
    if not storage.exists(uri):
        total = sum(file.num_embedded for file in files)
        chosen = np.random.default_rng(seed).choice(
            total, min(plan.num_training_vectors, total), replace=False, shuffle=False
        )
        chosen.sort()
        starts = np.cumsum([0, *(file.num_embedded for file in files)])
        cuts = np.searchsorted(chosen, starts)
        picks = [
            (file, chosen[cuts[at] : cuts[at + 1]] - starts[at])
            for at, file in enumerate(files)
            if cuts[at] < cuts[at + 1]
        ]
        batches = [
            picks[start : start + _FILES_PER_SAMPLE_TASK]
            for start in range(0, len(picks), _FILES_PER_SAMPLE_TASK)
        ]
        tasks = [SampleTask(source.of(file for file, _ in some), held, some, work) for some in batches]
        sampled = _in_order("sampling embeddings", build_steps.sample, tasks)
        task = TrainTask(sampled, described.embedding_dim, plan.key, seed, work, use_gpu)
        (trained,) = _in_order("training", build_steps.train, [task], num_gpus=float(use_gpu))
        storage.write_if_absent(uri, trained.data)
        for some in sampled:
            storage.delete(storage.join(work, some.stored.name))
    return ivf.load_template(storage.read(uri))


def _vectors(
    dataset: Dataset,
    source: VectorSource,
    described: SetManifest,
    segment: StoredObject,
    work: str,
    releases_uri: str,
) -> tuple[StoredVectors, list[ShardVectors]]:
    """The re-rank vectors in the order of the segment's lists, and what each shard brought."""
    sizes = np.array([(entry.number, entry.num_samples) for entry in dataset.shards], np.int64).reshape(-1, 2)
    (placed,) = _in_order(
        "placing re-rank vectors", vector_steps.place, [PlaceTask(segment, sizes, work, releases_uri)]
    )
    files, starts, row_bytes = described.files, places.starts_of(sizes), 4 * described.embedding_dim
    rows_per_file = max(1, vector_steps.FILE_BYTES // row_bytes)
    tasks = []
    for number, (start, stop) in enumerate(groups(sizes[:, 1], vector_steps.PIECE_BYTES // row_bytes)):
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


def groups(sizes: Ids, most: int) -> list[tuple[int, int]]:
    """Start and stop of neighbours whose sizes add up to no more than `most`, or that are alone."""
    bounds: list[int] = []
    total = 0
    for at, size in enumerate(sizes.tolist()):
        if not bounds or total + size > most:
            bounds.append(at)
            total = 0
        total += size
    return list(itertools.pairwise([*bounds, len(sizes)]))


def _reconcile(dataset: Dataset, segment: IndexInfo, shards: list[ShardVectors]) -> Counts:
    """Every sample went somewhere, and what is in the segment are the ids that live embeddings have."""
    counts = Counts(
        num_samples=dataset.version.num_samples,
        num_indexed=sum(len(shard.indexed) for shard in shards),
        num_refused=sum(shard.num_refused for shard in shards),
        num_tombstoned=len(dataset.tombstones),
    )
    ids_sum = sum(sum_of_ids(shard.indexed) for shard in shards) % 2**64
    if (segment.num_vectors, segment.ids_sum) != (counts.num_indexed, ids_sum):
        raise ManifestError(
            f"the segment holds {segment.num_vectors} vectors, {counts.num_indexed} are embedded and live, "
            "or their ids differ; delete the work folder and build again"
        )
    if counts.num_samples != counts.num_indexed + counts.num_refused + counts.num_tombstoned:
        raise ManifestError(f"the counts of the index don't add up: {counts}")
    return counts
