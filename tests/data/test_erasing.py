"""Erased from shards: nothing of the image is left, and everything else is where it was, for every reader."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset.tariterators

from namr.data import comparing, datasets, erasing, pack_shard, reading, records, sample_index, shards
from namr.data.datasets import Dataset
from namr.data.leftovers import RefusedImage
from namr.data.offered import Offered, SourceImage
from namr.data.pack_shard import Receipt
from namr.data.shards import Sample
from namr.errors import ConfigError, Conflict, ManifestError
from namr.store import manifests, scratch, storage
from tests import small_dataset
from tests.small_dataset import NOW, id_of, image

LONG = "a person whose name is longer than the hundred bytes for which a header of a tar has room/" + "x" * 60
ODD = "_.a/ä.b"


class Held:
    """A lease that nobody takes away."""

    def check(self) -> None:
        pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen images in three shards, the seventh taken out, and two of unusual names in a fourth."""
    folder = tmp_path_factory.mktemp("made")
    root = str(folder / "set")
    small_dataset.make_dataset(root, folder)
    samples = [
        Sample(key=LONG, image=b"long " * 300, extension="jpg", fields={"who": "Anna", "year": 2026}),
        Sample(key=ODD, image=image(20), extension="webp", label="elk"),
    ]
    entry = small_dataset.shard_of(root, folder, 5, samples)
    datasets.publish_version(datasets.head(root), [entry], now=NOW)
    return folder / "set"


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> Dataset:
    """A copy of it for each test."""
    return datasets.open_version(str(shutil.copytree(made, tmp_path / "set")))


def empty(dataset: Dataset, *keys: str, erasure_id: str = "e1") -> Dataset:
    found = datasets.open_version(dataset.uri).find_all(keys)
    ids = [each for ids in found.values() for each in ids]
    return erasing.empty(dataset.uri, ids, erasure_id=erasure_id, now=NOW)


def erase(dataset: Dataset, *keys: str, erasure_id: str = "e1") -> Dataset:
    now = empty(dataset, *keys, erasure_id=erasure_id)
    erasing.delete_old(now, now.version.emptied, keys, held=Held())
    return now


def contents(dataset: Dataset) -> dict[int, bytes]:
    return {s.id: s.image for entry in dataset.shards for s in reading.stream(dataset, entry)}


def everything(root: str) -> bytes:
    return b"".join(storage.read(storage.join(root, name)) for name in storage.list_names(root))


def test_nothing_of_an_image_is_left_and_all_others_are_where_they_were(dataset: Dataset) -> None:
    images, indexes = contents(dataset), [dataset.samples(entry) for entry in dataset.shards]
    assert all(gone in everything(dataset.uri) for gone in (image(3), b"long long", b"Anna", LONG.encode()))
    now = erase(dataset, "k3", LONG)
    erased = (id_of(3), shards.make_id(5, 0))
    assert contents(now) == {each: data for each, data in images.items() if each not in erased}
    left = everything(dataset.uri)
    assert image(2) in left and b"elk" in left
    assert not any(
        gone in left for gone in (image(3), image(3)[:99], b"long long", b"Anna", LONG[:40].encode())
    )
    for entry, was in zip(now.shards, indexes, strict=True):
        table = now.samples(entry)
        assert table.offsets.tolist() == was.offsets.tolist()
        for row, each in enumerate(table.ids.tolist()):
            columns = ("ids", "keys", "labels", "fields", "sizes")
            one, other = ([getattr(of, name)[row] for name in columns] for of in (table, was))
            key = records.key_of_erased(now.version.dataset_id, was.keys[row])
            assert one == ([each, key, None, "{}", 0] if each in erased else other)
    assert set(erased) < set(now.version.tombstones) and not now.live(np.array(erased)).any()
    assert [(each.number, each.version, each.ids) for each in now.version.emptied] == [
        (2, 4, erased[:1]),
        (5, 4, erased[1:]),
    ]


def test_plain_readers_of_tars_and_of_webdataset_read_what_is_left(dataset: Dataset) -> None:
    before = {entry.number: storage.read(dataset.shard_uri(entry)) for entry in dataset.shards}
    now = erase(dataset, "k3", LONG, "k4")
    for entry in now.shards:
        path = now.shard_uri(entry)
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert all(tar.extractfile(each).read() is not None for each in tar)  # type: ignore[union-attr]
        with Path(path).open("rb") as file:
            source = [{"url": path, "stream": file}]
            tars = webdataset.tariterators.tar_file_expander(source)
            samples = list(webdataset.tariterators.group_by_keys(tars))
        rows = int((now.samples(entry).sizes > 0).sum())
        assert len(samples) == rows and len(set(names)) == len(names)
        assert all("json" in each and {"png", "webp"} & set(each) for each in samples)
        with Path(path).open("rb") as file:
            found = shards.index_shard(file, number=entry.number, uri=path)
        assert len(found.table) == rows and not found.refused
        assert {each.kind for each in found.passed_over} <= {"metadata"}
        assert entry.tar.size_bytes == len(before[entry.number])


