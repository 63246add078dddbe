"""Temporary files and folders that the next start removes where a kill left them behind.

Each is held by an flock for as long as its process lives, so whoever finds one that nobody holds knows that
it is left over. `folder` has its own place in the system's temporary folder and clears it; what has to lie
beside its target (to be renamed or linked into place) is found by `sweep`, which every job calls for the
folders that it writes to (`storage.check_writable`).

On a file system that several machines share, locks may not reach from one to another: what another machine
left is removed when it is a day old. Not covered: what libraries leave in the temporary folder.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from namr.errors import NamrError, StorageError

_PREFIX = ".namr-tmp-"
_NAME = re.compile(rf"{re.escape(_PREFIX)}([0-9a-f]{{8}})-\w+")
_FOREIGN_AFTER_S = 24 * 3600.0
_FULL_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def folder(prefix: str) -> Iterator[Path]:
    """A new folder below the system's temporary folder (TMPDIR), removed with all that is in it afterwards.

    Removes what killed processes of this user left there. StorageError if that folder can't be used or is
    full, also where it becomes full inside the block.
    """
    root = _own_root()
    try:
        for path in root.iterdir():
            _remove_unless_held(path)
        path, handle = _held(lambda: Path(tempfile.mkdtemp(prefix=prefix, dir=root)))
    except OSError as error:
        raise _unusable(root, error) from error
    try:
        yield path
    except Exception as error:
        if _filled(root, error):
            raise _unusable(root, error) from error
        raise
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def beside(path: Path) -> AbstractContextManager[Path]:
    """An empty file of a new, hidden name in the folder of `path`, gone afterwards unless it was renamed."""
    return _gone_afterwards(lambda: _new_file(path.parent))


def folder_beside(path: Path) -> AbstractContextManager[Path]:
    """`beside` for a folder."""
    return _gone_afterwards(lambda: _new_folder(path.parent))


def sweep(folder: Path, *, below: bool = False) -> int:
    """Remove what `beside` and `folder_beside` of killed processes left in a folder, or anywhere below it.

    Returns how many files and folders that were.
    """
    num_removed = 0
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if matched := _NAME.fullmatch(name):
                path = Path(place, name)
                if matched[1] == _host() or _is_old(path):
                    num_removed += _remove_unless_held(path)
        folders[:] = [name for name in folders if below and not _NAME.fullmatch(name)]
    return num_removed


def _own_root() -> Path:
    try:
        root = Path(tempfile.gettempdir(), f"namr-{os.getuid()}")
    except OSError as error:
        raise StorageError(f"no temporary folder can be used: {error}; set TMPDIR to one") from error
    try:
        root.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _unusable(root, error) from error
    if root.is_symlink() or root.lstat().st_uid != os.getuid():
        raise StorageError(f"{root} belongs to somebody else; remove it, or set TMPDIR to your own folder")
    return root


def _unusable(root: Path, error: Exception) -> StorageError:
    state = "is full" if _filled(root, error) else "can't be used"
    return StorageError(
        f"the temporary folder {root} {state}: {error}; make room there, or set TMPDIR to a folder that has "
        "some and can be written to"
    )


def _filled(root: Path, error: BaseException | None) -> bool:
    """Whether a full disk is behind an error. Libraries have their own errors for it: the disk is asked."""
    if isinstance(error, OSError) and error.errno == errno.EDQUOT:
        return True
    while isinstance(error, NamrError):
        error = error.__cause__
        if error is None or (isinstance(error, OSError) and error.errno not in _FULL):
            return False
    status = os.statvfs(root if root.exists() else root.parent)
    is_out_of_files = status.f_files > 0 and status.f_favail == 0
    return status.f_bavail * status.f_frsize < _FULL_BYTES or is_out_of_files


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _own_prefix() -> str:
    return f"{_PREFIX}{_host()}-"


def _new_file(parent: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=_own_prefix(), dir=parent)
    os.fchmod(handle, 0o644)  # what it becomes is for everybody to read
    os.close(handle)
    return Path(name)


def _new_folder(parent: Path) -> Path:
    path = Path(tempfile.mkdtemp(prefix=_own_prefix(), dir=parent))
    with suppress(FileNotFoundError):  # swept before it was locked
        path.chmod(0o755)
    return path


@contextmanager
def _gone_afterwards(make: Callable[[], Path]) -> Iterator[Path]:
    path, handle = _held(make)
    try:
        yield path
    finally:
        _remove(path)
        os.close(handle)


def _held(make: Callable[[], Path]) -> tuple[Path, int]:
    """A new file or folder and the handle that locks it. Where a sweep was quicker than the lock, again."""
    while True:
        path = make()
        with suppress(FileNotFoundError):
            handle = _opened(path)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if is_at(path, handle):
                return path, handle
            os.close(handle)


def _opened(path: Path) -> int:
    """For locking: network file systems want a file open for writing, and folders can't be."""
    return os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))


def is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _is_old(path: Path) -> bool:
    try:
        return path.lstat().st_mtime < time.time() - _FOREIGN_AFTER_S
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_unless_held(path: Path) -> bool:
    try:
        handle = _opened(path)
    except OSError:
        return False  # gone already, or not ours
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_at(path, handle):
            return False
        _remove(path)
    except OSError:
        return False  # held, so its process lives
    finally:
        os.close(handle)
    return True
