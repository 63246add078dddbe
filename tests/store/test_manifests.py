import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from namr.errors import Conflict, ManifestError, ObjectMissing
from namr.store import manifests, storage
from namr.store.manifests import Pin, StoredObject


@dataclass(frozen=True, kw_only=True)
class Album:
    FORMAT: ClassVar[str] = "namr-test-album"
    FORMAT_VERSION: ClassVar[int] = 2
    title: str
    pictures: tuple[StoredObject, ...]
    year: int | None = None


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "local" else str(request.getfixturevalue("s3"))


def test_a_manifest_reads_back_equal(root: str) -> None:
    picture = manifests.write_object(root, "p/1.bin", b"picture")
    album = Album(title="Grüße", pictures=(picture,), year=None)
    manifests.write_manifest(storage.join(root, "album.json"), album)
    manifests.write_manifest(storage.join(root, "album.json"), album)
    assert manifests.read_manifest(storage.join(root, "album.json"), Album) == album
    assert manifests.read_object(root, picture) == b"picture"


def test_a_manifest_is_never_overwritten(root: str) -> None:
    uri = storage.join(root, "album.json")
    manifests.write_manifest(uri, Album(title="one", pictures=()))
    with pytest.raises(ManifestError, match="nothing was overwritten"):
        manifests.write_manifest(uri, Album(title="two", pictures=()))
    assert manifests.read_manifest(uri, Album).title == "one"


def test_an_object_is_never_overwritten(root: str, tmp_path: Path) -> None:
    first = manifests.write_object(root, "o", b"one")
    assert manifests.write_object(root, "o", b"one") == first
    (tmp_path / "two").write_bytes(b"two")
    with pytest.raises(ManifestError, match="exists with other contents"):
        manifests.write_object(root, "o", tmp_path / "two")
    assert manifests.read_object(root, first) == b"one"


def test_a_damaged_object_is_named_with_both_digests(root: str) -> None:
    stored = manifests.write_object(root, "o", b"one")
    storage.write(storage.join(root, "o"), b"eno")
    with pytest.raises(ManifestError, match=rf"o is damaged.*{stored.sha256}"):
        manifests.read_object(root, stored)
    storage.delete(storage.join(root, "o"))
    with pytest.raises(ObjectMissing):
        manifests.read_object(root, stored)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 3}, "has format version 3, and this namr reads 2"),
        ({"format": "namr-other"}, "is not a namr-test-album manifest"),
        ({"title": None}, "title"),
        ({"pictures": [{"name": "x", "size_bytes": "many", "sha256": ""}]}, "pictures.0.size_bytes"),
    ],
)
def test_what_is_no_such_manifest_is_refused(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    body = json.loads(manifests.encode_manifest(Album(title="t", pictures=())))
    uri = str(tmp_path / "album.json")
    storage.write(uri, json.dumps(body | change).encode())
    with pytest.raises(ManifestError, match=expected):
        manifests.read_manifest(uri, Album)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": "namr-test-album"'])
def test_half_a_manifest_is_refused(tmp_path: Path, data: bytes) -> None:
    uri = str(tmp_path / "album.json")
    storage.write(uri, data)
    with pytest.raises(ManifestError, match=r"album\.json is damaged"):
        manifests.read_manifest(uri, Album)


def test_a_missing_manifest_is_named(root: str) -> None:
    with pytest.raises(ManifestError, match=r"album\.json is missing"):
        manifests.read_manifest(storage.join(root, "album.json"), Album)


def test_what_is_read_to_be_changed_has_a_tag_for_it(root: str) -> None:
    uri = storage.join(root, "album.json")
    first = Album(title="one", pictures=())
    assert manifests.read_to_change(uri, Album) == (None, None)
    manifests.write_manifest(uri, first)
    read, etag = manifests.read_to_change(uri, Album)
    assert read == first
    storage.replace_if_match(uri, b"{}", etag=etag)
    with pytest.raises(Conflict):
        storage.replace_if_match(uri, b"[]", etag=etag)


def test_a_pointer_moves_only_from_where_it_was_read(root: str) -> None:
    uri = storage.join(root, "current.json")
    assert manifests.read_pointer(uri) is None
    manifests.swap_pointer(uri, "1", expected=None, token="a")
    first = manifests.read_pointer(uri)
    assert first is not None and first.target == "1"
    manifests.swap_pointer(uri, "2", expected=first, token="b")
    with pytest.raises(Conflict):
        manifests.swap_pointer(uri, "3", expected=first, token="c")
    with pytest.raises(Conflict):
        manifests.swap_pointer(uri, "3", expected=None, token="c")
    moved = manifests.read_pointer(uri)
    assert moved is not None and moved.target == "2"


def test_a_writer_whose_answer_was_lost_knows_its_own_swap(root: str) -> None:
    uri = storage.join(root, "current.json")
    manifests.swap_pointer(uri, "1", expected=None, token="mine")
    manifests.swap_pointer(uri, "1", expected=None, token="mine")
    with pytest.raises(Conflict):
        manifests.swap_pointer(uri, "1", expected=None, token="theirs")


def test_a_damaged_pointer_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "current.json")
    storage.write(uri, b'{"target": 5}')
    with pytest.raises(ManifestError, match=r"current\.json is damaged"):
        manifests.read_pointer(uri)


