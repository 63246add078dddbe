"""One shard: a tar of samples in the WebDataset layout, written, and indexed by where each image lies.

A sample is `<key>.jpg` (or another of EXTENSIONS) and `<key>.json` side by side. The JSON of our own shards
holds the user's fields, the label under "label" and the exact key under "__key__": WebDataset cuts a name at
its first dot, so names in the tar have awkward characters percent-encoded and the key itself is kept apart.
Foreign shards may carry their label as `<key>.cls`, or under "label" in the JSON, or not at all.

Not covered: compressed tars (nothing in them can be read by range) and samples of several images.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import webdataset
import webdataset.tariterators

from namr.errors import ConfigError, ManifestError
from namr.store.tables import SampleTable, fields_text

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""of images in a tar; what `images.decode` reads"""
MAX_SHARD_NUMBER = (1 << 21) - 1
_BLOCK_BYTES = 512
_NOT_SAMPLES = re.compile(r"__[^/]*__($|/)|(.*/)?\._")
"""WebDataset's metadata, and what macOS leaves in tars"""

Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of the user's, before it has a place in a dataset."""

    key: str
    image: bytes
    extension: str
    label: str | None = None
    fields: Mapping[str, Scalar] = field(default_factory=dict)


class Member(NamedTuple):
    """A sample as it was found in a tar."""

    key: str
    label: str | None
    fields: dict[str, Scalar]
    image: bytes
    offset: int
    """of the image's first byte in the tar"""


def make_id(number: int, row: int) -> int:
    """The id of the sample in place `row` of shard `number`: `number << 32 | row`."""
    return number << 32 | row


def shard_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Shard numbers of ids."""
    return ids >> 32


def row_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows in their shards of ids."""
    return ids & 0xFFFFFFFF


def write_shard(path: Path, samples: Iterable[Sample], *, number: int) -> SampleTable:
    """Write samples as a tar and return its index; the same samples give the same bytes.

    Raises ConfigError for a key that is there twice and for an extension that is not in EXTENSIONS.
    """
    seen: set[str] = set()
    with (
        path.open("wb") as file,
        webdataset.TarWriter(
            file, compress=False, encoder=False, mtime=0, user="", group="", format="GNU_FORMAT"
        ) as tar,
    ):
        for sample in samples:
            if sample.key in seen:
                raise ConfigError(f"key {sample.key!r} is there twice in one shard; keys must be distinct")
            if sample.extension not in EXTENSIONS:
                raise ConfigError(
                    f"{sample.key}: extension {sample.extension!r}; expected one of {EXTENSIONS}"
                )
            seen.add(sample.key)
            described = {**sample.fields, "__key__": sample.key, "label": sample.label}
            tar.write(
                {
                    "__key__": _name_of(sample.key),
                    sample.extension: sample.image,
                    "json": fields_text(described).encode(),
                }
            )
    with path.open("rb") as written:
        return index_shard(written, number=number, uri=str(path))


def index_shard(stream: BinaryIO, *, number: int, uri: str) -> SampleTable:
    """The sample index of a tar, ours or a foreign one; rows are numbered in the order of the tar.

    `uri` is for messages. Raises ManifestError as `iterate` does, and for a key that is there twice.
    """
    return index_members(iterate(stream, uri=uri), number=number, uri=uri)


def index_members(members: Iterable[Member], *, number: int, uri: str) -> SampleTable:
    """The sample index of members of the tar `uri`, all or a selection."""
    if not 0 <= number <= MAX_SHARD_NUMBER:
        raise ConfigError(f"shard number {number}; expected 0 to {MAX_SHARD_NUMBER}")
    rows: dict[str, tuple[str | None, str, int, int]] = {}
    for member in members:
        if member.key in rows:
            raise ManifestError(f"{uri}: key {member.key!r} is there twice; expected distinct keys")
        text = fields_text(member.fields)
        rows[member.key] = (member.label, text, member.offset, len(member.image))
    return SampleTable(
        ids=np.arange(len(rows), dtype=np.int64) + make_id(number, 0),
        keys=list(rows),
        labels=[label for label, _, _, _ in rows.values()],
        fields=[text for _, text, _, _ in rows.values()],
        offsets=np.array([offset for _, _, offset, _ in rows.values()], np.int64),
        sizes=np.array([size for _, _, _, size in rows.values()], np.int64),
    )


