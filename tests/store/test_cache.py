"""The cache of whole objects: its bound, who is held, many processes, kills; local files, verified once."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from namr.errors import ConfigError, ObjectMissing, StorageError
from namr.store import storage
from namr.store.cache import Cache
from namr.store.folders import Folders


class FolderAsBucket(Folders):
    """Serves s3://<path> from the folder /<path>: remote to the cache, and quick."""

    num_downloads = 0

    def size(self, uri: str) -> int:
        return super().size(uri.removeprefix("s3:/"))

    def download(self, uri: str, path: Path) -> None:
        self.num_downloads += 1
        super().download(uri.removeprefix("s3:/"), path)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderAsBucket:
    store = FolderAsBucket()
    monkeypatch.setattr(storage, "_s3", store)
    (tmp_path / "bucket").mkdir()
    return store


def put(tmp_path: Path, data: bytes) -> tuple[str, str]:
    """The URI and the digest of a new remote object."""
    digest = storage.sha256(data)
    (tmp_path / "bucket" / digest).write_bytes(data)
    return f"s3:/{tmp_path}/bucket/{digest}", digest


def numbered(tmp_path: Path, number: int, num_bytes: int = 10) -> tuple[str, str]:
    return put(tmp_path, number.to_bytes(num_bytes, "big"))


def present(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if len(path.name) == 64}


def test_an_object_is_downloaded_once_and_verified(tmp_path: Path, bucket: FolderAsBucket) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=100)
    uri, digest = put(tmp_path, b"contents")
    assert cache.get(digest) is None
    path = cache.path(uri, sha256=digest)
    assert cache.path(uri, sha256=digest) == path == cache.get(digest)
    assert path.read_bytes() == b"contents"
    assert bucket.num_downloads == 1


@pytest.mark.usefixtures("bucket")
def test_a_damaged_object_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=10)
    uri, _ = put(tmp_path, b"other")
    for _ in range(5):
        with pytest.raises(StorageError, match="damaged"):
            cache.path(uri, sha256=storage.sha256(b"contents"))
    assert {path.name for path in cache.folder.iterdir()} == {".lock", ".size"}
    assert (cache.folder / ".size").read_text() == "0"


@pytest.mark.usefixtures("bucket")
def test_what_was_used_least_recently_is_evicted(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=25)
    digests = []
    for number in range(3):
        uri, digest = numbered(tmp_path, number)
        digests.append(digest)
        os.utime(cache.path(uri, sha256=digest), (number, number))
        if number == 1:
            os.utime(tmp_path / "cache" / digests[0], (9, 9))
    assert present(cache) == {digests[0], digests[2]}


@pytest.mark.usefixtures("bucket")
def test_a_path_that_lives_is_not_evicted_and_one_that_was_dropped_is(tmp_path: Path) -> None:
    cache, other = (Cache(tmp_path / "cache", max_bytes=25) for _ in range(2))
    objects = [numbered(tmp_path, number) for number in range(4)]
    held = cache.path(objects[0][0], sha256=objects[0][1])
    for uri, digest in objects[1:3]:
        other.path(uri, sha256=digest)
    assert held.read_bytes() and present(cache) == {objects[0][1], objects[2][1]}
    also_held = other.get(objects[2][1])
    with pytest.raises(StorageError, match=r"no room for s3://.* 20 of 25 bytes are in use; raise"):
        other.path(objects[3][0], sha256=objects[3][1])
    with held.open("rb") as file:
        del held
        gc.collect()
        other.path(objects[3][0], sha256=objects[3][1])
        assert file.read() == (0).to_bytes(10, "big"), "what is open stays readable"
    assert also_held is not None and present(cache) == {objects[2][1], objects[3][1]}


@pytest.mark.usefixtures("bucket")
def test_an_object_larger_than_the_bound_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=25)
    small, large = numbered(tmp_path, 1), numbered(tmp_path, 2, 26)
    cache.path(small[0], sha256=small[1])
    with pytest.raises(ConfigError, match=r"has 26 bytes, and the cache .* may hold 25; raise cache_bytes"):
        cache.path(large[0], sha256=large[1])
    assert cache.path_if_room(large[0], sha256=large[1]) is None
    assert present(cache) == {small[1]}


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_a_bound_of_nothing_is_refused(tmp_path: Path, max_bytes: int) -> None:
    with pytest.raises(ConfigError, match=r"cache\.max_bytes is"):
        Cache(tmp_path, max_bytes)


