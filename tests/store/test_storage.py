import errno
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from namr.errors import ConfigError, Conflict, ObjectMissing, StorageError
from namr.store import buckets, scratch, storage
from namr.store.storage import Range


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place to write, on either kind of store: every test below holds for both."""
    return str(tmp_path / "root") if request.param == "local" else str(request.getfixturevalue("s3"))


def test_what_was_written_is_read(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    storage.write(uri, b"first")
    storage.write(uri, b"second")
    assert storage.read(uri) == b"second"
    assert storage.size(uri) == 6
    assert storage.exists(uri)
    assert not storage.exists(storage.join(root, "a"))


def test_write_if_absent_never_changes_what_is_there(root: str) -> None:
    uri = storage.join(root, "x")
    assert storage.write_if_absent(uri, b"one")
    assert not storage.write_if_absent(uri, b"two")
    assert storage.read(uri) == b"one"


def test_upload_if_absent_never_changes_what_is_there(root: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1" * 100)
    two.write_bytes(b"2" * 100)
    uri = storage.join(root, "x")
    assert storage.upload_if_absent(one, uri)
    assert not storage.upload_if_absent(two, uri)
    storage.download(uri, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"1" * 100


def test_move_if_absent_never_changes_what_is_there(root: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1" * 100)
    two.write_bytes(b"2" * 100)
    uri = storage.join(root, "below", "x")
    assert storage.move_if_absent(one, uri)
    assert not storage.move_if_absent(two, uri)
    one.unlink(missing_ok=True)
    assert storage.read(uri) == b"1" * 100


def test_a_file_that_is_moved_is_copied_only_where_it_can_not_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, linked, copied = tmp_path / "file", tmp_path / "linked", tmp_path / "copied"
    path.write_bytes(b"contents")
    assert storage.move_if_absent(path, str(linked))
    assert linked.samefile(path)
    link = os.link

    def to_another_file_system(source: Path, target: Path) -> None:
        if source == path:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", to_another_file_system)
    assert storage.move_if_absent(path, str(copied))
    assert copied.read_bytes() == b"contents" and not copied.samefile(path)


def test_of_writers_that_race_to_create_one_wins(root: str) -> None:
    uri = storage.join(root, "raced")
    won: list[int] = []

    def attempt(number: int) -> None:
        if storage.write_if_absent(uri, str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(won) == 1
    assert storage.read(uri) == str(won[0]).encode()


def test_replace_needs_the_tag_that_was_read(root: str) -> None:
    uri = storage.join(root, "current.json")
    storage.replace_if_match(uri, b"one", etag=None)
    with pytest.raises(Conflict):
        storage.replace_if_match(uri, b"two", etag=None)
    data, etag = storage.read_with_etag(uri)
    assert data == b"one"
    storage.replace_if_match(uri, b"two", etag=etag)
    with pytest.raises(Conflict, match=r"current\.json was changed by somebody else"):
        storage.replace_if_match(uri, b"three", etag=etag)
    assert storage.read(uri) == b"two"


def test_replacing_what_was_deleted_is_a_conflict(root: str) -> None:
    uri = storage.join(root, "current.json")
    storage.replace_if_match(uri, b"one", etag=None)
    _, etag = storage.read_with_etag(uri)
    storage.delete(uri)
    with pytest.raises(Conflict):
        storage.replace_if_match(uri, b"two", etag=etag)


def test_ranges_come_in_the_order_asked_for(root: str) -> None:
    one, two = storage.join(root, "1"), storage.join(root, "2")
    storage.write(one, bytes(range(100)))
    storage.write(two, bytes(range(100, 200)))
    found = storage.read_ranges([Range(two, 5, 7), Range(one, 0, 1), Range(one, 98, 100), Range(one, 4, 4)])
    assert found == [bytes([105, 106]), bytes([0]), bytes([98, 99]), b""]
    assert storage.read_ranges([]) == []


def test_a_range_past_the_end_is_an_error_that_names_the_object(root: str) -> None:
    uri = storage.join(root, "short")
    storage.write(uri, b"12345")
    with pytest.raises(StorageError, match="short"):
        storage.read_ranges([Range(uri, 3, 9)])


def test_streams_read_and_seek(root: str) -> None:
    uri = storage.join(root, "stream")
    storage.write(uri, b"0123456789")
    with storage.open_stream(uri) as stream:
        assert stream.read(4) == b"0123"
        stream.seek(8)
        assert stream.read() == b"89"


def test_names_are_listed_below_a_folder(root: str) -> None:
    for name in ("b/2", "b/10", "a", "c/d/e"):
        storage.write(storage.join(root, name), b"")
    assert storage.list_names(root) == ["a", "b/10", "b/2", "c/d/e"]
    assert storage.list_names(storage.join(root, "b")) == ["10", "2"]
    assert storage.list_names(storage.join(root, "nothing")) == []


def test_a_listing_tells_size_and_age_by_the_clock_of_the_store(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)  # this machine's clock says nothing
    storage.write(storage.join(root, "folder", "b"), b"12")
    (entry,) = storage.list_entries(root)
    assert entry[:2] == ("folder/b", 2)
    time.sleep(0.02)
    assert -0.01 <= storage.now(root) - entry.modified < 60
    assert storage.list_names(root) == ["folder/b"]


def test_a_copy_that_keeps_times_is_as_young_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "restored").write_bytes(b"")
    os.utime(tmp_path / "restored", (0, 0))
    (entry,) = storage.list_entries(str(tmp_path))
    assert storage.now(str(tmp_path)) - entry.modified < 60


def test_empty_folders_and_what_killed_writers_left_are_cleared(tmp_path: Path) -> None:
    for name in ("objects/1", "objects/2", "full"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "full" / "x").write_bytes(b"")
    with scratch.beside(tmp_path / "full" / "y") as held:
        left = held.with_name(f"{held.name[:-2]}zz")
        left.write_bytes(b"half")
        assert storage.clear_leftovers(str(tmp_path), before=0) == 1
        assert held.exists() and not left.exists()
        assert (tmp_path / "objects" / "1").exists()
    assert storage.clear_leftovers(str(tmp_path), before=storage.now(str(tmp_path)) + 60) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert storage.clear_leftovers(str(tmp_path / "nothing"), before=0) == 0


@pytest.mark.s3
def test_uploads_that_never_ended_are_cleared(s3: str) -> None:
    bucket, root = s3.removeprefix("s3://"), storage.join(s3, "releases")
    call = storage._s3.filesystem().call_s3
    for key in ("releases/one", "releases/two", "releases-of-others/x"):
        call("create_multipart_upload", Bucket=bucket, Key=key)
    assert storage.clear_leftovers(root, before=storage.now(root) - 3600) == 0
    assert storage.clear_leftovers(root, before=storage.now(root) + 3600) == 2
    left = call("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["releases-of-others/x"]


def test_a_missing_object_is_named(root: str) -> None:
    uri = storage.join(root, "nowhere")
    for act in (storage.read, storage.size, storage.read_with_etag, storage.open_stream):
        with pytest.raises(ObjectMissing, match="nowhere"):
            act(uri)
    storage.delete(uri)


def test_a_writable_place_passes_and_stays_clean(root: str) -> None:
    storage.check_writable(root)
    assert storage.list_names(root) == []


def test_a_folder_that_is_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file is not writable.*check that you may write"):
        storage.check_writable(str(tmp_path / "file"))


@pytest.mark.s3
@contextmanager
def full_disk() -> Iterator[None]:
    """While inside, this process can't write beyond the first bytes of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path: Path) -> None:
    folder, source = tmp_path / "store", tmp_path / "source"
    uri, new, large = str(folder / "pointer"), str(folder / "new"), bytes(4096)
    source.write_bytes(large)
    storage.write(uri, b"before")
    _, etag = storage.read_with_etag(uri)
    acts = (
        lambda: storage.write(uri, large),
        lambda: storage.replace_if_match(uri, large, etag=etag),
        lambda: storage.write_if_absent(new, large),
        lambda: storage.upload_if_absent(source, new),
        lambda: storage.download(str(source), Path(new)),
    )
    for act in acts:
        with full_disk(), pytest.raises(StorageError, match=r"cannot (write|replace|copy) .*File too large"):
            act()
        assert storage.read(uri) == b"before"
        assert {path.name for path in folder.iterdir()} <= {"pointer", ".pointer.lock"}
    storage.replace_if_match(uri, large, etag=etag)


