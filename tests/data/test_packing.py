"""Packing: the dataset contains what the source offers, once, whatever happens on the way."""

import io
import os
import signal
import subprocess
import tarfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namr.data import datasets, pack_shard, packing, reading
from namr.data.datasets import Dataset
from namr.data.pack_shard import ShardPlan
from namr.data.packing import PackingConfig, PackReport
from namr.data.sources import SourceImage
from namr.errors import ConfigError, ImageRefused, ManifestError, StorageError
from namr.store import storage, tables
from namr.store.manifests import StoredObject

ROOT = Path(__file__).parents[2]


def picture(number: int, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def folder_of(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def pack(source: object, dataset: object, **options: object) -> PackReport:
    config = PackingConfig(source=str(source), dataset_uri=str(dataset), **options)  # type: ignore[arg-type]
    return packing.pack(config, clock=lambda: datetime(2026, 11, 23, tzinfo=UTC))


def contents(dataset: Dataset) -> dict[str, bytes]:
    return {s.key: s.image for entry in dataset.shards for s in reading.stream(dataset, entry)}


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
    return packing.cut(found, config)


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


def test_a_plan_makes_a_shard_of_what_decodes_and_lists_what_does_not(tmp_path: Path) -> None:
    good, cmyk = folder_of(tmp_path / "in", "cat/1.png") / "cat/1.png", tmp_path / "in/2.jpg"
    Image.new("CMYK", (4, 4)).save(cmyk)
    (tmp_path / "junk.jpg").write_bytes(b"hello")
    (tmp_path / "half.jpg").write_bytes(picture(0, "JPEG")[:300])
    found = [
        SourceImage(key="one", location=str(good), label="cat", fields={"price": 3}, num_bytes=1),
        SourceImage(key="junk", location=str(tmp_path / "junk.jpg")),
        SourceImage(key="two.x", location=str(cmyk)),
        SourceImage(key="half", location=str(tmp_path / "half.jpg")),
        SourceImage(key="gone", location=str(tmp_path / "gone.jpg")),
    ]
    plan = ShardPlan(dataset_uri=str(tmp_path / "set"), number=7, images=found)
    receipt = pack_shard.run_plan(plan)
    assert receipt.entry
    table = tables.decode_samples(storage.read(f"{plan.dataset_uri}/{receipt.entry.index.name}"))
    assert (table.keys, table.labels, table.fields) == (
        ["one", "two.x"],
        ["cat", None],
        ['{"price": 3}', "{}"],
    )
    tar = storage.read(f"{plan.dataset_uri}/{receipt.entry.tar.name}")
    stored = [tar[o : o + s] for o, s in zip(table.offsets, table.sizes, strict=True)]
    assert stored == [good.read_bytes(), cmyk.read_bytes()]
    reasons = {image.key: image.reason for image in receipt.refused}
    assert reasons.keys() == {"junk", "half", "gone"}
    assert "not an image" in reasons["junk"]
    assert "damaged" in reasons["half"]
    assert reasons["gone"] == "nothing is there"


def test_a_repeated_plan_goes_by_the_receipt_unless_something_was_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "in", "1.png", "2.png")
    found = [SourceImage(key=n, location=str(root / f"{n}.png"), num_bytes=1) for n in "12"]
    plan = ShardPlan(dataset_uri=str(tmp_path / "set"), number=0, images=found)
    (root / "1.png").write_bytes(b"junk")
    first = pack_shard.run_plan(plan)
    assert [image.key for image in first.refused] == ["1"]
    (root / "1.png").write_bytes(picture(5))
    second = pack_shard.run_plan(plan)
    assert second.refused == ()
    (root / "1.png").unlink()
    assert pack_shard.run_plan(plan) == second


def test_a_plan_of_nothing_that_decodes_has_no_shard(tmp_path: Path) -> None:
    bad = [SourceImage(key="a", location=str(tmp_path / "nowhere.png"))]
    receipt = pack_shard.run_plan(ShardPlan(dataset_uri=str(tmp_path / "set"), number=0, images=bad))
    assert receipt.entry is None
    assert len(receipt.refused) == 1


def tar_of(path: Path, *entries: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_foreign_shard_is_indexed_where_it_is(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "x.tar",
        ("a.png", picture(0)),
        ("a.cls", b"3"),
        ("b.png", b"junk"),
        ("c.jpg", picture(1, "JPEG")),
    )
    foreign = StoredObject(str(path), path.stat().st_size, "")
    receipt = pack_shard.run_plan(ShardPlan(dataset_uri=str(tmp_path / "set"), number=4, foreign=foreign))
    assert receipt.entry
    assert receipt.entry.tar == StoredObject(
        str(path), path.stat().st_size, storage.sha256(path.read_bytes())
    )
    assert [(image.key, image.location) for image in receipt.refused] == [("b", str(path))]
    assert receipt.entry.num_samples == 2
    assert not list((tmp_path / "set").rglob("*.tar"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ManifestError, match=r"x\.tar"):
        pack_shard.run_plan(ShardPlan(dataset_uri=str(tmp_path / "other"), number=4, foreign=foreign))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_bytes": 0}, "shard_bytes is 0"),
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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_night_packs_only_what_is_new(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", "cat/1.png", "cat/2.png", "dog/1.png", "loose.png", "cat/readme.txt")
    first = pack(source, tmp_path / "set", shard_bytes=6000)
    assert (first.version, first.num_found, first.num_packed, first.num_known) == (1, 4, 4, 0)
    assert (first.num_classes, first.num_single_classes, first.num_unlabelled) == (2, 1, 1)
    assert (first.num_new_shards, first.num_passed_over) == (2, 1)
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
