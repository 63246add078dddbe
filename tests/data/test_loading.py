"""Loading: a batch depends on (seed, step) alone, and evaluation sees each sample once."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from namr.data import images, loading, sample_index, shards
from namr.data.datasets import Dataset
from namr.data.images import AugmentConfig, Preprocessing
from namr.data.loading import Batch, LoaderConfig
from namr.data.reading import SampleReader
from namr.data.sampling import ClassIndex, PKConfig
from namr.errors import ConfigError, ImageRefused
from namr.store import storage
from namr.store.cache import Cache
from tests.small_dataset import LABELS, id_of, image, make_dataset

PREP = Preprocessing(
    size_px=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", fit="squash"
)
BATCHES = PKConfig(classes_per_batch=3, samples_per_class=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return make_dataset(str(folder / "set"), folder)


def load(
    dataset: Dataset,
    folder: Path,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
) -> list[Batch]:
    loader = loading.make_loader(
        dataset,
        LoaderConfig(num_workers=num_workers, cache_folder=folder),
        batches=BATCHES,
        seed=5,
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
        loading.make_loader(
            dataset,
            LoaderConfig(num_workers=0, cache_folder=tmp_path),
            batches=PKConfig(classes_per_batch=5, samples_per_class=2),
            seed=0,
            rank=0,
            world_size=1,
            first_step=0,
            num_steps=1,
            prep=PREP,
            augment=AugmentConfig(),
        )


def test_each_batch_is_read_once_and_all_but_the_first_two_ahead_by_other_threads(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, read = load(dataset, tmp_path), SampleReader.read
    readers: list[str] = []

    def reading(self: SampleReader, *asked: Any) -> list[bytes]:
        readers.append(threading.current_thread().name)
        return read(self, *asked)

    monkeypatch.setattr(SampleReader, "read", reading)
    assert same(whole, load(dataset, tmp_path))
    assert sorted(name.startswith("namr-read") for name in readers) == [False] * 2 + [True] * 4


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 5), (3, 4), (5, 100)])
def test_evaluation_sees_each_labelled_sample_once_as_search_would(
    dataset: Dataset, tmp_path: Path, world_size: int, batch_size: int
) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in loading.make_evaluation_loader(
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
    index = sample_index.build(dataset, tmp_path)
    config = LoaderConfig(num_workers=0, cache_folder=tmp_path)
    whole = index.class_index
    some = ClassIndex(ids=whole.ids, starts=whole.starts[[0, 1, 2, 3]])  # ants, bees, cats
    loader = loading.make_loader(
        dataset, config, batches=BATCHES, seed=5, rank=0, world_size=1, first_step=0, num_steps=4, prep=PREP,
        augment=None, classes=some,
    )  # fmt: skip
    for batch in loader:
        assert set(batch.labels.tolist()) == {0, 1, 2}
    ids = index.labelled_ids[[4, 2]]
    (batch,) = loading.make_evaluation_loader(
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
