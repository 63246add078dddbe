"""A shard comes as batches in the order of its rows, beside the model, and never whole."""

import io
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namr.data import datasets, images, shards
from namr.data.datasets import Dataset
from namr.data.images import Preprocessing
from namr.embed import decoding
from namr.embed.decoding import Batch, Clock
from namr.errors import ManifestError
from namr.store import manifests, tables
from tests import small_release
from tests.small_release import NOW, Recipe

PREP = Preprocessing(size_px=16, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", fit="squash")
MEGABYTE = 1 << 20


def batches(dataset: Dataset, *, shard: int = 0, batch_size: int = 8) -> list[Batch]:
    found = decoding.batches(
        dataset,
        dataset.shards[shard],
        PREP,
        batch_size=batch_size,
        num_threads=3,
        num_tasks=0,
        clock=Clock(),
    )
    return list(found)


def add_tar(root: Path, members: dict[str, bytes]) -> Dataset:
    """A version whose one shard is a tar of these files, as other people write it."""
    root.mkdir(exist_ok=True)
    path = root / "foreign.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    uri = str(root / "dataset")
    with path.open("rb") as stream:
        table = shards.index_shard(stream, number=0, uri=str(path)).table
    entry = datasets.ShardEntry(
        number=0,
        tar=manifests.write_object(uri, "shards/0.tar", path),
        index=manifests.write_object(uri, "shards/0.parquet", tables.encode_samples(table)),
        num_samples=len(table),
    )
    return datasets.publish_version(datasets.head(uri), [entry], now=NOW)


def test_rows_come_in_order_in_full_batches_and_a_rest(tmp_path: Path) -> None:
    dataset = small_release.make_dataset(tmp_path, Recipe(num_shards=1, rows_per_shard=45))
    found = batches(dataset)
    assert [len(batch.samples) for batch in found] == [8, 8, 8, 8, 8, 5]
    samples = [sample for batch in found for sample in batch.samples]
    assert [sample.key for sample in samples] == dataset.samples(dataset.shards[0]).keys
    assert all(sample.image == b"" for sample in samples)
    pixels = np.concatenate([batch.pixels for batch in found])
    expected = [images.prepare(small_release.digit(row), PREP) for row in range(45)]
    np.testing.assert_array_equal(pixels, expected)


def test_what_does_not_decode_is_told_and_leaves_no_gap(tmp_path: Path) -> None:
    good = small_release.digit(0)
    members = {f"{row}.png": b"no image" if row in (0, 9, 19) else good for row in range(20)}
    found = batches(add_tar(tmp_path, members))
    assert [len(batch.samples) for batch in found] == [8, 8, 1]
    refused = [(sample.key, reason[:12]) for batch in found for sample, reason in batch.refused]
    assert refused == [(key, "not an image") for key in ("0", "9", "19")]
    only_bad = batches(add_tar(tmp_path / "bad", {"a.png": b"none"}))
    assert [(batch.pixels.shape, len(batch.refused)) for batch in only_bad] == [((0, 3, 16, 16), 1)]


def test_damage_is_an_error_at_the_latest_when_the_shard_ends(tmp_path: Path) -> None:
    dataset = small_release.make_dataset(tmp_path, Recipe(num_shards=1, rows_per_shard=20))
    path = Path(dataset.shard_uri(dataset.shards[0]))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ManifestError, match="is damaged: its SHA-256"):
        batches(dataset)


def test_a_large_shard_is_never_in_memory(tmp_path: Path) -> None:
    """Of 160 MB, most of it images and a film between two of them; what Pillow holds is not counted."""
    picture = io.BytesIO()
    Image.new("RGB", (600, 560), "red").save(picture, "BMP")
    members = {f"{row:03}.bmp": picture.getvalue() for row in range(100)}
    members["050.mp4"] = bytes(64 * MEGABYTE)
    dataset = add_tar(tmp_path, dict(sorted(members.items())))
    members.clear()
    assert dataset.shards[0].tar.size_bytes > 160 * MEGABYTE
    tracemalloc.start()
    try:
        found = decoding.batches(
            dataset, dataset.shards[0], PREP, batch_size=4, num_threads=1, num_tasks=0, clock=Clock()
        )
        assert sum(len(batch.samples) for batch in found) == 100
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60 * MEGABYTE
