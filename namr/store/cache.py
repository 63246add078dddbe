"""Whole objects on local disk, by digest: a bounded folder that the processes of a machine share.

    <folder>/<sha256>               an object, whole and verified
    <folder>/.<sha256>.lock         held by who downloads it, with the bytes that are kept free for it
    <folder>/.lock, .size           held by who counts or evicts; the bytes that are accounted for
    <folder>/verified/<digest of a path>    verdict over a local file, which is used where it lies

The count is never below the truth: bytes are added before they are downloaded. What a killed process or a
deletion by hand left in it is found when the folder seems full, which is when it is scanned anyway. Each
cache keeps to its own bound for all that lies in the folder, whoever put it there.

Not covered: parts of objects (`ranges` reads those); copies that the disk damages later.
"""

import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath
from typing import BinaryIO, NamedTuple

from namr import checks
from namr.errors import ConfigError, NamrError, StorageError
from namr.store import scratch, storage
from namr.store.folders import locked

UNUSED_AFTER_S = 3600.0
_VERDICTS_KEPT_S = 30 * 24 * 3600.0


class HeldPath(PosixPath):
    """The path of a cached object, which nobody evicts while this very path is alive.

    Keep it until the file is open or mapped; from then on it may be evicted and stays readable. Strings and
    other paths made of it hold nothing, nor does it in another process.
    """

    @classmethod
    def of(cls, path: Path, handle: int) -> "HeldPath":
        """`handle` has the shared lock of the file at `path` and is closed with the path's life."""
        held = cls(path)
        weakref.finalize(held, os.close, handle)
        return held


