"""What a night adds to a release: a segment of the shards that are new, and a list of what is gone.

    shards since the release   -> one more segment, from the same template, with its vectors and items
    tombstones since           -> ids that segments hold and nobody may find

Everything else is listed again by digest and not touched, so time and bytes follow what is new. A release
that was added to answers as one index over all its live entries, built from the same template, would (of
4-bit codes, many of which are equally far, the last of the candidates may be others).

What is few is made in this process; more of it by Ray tasks. As in a whole build, what a step made is found
again after a kill.

Not covered: whether the template still fits (`nightly.aging`), one segment in place of many (`compaction`),
and images whose bytes or labels changed in their shard: the release is built whole then, as after an erasure,
which leaves nothing behind.
"""

import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr import ray_connection
from namr.data import datasets, shards
from namr.data.datasets import Dataset, ShardEntry
from namr.embed import embeddings
from namr.errors import ManifestError
from namr.index import planning
from namr.release import build, build_steps, releases, segments, templates
from namr.release.build import BuildConfig, BuildReport
from namr.release.build_steps import InOrder, VectorSource
from namr.release.releases import Counts, Release
from namr.release.segments import Added
from namr.store import storage
from namr.store.cache import Cache

_FEW = 1 << 16
"""embeddings that are indexed in less time, here, than it takes to start tasks; at most 600 MB of memory"""

_HERE: InOrder = build_steps.here

Ids = npt.NDArray[np.int64]


class Changes(NamedTuple):
    """What a dataset version has, and an earlier one of it hadn't."""

    entries: list[ShardEntry]
    """new shards, by ascending number"""
    tombstones: Ids
    """of the shards that were there, ascending"""


def changes(dataset: Dataset, current: Release) -> Changes | str:
    """What the dataset has since the release; or, in words, why the release can't be added to."""
    then = current.manifest
    if then.dataset_uri != dataset.uri:
        return f"the current release is of another dataset, {then.dataset_uri}"
    try:
        before = datasets.open_version(dataset.uri, then.dataset_version)
    except ManifestError as error:
        return f"the dataset version of the current release can't be read: {error}"
    if before.digest != before.published_digest:
        return f"images of version {then.dataset_version}, which the current release has, were erased"
    if before.digest != then.dataset_digest or before.version.version > dataset.version.version:
        return f"version {then.dataset_version} of the dataset is no earlier one of this"
    kept = len(before.shards)
    changed = [new.number for old, new in zip(before.shards, dataset.shards, strict=False) if old != new]
    if changed or kept > len(dataset.shards):
        return f"{len(changed) or kept - len(dataset.shards)} shards were changed, shard {changed[:1]} first"
    gone = np.setdiff1d(dataset.tombstones, before.tombstones, assume_unique=True)
    was_there = shards.shard_of(gone) < before.version.next_shard_number
    return Changes(list(dataset.shards[kept:]), gone[was_there])


def extend(
    current: Release,
    new: Changes,
    dataset: Dataset,
    embeddings_uri: str,
    config: BuildConfig,
    *,
    cache: Cache,
) -> BuildReport:
    """What the next release lists: all of `current`, and what is new.

    cache: for what has to be read of a remote release. Raises what `build.build` raises; nothing of the
    current release is changed.
    """
    started, then, root = time.monotonic(), current.manifest, current.releases_uri
    storage.check_writable(root)
    added = _added(new, current, dataset, storage.absolute(embeddings_uri), config) if new.entries else None
    is_entry = current.places(cache).of(new.tombstones) >= 0
    dead, num_dead = np.union1d(current.tombstones(), new.tombstones[is_entry]), int(is_entry.sum())
    num_refused_gone = len(new.tombstones) - num_dead
    counts = Counts(
        num_samples=dataset.version.num_samples,
        num_indexed=then.counts.num_indexed - num_dead + (added.segment.num_entries if added else 0),
        num_refused=then.counts.num_refused - num_refused_gone + (added.num_refused if added else 0),
        num_tombstoned=len(dataset.tombstones),
    )
    return BuildReport(
        model_digest=then.model_digest,
        dataset=dataset,
        index_key=then.index_key,
        template=then.template,
        template_hash=then.template_hash,
        metric=then.metric,
        embedding_dim=then.embedding_dim,
        counts=build.checked(counts),
        segments=then.segments + ((added.segment,) if added else ()),
        tombstones=releases.store_tombstones(root, dead),
        vectors=then.vectors + ((added.vectors,) if added else ()),
        items=then.items + (added.items if added else ()),
        num_parts=1,
        imbalance=added.imbalance if added else 1.0,
        considered=(),
        seconds=time.monotonic() - started,
    )


def _added(
    new: Changes, current: Release, dataset: Dataset, embeddings_uri: str, config: BuildConfig
) -> Added:
    then, template = current.manifest, templates.of_release(current).template
    embedding_set = embeddings.open_set(embeddings_uri, then.model_digest, dataset)
    numbers = {entry.number for entry in new.entries}
    files = [file for file in embedding_set.files if file.number in numbers]
    num, num_parts, in_order = sum(file.num_embedded for file in files), 1, _HERE
    if num > _FEW:
        ray_connection.connect()
        planned = planning.plan(num, then.embedding_dim, key=then.index_key, num_parts=config.num_parts)
        num_parts, in_order = planned.num_parts, ray_connection.in_order
    source = VectorSource(
        embeddings_uri=embedding_set.root_uri, dead=dataset.tombstones, metric=then.metric
    ).of(files)
    decisive = files, source.dead.tolist(), then.metric, num_parts
    return segments.add(
        template,
        source,
        dataset.uri,
        new.entries,
        files,
        num_parts=num_parts,
        work_uri=build.work_uri(config, current.releases_uri, then.template_hash, *decisive),
        releases_uri=current.releases_uri,
        in_order=in_order,
    )
