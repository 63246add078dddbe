"""Packing: the dataset contains what the source offers, once, whatever happens on the way."""

import os
import signal
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from namr import ray_connection
from namr.data import datasets, packing, reading
from namr.data.datasets import Dataset
from namr.data.offered import Offered, SourceImage
from namr.data.packing import PackingConfig, PackReport
from namr.errors import ConfigError, ImageRefused, ManifestError, StorageError
from namr.store import storage
from tests import small_benchmarks
from tests.small_pictures import folder_of, picture, tar_of

ROOT = Path(__file__).parents[2]


def pack(source: object, dataset: object, **options: object) -> PackReport:
    config = PackingConfig(source=str(source), dataset_uri=str(dataset), **options)  # type: ignore[arg-type]
    return packing.pack(config, clock=lambda: datetime(2026, 11, 23, tzinfo=UTC))


def contents(dataset: Dataset) -> dict[str, bytes]:
    return {s.key: s.image for entry in dataset.shards for s in reading.stream(dataset, entry)}


def contents_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.png")}


def offered(*labels: str | None, num_bytes: int = 1000) -> list[SourceImage]:
    return [
        SourceImage(key=f"k{n}", location=f"/{n}", label=label, num_bytes=num_bytes)
        for n, label in enumerate(labels)
    ]


def cut(found: list[SourceImage], order: str, shard_bytes: int, seed: int = 0) -> list[list[SourceImage]]:
    config = PackingConfig(
        source="s",
        dataset_uri="d",
        order=order,
        shard_bytes=shard_bytes,
        seed=seed,  # type: ignore[arg-type]
    )
    return list(packing.cut(Offered.of(found, source="s"), config, shard_bytes=shard_bytes))


def test_shards_by_class_keep_a_class_in_one_range() -> None:
    found = offered(*"abcdefghij" * 9, None, None)
    parts = cut(found, "class", 60_000)
    assert sorted(i.key for part in parts for i in part) == sorted(i.key for i in found)
    in_order = [i.label for part in parts for i in part]
    runs = [label for place, label in enumerate(in_order) if place == 0 or in_order[place - 1] != label]
    assert len(runs) == 11
    assert runs[-1] is None
    assert runs[:10] != sorted("abcdefghij")
    assert all(sum(1000 + 2048 for _ in part) <= 60_000 for part in parts)
    for label in "abcdefghij":
        assert sum(label in {i.label for i in part} for part in parts) == 1
        keys = [i.key for part in parts for i in part if i.label == label]
        assert keys != sorted(keys)


def test_a_class_larger_than_a_shard_is_cut_and_an_image_larger_than_one_has_its_own() -> None:
    assert [len(part) for part in cut(offered(*"a" * 50), "class", 30_000)] == [9, 9, 9, 9, 9, 5]
    assert [len(part) for part in cut(offered(*"aab"), "class", 1)] == [1, 1, 1]


def test_shuffled_shards_mix_classes_and_the_seed_decides() -> None:
    found = offered(*"a" * 50, *"b" * 50)
    first, second = cut(found, "shuffled", 100_000), cut(found, "shuffled", 100_000)
    assert first == second != cut(found, "shuffled", 100_000, seed=1)
    assert all({i.label for i in part} == {"a", "b"} for part in first)


@pytest.mark.parametrize("order", ["class", "shuffled"])
def test_where_shards_are_cut_does_not_change_the_order_of_images(order: str) -> None:
    offered_images = offered(*"abcdefghij" * 9, None, None)
    small, large = (cut(offered_images, order, shard_bytes) for shard_bytes in (9_000, 1 << 30))
    assert len(small) > 20 and len(large) == 1
    assert [image for part in small for image in part] == large[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction is 1.5"),
        ({"source": "webdataset:x", "classes": "first_half"}, "foreign shards are indexed whole"),
    ],
)
def test_a_wrong_config_names_its_field(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PackingConfig(**{"source": "s", "dataset_uri": "d", **options})  # type: ignore[arg-type]


def test_what_can_not_be_written_or_read_fails_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="is not writable"):
        pack("digits", tmp_path / "file" / "set")
    with pytest.raises(ConfigError, match="is not a folder"):
        pack(tmp_path / "nowhere", tmp_path / "set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no images"):
        pack(tmp_path / "empty", tmp_path / "set")
    with pytest.raises(ConfigError, match=r"has no \.tar files"):
        pack(f"webdataset:{tmp_path / 'empty'}", tmp_path / "set")
    assert not (tmp_path / "set" / "current.json").exists()


