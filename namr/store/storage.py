"""Objects behind URIs: `s3://bucket/key` and local paths, with the two conditional writes that namr needs.

Everything stored is either immutable under a name that nobody else uses (`write`, `upload`,
`write_if_absent`), or one of the few pointers, which are swapped by `replace_if_match`. `folders` and
`buckets` do the work; here their failures become errors that name the URI.

Not covered: other object stores (their conditional writes differ), deleting whole trees.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from namr import secrets
from namr.errors import ConfigError, Conflict, ObjectMissing, StorageError
from namr.store import buckets, scratch
from namr.store.buckets import Buckets
from namr.store.folders import Folders


class Range(NamedTuple):
    """Bytes start (included) to stop (excluded) of one object."""

    uri: str
    start: int
    stop: int


class Entry(NamedTuple):
    """One object as a store lists it."""

    name: str
    """relative to what was listed"""
    size_bytes: int
    modified: float
    """when it was written, in seconds since 1970 by the store's own clock; compare it with `now` alone"""


class _Backend(Protocol):
    """What the two kinds of store can do; every method takes a URI of its own kind."""

    def read(self, uri: str) -> bytes: ...
    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]: ...
    def open_stream(self, uri: str) -> BinaryIO: ...
    def write(self, uri: str, data: bytes) -> None: ...
    def write_if_absent(self, uri: str, data: bytes) -> bool: ...
    def upload(self, path: Path, uri: str) -> None: ...
    def upload_if_absent(self, path: Path, uri: str) -> bool: ...
    def move_if_absent(self, path: Path, uri: str) -> bool: ...
    def download(self, uri: str, path: Path) -> None: ...
    def read_with_state(self, uri: str) -> tuple[bytes, str]: ...
    def state(self, uri: str) -> str: ...
    def read_with_etag(self, uri: str) -> tuple[bytes, str]: ...
    def replace_if_match(self, uri: str, data: bytes, etag: str | None) -> bool: ...
    def size(self, uri: str) -> int: ...
    def list_entries(self, uri: str) -> list[tuple[str, int, float]]: ...
    def now(self, uri: str) -> float: ...
    def clear_leftovers(self, uri: str, before: float) -> int: ...
    def delete(self, uri: str) -> None: ...


def join(base: str, *names: str) -> str:
    """`base/name/name`, for both kinds of URI."""
    return "/".join([base.rstrip("/") if len(base) > 1 else base, *(name.strip("/") for name in names)])


def is_local(uri: str) -> bool:
    """True for a path of this machine; ConfigError for a scheme that namr doesn't know, or credentials."""
    if "://" not in uri:
        return True
    shown = secrets.without_secrets(uri)
    if not uri.startswith(buckets.PREFIX):
        raise ConfigError(f"{shown!r}: unknown kind of URI; expected s3://bucket/key or a local path")
    bucket = uri.removeprefix(buckets.PREFIX).partition("/")[0]
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise ConfigError(
            "an s3 URI has credentials in it; expected s3://bucket/key, with AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment"
        )
    return False


def local_path(uri: str) -> Path:
    """The path of a local URI; ConfigError for a remote one."""
    if not is_local(uri):
        raise ConfigError(f"{uri} is not on this machine; expected a local path here")
    return Path(uri)


def absolute(uri: str) -> str:
    """The URI in a form that means the same in every process: local paths made absolute."""
    return str(Path(uri).expanduser().resolve()) if is_local(uri) else uri.rstrip("/")


def read(uri: str) -> bytes:
    """A whole object."""
    with _explained("read", uri):
        return _backend(uri).read(uri)


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """Many byte ranges, concurrently on S3; a range past the end of its object is a StorageError."""
    wanted = [asked for asked in ranges if asked.stop > asked.start]
    if not wanted:
        return [b""] * len(ranges)
    with _explained("read ranges of", wanted[0].uri):
        parts = _backend(wanted[0].uri).read_ranges(wanted)
    for asked, data in zip(wanted, parts, strict=True):
        if len(data) != asked.stop - asked.start:
            raise StorageError(
                f"{asked.uri}: wanted bytes {asked.start} to {asked.stop}, got {len(data)} of "
                f"{asked.stop - asked.start}; the object is shorter than its index says"
            )
    remaining = iter(parts)
    return [next(remaining) if asked.stop > asked.start else b"" for asked in ranges]


def open_stream(uri: str) -> BinaryIO:
    """A seekable file object for reading from front to back."""
    with _explained("open", uri):
        return _backend(uri).open_stream(uri)


def write(uri: str, data: bytes) -> None:
    """Write a whole object; readers see all of it or nothing."""
    with _explained("write", uri):
        _backend(uri).write(uri, data)


def write_if_absent(uri: str, data: bytes) -> bool:
    """Write a whole object unless one is there; False = one was there, and nothing changed."""
    with _explained("write", uri):
        return _backend(uri).write_if_absent(uri, data)


def upload(path: Path, uri: str) -> None:
    """`write` of a file, in parts where it is large."""
    with _explained("write", uri):
        _backend(uri).upload(path, uri)


def upload_if_absent(path: Path, uri: str) -> bool:
    """`write_if_absent` of a file."""
    with _explained("write", uri):
        return _backend(uri).upload_if_absent(path, uri)


def move_if_absent(path: Path, uri: str) -> bool:
    """`upload_if_absent` of a file that nobody writes to again: where it can be, it is linked, not copied."""
    with _explained("write", uri):
        return _backend(uri).move_if_absent(path, uri)