@pytest.mark.usefixtures("bucket")
def test_who_fills_takes_nothing_that_was_used_lately(tmp_path: Path) -> None:
    training, validation = (Cache(tmp_path / "cache", max_bytes=25) for _ in range(2))
    objects = [numbered(tmp_path, number) for number in range(3)]
    for uri, digest in objects[:2]:
        assert training.path_if_room(uri, sha256=digest)
    assert validation.path_if_room(objects[2][0], sha256=objects[2][1]) is None
    assert present(training) == {digest for _, digest in objects[:2]}
    os.utime(training.folder / objects[0][1], (time.time() - 2 * 3600,) * 2)
    assert validation.path_if_room(objects[2][0], sha256=objects[2][1])
    assert present(training) == {digest for _, digest in objects[1:]}


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("record", [None, "", "no number", "0", "1000000"])
def test_a_record_that_is_missing_or_wrong_is_mended(tmp_path: Path, record: str | None) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=45)
    for number in range(3):
        uri, digest = numbered(tmp_path, number)
        cache.path(uri, sha256=digest)
    if record is None:
        (cache.folder / ".size").unlink()
    else:
        (cache.folder / ".size").write_text(record)
    for number in range(3, 6 if record != "0" else 9):
        uri, digest = numbered(tmp_path, number)
        cache.path(uri, sha256=digest)
    assert int((cache.folder / ".size").read_text()) == 10 * len(present(cache)) <= 45


@pytest.mark.usefixtures("bucket")
def test_caches_of_different_bounds_share_a_folder_each_keeping_to_its_own(tmp_path: Path) -> None:
    large, small = Cache(tmp_path / "cache", max_bytes=100), Cache(tmp_path / "cache", max_bytes=30)
    held = [large.path(uri, sha256=digest) for uri, digest in (numbered(tmp_path, n) for n in range(2))]
    for number in range(2, 6):
        large.path(numbered(tmp_path, number)[0], sha256=numbered(tmp_path, number)[1])
    uri, digest = numbered(tmp_path, 6)
    assert small.path(uri, sha256=digest).read_bytes()
    assert len(present(small)) == 3 and all(path.exists() for path in held)
    uri, digest = numbered(tmp_path, 7)
    assert large.path(uri, sha256=digest) and len(present(large)) == 4


@pytest.mark.usefixtures("bucket")
def test_filling_a_full_cache_scans_it_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    entries = Cache._entries
    monkeypatch.setattr(Cache, "_entries", lambda self: scans.append(1) or entries(self))
    cache = Cache(tmp_path / "cache", max_bytes=400)
    for number in range(120):
        uri, digest = numbered(tmp_path, number)
        cache.path(uri, sha256=digest)
    assert len(scans) <= 24
    assert 36 <= len(present(cache)) <= 40