def test_a_second_image_of_the_shard_goes_later_and_one_that_is_gone_changes_nothing(
    dataset: Dataset,
) -> None:
    first = erase(dataset, "k3")
    images = contents(first)
    again = erase(dataset, "k3", erasure_id="e2")
    assert again == first
    second = erase(dataset, "k3", "k4", "k6", erasure_id="e2")
    assert [(each.erasure_id, each.ids) for each in second.version.emptied] == [
        ("e1", (id_of(3),)),
        ("e2", (id_of(4),)),
        ("e2", (id_of(6),)),
    ]
    assert sorted(contents(second)) == sorted(set(images) - {id_of(4)})
    left = everything(dataset.uri)
    assert not any(image(each) in left or f'"k{each}"'.encode() in left for each in (3, 4, 6))
    names = storage.list_names(storage.join(dataset.uri, "shards"))
    assert len(names) == 2 * len(second.shards)
    assert second.find_all(["k3"]) == {"k3": (id_of(3),)}
    with pytest.raises(ConfigError, match=r"1 of 2 keys are not in .*'nobody'; nothing was changed"):
        second.find_all(["k3", "nobody"])


def test_an_earlier_version_is_opened_as_it_is_left(dataset: Dataset) -> None:
    then = datasets.open_version(dataset.uri, 2)
    assert then.digest == then.published_digest
    erase(dataset, "k3", LONG)
    left = datasets.open_version(dataset.uri, 2)
    assert left.version.version == 2 and left.published_digest == then.digest != left.digest
    assert left.version.tombstones == tuple(sorted((id_of(3), id_of(6))))
    assert sorted(contents(left)) == [id_of(n) for n in range(14) if n not in (3, 6)]
    assert datasets.open_version(dataset.uri, 2).digest == left.digest
    erase(dataset, "k9", erasure_id="e2")
    again = datasets.open_version(dataset.uri, 2)
    assert again.digest not in (then.digest, left.digest) and id_of(9) not in contents(again)


def test_what_was_open_goes_on_without_it_or_says_why_not(dataset: Dataset, tmp_path: Path) -> None:
    index, reader = sample_index.build(dataset, tmp_path), reading.SampleReader(dataset, cache=None)
    pictures, entry = reading.Pictures(dataset.uri, 3), dataset.shards[0]
    table, uri = dataset.samples(entry), storage.join(dataset.uri, entry.index.name)
    was = storage.read(uri)

    def read(*numbers: int) -> list[bytes]:
        ids = np.array([id_of(number) for number in numbers])
        places = index.places(ids)
        return reader.read(ids, index.offsets(places), index.sizes(places))

    def shown(row: int) -> bytes:
        return pictures.read(int(table.ids[row]), int(table.offsets[row]), int(table.sizes[row]))

    assert read(3, 2) == [image(3), image(2)] and shown(3) == image(3)
    erase(dataset, "k3")
    with pytest.raises(ManifestError, match=r"shard 2 has no index: .* erasure e1 emptied the shard since"):
        dataset.samples(entry)
    storage.write(uri, was)  # for a run that read it just before
    with pytest.raises(
        ManifestError, match=r"2\.tar is missing: erasure e1 emptied the shard since this run"
    ):
        list(reading.stream(dataset, entry))
    assert read(9, 2, 4) == [image(9), image(2), image(4)] and shown(2) == image(2)
    for again in (lambda: read(2, 3), lambda: shown(3)):
        with pytest.raises(ManifestError, match=f"image {id_of(3)} of .* was erased since this run began"):
            again()


def test_it_is_neither_trained_on_nor_packed_again(dataset: Dataset, tmp_path: Path) -> None:
    now = erase(dataset, "k0", LONG)
    index = sample_index.build(now, tmp_path)
    assert id_of(0) not in index.labelled_ids and id_of(1) in index.labelled_ids
    keys = ["k0", "k6", LONG, "k1", "new"]
    offered = Offered.of((SourceImage(key=key, location=key, label="ant") for key in keys), source="s")
    assert comparing.keep_new(offered, now, "size") == 3
    assert [each.key for each in offered] == ["k1", "new"], "k1 has another label"


