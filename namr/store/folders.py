"""Objects as files of a folder, with the two conditional writes.

Write-if-absent is a temporary file, fsync and `os.link`; replace-if-match is `flock` on a permanent file, a
comparison and `os.replace`. A tag (ETag) is the SHA-256 of the contents. An object's time is that of its
inode's last change, which a copy that keeps times doesn't keep. Errors are OSErrors: `storage` explains them.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from namr.store import scratch


class Folders:
    """The store whose URIs are paths."""

    def read(self, uri: str) -> bytes:
        return Path(uri).read_bytes()

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        parts = []
        for path, start, stop in ranges:
            with Path(path).open("rb", buffering=0) as file:
                parts.append(os.pread(file.fileno(), stop - start, start))
        return parts

    def open_stream(self, uri: str) -> BinaryIO:
        return Path(uri).open("rb")

    def write(self, uri: str, data: bytes) -> None:
        with self._new_file(uri) as (temporary, target):
            _write_through(temporary, data)
            temporary.replace(target)
            _sync_folder(target.parent)

    def write_if_absent(self, uri: str, data: bytes) -> bool:
        with self._new_file(uri) as (temporary, target):
            _write_through(temporary, data)
            return self._link(temporary, target)

    def upload(self, path: Path, uri: str) -> None:
        with self._new_file(uri) as (temporary, target):
            _copy_through(path, temporary)
            temporary.replace(target)
            _sync_folder(target.parent)

    def upload_if_absent(self, path: Path, uri: str) -> bool:
        with self._new_file(uri) as (temporary, target):
            _copy_through(path, temporary)
            return self._link(temporary, target)

    def move_if_absent(self, path: Path, uri: str) -> bool:
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sync_file(path)
        try:
            return self._link(path, target)
        except OSError:  # on another file system, or one without links
            return self.upload_if_absent(path, uri)

    def download(self, uri: str, path: Path) -> None:
        shutil.copyfile(uri, path)

    def read_with_state(self, uri: str) -> tuple[bytes, str]:
        before = self.state(uri)
        return self.read(uri), before

    def state(self, uri: str) -> str:
        status = Path(uri).stat()
        return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"

    def read_with_etag(self, uri: str) -> tuple[bytes, str]:
        data = self.read(uri)
        return data, _tag(data)

    def replace_if_match(self, uri: str, data: bytes, etag: str | None) -> bool:
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / f".{path.name}.lock"):
            current = _tag(path.read_bytes()) if path.exists() else None
            if current != etag:
                return False
            self.write(uri, data)
        return True

    def size(self, uri: str) -> int:
        path = Path(uri)
        if path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "is a folder, not a file", uri)
        return path.stat().st_size

    def list_entries(self, uri: str) -> list[tuple[str, int, float]]:
        root, entries = Path(uri), []
        paths = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
        for path in paths:
            if not path.name.startswith("."):
                with suppress(FileNotFoundError):  # deleted since it was seen
                    status = path.stat()
                    entries.append((str(path.relative_to(root)), status.st_size, status.st_ctime))
        return entries

    def now(self, uri: str) -> float:
        with scratch.beside(Path(uri, "probe")) as path:
            return path.stat().st_ctime

    def clear_leftovers(self, uri: str, before: float) -> int:
        num = scratch.sweep(Path(uri), below=True)
        for folder in (Path(name) for name, _, _ in os.walk(uri, topdown=False)):
            with suppress(OSError):  # there is something in it
                if folder != Path(uri) and folder.stat().st_ctime < before:
                    folder.rmdir()
        return num

    def delete(self, uri: str) -> None:
        Path(uri).unlink(missing_ok=True)

    @contextmanager
    def _new_file(self, uri: str) -> Iterator[tuple[Path, Path]]:
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch.beside(target) as temporary:
            yield temporary, target

    def _link(self, temporary: Path, target: Path) -> bool:
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        _sync_folder(target.parent)
        return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among all processes of this machine that lock the same path."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy_through(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    _sync_file(target)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