class Cache:
    """A folder of whole objects, named by digest, shared by the processes of a machine and bounded in bytes.

    An object is downloaded once, verified, and evicted when it is the one used least recently. A file that
    lies on this machine is not copied, only verified: once for each state (inode, size, times) of it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        checks.in_range(self, "max_bytes", above=0, place="cache")
        self._has_forgotten = False

    def get(self, sha256: str) -> Path | None:
        """The local copy, if there is one; held while the returned path lives."""
        path = self.folder / sha256
        try:
            handle = _held(path)
        except FileNotFoundError:
            return None
        os.utime(handle)
        return HeldPath.of(path, handle)

    def path(self, uri: str, *, sha256: str) -> Path:
        """The local copy, made now if there is none; held while the returned path lives.

        StorageError if the object's digest is another, or where all that others hold leaves no room;
        ConfigError for an object that is larger than the cache may be.
        """
        path = self._path(uri, sha256, unused_for_s=0.0)
        if isinstance(path, NamrError):
            raise path
        return path

    def path_if_room(self, uri: str, *, sha256: str, unused_for_s: float = UNUSED_AFTER_S) -> Path | None:
        """`path`, or None where only what somebody used within `unused_for_s` could make room.

        For filling the cache ahead: several who do that share it and don't take from each other.
        """
        path = self._path(uri, sha256, unused_for_s=unused_for_s)
        return None if isinstance(path, NamrError) else path

    def _path(self, uri: str, sha256: str, *, unused_for_s: float) -> Path | NamrError:
        """The path, or why there is no room."""
        if storage.is_local(uri):
            return self._verified(uri, sha256)
        copy = self.get(sha256)
        if copy:
            return copy
        self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder / f".{sha256}.lock") as lock:
            copy = self.get(sha256)
            if copy:
                return copy
            num_bytes = storage.size(uri)
            if num_bytes > self.max_bytes:
                return ConfigError(
                    f"{uri} has {num_bytes} bytes, and the cache {self.folder} may hold {self.max_bytes}; "
                    "raise cache_bytes to several times that size"
                )
            used = self._reserve(num_bytes, lock, unused_for_s)
            if used is not None:
                return StorageError(
                    f"no room for {uri} ({num_bytes} bytes) in the cache {self.folder}: {used} of "
                    f"{self.max_bytes} bytes are in use; raise cache_bytes, or end what uses them"
                )
            try:
                return self._downloaded(uri, sha256)
            except BaseException:
                with locked(self.folder / ".lock"):
                    self._count(-num_bytes)
                raise

    def _downloaded(self, uri: str, sha256: str) -> Path:
        target = self.folder / sha256
        with scratch.folder_beside(target) as temporary:
            storage.download(uri, temporary / "object")
            _check_digest(uri, storage.sha256_of_file(temporary / "object"), sha256)
            handle = _held(temporary / "object")  # before it has a name by which others evict it
            (temporary / "object").replace(target)
        return HeldPath.of(target, handle)

    def _reserve(self, num_bytes: int, lock: BinaryIO, unused_for_s: float) -> int | None:
        """Make room and account for it; else the bytes that are in use."""
        with locked(self.folder / ".lock"):
            used = self._counted()
            if used is None or used + num_bytes > self.max_bytes:
                used = self._make_room(num_bytes, unused_for_s)
            fits = used + num_bytes <= self.max_bytes
            if fits:
                lock.write(str(num_bytes).encode())
                lock.flush()
            (self.folder / ".size").write_text(str(used + num_bytes if fits else used))
        return None if fits else used

    def _counted(self) -> int | None:
        try:
            return int((self.folder / ".size").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _count(self, num_bytes: int) -> None:
        used = self._counted()
        if used is not None:
            (self.folder / ".size").write_text(str(used + num_bytes))

    def _make_room(self, num_bytes: int, unused_for_s: float) -> int:
        """Scan; evict where it is needed, a tenth more than that, so that not every object needs a scan."""
        scratch.sweep(self.folder)
        entries, used = self._entries()
        if used + num_bytes <= self.max_bytes:
            return used
        spare = (self.max_bytes - num_bytes) // 10
        for entry in sorted(entries):
            is_recent = unused_for_s > 0 and entry.used_at > time.time() - unused_for_s
            if is_recent or used + num_bytes + spare <= self.max_bytes:
                break
            if _evicted(entry.path):
                used -= entry.num_bytes
        return used

    def _entries(self) -> "tuple[list[_Entry], int]":
        """All objects, and the bytes of them and of what is being downloaded."""
        entries, pending = [], 0
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.name.startswith(".") and path.suffix == ".lock" and path.name != ".lock":
                    pending += _pending_bytes(path)
                elif not path.name.startswith(".") and path.is_file():
                    entries.append(_Entry(status.st_mtime, status.st_size, path))
        return entries, pending + sum(entry.num_bytes for entry in entries)

    def _verified(self, uri: str, sha256: str) -> Path:
        path = storage.local_path(uri).absolute()
        verdict = self.folder / "verified" / storage.sha256(os.fsencode(path))
        with storage.open_stream(uri) as file:
            status = os.fstat(file.fileno())
            state = f"{sha256} {status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} "
            state += str(status.st_ctime_ns)  # who sets mtime back can't set this one
            with suppress(FileNotFoundError):
                if verdict.read_text() == state:
                    os.utime(verdict)
                    return path
            _check_digest(uri, storage.sha256_of_file(path), sha256)
        verdict.parent.mkdir(parents=True, exist_ok=True)
        with scratch.beside(verdict) as temporary:  # not synced: half of one is no verdict, and made again
            temporary.write_text(state)
            temporary.replace(verdict)
        if not self._has_forgotten:
            self._has_forgotten = True
            _forget_old(verdict.parent)
        return path


class _Entry(NamedTuple):
    used_at: float
    num_bytes: int
    path: Path


def _check_digest(uri: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise StorageError(f"{uri} is damaged: its SHA-256 is {actual}, expected {expected}; write it anew")


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """Alone with a lock file that is deleted afterwards; who locked a deleted one locks again."""
    while True:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if scratch.is_at(path, file.fileno()):
                file.truncate(0)  # what a killed process wrote
                try:
                    yield file
                finally:
                    path.unlink(missing_ok=True)
                return


def _held(path: Path) -> int:
    """A handle with the shared lock of the file that lies at `path`; FileNotFoundError if none does."""
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    if not scratch.is_at(path, handle):
        os.close(handle)
        raise FileNotFoundError(path)
    return handle


def _evicted(path: Path) -> bool:
    """Whether nobody holds the file, so that it is gone now."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


def _pending_bytes(lock: Path) -> int:
    """What a download that is under way has reserved; the lock of one that was killed is deleted."""
    with lock.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or b"0")
        lock.unlink()
    return 0


def _forget_old(folder: Path) -> None:
    """Verdicts over files that nobody opened for a month."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _VERDICTS_KEPT_S:
                path.unlink()
