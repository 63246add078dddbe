"""The embeddings of a dataset version into one segment, by Ray tasks.

    sample of all embeddings -> template -> parts, in parallel -> segment (merged, reconciled)

Parts are equal ranges of the embedded rows, whatever the sizes of the shards. The sample goes from task to
task by way of the work folder: it may be gigabytes, and the driver holds none of it.

Not covered: what else a release lists (`build`), and the single steps (`build_steps`).
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr import ray_connection
from namr.embed.embeddings import EmbeddingFile
from namr.index import ivf
from namr.index.ivf import Template
from namr.index.planning import IndexPlan
from namr.release import build_steps, releases
from namr.release.build_steps import (
    HeldOut,
    IndexFile,
    MergeTask,
    PartTask,
    RowRange,
    SampleTask,
    TrainTask,
    VectorSource,
)
from namr.store import storage
from namr.store.manifests import StoredObject

_FILES_PER_SAMPLE_TASK = 16

Ids = npt.NDArray[np.int64]


class Built(NamedTuple):
    """A segment in the releases, and what it was built from."""

    template: Template
    stored_template: StoredObject
    segment: IndexFile


def build(
    source: VectorSource,
    files: Sequence[EmbeddingFile],
    plan: IndexPlan,
    held: HeldOut,
    *,
    seed: int,
    use_gpu: bool,
    work_uri: str,
    releases_uri: str,
) -> Built:
    """Build what `plan` says, or go on with it where an earlier attempt at the same stopped.

    work_uri: named by all that decides the segment. Raises what the steps raise.
    """
    template = _template(work_uri, source, files, plan, held, seed=seed, use_gpu=use_gpu)
    stored = releases.store(releases_uri, "template.faiss", template.data)
    tasks = [
        PartTask(source.of(rows.file for rows in ranges), template, ranges, work_uri, number)
        for number, ranges in enumerate(cut(files, plan.num_parts))
    ]
    parts = ray_connection.in_order("building parts", build_steps.build_part, tasks)
    merging = [MergeTask(template, parts, work_uri, releases_uri)]
    (segment,) = ray_connection.in_order("merging parts", build_steps.merge, merging)
    return Built(template, stored, segment)


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


def _template(
    work_uri: str,
    source: VectorSource,
    files: Sequence[EmbeddingFile],
    plan: IndexPlan,
    held: HeldOut,
    *,
    seed: int,
    use_gpu: bool,
) -> Template:
    """The template in the work folder, trained now if there is none."""
    uri = storage.join(work_uri, "template.faiss")
    if not storage.exists(uri):
        picks = picked(files, plan.num_training_vectors, seed=seed)
        batches = [
            picks[start : start + _FILES_PER_SAMPLE_TASK]
            for start in range(0, len(picks), _FILES_PER_SAMPLE_TASK)
        ]
        tasks = [SampleTask(source.of(file for file, _ in some), held, some, work_uri) for some in batches]
        sampled = ray_connection.in_order("sampling embeddings", build_steps.sample, tasks)
        task = TrainTask(sampled, files[0].embedding_dim, plan.key, seed, work_uri, use_gpu)
        (trained,) = ray_connection.in_order("training", build_steps.train, [task], num_gpus=float(use_gpu))
        storage.write_if_absent(uri, trained.data)
        for some in sampled:
            storage.delete(storage.join(work_uri, some.stored.name))
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
