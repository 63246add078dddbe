"""A segment and what it is served with, from the embeddings of some shards: as Ray tasks, or here.

    embeddings -> parts, in parallel -> segment (merged, reconciled)
    embeddings -> re-rank vectors, in the order of the segment's lists;  sample indexes -> files of items

Parts are equal ranges of the embedded rows, whatever the sizes of the shards. The ids in the segment are
compared with the ids in the embeddings, not only their number.

Not covered: what it is built from (`templates`), which shards (`build`, `increment`), and the single steps
(`build_steps`, `vector_steps`).
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from namr import ray_connection
from namr.data.datasets import ShardEntry
from namr.embed.embeddings import EmbeddingFile
from namr.errors import ManifestError
from namr.index.ivf import IndexInfo, Template
from namr.release import build_steps, places, vector_steps
from namr.release.build_steps import (
    IndexFile,
    InOrder,
    ItemsTask,
    MergeTask,
    PartTask,
    RowRange,
    SegmentTask,
    VectorSource,
)
from namr.release.releases import Segment, StoredVectors
from namr.release.vector_steps import Placed, PlaceTask, ShardVectors, SortTask
from namr.store import storage
from namr.store.manifests import StoredObject

_ITEMS_PER_FILE = 1 << 18
"""few files to map, and about 150 MB in the task that writes one"""


class Added(NamedTuple):
    """A segment over some shards, and what it is served with."""

    segment: Segment
    vectors: StoredVectors
    items: tuple[StoredObject, ...]
    num_refused: int
    """live samples of these shards that have no embedding"""
    imbalance: float


def add(
    template: Template,
    source: VectorSource,
    dataset_uri: str,
    entries: Sequence[ShardEntry],
    files: Sequence[EmbeddingFile],
    *,
    num_parts: int,
    work_uri: str,
    releases_uri: str,
    in_order: InOrder = ray_connection.in_order,
) -> Added:
    """Make a segment of the live embeddings of some shards, at least one, and store all that belongs to it.

    work_uri: named by all that decides it. ManifestError if the ids in the segment are not those of the live
    embeddings, and what the steps raise.
    """
    of_files = build(
        template,
        source,
        files,
        num_parts=num_parts,
        work_uri=work_uri,
        releases_uri=releases_uri,
        in_order=in_order,
    )
    placed, vectors, shards = store_vectors(
        source,
        entries,
        files,
        segment=of_files.stored,
        dim=template.dim,
        work_uri=work_uri,
        releases_uri=releases_uri,
        in_order=in_order,
    )
    _check_ids(of_files.info, shards)
    num_indexed = [shard.num_indexed for shard in shards]
    tasks = items_tasks(dataset_uri, entries, num_indexed, placed=placed, releases_uri=releases_uri)
    return Added(
        segment=Segment(file=of_files.stored, num_entries=of_files.info.num_vectors),
        vectors=vectors,
        items=tuple(in_order("storing items", build_steps.store_items, tasks)),
        num_refused=sum(shard.num_refused for shard in shards),
        imbalance=of_files.info.imbalance,
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


def build(
    template: Template,
    source: VectorSource,
    files: Sequence[EmbeddingFile],
    *,
    num_parts: int,
    work_uri: str,
    releases_uri: str,
    in_order: InOrder = ray_connection.in_order,
) -> IndexFile:
    """A segment in the releases, or go on with it where an earlier attempt at the same stopped.

    work_uri: named by all that decides the segment. Raises what the steps raise.
    """
    tasks = [
        PartTask(source.of(rows.file for rows in ranges), template, ranges, work_uri, number)
        for number, ranges in enumerate(cut(files, num_parts))
    ]
    if len(tasks) == 1:
        of_one = [SegmentTask(tasks[0], releases_uri)]
        (segment,) = in_order("building the segment", build_steps.build_segment, of_one)
        return segment
    parts = in_order("building parts", build_steps.build_part, tasks)
    merging = [MergeTask(template, parts, work_uri, releases_uri)]
    (segment,) = in_order("merging parts", build_steps.merge, merging)
    return segment


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


def _check_ids(segment: IndexInfo, shards: Sequence[ShardVectors]) -> None:
    """What is in the segment are the ids that live embeddings have."""
    num_indexed = sum(shard.num_indexed for shard in shards)
    ids_sum = sum(shard.ids_sum for shard in shards) % 2**64
    if (segment.num_vectors, segment.ids_sum) != (num_indexed, ids_sum):
        raise ManifestError(
            f"the segment holds {segment.num_vectors} vectors, {num_indexed} are embedded and live, or their "
            "ids differ; delete the work folder and build again"
        )
