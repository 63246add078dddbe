"""A dataset of fourteen small images in three shards, one of them tombstoned."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from namr.data import datasets, images, shards
from namr.data.datasets import Dataset, ShardEntry
from namr.data.shards import Sample
from namr.store import manifests, tables

NOW = datetime(2026, 11, 23, tzinfo=UTC)
LABELS = ["ant", "bee", "cat", "cat", None, "bee", "ant", "dog", "bee", "cat", "eel", "eel", "bee", "ant"]


def id_of(number: int) -> int:
    return shards.make_id(2 + number // 5, number % 5)


def image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (10, 10 + number, 3), np.uint8)
    return images.encode_png(pixels)


def make_dataset(root: str, folder: Path, per_shard: int = 5) -> Dataset:
    """Fourteen images in three shards with numbers 2, 3, 4; the second ant (row 1 of shard 3) is gone."""
    entries = []
    for number, start in enumerate(range(0, len(LABELS), per_shard), 2):
        rows = range(start, min(start + per_shard, len(LABELS)))
        samples = [Sample(key=f"k{n}", image=image(n), extension="png", label=LABELS[n]) for n in rows]
        entries.append(shard_of(root, folder, number, samples))
    datasets.publish_version(datasets.head(root), entries, now=NOW)
    return datasets.tombstone(root, ["k6"], now=NOW)


def shard_of(root: str, folder: Path, number: int, samples: list[Sample]) -> ShardEntry:
    """A shard that no version lists yet."""
    path = folder / f"{number}.tar"
    table = shards.write_shard(path, samples, number=number)
    return ShardEntry(
        number=number,
        tar=manifests.write_object(root, f"shards/{number}.tar", path),
        index=manifests.write_object(root, f"shards/{number}.parquet", tables.encode_samples(table)),
        num_samples=len(table),
    )
