"""Items of several files against those of others: by id side by side, by key in turns over the hashes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.data import datasets
from namr.data.shards import Sample
from namr.nightly import losses
from namr.release.releases import Release
from namr.store import item_files, tables
from namr.store.item_files import ItemFile
from namr.store.tables import SampleTable
from tests import small_dataset, small_release
from tests.small_release import Recipe


def file_of(*ids: int) -> ItemFile:
    nothing = np.zeros(len(ids), np.int64)
    table = SampleTable(
        ids=np.array(ids, np.int64),
        keys=[f"k{each}" for each in ids],
        labels=[None] * len(ids),
        fields=["{}"] * len(ids),
        offsets=nothing,
        sizes=nothing,
    )
    return item_files.decode(item_files.encode([table]))


def cut(ids: list[int], *sizes: int) -> list[ItemFile]:
    bounds = np.cumsum([0, *sizes]).tolist()
    return [file_of(*ids[start:stop]) for start, stop in zip(bounds, [*bounds[1:], None], strict=True)]


@pytest.mark.parametrize("our_sizes", [(), (3, 0, 20), (40,), (0,)])
@pytest.mark.parametrize("their_sizes", [(), (1, 1, 0, 17), (50,)])
def test_what_others_lack_by_id_is_found_however_files_are_cut(
    our_sizes: tuple[int, ...], their_sizes: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(len(our_sizes) + 10 * len(their_sizes))
    ours, theirs = (np.sort(rng.choice(100, 60, replace=False)).tolist() for _ in range(2))
    lacking = losses._without_id_in(cut(ours, *our_sizes), iter(cut(theirs, *their_sizes)))
    found = [int(file.ids[row]) for file, rows in lacking for row in rows]
    assert found == [each for each in ours if each not in theirs]
    assert 0 < len(found) < 60


def test_nothing_and_everything_is_lacking_by_id() -> None:
    files = cut([1, 5, 9], 1)
    assert [len(rows) for _, rows in losses._without_id_in(files, files)] == [0, 0]
    assert [len(rows) for _, rows in losses._without_id_in(files, [])] == [1, 2]
    assert list(losses._without_id_in([], files)) == []


@pytest.mark.parametrize("at_once", [1 << 23, 20, 7, 1])
def test_what_others_lack_by_key_is_found_in_any_number_of_turns(at_once: int) -> None:
    rng = np.random.default_rng(3)
    ours, theirs = (np.sort(rng.choice(100, 60, replace=False)).tolist() for _ in range(2))
    also = [ours[0], ours[7], 1000]
    lacking = losses._without_key_in(
        cut(ours, 20, 0), cut(theirs, 31), also=[f"k{each}" for each in also], at_once=at_once
    )
    found = sorted(file.key(row) for file, rows in lacking for row in rows)
    assert found == sorted(f"k{each}" for each in ours if each not in theirs and each not in also)
    assert list(losses._without_key_in([], cut(theirs), at_once=at_once)) == []
    everything = losses._without_key_in(cut(ours, 20), [], at_once=at_once)
    assert sum(len(rows) for _, rows in everything) == 60


def test_of_files_that_both_list_nothing_is_lost_and_none_is_read(tmp_path: Path) -> None:
    made = small_release.publish(tmp_path, Recipe(num_shards=2))
    table, uri = small_release.table_of(made), made.releases_uri
    head, tail, less = (
        small_release.store_items(uri, tables.rows_of(table, rows))
        for rows in (np.arange(60), np.arange(60, 80), np.arange(60, 79))
    )
    both = [Release(uri, replace(made.manifest, items=(*head, *each))) for each in (tail, less)]
    (tmp_path / "releases" / head[0].name).write_bytes(b"nobody reads this")
    dataset = datasets.open_version(made.manifest.dataset_uri)
    assert losses.lost_images(both[1], dataset, current=both[0]) == (1, ["digit/79"])
    assert losses.lost_images(both[0], dataset, current=both[1]) == (0, [])


def test_a_changed_image_is_no_excuse_for_the_loss_of_what_it_is_now(tmp_path: Path) -> None:
    dataset = small_dataset.make_dataset(str(tmp_path / "set"), tmp_path)
    again = Sample(key="k1", image=b"now", extension="png")
    shard = small_dataset.shard_of(dataset.uri, tmp_path, 5, [again])
    latest = datasets.publish_version(
        datasets.head(dataset.uri), [shard], now=small_dataset.NOW, tombstones=[small_dataset.id_of(1)]
    )
    assert sorted(losses._keys_taken_out(latest)) == ["k6"]
    assert sorted(losses._keys_taken_out(datasets.tombstone(dataset.uri, ["k1"], now=small_dataset.NOW))) == [
        "k1",
        "k6",
    ]