def test_images_are_put_in_order_once_and_counted_as_they_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    num_ordered = []
    in_order = Offered.in_order

    def watched(*of: Any, **how: Any) -> Any:
        num_ordered.append(1)
        return in_order(*of, **how)

    monkeypatch.setattr(Offered, "in_order", watched)
    monkeypatch.setattr(ray_connection, "connect", lambda: None)
    monkeypatch.setattr(ray_connection, "total_cpus", lambda: 1)
    monkeypatch.setattr(ray_connection, "map_tasks", lambda run, plans: enumerate(map(run, plans)))
    source = folder_of(tmp_path / "in", *(f"cat/{n}.png" for n in range(6)))
    (source / "cat" / "x.jpg").write_bytes(b"no image")
    report = pack(source, tmp_path / "set", shard_bytes=6000, max_bad_fraction=0.5)
    assert (report.num_packed, report.num_refused, report.num_new_shards > 1) == (6, 1, True)
    assert num_ordered == [1]
    assert "packing images: 7 of 7 (1 images refused)" in capsys.readouterr().err
    tar_of(tmp_path / "tars" / "0.tar", ("a.png", picture(0)), ("b.png", picture(1)))
    assert pack(f"webdataset:{tmp_path / 'tars'}", tmp_path / "foreign").num_packed == 2
    assert "indexing shards: 1 of 1" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_night_packs_only_what_is_new(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", "cat/1.png", "cat/2.png", "dog/1.png", "loose.png", "cat/readme.txt")
    first = pack(source, tmp_path / "set", shard_bytes=6000)
    assert (first.version, first.num_found, first.num_packed, first.num_known) == (1, 4, 4, 0)
    assert (first.num_classes, first.num_single_classes, first.num_unlabelled) == (2, 1, 1)
    assert first.num_new_shards == 2
    assert [str(each) for each in first.passed_over] == ["1 .txt (cat/readme.txt)"]
    assert pack(source, tmp_path / "set").version == 1

    datasets.tombstone(str(tmp_path / "set"), ["cat/1"], now=datetime.now(UTC))
    folder_of(source, "dog/2.png", "eel/1.png")
    night = pack(source, tmp_path / "set")
    assert (night.version, night.num_found, night.num_known, night.num_packed) == (3, 6, 4, 2)
    dataset = datasets.open_version(str(tmp_path / "set"))
    expected = {"cat/2", "dog/1", "dog/2", "eel/1", "loose"}
    assert contents(dataset) == {key: (source / f"{key}.png").read_bytes() for key in expected}
    assert [entry.number for entry in dataset.shards] == [0, 1, 2]
    assert [record.num_packed for record in dataset.version.sources] == [4, 2]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_changed_image_is_a_new_version_of_its_key_and_one_that_was_taken_out_stays_out(
    tmp_path: Path,
) -> None:
    source = folder_of(tmp_path / "in", *(f"{label}/{n}.png" for label in ("cat", "dog") for n in range(3)))
    rows = [["path", "key", "label"], *([f"{k}.png", k, k[:3]] for k in sorted(contents_of(source)))]
    table = source / "items.csv"
    table.write_text("\n".join(map(",".join, rows)))
    pack(table, tmp_path / "set")
    datasets.tombstone(str(tmp_path / "set"), ["dog/2"], now=datetime.now(UTC))

    for name, size in (("cat/0", 20), ("dog/2", 21)):
        (source / f"{name}.png").write_bytes(picture(7, size=size))
    (source / "cat" / "1.png").write_bytes(b"no picture any more, so that what was there stays")
    table.write_text(table.read_text().replace("dog/0,dog", "dog/0,wolf"))
    report = pack(table, tmp_path / "set", max_bad_fraction=0.2)
    found = (report.version, report.num_known, report.num_packed, report.num_replaced, report.num_refused)
    assert found == (3, 3, 2, 2, 1)
    assert (report.num_classes, report.num_single_classes, report.num_unlabelled) == (3, 2, 0)
    dataset = datasets.open_version(str(tmp_path / "set"))
    ids = dataset.find(["cat/0", "cat/1", "dog/0", "dog/2"])
    assert {key: len(of_key) for key, of_key in ids.items()} == {
        "cat/0": 2, "cat/1": 1, "dog/0": 2, "dog/2": 1,
    }  # fmt: skip
    dead = sorted([ids["cat/0"][0], ids["dog/0"][0], ids["dog/2"][0]])
    assert dataset.version.tombstones == tuple(dead)
    assert dataset.version.sources[-1].num_replaced == 2
    live = contents(dataset)
    assert live.keys() == {"cat/0", "cat/1", "cat/2", "dog/0", "dog/1"}
    assert live["cat/0"] == picture(7, size=20)
    (source / "cat" / "1.png").write_bytes(live["cat/1"])
    assert pack(table, tmp_path / "set").version == 3

    (source / "dog" / "1.png").write_bytes(live["dog/1"][:-1] + b"!")  # behind what decoders read
    assert pack(table, tmp_path / "set").version == 3
    assert pack(table, tmp_path / "set", compare="bytes").num_replaced == 1
    datasets.tombstone(str(tmp_path / "set"), ["cat/0"], now=datetime.now(UTC))
    assert pack(table, tmp_path / "set", compare="bytes").num_known == 6


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_benchmark_is_packed_split_by_split(tmp_path: Path) -> None:
    root = small_benchmarks.in_shop(tmp_path / "In-shop")
    packed = {}
    for split in ("train", "query", "gallery"):
        report = pack(f"inshop:{root}:{split}", tmp_path / split, max_bad_fraction=0)
        assert (report.num_refused, report.num_unlabelled, report.num_classes) == (0, 0, 2)
        packed[split] = contents(datasets.open_version(str(tmp_path / split)))
    assert {split: len(images) for split, images in packed.items()} == {"train": 4, "query": 2, "gallery": 3}
    for images in packed.values():
        assert images == {key: (root / "Img" / f"{key}.jpg").read_bytes() for key in images}
    (root / "Img" / "img" / "WOMEN" / "Shorts" / "id_00007970" / "02_1_front.jpg").unlink()
    with pytest.raises(ImageRefused, match="1 of 2 images, more than max_bad_fraction 0 allows"):
        pack(f"inshop:{root}:query", tmp_path / "again", max_bad_fraction=0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_small_set_is_cut_so_that_every_core_has_shards_to_make() -> None:
    def shard_bytes(num_images: int, num_bytes: int, **options: int) -> int:
        config = PackingConfig(source="s", dataset_uri="d", **options)  # type: ignore[arg-type]
        found = Offered.of(offered(*"a" * num_images, num_bytes=num_bytes), source="s")
        return packing._shard_bytes(found, config)

    assert ray_connection.total_cpus() == 2
    assert shard_bytes(0, 0) == 256 << 20
    assert shard_bytes(100, 10_000) == 4 << 20
    assert shard_bytes(100, 1 << 20) == 16 << 20  # 100 MiB, at least 3 shards a core
    assert shard_bytes(110, 1 << 20) == 16 << 20  # a rerun with a little more cuts alike
    assert shard_bytes(100, 1 << 30) == 256 << 20
    assert shard_bytes(100, 1 << 20, shard_bytes=5_000) == 5_000


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_one_bad_row_of_a_table_is_counted_and_does_not_end_the_run(tmp_path: Path) -> None:
    folder_of(tmp_path, *(f"{n}.png" for n in range(9)))
    rows = [f"{n}.png" for n in range(9)]
    (tmp_path / "items.csv").write_text("\n".join(["path", *rows, "x" * 5000]))
    with pytest.raises(ImageRefused, match=r"1 of 10 images, more than .*File name too long"):
        pack(tmp_path / "items.csv", tmp_path / "set")
    report = pack(tmp_path / "items.csv", tmp_path / "set", max_bad_fraction=0.1)
    assert (report.num_found, report.num_packed, report.num_refused) == (10, 9, 1)
    assert pack(tmp_path / "items.csv", tmp_path / "set", max_bad_fraction=0.1).num_known == 9
    (tmp_path / "bad.csv").write_text("path\ngone.png\n")
    with pytest.raises(ImageRefused, match=r"gone\.png .*nothing is there"):
        pack(tmp_path / "bad.csv", tmp_path / "other")
    with pytest.raises(ConfigError, match="all 1 images were refused"):
        pack(tmp_path / "bad.csv", tmp_path / "other", max_bad_fraction=1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_too_many_refused_images_fail_the_run_and_the_first_is_named(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", *(f"cat/{n}.png" for n in range(9)))
    (source / "cat" / "x.jpg").write_bytes(b"no image")
    with pytest.raises(ImageRefused, match=r"1 of 10 images, more than .* 0\.05 .* first is .*/cat/x\.jpg"):
        pack(source, tmp_path / "set", max_bad_fraction=0.05)
    with pytest.raises(ManifestError, match="is no dataset"):
        datasets.open_version(str(tmp_path / "set"))
    report = pack(source, tmp_path / "set", max_bad_fraction=0.1)
    assert (report.num_packed, report.num_refused) == (9, 1)
    assert report.refused[0].key == "cat/x"
    folder_of(source, "cat/new.png")
    assert pack(source, tmp_path / "set", max_bad_fraction=0.1).num_packed == 1  # 1 of 11, not 1 of 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_foreign_shards_come_with_their_keys_and_new_ones_are_added(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    tar_of(folder / "0.tar", ("a.png", picture(0)), ("b.png", picture(1)))
    assert pack(f"webdataset:{folder}", tmp_path / "set").num_packed == 2
    tar_of(folder / "1.tar", ("c.png", picture(2)))
    report = pack(f"webdataset:{folder}", tmp_path / "set")
    assert (report.version, report.num_found, report.num_known, report.num_packed) == (2, 3, 2, 1)
    dataset = datasets.open_version(str(tmp_path / "set"))
    assert contents(dataset) == {"a": picture(0), "b": picture(1), "c": picture(2)}

    tar_of(folder / "2.tar", ("a.png", picture(3)))
    with pytest.raises(ConfigError, match=r"'a' of .*2\.tar is in the dataset already"):
        pack(f"webdataset:{folder}", tmp_path / "set")
    with pytest.raises(ConfigError, match=r"'a' is in .*0\.tar and in .*2\.tar"):
        pack(f"webdataset:{folder}", tmp_path / "fresh")
    tar_of(folder / "0.tar", *((f"{n}.png", picture(n)) for n in range(20)))
    with pytest.raises(ManifestError, match=r"0\.tar has .* when it was indexed"):
        pack(f"webdataset:{folder}", tmp_path / "set")


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.usefixtures("ray_local")
def test_a_table_of_uris_is_packed_to_s3(s3: str) -> None:
    rows = [f"{s3}/photos/{n}.png" for n in range(5)]
    for n, uri in enumerate(rows):
        storage.write(uri, picture(n))
    lines = ["uri,label,price", *(f"{uri},cat,{n}" for n, uri in enumerate(rows))]
    storage.write(f"{s3}/items.csv", "\n".join(lines).encode())
    report = pack(f"{s3}/items.csv", f"{s3}/set")
    assert (report.num_packed, report.version) == (5, 1)
    dataset = datasets.open_version(f"{s3}/set")
    assert contents(dataset) == {uri.removesuffix(".png"): picture(n) for n, uri in enumerate(rows)}
    assert sorted(next(dataset.all_samples()).fields) == [f'{{"price": "{n}"}}' for n in range(5)]
    storage.write(f"{s3}/photos/5.png", picture(5))
    assert pack(f"{s3}/photos", f"{s3}/set2").num_unlabelled == 6
    with pytest.raises(StorageError, match="create the bucket"):
        pack("digits", f"{s3}-nowhere/set")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_leaves_the_old_state_and_the_next_one_goes_on(tmp_path: Path, python: str) -> None:
    source = folder_of(tmp_path / "in", *(f"class{n % 7}/{n}.png" for n in range(1000)))
    root = tmp_path / "set"
    command = [
        python,
        "jobs/pack.py",
        "--source",
        str(source),
        "--dataset-uri",
        str(root),
        "--shard-bytes",
        "30000",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while len(list((root / "packing").glob("*.json"))) < 5 and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ManifestError, match="is no dataset"):
        datasets.open_version(str(root))
    done = {path: path.stat().st_mtime_ns for path in (root / "packing").glob("*.json")}
    assert 5 <= len(done) < 100
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    assert "packed 1000 of 1000 images" in finished.stdout
    assert {path: path.stat().st_mtime_ns for path in done} == done
    dataset = datasets.open_version(str(root))
    assert contents(dataset).keys() == {f"class{n % 7}/{n}" for n in range(1000)}
