"""Whole objects on local disk, by digest: a bounded folder that the processes of a machine share.

Not covered: parts of objects (`ranges` reads those).
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from namr.errors import ConfigError, StorageError
from namr.store import storage
from namr.store.folders import locked, temporary_beside

_ABANDONED_AFTER_S = 24 * 3600.0


class Cache:
    """A folder of whole objects, named by digest, shared by the processes of a machine and bounded in bytes.

    An object is downloaded once (`flock`), verified, and evicted when it is the one used least recently.
    An evicted file that some process still has open or mapped stays readable to it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ConfigError(f"max_bytes of a cache is {max_bytes}; expected more than 0")
        self.folder, self.max_bytes = folder, max_bytes

    def get(self, sha256: str) -> Path | None:
        """The local copy, if there is one."""
        path = self.folder / sha256
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def path(self, uri: str, *, sha256: str) -> Path:
        """The local copy, made now if there is none; StorageError if the object's digest is another."""
        found = self.get(sha256)
        if found:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / f".{sha256}.lock"):
            found = self.get(sha256)
            if found:
                return found
            self._make_room(storage.size(uri))
            with temporary_beside(self.folder / sha256) as temporary:
                storage.download(uri, temporary)
                actual = storage.sha256_of_file(temporary)
                if actual != sha256:
                    raise StorageError(
                        f"{uri} is damaged: its SHA-256 is {actual}, expected {sha256}; write it anew"
                    )
                temporary.replace(self.folder / sha256)
        (self.folder / f".{sha256}.lock").unlink(missing_ok=True)
        return self.folder / sha256

    def _make_room(self, num_bytes: int) -> None:
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if not path.name.startswith("."):
                    files.append((status.st_mtime, status.st_size, path))
                elif status.st_mtime < time.time() - _ABANDONED_AFTER_S:
                    path.unlink()  # half a download of a process that was killed
        excess = sum(length for _, length, _ in files) + num_bytes - self.max_bytes
        for _, length, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= length
