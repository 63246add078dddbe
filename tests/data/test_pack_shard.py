"""One shard: what decodes is packed, what doesn't is listed, and a repeated plan goes by its receipt."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from namr.data import pack_shard
from namr.data.offered import SourceImage
from namr.data.pack_shard import ShardPlan
from namr.errors import ManifestError, ObjectMissing
from namr.store import storage, tables
from namr.store.manifests import StoredObject
from tests.small_pictures import folder_of, picture, tar_of


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
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.*")}
    assert pack_shard.run_plan(plan) == second
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.*")} == written
    (root / "1.png").unlink()
    assert [image.reason for image in pack_shard.run_plan(plan).refused] == ["nothing is there"]


def packed(plan: ShardPlan) -> list[bytes]:
    """The images of the shard that the plan makes."""
    receipt = pack_shard.run_plan(plan)
    assert receipt.entry
    table = tables.decode_samples(storage.read(f"{plan.dataset_uri}/{receipt.entry.index.name}"))
    tar = storage.read(storage.join(plan.dataset_uri, receipt.entry.tar.name))
    return [tar[o : o + s] for o, s in zip(table.offsets, table.sizes, strict=True)]


def of_one_length(number: int) -> bytes:
    """Different pictures, as long as each other."""
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(sink, "BMP")
    return sink.getvalue()


@pytest.mark.parametrize("replaced_by", ["a rename", "a write"])
def test_an_image_that_was_replaced_since_is_packed_anew(tmp_path: Path, replaced_by: str) -> None:
    path = tmp_path / "1.bmp"
    path.write_bytes(of_one_length(1))
    images = [SourceImage(key="1", location=str(path), num_bytes=path.stat().st_size)]
    plan = ShardPlan(dataset_uri=str(tmp_path / "set"), number=0, images=images)
    assert packed(plan) == [of_one_length(1)]
    if replaced_by == "a write":
        path.write_bytes(of_one_length(2))
    else:
        status = path.stat()
        (tmp_path / "new").write_bytes(of_one_length(2))
        os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        (tmp_path / "new").replace(path)
    assert packed(plan) == [of_one_length(2)]


@pytest.mark.s3
def test_an_image_that_was_replaced_in_its_bucket_since_is_packed_anew(s3: str) -> None:
    uri = f"{s3}/photos/1.bmp"
    plan = ShardPlan(
        dataset_uri=f"{s3}/set", number=0, images=[SourceImage(key="1", location=uri, num_bytes=1)]
    )
    for number in (1, 2):
        storage.write(uri, of_one_length(number))
        assert packed(plan) == [of_one_length(number)]
        data, state = storage.read_with_state(uri)
        assert (data, storage.state(uri)) == (of_one_length(number), state)
    receipt = pack_shard.run_plan(plan)
    assert pack_shard.run_plan(plan) == receipt
    storage.delete(uri)
    with pytest.raises(ObjectMissing):
        storage.state(uri)


def test_an_image_that_a_library_holds_is_told_apart_by_its_bytes(tmp_path: Path) -> None:
    for number in (1, 2):
        images = [SourceImage(key="1", location="lib[1]", num_bytes=1, data=of_one_length(number))]
        assert packed(ShardPlan(dataset_uri=str(tmp_path), number=0, images=images)) == [
            of_one_length(number)
        ]


def test_a_foreign_tar_that_was_replaced_since_is_indexed_anew(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", ("a.png", picture(0)))
    foreign = StoredObject(str(path), path.stat().st_size, "")
    plan = ShardPlan(dataset_uri=str(tmp_path / "set"), number=0, foreign=foreign)
    before = pack_shard.run_plan(plan)
    tar_of(path, ("b.png", picture(0)))
    after = pack_shard.run_plan(plan)
    assert before.entry and after.entry
    assert after.entry.tar.size_bytes == before.entry.tar.size_bytes
    assert after.entry.tar.sha256 == storage.sha256(path.read_bytes()) != before.entry.tar.sha256


def test_a_plan_of_nothing_that_decodes_has_no_shard(tmp_path: Path) -> None:
    bad = [SourceImage(key="a", location=str(tmp_path / "nowhere.png"))]
    receipt = pack_shard.run_plan(ShardPlan(dataset_uri=str(tmp_path / "set"), number=0, images=bad))
    assert receipt.entry is None
    assert len(receipt.refused) == 1


def test_a_foreign_shard_is_indexed_where_it_is(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "x.tar",
        ("a.png", picture(0)),
        ("a.cls", b"3"),
        ("b.png", b"junk"),
        ("c.jpg", picture(1, "JPEG")),
        ("notes.txt", b"no image"),
    )
    foreign = StoredObject(str(path), path.stat().st_size, "")
    receipt = pack_shard.run_plan(ShardPlan(dataset_uri=str(tmp_path / "set"), number=4, foreign=foreign))
    assert receipt.entry
    assert receipt.entry.tar == StoredObject(
        str(path), path.stat().st_size, storage.sha256(path.read_bytes())
    )
    assert [(image.key, image.location) for image in receipt.refused] == [("b", str(path))]
    assert receipt.entry.num_samples == 2
    assert [str(each) for each in receipt.passed_over] == ["1 .txt (notes.txt)"]
    assert not list((tmp_path / "set").rglob("*.tar"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ManifestError, match=r"x\.tar"):
        pack_shard.run_plan(ShardPlan(dataset_uri=str(tmp_path / "other"), number=4, foreign=foreign))
