"""A small build in one process on one thread, by the steps of a real one, of made-up embeddings: each timed.

The vectors lie around centres on a surface of few dimensions, as embeddings of images do. All is written to
a local folder. Not covered: Ray, extraction, an object store, and the measuring of a release.
Legend: n vectors, D dimension.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from namr.data.datasets import ShardEntry
from namr.embed.embeddings import EmbeddingFile
from namr.index import ivf, planning
from namr.index.planning import IndexPlan
from namr.release import arrays, build_steps, segments, templates
from namr.release.build_steps import HeldOut, MergeTask, PartTask, SampleTask, VectorSource
from namr.release.places import Places
from namr.search.vectors import GalleryVectors
from namr.store import manifests, tables
from namr.store.manifests import StoredObject
from namr.store.tables import EmbeddingTable, SampleTable

_ROWS_PER_SHARD = 10_000
_NUM_CENTRES, _LATENT_DIM = 5000, 32

Floats = npt.NDArray[np.float32]
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was built, and the seconds of one core that each stage took."""

    plan: IndexPlan
    seconds: dict[str, float]
    """by stage: sample, train, parts, merge"""
    index_path: Path
    index_bytes: int
    imbalance: float
    segment: StoredObject


class Materials(NamedTuple):
    """Embeddings and sample indexes of a made-up dataset, in a folder."""

    folder: Path
    entries: list[ShardEntry]
    files: list[EmbeddingFile]
    source: VectorSource
    num_vectors: int
    dim: int

    @property
    def releases_uri(self) -> str:
        return str(self.folder / "releases")


class StoredSides(NamedTuple):
    """What a release has beside its index, and the seconds that it took."""

    vectors: GalleryVectors
    vectors_s: float
    items_s: float
    items_bytes: int


def draw(num: int, dim: int, *, seed: int) -> Floats:
    """(n, D) points around the same centres for every seed, mean distance near 1."""
    of_all = np.random.default_rng(0)
    centres = of_all.standard_normal((_NUM_CENTRES, _LATENT_DIM), dtype=np.float32)
    spread = of_all.standard_normal((_LATENT_DIM, dim), dtype=np.float32) / np.float32(
        np.sqrt(2 * _LATENT_DIM * dim)
    )
    rng = np.random.default_rng(seed)
    latent = centres[rng.integers(0, _NUM_CENTRES, num)]
    latent += 0.6 * rng.standard_normal((num, _LATENT_DIM), dtype=np.float32)
    x: Floats = latent @ spread + 0.002 * rng.standard_normal((num, dim), dtype=np.float32)
    return x


def prepare(folder: Path, *, num_vectors: int, dim: int, rows_per_shard: int = _ROWS_PER_SHARD) -> Materials:
    """Store made-up embeddings and sample indexes, as extraction and packing would."""
    entries, files = [], []
    for number in range(-(-num_vectors // rows_per_shard)):
        num = min(rows_per_shard, num_vectors - number * rows_per_shard)
        rows, ids = range(number * rows_per_shard, num_vectors)[:num], (number << 32) + np.arange(num)
        keys, labels = (
            [f"folder/image-{row:010d}.jpg" for row in rows],
            [f"class {row % 997}" for row in rows],
        )
        x = draw(num, dim, seed=number + 1).astype(np.float16)
        s = np.random.default_rng(number).uniform(0.5, 1.5, (num, dim)).astype(np.float16)
        embedded = EmbeddingTable(
            ids=ids,
            keys=keys,
            labels=list(labels),
            embeddings=x,
            structures=s,
            refused_ids=np.empty(0, np.int64),
            refused_keys=[],
            refused_reasons=[],
        )
        samples = SampleTable(
            ids=ids,
            keys=keys,
            labels=list(labels),
            fields=["{}"] * num,
            offsets=np.arange(num) * 20_480,
            sizes=np.full(num, 20_000),
        )
        index = manifests.write_object(
            str(folder), f"samples-{number}.parquet", tables.encode_samples(samples)
        )
        stored = manifests.write_object(
            str(folder), f"embeddings-{number}.parquet", tables.encode_embeddings(embedded)
        )
        entries.append(ShardEntry(number=number, tar=index, index=index, num_samples=num))
        files.append(
            EmbeddingFile(
                number=number,
                stored=stored,
                num_embedded=num,
                num_refused=0,
                embedding_dim=dim,
                dtype="float16",
            )
        )
    source = VectorSource(embeddings_uri=str(folder), dead=np.empty(0, np.int64), metric="l2")
    return Materials(folder, entries, files, source, num_vectors, dim)


def build_index(made: Materials, key: str, *, num_parts: int = 4) -> Rehearsal:
    """Sample, train, build the parts and merge them."""
    plan = planning.plan(made.num_vectors, made.dim, key=key, num_parts=num_parts)
    work, seconds, held = str(made.folder / f"work-{key}"), {}, HeldOut(0.0, 0)
    picks = templates.picked(made.files, plan.num_training_vectors, seed=0)
    sampled, seconds["sample"] = timed(lambda: build_steps.sample(SampleTask(made.source, held, picks, work)))
    x = arrays.decode_array(manifests.read_object(work, sampled.stored), np.float32)
    template, seconds["train"] = timed(lambda: ivf.train_template(x, plan.key, seed=0, num_threads=1))
    tasks = [
        PartTask(made.source, template, ranges, work, number)
        for number, ranges in enumerate(segments.cut(made.files, plan.num_parts))
    ]
    parts, seconds["parts"] = timed(lambda: [build_steps.build_part(task) for task in tasks])
    task = MergeTask(template, parts, work, made.releases_uri)
    merged, seconds["merge"] = timed(lambda: build_steps.merge(task))
    return Rehearsal(
        plan=plan,
        seconds=seconds,
        index_path=Path(made.releases_uri, merged.stored.name),
        index_bytes=merged.stored.size_bytes,
        imbalance=merged.info.imbalance,
        segment=merged.stored,
    )


def store_sides(made: Materials, segment: StoredObject) -> StoredSides:
    """Store the re-rank vectors in the order of the segment, and the items."""
    root = made.releases_uri
    (placed, stored, shards), vectors_s = timed(
        lambda: segments.store_vectors(
            made.source,
            made.entries,
            made.files,
            segment=segment,
            dim=made.dim,
            work_uri=str(made.folder / "work-vectors"),
            releases_uri=root,
            in_order=build_steps.here,
        )
    )

    def store_items() -> list[StoredObject]:
        num_indexed = [shard.num_indexed for shard in shards]
        tasks = segments.items_tasks(
            str(made.folder), made.entries, num_indexed, placed=placed, releases_uri=root
        )
        return build_steps.here("", build_steps.store_items, tasks)

    items, items_s = timed(store_items)
    places = Places.open(
        Path(root, placed.shards.name), Path(root, placed.rows.name), num_rows=placed.num_rows
    )
    paths = [Path(root, each.file.name) for each in stored.files]
    vectors = GalleryVectors(paths, places, dim=made.dim)
    return StoredSides(vectors, vectors_s, items_s, sum(each.size_bytes for each in items))


def timed(act: Callable[[], R]) -> tuple[R, float]:
    """What it gives, and the seconds of processor that it took."""
    began = time.process_time()
    result = act()
    return result, time.process_time() - began
