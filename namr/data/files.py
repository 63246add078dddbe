"""Files that users offer: found below a folder, and looked at before anything opens them.

Links are followed, folders too. Pipes, sockets and devices are never opened: reading one could wait for ever.
Not covered: what is in a file (`images`, `shards`).
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from namr.data.leftovers import Tally, is_text
from namr.errors import ConfigError, ImageRefused, StorageError
from namr.store import storage

_MAX_KEY_BYTES = 1024
_OF_THIS_PATH = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)
"""errors that one path has and its neighbours don't; others end the run"""


class Found(NamedTuple):
    """A file below a folder."""

    name: str
    """relative to the folder"""
    num_bytes: int | None
    """None where listing doesn't tell, and `size_of` does"""


def below(folder_uri: str, passed_over: Tally) -> Iterator[Found]:
    """The files below a folder, in no order; what is hidden or none is tallied."""
    if storage.is_local(folder_uri):
        yield from (Found(name, None) for name in _walk(Path(folder_uri), passed_over))
        return
    for entry in storage.list_entries(folder_uri):
        if any(part.startswith(".") for part in PurePosixPath(entry.name).parts):
            passed_over.add("hidden", entry.name)
        else:
            yield Found(entry.name, entry.size_bytes)


def size_of(location: str) -> int | None:
    """Bytes of a local file, None for a remote one, which would take a request.

    Raises ImageRefused, with the reason, for what can't be an image: a path that is no text or too long, to
    nothing, to a folder or a device, or that may not be read.
    """
    if "\0" in location:
        raise ImageRefused("its path holds a NUL")
    if not is_text(location):
        raise ImageRefused("its name is not UTF-8")
    try:
        is_local = storage.is_local(location)
    except ConfigError as error:
        raise ImageRefused(str(error)) from error
    if is_local:
        return _local_size(Path(location))
    bucket, _, key = location.partition("://")[2].partition("/")
    if not bucket or not key or len(key.encode()) > _MAX_KEY_BYTES:
        raise ImageRefused(f"not s3://bucket/key with a key of 1 to {_MAX_KEY_BYTES} bytes")
    return None


def _walk(root: Path, passed_over: Tally) -> Iterator[str]:
    """A link to a folder that it lies in is passed over; a link to nothing counts as a file."""
    waiting: list[tuple[str, tuple[os.stat_result, ...]]] = [("", (root.stat(),))]
    while waiting:
        folder, above = waiting.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            raise StorageError(f"{root / folder} can't be listed: {error.strerror}") from error
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                passed_over.add("hidden", name)
                continue
            try:
                status = entry.stat()
            except OSError:  # who reads it is told why
                yield name
                continue
            if stat.S_ISREG(status.st_mode):
                yield name
            elif not stat.S_ISDIR(status.st_mode):
                passed_over.add(_kind_of(status), name)
            elif any(os.path.samestat(status, each) for each in above):
                passed_over.add("link to a folder above it", name)
            else:
                waiting.append((name, (*above, status)))


def _local_size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        if error.errno not in _OF_THIS_PATH:
            raise StorageError(f"cannot look at {path}: {error.strerror}") from error
        is_gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
        raise ImageRefused("nothing is there" if is_gone else os.strerror(error.errno)) from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageRefused(f"a {_kind_of(status)}, not a file")
    if not os.access(path, os.R_OK):
        raise ImageRefused("may not be read")
    return status.st_size


def _kind_of(status: os.stat_result) -> str:
    """Of what is no regular file."""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(status.st_mode), "device")
