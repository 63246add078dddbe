"""Dataset versions: what is published is read back; damage and contests are named errors."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from namr.data import datasets, shards
from namr.data.datasets import Dataset, ShardEntry
from namr.data.shards import Sample
from namr.errors import ConfigError, Conflict, ManifestError
from namr.store import manifests, tables

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def make_shard(root: Path, number: int, keys: list[str]) -> ShardEntry:
    path = root.parent / f"{number}.tar"
    table = shards.write_shard(
        path, [Sample(key=k, image=k.encode(), extension="png") for k in keys], number=number
    )
    return ShardEntry(
        number=number,
        tar=manifests.write_object(str(root), f"shards/{number}.tar", path),
        index=manifests.write_object(str(root), f"shards/{number}.parquet", tables.encode_samples(table)),
        num_samples=len(table),
    )


def publish(root: Path, number: int, keys: list[str]) -> Dataset:
    return datasets.publish_version(datasets.head(str(root)), [make_shard(root, number, keys)], now=NOW)


def test_a_version_adds_shards_and_the_old_one_stays_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "set"
    first = publish(root, 0, ["a", "b"])
    second = publish(root, 1, ["c"])
    assert datasets.open_version(str(root)) == second
    assert datasets.open_version(str(root), 1) == first
    assert [e.number for e in second.shards] == [0, 1]
    assert (first.version.version, second.version.version) == (1, 2)
    assert first.version.dataset_id == second.version.dataset_id
    assert (second.version.num_samples, second.version.next_shard_number) == (3, 2)
    assert [t.keys for t in second.all_samples()] == [["a", "b"], ["c"]]
    assert second.find(["c", "a", "nobody"]) == {"a": (0,), "c": (1 << 32,)}


def test_of_two_changes_at_once_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    root = tmp_path / "set"
    publish(root, 0, ["a"])
    before = datasets.head(str(root))
    winner = datasets.publish_version(before, [make_shard(root, 1, ["b"])], now=NOW)
    with pytest.raises(Conflict, match="changed by somebody else"):
        datasets.publish_version(before, [], now=NOW, tombstones=[0])
    assert datasets.open_version(str(root)) == winner


def test_a_run_killed_before_it_published_leaves_the_old_state_and_is_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "set"
    first = publish(root, 0, ["a"])
    (root / "versions" / "2.json").write_text("left behind by a killed run")
    assert datasets.open_version(str(root)) == first
    assert publish(root, 1, ["b"]).version.version == 3


def test_a_tombstone_hides_an_id_and_keeps_its_key_known(tmp_path: Path) -> None:
    root = tmp_path / "set"
    publish(root, 0, ["a", "b", "c"])
    dataset = datasets.tombstone(str(root), ["b"], now=NOW)
    assert (dataset.version.tombstones, dataset.num_live) == ((1,), 2)
    assert dataset.live(dataset.samples(dataset.shards[0]).ids).tolist() == [True, False, True]
    assert dataset.find(["b"]) == {"b": (1,)}
    assert datasets.tombstone(str(root), ["b"], now=NOW) == dataset
    with pytest.raises(ConfigError, match=r"1 of 2 keys are not in .* 'x'"):
        datasets.tombstone(str(root), ["a", "x"], now=NOW)


def test_a_version_that_was_never_current_is_not_opened_by_its_number(tmp_path: Path) -> None:
    root = tmp_path / "set"
    publish(root, 0, ["a"])
    before = datasets.head(str(root))
    winner = datasets.publish_version(before, [make_shard(root, 1, ["b"])], now=NOW)
    with pytest.raises(Conflict):
        datasets.publish_version(before, winner.shards[1:], now=NOW)
    lost = r"no such version as 3, or it was never current; the newest that were are 1, 2"
    with pytest.raises(ManifestError, match=lost):
        datasets.open_version(str(root), 3)
    last = publish(root, 2, ["d"])
    with pytest.raises(ManifestError, match=lost):
        datasets.open_version(str(root), 3)
    assert (last.version.version, last.version.history) == (4, (1, 2))
    assert datasets.open_version(str(root), 2) == winner
    assert [datasets.open_version(str(root), n).version.version for n in (1, 4)] == [1, 4]


def test_versions_that_an_older_namr_wrote_are_opened_as_it_did(tmp_path: Path) -> None:
    root = tmp_path / "set"
    publish(root, 0, ["a"])
    publish(root, 1, ["b"])
    for path in (root / "versions").iterdir():
        body = json.loads(path.read_text())
        del body["history"], body["emptied"]
        body["format_version"] = 1
        path.write_text(json.dumps(body))
    assert datasets.open_version(str(root)).version.history is None
    assert datasets.open_version(str(root), 1).version.version == 1
    assert publish(root, 2, ["c"]).version.history == (1, 2)


@pytest.mark.parametrize("id", [1 << 70, -1, 3, (7 << 32) + 1])
def test_a_tombstone_is_an_id_of_the_dataset(tmp_path: Path, id: int) -> None:
    root = tmp_path / "set"
    dataset = publish(root, 0, ["a", "b", "c"])
    with pytest.raises(ConfigError, match=f"tombstone {id} is the id of no sample"):
        datasets.publish_version(datasets.head(str(root)), [], now=NOW, tombstones=[id])
    assert datasets.open_version(str(root)) == dataset


@pytest.mark.parametrize("ids", ["[-1]", f"[{1 << 70}]", "[2, 1]"])
def test_tombstones_that_can_not_be_are_damage(tmp_path: Path, ids: str) -> None:
    root = tmp_path / "set"
    publish(root, 0, ["a", "b", "c"])
    path = root / "versions" / "1.json"
    path.write_text(path.read_text().replace('"tombstones": []', f'"tombstones": {ids}'))
    with pytest.raises(ManifestError, match=r"is damaged.*tombstones"):
        datasets.open_version(str(root))


def test_what_is_live_is_found_among_many_tombstones(tmp_path: Path) -> None:
    dataset = publish(tmp_path / "set", 0, ["a"])
    ids = np.array([0, 5, 6, 9, 11, 1 << 40])
    assert dataset.live(ids).all()
    dead = replace(dataset, version=replace(dataset.version, tombstones=(5, 7, 11)))
    assert dead.live(ids).tolist() == [True, False, True, True, False, True]
    assert dead.live(ids[:0]).tolist() == []


@pytest.mark.parametrize("number", [0, -1, 1 << 21])
def test_a_shard_number_is_given_once_and_stays_in_range(tmp_path: Path, number: int) -> None:
    root = tmp_path / "set"
    dataset = publish(root, 0, ["a"])
    entry = dataset.shards[0]
    with pytest.raises(ConfigError, match="never given before"):
        datasets.publish_version(
            datasets.head(str(root)), [ShardEntry(**{**vars(entry), "number": number})], now=NOW
        )
    assert datasets.open_version(str(root)) == dataset


def test_no_dataset_is_a_named_error(tmp_path: Path) -> None:
    for opened in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ManifestError, match=r"is no dataset: it has no current\.json"):
            datasets.open_version(str(opened))
        with pytest.raises(ManifestError, match="is no dataset"):
            datasets.tombstone(str(opened), ["a"], now=NOW)


def test_damage_is_a_named_error(tmp_path: Path) -> None:
    root = tmp_path / "set"
    dataset = publish(root, 0, ["a"])
    entry = dataset.shards[0]
    index, version = root / entry.index.name, root / "versions" / "1.json"

    whole = index.read_bytes()
    index.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ManifestError, match=r"0\.parquet is damaged"):
        dataset.samples(entry)
    index.unlink()
    with pytest.raises(ManifestError, match=r"shard 0 has no index: .*0\.parquet is missing"):
        dataset.samples(entry)

    text = version.read_text()
    version.write_text(text.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(ManifestError, match="format version 3, and this namr reads 1, 2"):
        datasets.open_version(str(root))
    version.write_text(text[:-9])
    with pytest.raises(ManifestError, match="no JSON"):
        datasets.open_version(str(root))
    version.unlink()
    with pytest.raises(ManifestError, match=r"versions/1\.json is missing"):
        datasets.open_version(str(root))


def test_a_tombstone_that_is_no_id_is_a_named_error(tmp_path: Path) -> None:
    root = tmp_path / "set"
    publish(root, 0, ["a"])
    path = root / "versions" / "1.json"
    path.write_text(path.read_text().replace('"tombstones": []', f'"tombstones": [0, {2**70}]'))
    with pytest.raises(ManifestError, match=r"1\.json is damaged: tombstones\.1: .*less than"):
        datasets.open_version(str(root))


def test_an_index_of_another_shard_is_a_named_error(tmp_path: Path) -> None:
    root = tmp_path / "set"
    one, two = make_shard(root, 0, ["a"]), make_shard(root, 1, ["b"])
    mixed = ShardEntry(**{**vars(one), "index": two.index})
    dataset = datasets.publish_version(datasets.head(str(root)), [mixed], now=NOW)
    with pytest.raises(ManifestError, match="not the index of shard 0 with 1 samples"):
        dataset.samples(mixed)


@pytest.mark.s3
def test_versions_and_contested_changes_on_s3(s3: str, tmp_path: Path) -> None:
    uri = f"{s3}/set"
    entries = []
    for number in range(2):
        path = tmp_path / f"{number}.tar"
        table = shards.write_shard(
            path, [Sample(key=f"k{number}", image=b"i", extension="png")], number=number
        )
        entries.append(
            ShardEntry(
                number=number,
                tar=manifests.write_object(uri, f"shards/{number}.tar", path),
                index=manifests.write_object(uri, f"shards/{number}.parquet", tables.encode_samples(table)),
                num_samples=1,
            )
        )
    datasets.publish_version(datasets.head(uri), entries[:1], now=NOW)
    before = datasets.head(uri)
    datasets.publish_version(before, entries[1:], now=NOW)
    with pytest.raises(Conflict):
        datasets.publish_version(before, entries[1:], now=NOW)
    dataset = datasets.tombstone(uri, ["k0"], now=NOW)
    assert dataset.version.version == 4  # 3 is what the loser wrote and could not publish
    assert dataset.find(["k0", "k1"]) == {"k0": (0,), "k1": (1 << 32,)}
    with pytest.raises(ManifestError, match="is no dataset"):
        datasets.open_version(f"{s3}/other")
