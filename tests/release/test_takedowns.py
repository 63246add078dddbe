"""Taken down: listed beside the pointer, for every release, whoever writes at the same moment."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from namr.data import datasets
from namr.data.datasets import Dataset
from namr.data.shards import Sample, make_id
from namr.errors import ConfigError, ManifestError
from namr.release import takedowns
from namr.store import storage
from tests import small_dataset, small_release
from tests.small_release import NOW, Recipe

DATASET = "s3://somewhere/photos"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The root of some releases."""
    return str(tmp_path / "releases") if request.param == "local" else str(request.getfixturevalue("s3"))


def test_nothing_is_taken_down_where_there_is_no_list(root: str) -> None:
    ids = takedowns.taken_down(root, DATASET)
    assert ids.dtype == np.int64 and ids.shape == (0,)


def test_what_was_taken_down_is_read_in_ascending_order_and_only_of_its_dataset(root: str) -> None:
    takedowns.take_down(root, DATASET, [7 << 32, 3])
    takedowns.take_down(root, DATASET, np.array([3, 5], np.int64))
    takedowns.take_down(root, "s3://somewhere/drawings", [9])
    assert takedowns.taken_down(root, DATASET).tolist() == [3, 5, 7 << 32]
    assert takedowns.taken_down(root, "s3://somewhere/drawings").tolist() == [9]


def test_a_dataset_is_known_by_every_way_to_write_its_folder(root: str, tmp_path: Path) -> None:
    takedowns.take_down(root, str(tmp_path / "photos"), [1])
    assert takedowns.taken_down(root, f"{tmp_path}/x/../photos/").tolist() == [1]


def test_what_is_listed_already_is_not_written_again(root: str) -> None:
    takedowns.take_down(root, DATASET, [1, 2])
    uri = storage.join(root, "tombstones.json")
    _, etag = storage.read_with_etag(uri)
    takedowns.take_down(root, DATASET, [2])
    takedowns.take_down(root, DATASET, [])
    assert storage.read_with_etag(uri)[1] == etag


def test_of_many_writers_at_once_nobody_loses_anything(root: str) -> None:
    def add(ids: list[int]) -> None:
        for each in ids:
            takedowns.take_down(root, DATASET, [each])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, [list(range(start, start + 5)) for start in (0, 5, 10)]))
    assert takedowns.taken_down(root, DATASET).tolist() == list(range(15))


@pytest.mark.parametrize("damage", ["{", "{}", "ids"])
def test_a_damaged_list_is_an_error_and_never_an_empty_one(root: str, damage: str) -> None:
    uri = storage.join(root, "tombstones.json")
    takedowns.take_down(root, DATASET, [1])
    if damage == "ids":
        body = json.loads(storage.read(uri))
        body["ids"][DATASET] = [1, 2**70]
        damage = json.dumps(body)
    storage.write(uri, damage.encode())
    with pytest.raises(ManifestError, match=r"tombstones\.json is"):
        takedowns.taken_down(root, DATASET)


def test_taken_out_by_key_is_listed_and_out_of_the_dataset(root: str, tmp_path: Path) -> None:
    dataset = small_release.make_dataset(tmp_path, Recipe(num_shards=2, rows_per_shard=10))
    ids = takedowns.take_out(root, dataset.uri, ["digit/12", "digit/3"], now=NOW)
    assert ids.tolist() == [3, (1 << 32) + 2]
    assert takedowns.taken_down(root, dataset.uri).tolist() == ids.tolist()
    assert datasets.open_version(dataset.uri).version.tombstones == tuple(ids.tolist())
    assert takedowns.take_out(root, dataset.uri, ["digit/3"], now=NOW).tolist() == [3]
    assert datasets.open_version(dataset.uri).version.version == 2


def test_of_a_changed_image_what_it_was_is_taken_down_too(root: str, tmp_path: Path) -> None:
    dataset = small_dataset.make_dataset(str(tmp_path / "set"), tmp_path)
    again = Sample(key="k1", image=b"now", extension="png")
    shard = small_dataset.shard_of(dataset.uri, tmp_path, 5, [again])
    was, now = small_dataset.id_of(1), make_id(5, 0)
    datasets.publish_version(datasets.head(dataset.uri), [shard], now=NOW, tombstones=[was])
    assert takedowns.take_out(root, dataset.uri, ["k1"], now=NOW).tolist() == [was, now]
    assert takedowns.taken_down(root, dataset.uri).tolist() == [was, now]
    assert {was, now} <= set(datasets.open_version(dataset.uri).version.tombstones)


def test_an_image_that_changes_while_it_is_taken_down_is_down_as_well(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = small_dataset.make_dataset(str(tmp_path / "set"), tmp_path)
    was, now, tombstone = small_dataset.id_of(1), make_id(5, 0), datasets.tombstone

    def changed_before(*arguments: Any, **named: Any) -> Dataset:
        again = Sample(key="k1", image=b"now", extension="png")
        shard = small_dataset.shard_of(dataset.uri, tmp_path, 5, [again])
        datasets.publish_version(datasets.head(dataset.uri), [shard], now=NOW, tombstones=[was])
        return tombstone(*arguments, **named)

    monkeypatch.setattr(datasets, "tombstone", changed_before)
    assert takedowns.take_out(root, dataset.uri, ["k1"], now=NOW).tolist() == [was, now]
    assert takedowns.taken_down(root, dataset.uri).tolist() == [was, now]


def test_an_unknown_key_takes_nothing_out(root: str, tmp_path: Path) -> None:
    dataset = small_release.make_dataset(tmp_path, Recipe(num_shards=1, rows_per_shard=10))
    with pytest.raises(ConfigError, match=r"1 of 2 keys are not in .*'digit/99'; nothing was changed"):
        takedowns.take_out(root, dataset.uri, ["digit/3", "digit/99"], now=NOW)
    assert not len(takedowns.taken_down(root, dataset.uri))
    assert datasets.open_version(dataset.uri).version.version == 1


def test_killed_between_the_list_and_the_dataset_the_same_call_finishes(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = small_release.make_dataset(tmp_path, Recipe(num_shards=1, rows_per_shard=10))

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "tombstone", dies)
        with pytest.raises(KeyboardInterrupt):
            takedowns.take_out(root, dataset.uri, ["digit/3"], now=NOW)
    assert takedowns.taken_down(root, dataset.uri).tolist() == [3]
    takedowns.take_out(root, dataset.uri, ["digit/3"], now=NOW)
    assert takedowns.taken_down(root, dataset.uri).tolist() == [3]
    assert datasets.open_version(dataset.uri).version.tombstones == (3,)
