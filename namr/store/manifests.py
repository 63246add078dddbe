"""Immutable objects, small JSON manifests written last, and the one thing that changes: a pointer.

A manifest class is a frozen, keyword-only dataclass with two class variables, FORMAT and FORMAT_VERSION. Its
JSON carries both, and readers refuse what they don't know; a third, EARLIER, says how to read versions from
before. A pointer (`current.json`) names its target and
carries its writer's token, so that a writer whose answer was lost recognises its own swap; it may be pinned,
with a reason, by those who want it to stay.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

import pydantic

from namr.errors import Conflict, ManifestError, ObjectMissing
from namr.store import storage


class Manifest(Protocol):
    """What a manifest class has beside its fields."""

    FORMAT: ClassVar[str]
    FORMAT_VERSION: ClassVar[int]


M = TypeVar("M", bound=Manifest)
Id = Annotated[int, pydantic.Field(ge=0, lt=1 << 53)]
"""A sample's id as a manifest lists it: below 2^53, so that it is exact in everybody's JSON."""


Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
"""From the fields of an earlier version to those of the next."""


def _always(_: object) -> bool:
    return True


@dataclass(frozen=True)
class StoredObject:
    """One immutable object, by its name relative to the root that the manifest speaks of."""

    name: str
    size_bytes: int
    sha256: str


class Pin(NamedTuple):
    """Why a pointer is to stay where it is until somebody lifts the pin."""

    since: str
    """ISO 8601, UTC"""
    reason: str


class Pointer(NamedTuple):
    """What a pointer said when it was read."""

    target: str
    token: str
    etag: str
    pin: Pin | None = None


def write_object(
    root_uri: str, name: str, data: bytes | Path, *, sha256: str | None = None, is_done_with: bool = False
) -> StoredObject:
    """Write an object under a name of its own, once.

    The same bytes under the same name are a repeated attempt and fine; other bytes are a ManifestError,
    and what was there stays. sha256: of the data, where it is known. is_done_with: nobody writes to the file
    again, so that it need not be copied.
    """
    described = describe_object(name, data, sha256=sha256)
    uri = storage.join(root_uri, name)
    if isinstance(data, bytes):
        written = storage.write_if_absent(uri, data)
    else:
        written = (storage.move_if_absent if is_done_with else storage.upload_if_absent)(data, uri)
    if not written and storage.sha256_of(uri) != described.sha256:
        raise ManifestError(f"{uri} exists with other contents; nothing was overwritten, choose another name")
    return described


def describe_object(name: str, data: bytes | Path, *, sha256: str | None = None) -> StoredObject:
    """Size and digest of an object that may not be written yet."""
    if isinstance(data, bytes):
        return StoredObject(name, len(data), sha256 or storage.sha256(data))
    return StoredObject(name, data.stat().st_size, sha256 or storage.sha256_of_file(data))


def read_object(root_uri: str, stored: StoredObject) -> bytes:
    """The bytes of an object; ManifestError if size or digest differ, ObjectMissing if it is gone."""
    uri = storage.join(root_uri, stored.name)
    data = storage.read(uri)
    if len(data) != stored.size_bytes or storage.sha256(data) != stored.sha256:
        raise ManifestError(
            f"{uri} is damaged: {len(data)} bytes with SHA-256 {storage.sha256(data)}, its manifest says "
            f"{stored.size_bytes} bytes with {stored.sha256}; restore it or make it anew"
        )
    return data


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Write a manifest, exclusively and after everything that it lists; the same one again is fine."""
    data = encode_manifest(manifest)
    if not storage.write_if_absent(uri, data) and storage.read(uri) != data:
        raise ManifestError(f"{uri} exists and says something else; nothing was overwritten")


def encode_manifest(manifest: Manifest) -> bytes:
    """The JSON text of a manifest, the same bytes for the same contents."""
    body = _adapter(type(manifest)).dump_python(manifest, mode="json")
    head = {"format": manifest.FORMAT, "format_version": manifest.FORMAT_VERSION}
    text = json.dumps(head | body, indent=1, ensure_ascii=False)
    if _is_unicode(text):
        return text.encode()
    raise ManifestError(
        f"a {manifest.FORMAT} manifest can't be written: half a character (a lone surrogate) is in "
        f"{_around_surrogate(text)}; expected Unicode, rename it"
    )


def read_manifest(uri: str, kind: type[M]) -> M:
    """The manifest at a URI; ManifestError if missing, damaged, of another format or from the future."""
    try:
        data = storage.read(uri)
    except ObjectMissing as error:
        raise ManifestError(f"{uri} is missing, so there is no {kind.FORMAT} here; check the URI") from error
    return decode_manifest(data, kind, uri)