def iterate(stream: BinaryIO, *, uri: str) -> Iterator[Member]:
    """The samples of a tar that have an image, in order; entries of other kinds are passed over.

    `uri` is for messages. Raises ManifestError where the tar is truncated (also where only its end marker
    is missing), compressed, or no tar, and where a sample has two images or damaged JSON.
    """
    for found in webdataset.tariterators.group_by_keys(_entries(stream, uri)):
        images = [suffix for suffix in EXTENSIONS if suffix in found]
        if len(images) > 1:
            raise ManifestError(f"{uri}: sample {found['__key__']!r} has {len(images)} images; expected one")
        if images:
            yield _member(found, found[images[0]], uri)


class _Bytes(NamedTuple):
    """The contents of one tar entry, and where they lie."""

    data: bytes
    offset: int


class _Tail:
    """A stream that remembers the last bytes read, to see whether a tar ends as a tar does."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.last, self.num_bytes = stream, b"", 0

    def read(self, num: int) -> bytes:
        data = self.stream.read(num)
        self.last = (self.last + data)[-2 * _BLOCK_BYTES :]
        self.num_bytes += len(data)
        return data


def _entries(stream: BinaryIO, uri: str) -> Iterator[dict[str, Any]]:
    """What WebDataset calls file samples, with the offset beside the bytes."""
    tail = _Tail(stream)
    names: set[str] = set()
    try:
        with tarfile.open(fileobj=cast(BinaryIO, tail), mode="r|") as tar:
            for entry in tar:
                tar.members = []  # type: ignore[attr-defined]  # else every header of the tar stays in memory
                if not entry.isreg() or _NOT_SAMPLES.match(entry.name):
                    continue
                if entry.name in names:
                    raise ManifestError(f"{uri}: {entry.name!r} is there twice; expected distinct names")
                names.add(entry.name)
                contents = tar.extractfile(entry)
                data = contents.read() if contents else b""
                yield {"fname": entry.name, "data": _Bytes(data, entry.offset_data), "__url__": uri}
        while tail.read(1 << 20):
            pass
    except tarfile.TarError as error:
        raise ManifestError(
            f"{uri} can't be read as a tar: {error} (after {tail.num_bytes} bytes); expected a whole, "
            "uncompressed tar: write or copy it again"
        ) from error
    if tail.last != bytes(2 * _BLOCK_BYTES):
        raise ManifestError(
            f"{uri} is truncated: it ends after {tail.num_bytes} bytes without a tar's end marker; "
            "write or copy it again"
        )


def _member(found: Mapping[str, Any], image: _Bytes, uri: str) -> Member:
    fields = _json(found, uri)
    key, label = fields.pop("__key__", found["__key__"]), fields.pop("label", None)
    if "cls" in found:
        label = found["cls"].data.decode(errors="replace").strip()
    scalars = {
        name: value for name, value in fields.items() if value is None or isinstance(value, str | int | float)
    }
    return Member(str(key), None if label is None else str(label), scalars, image.data, image.offset)


def _json(found: Mapping[str, Any], uri: str) -> dict[str, Any]:
    if "json" not in found:
        return {}
    try:
        fields = json.load(io.BytesIO(found["json"].data))
    except ValueError as error:
        raise ManifestError(f"{uri}: the JSON of sample {found['__key__']!r} is damaged: {error}") from error
    return fields if isinstance(fields, dict) else {}


def _name_of(key: str) -> str:
    """The key as a name in a tar that WebDataset reads back as one sample."""
    name = "".join(_encoded(c) if c in "%.\\" or not c.isprintable() else c for c in key)
    return _encoded(name[0]) + name[1:] if name[:1] in ("/", "_") else name


def _encoded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())
