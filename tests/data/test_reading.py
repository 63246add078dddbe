"""Reading: every image comes back as it was packed, and a batch depends on (seed, step) alone."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from namr.data import datasets, images, reading, shards
from namr.data.datasets import Dataset, ShardEntry
from namr.data.images import AugmentConfig, Preprocessing
from namr.data.reading import Batch, LoaderConfig
from namr.data.sample_index import SampleIndex
from namr.data.sampling import ClassIndex, PKConfig
from namr.data.shards import Sample
from namr.errors import ConfigError, ImageRefused, ManifestError, StorageError
from namr.store import manifests, storage, tables
from namr.store.cache import Cache

NOW = datetime(2026, 11, 23, tzinfo=UTC)
PREP = Preprocessing(
    size_px=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", fit="squash"
)
BATCHES = PKConfig(classes_per_batch=3, samples_per_class=2, seed=5)
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
        path = folder / f"{number}.tar"
        table = shards.write_shard(path, samples, number=number)
        entries.append(
            ShardEntry(
                number=number,
                tar=manifests.write_object(root, f"shards/{number}.tar", path),
                index=manifests.write_object(root, f"shards/{number}.parquet", tables.encode_samples(table)),
                num_samples=len(table),
            )
        )
    datasets.publish_version(datasets.head(root), entries, now=NOW)
    return datasets.tombstone(root, ["k6"], now=NOW)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return make_dataset(str(folder / "set"), folder)


def test_a_stream_gives_the_live_samples_in_order(dataset: Dataset) -> None:
    found = [sample for entry in dataset.shards for sample in reading.stream(dataset, entry)]
    numbers = [n for n in range(14) if n != 6]
    assert [s.key for s in found] == [f"k{n}" for n in numbers]
    assert [s.label for s in found] == [LABELS[n] for n in numbers]
    assert [s.image for s in found] == [image(n) for n in numbers]
    assert [s.id for s in found[:6]] == [*(shards.make_id(2, row) for row in range(5)), shards.make_id(3, 0)]


def test_a_stream_of_a_damaged_or_truncated_tar_is_a_named_error(tmp_path: Path) -> None:
    dataset = make_dataset(str(tmp_path / "set"), tmp_path)
    entry = dataset.shards[1]
    path = Path(dataset.shard_uri(entry))
    whole = path.read_bytes()
    offset = int(dataset.samples(entry).offsets[0])
    path.write_bytes(whole[: offset + 50])
    with pytest.raises(ManifestError, match=r"3\.tar is truncated"):
        list(reading.stream(dataset, entry))
    path.write_bytes(whole[: offset + 50] + b"?" + whole[offset + 51 :])
    with pytest.raises(ManifestError, match=r"3\.tar is damaged"):
        list(reading.stream(dataset, entry))


def test_the_sample_index_is_written_once(dataset: Dataset, tmp_path: Path) -> None:
    reading.build_class_index(dataset, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    reading.build_class_index(dataset, tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}


def test_sample_indexes_that_nobody_opens_go_away(dataset: Dataset, tmp_path: Path) -> None:
    old = tmp_path / "indexes" / "of a version of last month"
    old.mkdir(parents=True)
    os.utime(old, (time.time() - 8 * 24 * 3600,) * 2)
    recent = tmp_path / "indexes" / "of yesterday"
    recent.mkdir()
    reading.build_class_index(dataset, tmp_path)
    assert recent.exists() and not old.exists()


def read_all(index: SampleIndex, reader: reading.SampleReader) -> None:
    """Every sample, in an order of no pattern and one of them twice, as it was packed."""
    order = np.random.default_rng(0).permutation(14)
    order = np.concatenate([order, order[:1]])
    ids = np.array([id_of(n) for n in order])
    places = index.places(ids)
    found = reader.read(ids, index.offsets(places), index.sizes(places))
    assert found == [image(n) for n in order]


def test_samples_come_back_in_the_order_asked(dataset: Dataset, tmp_path: Path) -> None:
    index = reading.build_class_index(dataset, tmp_path)
    read_all(index, reading.SampleReader(dataset, cache=None))


def test_a_shard_that_the_dataset_has_not_is_a_named_error(dataset: Dataset) -> None:
    nowhere = np.array([shards.make_id(9, 0)])
    with pytest.raises(ManifestError, match="no shard 9 in version 2"):
        reading.SampleReader(dataset, cache=None).read(nowhere, nowhere, nowhere)


def test_pictures_are_read_by_many_threads_and_their_version_opened_when_the_first_is_asked_for(
    dataset: Dataset, tmp_path: Path
) -> None:
    index = reading.build_class_index(dataset, tmp_path)
    ids = [id_of(n) for n in (9, 2, 11)]
    places = index.places(np.array(ids))
    offsets, sizes = index.offsets(places).tolist(), index.sizes(places).tolist()
    pictures = reading.Pictures(dataset.uri, dataset.version.version)
    assert pictures.read_many(ids, offsets, sizes) == [image(9), image(2), image(11)]
    assert pictures.read_many([], [], []) == []
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(pictures.read, ids, offsets, sizes)) == [image(9), image(2), image(11)]
    gone = reading.Pictures(dataset.uri, 99)
    with pytest.raises(ManifestError, match="no such version"):
        gone.read(ids[0], offsets[0], sizes[0])


def load(
    dataset: Dataset,
    folder: Path,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
) -> list[Batch]:
    loader = reading.make_loader(
        dataset,
        LoaderConfig(num_workers=num_workers, cache_folder=folder),
        batches=BATCHES,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        num_steps=6 - first_step,
        prep=PREP,
        augment=AugmentConfig(),
    )
    return list(loader)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_read_the_global_batch(dataset: Dataset, tmp_path: Path, world_size: int) -> None:
    whole = load(dataset, tmp_path)
    ranks = [load(dataset, tmp_path, rank=rank, world_size=world_size) for rank in range(world_size)]
    united = [
        Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        for batches in zip(*ranks, strict=True)
    ]
    assert same(whole, united)
    for batch in whole:
        assert batch.pixels.shape == (6, 3, 8, 8)
        assert batch.pixels.dtype == torch.uint8
        assert batch.positions.tolist() == list(range(6))
        assert sorted(torch.bincount(batch.labels, minlength=5).tolist()) == [0, 0, 2, 2, 2]
        assert 3 not in batch.labels  # one dog makes no pair
        assert shards.make_id(3, 1) not in batch.ids  # gone


@pytest.mark.slow
def test_the_number_of_loader_workers_changes_no_bit(dataset: Dataset, tmp_path: Path) -> None:
    whole = load(dataset, tmp_path)
    for num_workers in (1, 2):
        assert same(whole, load(dataset, tmp_path, num_workers=num_workers))


def test_a_loader_that_starts_later_gives_what_is_left(dataset: Dataset, tmp_path: Path) -> None:
    whole = load(dataset, tmp_path)
    assert same(whole[4:], load(dataset, tmp_path, first_step=4))
    assert not torch.equal(whole[0].pixels, whole[1].pixels)


def test_too_few_classes_are_a_named_error(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only 4 of 5 classes have at least 2 samples"):
        reading.make_loader(
            dataset,
            LoaderConfig(num_workers=0, cache_folder=tmp_path),
            batches=PKConfig(classes_per_batch=5, samples_per_class=2, seed=0),
            rank=0,
            world_size=1,
            first_step=0,
            num_steps=1,
            prep=PREP,
            augment=AugmentConfig(),
        )


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 5), (3, 4), (5, 100)])
def test_evaluation_sees_each_labelled_sample_once_as_search_would(
    dataset: Dataset, tmp_path: Path, world_size: int, batch_size: int
) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in reading.make_evaluation_loader(
            dataset,
            LoaderConfig(num_workers=0, cache_folder=tmp_path),
            batch_size_per_worker=batch_size,
            rank=rank,
            world_size=world_size,
            prep=PREP,
        )
    ]
    numbers = [n for n, label in enumerate(LABELS) if label and n != 6]
    assert torch.cat([b.positions for b in batches]).tolist() == list(range(len(numbers)))
    assert torch.cat([b.ids for b in batches]).tolist() == [id_of(n) for n in numbers]
    names = sorted({label for label in LABELS if label})
    assert torch.cat([b.labels for b in batches]).tolist() == [names.index(LABELS[n] or "") for n in numbers]
    expected = np.stack([images.prepare(image(n), PREP) for n in numbers])
    assert np.array_equal(torch.cat([b.pixels for b in batches]).numpy(), expected)


def test_batches_and_passes_can_be_of_some_classes_and_samples(dataset: Dataset, tmp_path: Path) -> None:
    index = reading.build_class_index(dataset, tmp_path)
    config = LoaderConfig(num_workers=0, cache_folder=tmp_path)
    whole = index.class_index
    some = ClassIndex(rows=whole.rows, starts=whole.starts[[0, 1, 2, 3]])  # ants, bees, cats
    loader = reading.make_loader(
        dataset, config, batches=BATCHES, rank=0, world_size=1, first_step=0, num_steps=4, prep=PREP,
        augment=None, classes=some,
    )  # fmt: skip
    for batch in loader:
        assert set(batch.labels.tolist()) == {0, 1, 2}
    ids = index.labelled_ids[[4, 2]]
    (batch,) = reading.make_evaluation_loader(
        dataset, config, batch_size_per_worker=9, rank=0, world_size=1, prep=PREP, ids=ids
    )
    assert batch.ids.tolist() == ids.tolist()


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    dataset = make_dataset(str(tmp_path / "set"), tmp_path)
    for entry in dataset.shards:
        path, table = Path(dataset.shard_uri(entry)), dataset.samples(entry)
        data = bytearray(path.read_bytes())
        for offset in table.offsets.tolist():
            data[offset : offset + 4] = b"????"
        path.write_bytes(data)
    with pytest.raises(ImageRefused, match=r"not an image .*\(sample \d+ of .*/set\)"):
        load(dataset, tmp_path / "cache")


@pytest.fixture
def remote(s3: str, tmp_path: Path) -> Dataset:
    return make_dataset(f"{s3}/set", tmp_path)


@pytest.mark.s3
def test_on_s3_batches_are_the_same_cold_and_from_the_cache(
    dataset: Dataset, remote: Dataset, tmp_path: Path
) -> None:
    local = load(dataset, tmp_path)
    assert same(local, load(remote, tmp_path))
    wait_until_cached(remote, tmp_path)
    for entry in remote.shards:
        storage.delete(remote.shard_uri(entry))
    assert same(local, load(remote, tmp_path))


def wait_until_cached(remote: Dataset, folder: Path) -> None:
    cache = Cache(folder / "shards", 1 << 30)
    for entry in remote.shards:
        cache.path(remote.shard_uri(entry), sha256=entry.tar.sha256)


@pytest.mark.s3
def test_a_reader_fills_the_cache_while_it_answers_and_stays_within_its_limit(
    remote: Dataset, tmp_path: Path
) -> None:
    index = reading.build_class_index(remote, tmp_path)
    limit = sum(entry.tar.size_bytes for entry in remote.shards[:2])
    cache = Cache(tmp_path / "shards", limit)
    reader = reading.SampleReader(remote, cache=cache)
    read_all(index, reader)
    for _ in range(100):
        if all(cache.get(entry.tar.sha256) for entry in remote.shards[:2]):
            break
        time.sleep(0.05)
    assert [cache.get(entry.tar.sha256) is not None for entry in remote.shards] == [True, True, False]
    read_all(index, reader)


@pytest.mark.s3
def test_a_damaged_remote_shard_is_told_by_the_next_read(remote: Dataset, tmp_path: Path) -> None:
    index = reading.build_class_index(remote, tmp_path)
    for entry in remote.shards:
        uri = remote.shard_uri(entry)
        data = storage.read(uri)
        storage.write(uri, data[:-1] + b"x")
    reader = reading.SampleReader(remote, cache=Cache(tmp_path / "shards", 1 << 30))
    with pytest.raises(StorageError, match="is damaged: its SHA-256"):
        for _ in range(100):
            read_all(index, reader)
            time.sleep(0.05)


@pytest.mark.s3
def test_a_stream_from_s3_gives_what_was_packed(remote: Dataset) -> None:
    found = [sample.image for entry in remote.shards for sample in reading.stream(remote, entry)]
    assert found == [image(n) for n in range(14) if n != 6]