@pytest.mark.usefixtures("bucket")
def test_filling_a_cache_that_has_room_takes_time_in_proportion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, as two caches, take turns; one looks through the folder, once."""
    looked_at: list[int] = []
    entries = Cache._entries

    def counted(cache: Cache) -> object:
        found = entries(cache)
        looked_at.append(len(found[0]))
        return found

    monkeypatch.setattr(Cache, "_entries", counted)
    caches = [Cache(tmp_path / "cache", max_bytes=1 << 20) for _ in range(2)]
    for number in range(500):
        uri, digest = numbered(tmp_path, number)
        caches[number % 2].path(uri, sha256=digest)
    assert looked_at == [0]
    assert (tmp_path / "cache" / ".size").read_text() == "5000"


VICTIM = """
import os, signal, sys
from pathlib import Path
from namr.store import storage
from namr.store.cache import Cache
def killed(uri, path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
storage._s3.size = lambda uri: 10
storage._s3.download = killed
Cache(Path(sys.argv[1]), 25).path("s3://x/y", sha256="0" * 64)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("bucket")
def test_what_a_killed_download_left_goes_away_when_its_room_is_needed(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=25)
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", VICTIM, str(cache.folder)], check=False)
        assert killed.returncode == -9
    assert (cache.folder / ".size").read_text() == "20"
    for number in range(2):
        cache.path(numbered(tmp_path, number)[0], sha256=numbered(tmp_path, number)[1])
    assert len(present(cache)) == 2
    assert {path.name for path in cache.folder.iterdir()} - present(cache) == {".lock", ".size"}


@pytest.mark.usefixtures("bucket")
def test_threads_that_want_more_than_fits_get_what_they_hold_or_are_told(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=55)
    objects = [numbered(tmp_path, number) for number in range(12)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        for step in range(60):
            number = (seed * 7 + step * 3) % 12
            uri, digest = objects[number]
            try:
                data = cache.path(uri, sha256=digest).read_bytes()
            except StorageError as error:
                if "no room" not in str(error):
                    wrong.append(error)
                continue
            if data != number.to_bytes(10, "big"):
                wrong.append(data)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(present(cache)) <= 5
    # Never below the truth; what is counted twice while a download ends is found at the next scan.
    assert int((cache.folder / ".size").read_text()) >= 10 * len(present(cache))


def _read_many(folder: Path, objects: list[tuple[str, str]], results: "multiprocessing.Queue[str]") -> None:
    cache = Cache(folder, 2500)
    for uri, digest in objects:
        path = cache.path(uri, sha256=digest)
        results.put("right" if storage.sha256(path.read_bytes()) == digest else "wrong")


@pytest.mark.s3
@pytest.mark.slow
def test_processes_that_share_a_small_cache_open_all_that_they_were_given(s3: str, tmp_path: Path) -> None:
    objects = []
    for number in range(12):
        data = number.to_bytes(500, "big")
        objects.append((storage.join(s3, str(number)), storage.sha256(data)))
        storage.write(objects[-1][0], data)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [
        context.Process(target=_read_many, args=(tmp_path / "cache", objects[at:] + objects[:at], results))
        for at in (0, 4, 8)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in range(36)] == ["right"] * 36
    for process in processes:
        process.join(timeout=30)
    assert len(present(Cache(tmp_path / "cache", 1))) <= 5


def bytes_read() -> int:
    """By this process, from files and elsewhere, since it started."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_local_file_is_used_where_it_lies_and_read_once(tmp_path: Path) -> None:
    cache, path = Cache(tmp_path / "cache", max_bytes=10), tmp_path / "index"
    path.write_bytes(bytes(8 << 20))
    digest = storage.sha256_of_file(path)
    before = bytes_read()
    assert cache.path(str(path), sha256=digest) == path
    assert bytes_read() - before >= 8 << 20
    before = bytes_read()
    again = Cache(tmp_path / "cache", max_bytes=10)
    assert again.path(str(path), sha256=digest) == cache.path_if_room(str(path), sha256=digest) == path
    assert bytes_read() - before < 1 << 20
    assert present(cache) == set()


def test_flipped_bytes_of_a_local_file_are_found(tmp_path: Path) -> None:
    cache, path = Cache(tmp_path / "cache", max_bytes=10), tmp_path / "index"
    path.write_bytes(bytes(100_000))
    digest = storage.sha256_of_file(path)
    cache.path(str(path), sha256=digest)
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(50_000)
        file.write(b"\1" * 2000)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"index is damaged: its SHA-256 is"):
            cache.path(str(path), sha256=digest)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(StorageError, match="damaged"):
        cache.path(str(path), sha256=digest)
    path.write_bytes(bytes(100_000))
    assert cache.path(str(path), sha256=digest) == path
    with pytest.raises(StorageError, match="damaged"):
        cache.path(str(path), sha256="0" * 64)


def test_a_local_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing, match="nowhere"):
        Cache(tmp_path / "cache", 10).path(str(tmp_path / "nowhere"), sha256="0" * 64)


def test_verdicts_that_nobody_asked_for_in_a_month_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"x")
    verdicts = tmp_path / "cache" / "verified"
    verdicts.mkdir(parents=True)
    for age_days in (1, 31):
        (verdicts / str(age_days)).write_text("")
        os.utime(verdicts / str(age_days), (time.time() - age_days * 24 * 3600,) * 2)
    Cache(tmp_path / "cache", 10).path(str(path), sha256=storage.sha256(b"x"))
    assert sorted(len(path.name) for path in verdicts.iterdir()) == [1, 64]
