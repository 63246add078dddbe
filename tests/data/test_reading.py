"""Reading: every image comes back as it was packed, from anywhere; damage is a named error."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from namr.data import reading, sample_index, shards
from namr.data.datasets import Dataset
from namr.data.sample_index import SampleIndex
from namr.errors import ManifestError, StorageError
from namr.store import storage
from namr.store.cache import Cache
from tests.small_dataset import LABELS, id_of, image, make_dataset


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


def read_all(index: SampleIndex, reader: reading.SampleReader) -> None:
    """Every sample, in an order of no pattern and one of them twice, as it was packed."""
    order = np.random.default_rng(0).permutation(14)
    order = np.concatenate([order, order[:1]])
    ids = np.array([id_of(n) for n in order])
    places = index.places(ids)
    found = reader.read(ids, index.offsets(places), index.sizes(places))
    assert found == [image(n) for n in order]


def test_samples_come_back_in_the_order_asked(dataset: Dataset, tmp_path: Path) -> None:
    index = sample_index.build(dataset, tmp_path)
    read_all(index, reading.SampleReader(dataset, cache=None))


def test_a_shard_that_the_dataset_has_not_is_a_named_error(dataset: Dataset) -> None:
    nowhere = np.array([shards.make_id(9, 0)])
    with pytest.raises(ManifestError, match="no shard 9 in version 2"):
        reading.SampleReader(dataset, cache=None).read(nowhere, nowhere, nowhere)


def test_pictures_are_read_by_many_threads_and_their_version_opened_when_the_first_is_asked_for(
    dataset: Dataset, tmp_path: Path
) -> None:
    index = sample_index.build(dataset, tmp_path)
    ids = [id_of(n) for n in (9, 2, 11)]
    places = index.places(np.array(ids))
    offsets, sizes = index.offsets(places).tolist(), index.sizes(places).tolist()
    pictures = reading.Pictures(dataset.uri, dataset.version.version)
    assert pictures.read_many(ids, offsets, sizes) == [image(9), image(2), image(11)]
    assert pictures.read_many([], [], []) == []
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(pictures.read, ids, offsets, sizes)) == [image(9), image(2), image(11)]
    gone = reading.Pictures(dataset.uri, 99)
    with pytest.raises(ManifestError, match="no such version as 99"):
        gone.read(ids[0], offsets[0], sizes[0])


@pytest.fixture
def remote(s3: str, tmp_path: Path) -> Dataset:
    return make_dataset(f"{s3}/set", tmp_path)


@pytest.mark.s3
def test_a_reader_fills_the_cache_while_it_answers_and_stays_within_its_limit(
    remote: Dataset, tmp_path: Path
) -> None:
    index = sample_index.build(remote, tmp_path)
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
    index = sample_index.build(remote, tmp_path)
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