def download(uri: str, path: Path) -> None:
    """Copy an object to a local file, which appears whole or not at all."""
    with _explained("copy", uri, f" to {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.beside(path) as temporary:
            _backend(uri).download(uri, temporary)
            temporary.replace(path)


def read_with_etag(uri: str) -> tuple[bytes, str]:
    """A whole object and the tag that `replace_if_match` compares."""
    with _explained("read", uri):
        return _backend(uri).read_with_etag(uri)


def read_with_state(uri: str) -> tuple[bytes, str]:
    """A whole object and its `state` as it was read, or just before."""
    with _explained("read", uri):
        return _backend(uri).read_with_state(uri)


def state(uri: str) -> str:
    """What is another when the object was replaced or written to: known without reading it."""
    with _explained("look at", uri):
        return _backend(uri).state(uri)


def replace_if_match(uri: str, data: bytes, *, etag: str | None) -> None:
    """Replace the object whose tag is `etag` (None: there must be none yet), else raise Conflict.

    A put whose answer was lost may be repeated underneath and then report a Conflict of the writer with
    itself: callers that must know put a token of their own into `data` and read it back.
    """
    with _explained("replace", uri):
        swapped = _backend(uri).replace_if_match(uri, data, etag)
    if not swapped:
        shown = secrets.without_secrets(uri)
        raise Conflict(f"{shown} was changed by somebody else since it was read; read it and decide again")


def exists(uri: str) -> bool:
    """Whether an object (not a folder) lies there."""
    try:
        size(uri)
    except ObjectMissing:
        return False
    return True


def size(uri: str) -> int:
    """Bytes of an object."""
    with _explained("look at", uri):
        return _backend(uri).size(uri)


def list_names(uri: str) -> list[str]:
    """Names of all objects below `uri`, relative to it, sorted; empty if there are none."""
    return [entry.name for entry in list_entries(uri)]


def list_entries(uri: str) -> list[Entry]:
    """`list_names`, with size and age."""
    with _explained("list", uri):
        return sorted(Entry(*each) for each in _backend(uri).list_entries(uri))


def now(uri: str) -> float:
    """The time by the clock that gives `Entry.modified`: the store's, whatever this machine's says."""
    with _explained("ask the time of", uri):
        return _backend(uri).now(uri)


def clear_leftovers(uri: str, *, before: float) -> int:
    """Remove what killed writers left below `uri` and no listing shows; how much there was.

    In a folder, temporary files that nobody holds, and empty folders that are older than `before` (of `now`);
    in a bucket, uploads in parts that began before it and never ended.
    """
    with _explained("clear", uri):
        return _backend(uri).clear_leftovers(uri, before)


def delete(uri: str) -> None:
    """Delete one object; nothing happens if it is not there."""
    with _explained("delete", uri):
        _backend(uri).delete(uri)


def check_writable(uri: str) -> None:
    """Raise StorageError, saying what to do, unless objects can be written below `uri`.

    Every job asks this first of each place it writes to. In a folder, it removes what killed writers left.
    """
    try:
        with _explained("write", uri):
            if is_local(uri):
                _check_folder(Path(uri))
            else:
                _s3.check_bucket(uri)
        if not is_local(uri):
            probe = join(uri, ".namr-probe")  # one name, so that a killed job leaves nothing for good
            write(probe, b"")
            delete(probe)
    except StorageError as error:
        remedy = (
            "check that you may write to this folder"
            if is_local(uri)
            else "create the bucket, and check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        )
        text = secrets.without_secrets(f"{uri} is not writable: {error}; {remedy}")
        raise StorageError(text) from error


def _check_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scratch.sweep(folder, below=True)
    with scratch.beside(folder / "probe"):
        pass


def sha256(data: bytes) -> str:
    """Digest, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(uri: str) -> str:
    """Digest of an object, in hexadecimal, read as a stream."""
    digest = hashlib.sha256()
    with _explained("read", uri), open_stream(uri) as stream:
        while block := stream.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """An Arrow file system and the path in it, for libraries that write for themselves (Ray Train)."""
    from pyarrow import fs  # a quarter second that most users of this module don't need

    if is_local(uri):
        return fs.LocalFileSystem(), absolute(uri)
    return fs.PyFileSystem(fs.FSSpecHandler(_s3.filesystem())), absolute(uri).removeprefix(buckets.PREFIX)


_local, _s3 = Folders(), Buckets()


def _backend(uri: str) -> _Backend:
    return _local if is_local(uri) else _s3


@contextmanager
def _explained(verb: str, uri: str, more: str = "") -> Iterator[None]:
    """Failures of the libraries become ObjectMissing or StorageError that name the URI and no secret."""
    try:
        yield
    except Exception as error:
        kind, reason = _understood(error)
        if kind is None:
            raise
        text = secrets.without_secrets(f"cannot {verb} {uri}{more}: {reason}")
        raise kind(text) from secrets.cause_of(error)


def _understood(error: Exception) -> tuple[type[StorageError] | None, str]:
    """What a failure of a library is called here, and the reason; None for all others."""
    if isinstance(error, FileNotFoundError):
        if buckets.error_code(error) == "NoSuchBucket":
            return StorageError, "there is no such bucket; create it first"
        return ObjectMissing, "nothing is there"
    if isinstance(error, OSError):
        return StorageError, error.strerror or str(error) or type(error).__name__
    if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
        return StorageError, str(error)
    return None, ""