def test_what_killed_runs_and_receipts_of_packing_tell_of_it_goes_too(dataset: Dataset) -> None:
    root, old = dataset.uri, dataset.shards[0]
    refused = [RefusedImage(key=key, location=f"photos/{key}.png", reason="cut") for key in ("k3", "k5")]
    entry = erase(dataset, "k9", erasure_id="e0").shards[1]
    receipts = {
        "key": Receipt(entry=entry, refused=tuple(refused[:1])),
        "shard": Receipt(entry=old, refused=()),
        "other": Receipt(entry=entry, refused=tuple(refused[1:])),
    }
    for name, receipt in receipts.items():
        manifests.write_manifest(storage.join(root, "packing", f"{name}.json"), receipt)
    with scratch.beside(Path(root, "shards", "x.tar")) as path:
        half = path.name
    Path(root, "shards", half).write_bytes(image(3))
    killed = [pack_shard.store_file(root, number, image(3) + bytes([number]), "tar") for number in (3, 5, 6)]
    erase(dataset, "k3")
    assert storage.list_names(storage.join(root, "packing")) == ["other.json"]
    assert not Path(root, "shards", half).exists()
    left = [storage.exists(storage.join(root, each.name)) for each in killed]
    assert left == [False, False, True], "a run that is under way may publish the last"


def test_of_two_changes_at_once_one_wins_and_the_other_goes_on_when_it_is_repeated(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = small_dataset.shard_of(dataset.uri, tmp_path, 6, [Sample(key="n", image=b"n", extension="png")])
    publish = datasets.publish

    def late(before: datasets.Head, version: datasets.DatasetVersion) -> Dataset:
        monkeypatch.setattr(datasets, "publish", publish)
        datasets.publish_version(datasets.head(dataset.uri), [new], now=NOW)
        return publish(before, version)

    monkeypatch.setattr(datasets, "publish", late)
    with pytest.raises(Conflict):
        erase(dataset, "k3")
    assert contents(datasets.open_version(dataset.uri))[id_of(3)] == image(3)
    now = erase(dataset, "k3")
    assert now.version.shards[-1] == new and now.version.next_shard_number == 7
    assert id_of(3) not in contents(now) and image(3) not in everything(dataset.uri)


def test_what_is_not_ours_or_damaged_is_left_as_it_is(dataset: Dataset, tmp_path: Path) -> None:
    foreign = small_dataset.shard_of(
        str(tmp_path), tmp_path, 6, [Sample(key="f", image=b"f", extension="png")]
    )
    tar = manifests.describe_object(str(tmp_path / "6.tar"), tmp_path / "6.tar")
    index = manifests.write_object(dataset.uri, "6.parquet", (tmp_path / foreign.index.name).read_bytes())
    entry = datasets.ShardEntry(number=6, tar=tar, index=index, num_samples=1)
    now = datasets.publish_version(datasets.head(dataset.uri), [entry], now=NOW)
    erasing.check_own(now, [id_of(3)])
    with pytest.raises(
        ConfigError, match=r"only indexes .*6\.tar, .* whoever keeps that tar has to write it"
    ):
        erasing.check_own(now, [id_of(3), shards.make_id(6, 0)])
    path = Path(dataset.shard_uri(dataset.shards[0]))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ManifestError, match=r"2\.tar is damaged: .* restore it first"):
        erase(dataset, "k3")
    with pytest.raises(ManifestError, match="is no dataset"):
        erasing.empty(str(tmp_path), [1], erasure_id="e", now=NOW)
    assert datasets.open_version(dataset.uri).digest == now.digest


def test_one_erasure_at_a_time_works_on_a_dataset(dataset: Dataset) -> None:
    with erasing.alone(dataset.uri) as lease:
        assert lease.uri == storage.join(dataset.uri, "erasing.json") and lease.holder.startswith(
            "an erasure"
        )


@pytest.mark.s3
def test_erased_in_a_bucket(s3: str, tmp_path: Path) -> None:
    dataset = small_dataset.make_dataset(s3, tmp_path)
    reader, table = reading.SampleReader(dataset, cache=None), dataset.samples(dataset.shards[0])
    now = erase(dataset, "k3")
    assert sorted(contents(now)) == [id_of(n) for n in range(14) if n not in (3, 6)]
    assert image(3) not in everything(s3) and len(storage.list_names(storage.join(s3, "shards"))) == 6
    assert reader.read(table.ids[:1], table.offsets[:1], table.sizes[:1]) == [image(0)]