def test_a_missing_bucket_is_not_writable(s3: str) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket.*create"):
        storage.check_writable(f"{s3.replace(s3.removeprefix('s3://'), 'no-such-bucket')}/a")


@pytest.mark.s3
def test_wrong_credentials_are_an_error_without_the_secret(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-wrong-secret")
    with pytest.raises(StorageError) as caught, fresh_connections():
        storage.check_writable(s3)
    assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)
    assert "a-very-wrong-secret" not in str(caught.value)


class fresh_connections:
    """Leaves the connections of this process aside, as a new process would."""

    def __enter__(self) -> None:
        buckets.Buckets._filesystem_of.cache_clear()

    def __exit__(self, *_: object) -> None:
        buckets.Buckets._filesystem_of.cache_clear()


@pytest.mark.s3
def test_a_file_of_many_parts_arrives_whole(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_PART_BYTES", 5 << 20)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(13 << 20))
    uri = storage.join(s3, "large")
    storage.upload(path, uri)
    assert storage.sha256_of(uri) == storage.sha256_of_file(path)
    assert not storage.upload_if_absent(path, uri)


def test_an_unknown_kind_of_uri_is_refused() -> None:
    with pytest.raises(ConfigError, match="gs://bucket"):
        storage.read("gs://bucket/key")
    with pytest.raises(ConfigError, match="names no object"):
        storage.write("s3://bucket", b"")
