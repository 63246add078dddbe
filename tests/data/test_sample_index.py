"""The memory-mapped sample index: ids, classes and places, whatever is missing in between."""

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from namr.data import sample_index, shards
from namr.data.datasets import Dataset
from namr.store.tables import SampleTable
from tests.small_dataset import make_dataset


def table(number: int, labels: list[str | None], sizes: list[int]) -> SampleTable:
    num = len(labels)
    return SampleTable(
        ids=np.arange(num, dtype=np.int64) + shards.make_id(number, 0),
        keys=[f"{number}-{row}" for row in range(num)],
        labels=labels,
        fields=["{}"] * num,
        offsets=np.arange(num, dtype=np.int64) * 1000 + number,
        sizes=np.array(sizes, np.int64),
    )


@pytest.fixture
def index(tmp_path: Path) -> sample_index.SampleIndex:
    """Shards 2 and 7; in 7, row 1 is tombstoned and row 3 erased."""
    first = table(2, ["cat", None, "ant"], [1, 2, 3])
    second = table(7, ["ant", "cat", "bee", "eel", "cat"], [4, 5, 6, 0, 8])
    live = [np.ones(3, bool), np.array([True, False, True, True, True])]
    return sample_index.write(tmp_path / "index", zip([first, second], live, strict=True))


def test_classes_are_the_sorted_labels_of_live_samples(index: sample_index.SampleIndex) -> None:
    assert index.class_names == ["ant", "bee", "cat"]
    assert (index.num_classes, index.class_index.num_excluded) == (3, 1)
    expected = [[(2, 2), (7, 0)], [(7, 2)], [(2, 0), (7, 4)]]
    ids = [[shards.make_id(number, row) for number, row in some] for some in expected]
    found = np.split(index.class_index.ids, index.class_index.starts[1:-1])
    assert [rows.tolist() for rows in found] == ids
    assert index.labelled_ids.tolist() == sorted(id for some in ids for id in some)


def test_every_id_has_its_place(index: sample_index.SampleIndex) -> None:
    ids = np.array([shards.make_id(7, 4), shards.make_id(2, 1), shards.make_id(7, 1), shards.make_id(2, 0)])
    places = index.places(ids)
    assert index.offsets(places).tolist() == [4007, 1002, 1007, 2]
    assert index.sizes(places).tolist() == [8, 2, 5, 1]
    assert index.classes(places).tolist() == [2, -1, -1, 2]


def test_another_process_maps_the_same_files(index: sample_index.SampleIndex) -> None:
    other = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) < 1000
    assert other.class_names == index.class_names
    assert isinstance(other.class_index.ids, np.memmap)


def test_a_dataset_without_samples_or_labels_has_no_classes(tmp_path: Path) -> None:
    assert sample_index.write(tmp_path / "none", []).num_classes == 0
    shard = table(0, [None], [1])
    unlabelled = sample_index.write(tmp_path / "some", [(shard, np.ones(1, bool))])
    assert (unlabelled.num_classes, len(unlabelled.labelled_ids)) == (0, 0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return make_dataset(str(folder / "set"), folder)


def test_the_sample_index_is_written_once(dataset: Dataset, tmp_path: Path) -> None:
    sample_index.build(dataset, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    sample_index.build(dataset, tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}


def test_sample_indexes_that_nobody_opens_go_away(dataset: Dataset, tmp_path: Path) -> None:
    old = tmp_path / "indexes" / "of a version of last month"
    old.mkdir(parents=True)
    os.utime(old, (time.time() - 8 * 24 * 3600,) * 2)
    recent = tmp_path / "indexes" / "of yesterday"
    recent.mkdir()
    sample_index.build(dataset, tmp_path)
    assert recent.exists() and not old.exists()