def test_a_pin_lies_beside_the_target_until_a_swap_without_one(root: str) -> None:
    uri, pin = storage.join(root, "current.json"), Pin("2026-11-01T02:00:00+00:00", "Grüße")
    manifests.swap_pointer(uri, "1", expected=None, token="a", pin=pin)
    pinned = manifests.read_pointer(uri)
    assert pinned is not None and (pinned.target, pinned.pin) == ("1", pin)
    manifests.swap_pointer(uri, "1", expected=pinned, token="b")
    lifted = manifests.read_pointer(uri)
    assert lifted is not None and (lifted.target, lifted.pin) == ("1", None)


@pytest.mark.parametrize("pin", ['"why"', '["since"]', '{"since": 1, "reason": "x"}', '{"reason": "x"}'])
def test_a_pin_that_is_none_is_damage(tmp_path: Path, pin: str) -> None:
    uri = str(tmp_path / "current.json")
    storage.write(uri, f'{{"target": "1", "token": "a", "pin": {pin}}}'.encode())
    with pytest.raises(ManifestError, match=r"current\.json is damaged"):
        manifests.read_pointer(uri)


@dataclass(frozen=True, kw_only=True)
class Ids:
    FORMAT: ClassVar[str] = "namr-test-ids"
    FORMAT_VERSION: ClassVar[int] = 1
    ids: tuple[manifests.Id, ...]


@pytest.mark.parametrize("wrong", [2**70, 2**53, -1])
def test_an_id_that_is_none_is_told_by_its_place(wrong: int) -> None:
    body = json.loads(manifests.encode_manifest(Ids(ids=(0, 2**53 - 1))))
    assert manifests.decode_manifest(json.dumps(body).encode(), Ids, "x").ids == (0, 2**53 - 1)
    body["ids"].append(wrong)
    with pytest.raises(ManifestError, match=r"x is damaged: ids\.2: "):
        manifests.decode_manifest(json.dumps(body).encode(), Ids, "x")


def test_json_that_is_nested_absurdly_deep_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "album.json")
    storage.write(uri, b"[" * 200_000)
    for read in (manifests.read_pointer, lambda uri: manifests.read_manifest(uri, Album)):
        with pytest.raises(ManifestError, match=r"album\.json is damaged: its JSON is nested too deep"):
            read(uri)


def test_half_a_character_is_refused_where_it_is_read_and_where_it_is_written(tmp_path: Path) -> None:
    uri = str(tmp_path / "album.json")
    storage.write(uri, b'{"target": "a\\uD800", "token": "t"}')
    with pytest.raises(ManifestError, match=r"album\.json is damaged: half a character"):
        manifests.read_pointer(uri)
    with pytest.raises(ManifestError, match=r"can't be written: .*'.*fu.*\\ud800.*rename it"):
        manifests.write_manifest(uri, Album(title="fuß\ud800", pictures=()))
    with pytest.raises(ManifestError, match=r"can't point to 'a\\udfff'"):
        manifests.swap_pointer(uri, "a\udfff", expected=None, token="t")
    storage.write(uri, b'{"target": "\\uD83D\\uDE00", "token": "t"}')
    pointer = manifests.read_pointer(uri)
    assert pointer is not None and pointer.target == "😀"


def test_the_first_record_counts_and_the_work_is_done_once(root: str) -> None:
    uri, titles = storage.join(root, "album.json"), iter(["one", "two"])

    def make() -> Album:
        return Album(title=next(titles), pictures=())

    first = manifests.recorded(uri, Album, make)
    assert first.title == "one" == manifests.read_manifest(uri, Album).title
    assert manifests.recorded(uri, Album, make) == first
    assert next(titles) == "two"


def test_a_record_that_no_longer_holds_is_replaced(root: str) -> None:
    uri = storage.join(root, "album.json")
    picture = manifests.write_object(root, "1.bin", b"picture")

    def make() -> Album:
        return Album(title="new", pictures=(manifests.write_object(root, "2.bin", b"new"),))

    def holds(album: Album) -> bool:
        return all(storage.exists(storage.join(root, picture.name)) for picture in album.pictures)

    old = Album(title="old", pictures=(picture,))
    assert manifests.recorded(uri, Album, lambda: old, holds=holds) == old
    assert manifests.recorded(uri, Album, make, holds=holds) == old
    storage.delete(storage.join(root, "1.bin"))
    assert manifests.recorded(uri, Album, make, holds=holds).title == "new"
    assert manifests.read_manifest(uri, Album).title == "new"


KILLED = """
import os, signal, sys
from namr.store import manifests
from tests.store.test_manifests import Album
def make():
    manifests.write_object(sys.argv[1], "1.bin", b"picture")
    os.kill(os.getpid(), signal.SIGKILL)
manifests.recorded(sys.argv[1] + "/album.json", Album, make)
"""


@pytest.mark.slow
def test_work_that_was_killed_is_done_again(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    assert subprocess.run([sys.executable, "-c", KILLED, root], check=False).returncode == -9
    made = manifests.recorded(
        storage.join(root, "album.json"),
        Album,
        lambda: Album(title="again", pictures=(manifests.write_object(root, "1.bin", b"picture"),)),
    )
    assert made.title == "again"
    assert storage.list_names(root) == ["1.bin", "album.json"]


def test_of_two_attempts_at_once_the_first_record_is_everybodys(root: str) -> None:
    uri, both = storage.join(root, "album.json"), threading.Barrier(2, timeout=30)

    def attempt(number: int) -> Album:
        def make() -> Album:
            both.wait()
            return Album(title=str(number), pictures=())

        return manifests.recorded(uri, Album, make)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(attempt, range(2))
    assert one == two == manifests.read_manifest(uri, Album)
