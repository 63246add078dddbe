"""Shards: what is written comes back, byte for byte and by offset; damaged tars are named errors."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset.tariterators
from hypothesis import given, settings
from hypothesis import strategies as st

from namr.data import shards
from namr.data.leftovers import PassedOver, RefusedImage
from namr.data.shards import Sample, TarIndex
from namr.errors import ConfigError, ManifestError

SAMPLES = [
    Sample(key="cat/1", image=b"one", extension="jpg", label="cat", fields={"price": 3, "name": "é"}),
    Sample(key="cat/2.small", image=b"x" * 5000, extension="png", label="cat"),
    Sample(key="dog/" + "long" * 60, image=b"y" * 512, extension="webp", label=None),
]


def tar_of(*entries: tuple[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def index_all(data: bytes) -> TarIndex:
    return shards.index_shard(io.BytesIO(data), number=1, uri="the.tar")


def index(data: bytes) -> shards.SampleTable:
    return index_all(data).table


def test_every_image_lies_where_the_index_says(tmp_path: Path) -> None:
    table = shards.write_shard(tmp_path / "a.tar", SAMPLES, number=17)
    data = (tmp_path / "a.tar").read_bytes()
    assert table.keys == [s.key for s in SAMPLES]
    assert table.labels == ["cat", "cat", None]
    assert json.loads(table.fields[0]) == {"price": 3, "name": "é"}
    for sample, offset, size in zip(SAMPLES, table.offsets, table.sizes, strict=True):
        assert data[offset : offset + size] == sample.image
    assert shards.shard_of(table.ids).tolist() == [17, 17, 17]
    assert shards.row_of(table.ids).tolist() == [0, 1, 2]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        shards.write_shard(tmp_path / name, SAMPLES, number=1)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, unique=True))
def test_webdataset_reads_every_key_as_one_sample(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str]
) -> None:
    path = tmp_path_factory.mktemp("keys") / "a.tar"
    samples = [Sample(key=key, image=key.encode(), extension="png") for key in keys]
    assert shards.write_shard(path, samples, number=0).keys == keys
    with path.open("rb") as file:
        source = [{"url": "a.tar", "stream": file}]
        read = webdataset.tariterators.group_by_keys(webdataset.tariterators.tar_file_expander(source))
        assert [sample["png"] for sample in read] == [key.encode() for key in keys]


def test_foreign_labels_come_from_cls_or_json_and_other_entries_are_passed_over() -> None:
    found = index_all(
        tar_of(
            ("__meta__/info.json", b"{}"),
            ("a.jpg", b"A"),
            ("a.cls", b"7\n"),
            ("b.JPEG", b"B"),
            ("b.json", b'{"label": 3, "caption": "bee", "boxes": [1, 2]}'),
            ("notes.txt", b"no image"),
            ("c.png", b"C"),
            (".hidden.png", b"D"),
            ("README", b"E"),
        )
    )
    assert (found.table.keys, found.table.labels) == (["a", "b", "c"], ["7", "3", None])
    assert json.loads(found.table.fields[1]) == {"caption": "bee"}
    assert [str(each) for each in found.passed_over] == [
        "1 .txt (notes.txt)",
        "1 hidden (.hidden.png)",
        "1 metadata (__meta__/info.json)",
        "1 no suffix (README)",
    ]


def test_labels_are_found_wherever_in_the_tar_they_lie() -> None:
    """As `tar --sort=name` orders them, or images first and all that is said of them afterwards."""
    found = index_all(
        tar_of(
            ("2.json", b'{"label": "two"}'),
            ("0.jpg", b"zero"),
            ("1.jpg", b"one"),
            ("2.jpg", b"two"),
            ("0.json", b'{"label": "nil", "price": 3}'),
            ("1.cls", b"1"),
            ("9.json", b'{"label": "nobody"}'),
        )
    )
    assert (found.table.keys, found.table.labels) == (["0", "1", "2"], ["nil", "1", "two"])
    assert [json.loads(text) for text in found.table.fields] == [{"price": 3}, {}, {}]
    assert found.table.sizes.tolist() == [4, 3, 3]
    assert found.passed_over == (PassedOver(kind=".json without an image", num=1, names=("9.json",)),)


@pytest.mark.parametrize("padding", [1024, 10240, 1 << 20])
def test_a_second_tar_after_the_first_is_a_named_error_that_says_where(padding: int) -> None:
    first = tar_of(("a.jpg", b"A" * 700)).rstrip(b"\0")
    first += bytes(-len(first) % 512 + padding)
    assert index(first).keys == ["a"]
    with pytest.raises(ManifestError, match=rf"the\.tar goes on at byte {len(first)}, after a tar's end"):
        index(first + tar_of(("b.jpg", b"B")))


def test_links_pipes_and_devices_are_counted() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, kind in {
            "a.jpg": tarfile.SYMTYPE,
            "b.jpg": tarfile.LNKTYPE,
            "c.jpg": tarfile.FIFOTYPE,
            "d.jpg": tarfile.CHRTYPE,
            "e": tarfile.DIRTYPE,
        }.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
    found = index_all(sink.getvalue())
    assert len(found.table) == 0
    assert {each.kind: each.num for each in found.passed_over} == {"link": 2, "fifo": 1, "device": 1}


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_a_sparse_image_is_refused_because_it_could_not_be_read_by_range(tmp_path: Path, format: str) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        file.write(b"x" * 4096)
        file.seek(1 << 20)
        file.write(b"y" * 4096)
    (tmp_path / "whole.jpg").write_bytes(b"z" * 600)
    words = ["tar", "--sparse", f"--format={format}", "-cf", "a.tar", "holes.jpg", "whole.jpg"]
    subprocess.run(words, cwd=tmp_path, check=True)
    data = (tmp_path / "a.tar").read_bytes()
    found = index_all(data)
    assert found.table.keys == ["whole"]
    assert data[found.table.offsets[0] :][:600] == b"z" * 600
    assert [(image.key, image.reason[:6]) for image in found.refused] == [("holes", "sparse")]


def test_text_that_is_no_unicode_is_refused_where_it_enters(tmp_path: Path) -> None:
    found = index_all(
        tar_of(
            ("a.jpg", b"A"),
            ("a.json", b'{"label": "\\ud800"}'),
            ("b.jpg", b"B"),
            ("b.json", b'{"caption": "\\udfff"}'),
            ("c.jpg", b"C"),
            ("c.cls", b"\xff"),
            ("caf\udce9.jpg", b"D"),
            ("e.jpg", b"E"),
        )
    )
    assert found.table.keys == ["e"]
    reason = "its name, label or fields are no Unicode text"
    assert found.refused == tuple(
        RefusedImage(key=key, location="the.tar", reason=reason) for key in ("a", "b", "c", "caf\\udce9")
    )
    for wrong in ({"key": "\ud800"}, {"label": "\ud800"}, {"fields": {"name": "\ud800"}}):
        sample = Sample(**{"key": "a", "image": b"A", "extension": "jpg", **wrong})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="lone surrogate"):
            shards.write_shard(tmp_path / "a.tar", [sample], number=0)


@pytest.mark.parametrize("num_bytes", [0, 100, 512, 700, 1024, 1536, 6144, -10240, -1])
def test_a_truncated_tar_is_a_named_error(tmp_path: Path, num_bytes: int) -> None:
    shards.write_shard(tmp_path / "a.tar", SAMPLES[:2], number=0)
    whole = tar_of(("a.jpg", b"A" * 100), ("b.jpg", b"B" * 5000))
    for data in ((tmp_path / "a.tar").read_bytes(), whole):
        end = num_bytes if num_bytes >= 0 else len(data.rstrip(b"\0")) + 1
        with pytest.raises(ManifestError, match=r"the\.tar .*(truncated|can't be read as a tar)"):
            index(data[:end])


def test_what_is_no_plain_tar_is_a_named_error() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    for data in (sink.getvalue(), b"hello" * 1000):
        with pytest.raises(ManifestError, match="uncompressed tar"):
            index(data)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a.jpg", b"A"), ("a.jpg", b"B")], "'a.jpg' is there twice"),
        ([("a.jpg", b"A"), ("b.jpg", b"B"), ("a.png", b"C")], "'a' has 2 images"),
        ([("a.jpg", b"A"), ("a.JPG", b"B")], "'a' has 2 images"),
        ([("a.jpg", b"A"), ("a.json", b"{}"), ("a.JSON", b"{}")], r"'a' has two \.json"),
        ([("a.jpg", b"A"), ("a.json", b'{"__key__": "b"}'), ("b.jpg", b"B")], "key 'b' is there twice"),
        ([("a.jpg", b"A"), ("a.json", b"[" * 100_000)], "JSON of sample 'a' is damaged"),
        ([("a.jpg", b"A"), ("a.png", b"B")], "'a' has 2 images"),
        ([("a.jpg", b"A"), ("a.json", b"{")], "JSON of sample 'a' is damaged"),
    ],
)
def test_ambiguous_samples_are_named_errors(entries: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        index(tar_of(*entries))


def test_writing_refuses_a_key_twice_an_unknown_extension_and_a_number_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with pytest.raises(ConfigError, match="'cat/1' is there twice"):
        shards.write_shard(path, [SAMPLES[0], SAMPLES[0]], number=0)
    with pytest.raises(ConfigError, match="key is empty"):
        shards.write_shard(path, [Sample(key="", image=b"", extension="png")], number=0)
    with pytest.raises(ConfigError, match="'heic'"):
        shards.write_shard(path, [Sample(key="a", image=b"", extension="heic")], number=0)
    with pytest.raises(ConfigError, match=f"expected 0 to {2**21 - 1}"):
        shards.write_shard(path, SAMPLES, number=1 << 21)


def test_an_index_of_no_samples_is_empty() -> None:
    table = index(tar_of(("readme.txt", b"hello")))
    assert len(table) == 0
    assert table.ids.dtype == np.int64