def decode_manifest(data: bytes, kind: type[M], uri: str) -> M:
    """`read_manifest` of bytes that were read already; `uri` is for the messages."""
    body = _parse(data, uri)
    if body.pop("format", None) != kind.FORMAT:
        raise ManifestError(f"{uri} is not a {kind.FORMAT} manifest; check the URI")
    version = body.pop("format_version", None)
    earlier: Mapping[int, Upgrade] = getattr(kind, "EARLIER", {})
    if version != kind.FORMAT_VERSION and version not in earlier:
        reads = ", ".join(map(str, [*earlier, kind.FORMAT_VERSION]))
        raise ManifestError(
            f"{uri} has format version {version}, and this namr reads {reads} of "
            f"{kind.FORMAT}; use the namr that wrote it, or a newer one"
        )
    try:
        if version in earlier:
            body = earlier[version](body)
        read: M = _adapter(kind).validate_python(body)
        return read
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ManifestError(
            f"{uri} is damaged: {place}: {first['msg']}; restore it or make it anew"
        ) from error


def read_to_change(uri: str, kind: type[M]) -> tuple[M | None, str | None]:
    """What `read_manifest` reads, and its tag for a conditional put; (None, None) where nothing is yet."""
    try:
        data, etag = storage.read_with_etag(uri)
    except ObjectMissing:
        return None, None
    return decode_manifest(data, kind, uri), etag


def recorded(uri: str, kind: type[M], make: Callable[[], M], *, holds: Callable[[M], bool] = _always) -> M:
    """The record at `uri`, or, where there is none that still holds, what `make` does and returns, recorded.

    The record is written last, so work that was killed is done again. Of two attempts at once the first
    record counts; one that no longer holds (what it speaks of is gone) is replaced.
    """
    earlier = read_manifest(uri, kind) if storage.exists(uri) else None
    if earlier is not None and holds(earlier):
        return earlier
    made = make()
    if earlier is not None:
        storage.write(uri, encode_manifest(made))
        return made
    if storage.write_if_absent(uri, encode_manifest(made)):
        return made
    first = read_manifest(uri, kind)
    return first if holds(first) else made


def read_pointer(uri: str) -> Pointer | None:
    """Where a pointer points, or None where there is none yet."""
    try:
        data, etag = storage.read_with_etag(uri)
    except ObjectMissing:
        return None
    try:
        said: _PointerBody = _adapter(_PointerBody).validate_python(_parse(data, uri))
    except pydantic.ValidationError as error:
        raise ManifestError(f"{uri} is damaged: expected a target and a token; point it anew") from error
    return Pointer(said.target, said.token, etag, said.pin)


def swap_pointer(
    uri: str, target: str, *, expected: Pointer | None, token: str, pin: Pin | None = None
) -> None:
    """Point to `target`, if the pointer is still what it was when `expected` was read; else Conflict.

    `token` is the writer's own, new for each swap. If the swap happened but its answer was lost, the
    repeated attempt finds the token and is content. A pin is kept beside the target; none lifts it.
    """
    if not _is_unicode(target):
        raise ManifestError(f"{uri} can't point to {target!a}: half a character (a lone surrogate) is in it")
    body = {"target": target, "token": token} | ({"pin": pin._asdict()} if pin else {})
    try:
        storage.replace_if_match(uri, json.dumps(body).encode(), etag=expected.etag if expected else None)
    except Conflict:
        standing = read_pointer(uri)
        if standing is None or standing.token != token:
            raise


@dataclass(frozen=True, kw_only=True)
class _PointerBody:
    """The JSON of a pointer."""

    target: str
    token: str
    pin: Pin | None = None


@functools.cache
def _adapter(kind: type) -> pydantic.TypeAdapter[Any]:
    """Making one takes longer than reading a manifest with it."""
    return pydantic.TypeAdapter(kind)


def _parse(data: bytes, uri: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError as error:
        raise ManifestError(f"{uri} is damaged: no JSON ({error}); restore it or make it anew") from error
    except RecursionError:
        raise ManifestError(f"{uri} is damaged: its JSON is nested too deep; restore it") from None
    if b"\\ud" in data.lower() and not _is_unicode(json.dumps(body, ensure_ascii=False)):
        raise ManifestError(f"{uri} is damaged: half a character (a lone surrogate) is in it; restore it")
    if not isinstance(body, dict):
        raise ManifestError(f"{uri} is damaged: expected a JSON object")
    return body


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _around_surrogate(text: str) -> str:
    at = next(place for place, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    return ascii(text[max(0, at - 20) : at + 20])
