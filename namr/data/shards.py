"""One shard: a tar of samples in the WebDataset layout, written, and indexed by where each image lies.

A sample is `<key>.jpg` (or another of EXTENSIONS) and `<key>.json` side by side. The JSON of our own shards
holds the user's fields, the label under "label" and the exact key under "__key__": WebDataset cuts a name at
its first dot, so names in the tar have awkward characters percent-encoded and the key itself is kept apart.
Foreign shards may carry their label as `<key>.cls`, or under "label" in the JSON, or not at all.

Not covered: compressed tars (nothing in them can be read by range) and samples of several images.
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import webdataset
import webdataset.tariterators

from namr.data.leftovers import PassedOver, RefusedImage, Tally, is_text, printable
from namr.errors import ConfigError, ManifestError
from namr.store.tables import SampleTable, fields_text

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""of images in a tar; what `images.decode` reads"""
MAX_SHARD_NUMBER = (1 << 21) - 1
_DESCRIPTIONS = ("json", "cls")
_BLOCK_BYTES = 512
_READ_BYTES = 1 << 20
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


class TarIndex(NamedTuple):
    """What was found in a tar."""

    table: SampleTable
    refused: tuple[RefusedImage, ...]
    passed_over: tuple[PassedOver, ...]


def make_id(number: int, row: int) -> int:
    """The id of the sample in place `row` of shard `number`: `number << 32 | row`."""
    return number << 32 | row


def shard_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Shard numbers of ids."""
    return ids >> 32


def among(ids: npt.NDArray[np.int64], ascending: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of some ids, of any shape, are in an ascending list."""
    if not len(ascending):
        return np.zeros(ids.shape, np.bool_)
    at = np.searchsorted(ascending, ids).clip(max=len(ascending) - 1)
    return np.asarray(ascending[at] == ids)


def row_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows in their shards of ids."""
    return ids & 0xFFFFFFFF


def write_shard(path: Path, samples: Iterable[Sample], *, number: int) -> SampleTable:
    """Write samples as a tar and return its index; the same samples give the same bytes.

    Raises ConfigError for a key that is empty or there twice, for an extension that is not in EXTENSIONS,
    and for text that is no Unicode.
    """
    seen: set[str] = set()
    with (
        path.open("wb") as file,
        webdataset.TarWriter(
            file, compress=False, encoder=False, mtime=0, user="", group="", format="GNU_FORMAT"
        ) as tar,
    ):
        for sample in samples:
            if not sample.key:
                raise ConfigError("a sample's key is empty; expected one that says who the image is")
            if sample.key in seen:
                raise ConfigError(f"key {sample.key!r} is there twice in one shard; keys must be distinct")
            if sample.extension not in EXTENSIONS:
                raise ConfigError(
                    f"{sample.key}: extension {sample.extension!r}; expected one of {EXTENSIONS}"
                )
            seen.add(sample.key)
            try:
                described = fields_text({**sample.fields, "__key__": sample.key, "label": sample.label})
            except ManifestError as error:
                raise ConfigError(f"{sample.key!r}: {error}") from error
            tar.write(
                {
                    "__key__": _name_of(sample.key),
                    sample.extension: sample.image,
                    "json": described.encode(),
                }
            )
    with path.open("rb") as written:
        return index_shard(written, number=number, uri=str(path)).table


def _no_objection(image: bytes) -> str | None:  # noqa: ARG001  it is one of many objections
    return None


def index_shard(
    stream: BinaryIO,
    *,
    number: int,
    uri: str,
    objection: Callable[[bytes], str | None] = _no_objection,
) -> TarIndex:
    """The sample index of a tar, ours or a foreign one; rows are numbered in the order of its images.

    What belongs to a sample may lie anywhere in the tar. objection: why an image is refused, or None.
    `uri` is for messages. Raises ManifestError where the tar is truncated (also where only its end marker is
    missing), compressed, no tar, or goes on after its end marker, where a sample has two images or damaged
    JSON, and for a key that is there twice.
    """
    if not 0 <= number <= MAX_SHARD_NUMBER:
        raise ConfigError(f"shard number {number}; expected 0 to {MAX_SHARD_NUMBER}")
    images: dict[str, _Image] = {}
    texts: dict[tuple[str, str], bytes] = {}
    passed_over = Tally()
    for entry in _entries(stream, uri, passed_over):
        if entry.suffix in _DESCRIPTIONS:
            if (entry.name, entry.suffix) in texts:
                raise ManifestError(f"{uri}: sample {entry.name!r} has two .{entry.suffix}; expected one")
            if entry.data is None:
                raise ManifestError(f"{uri}: the .{entry.suffix} of {entry.name!r} is sparse; write it whole")
            texts[entry.name, entry.suffix] = entry.data
        elif entry.name in images:
            raise ManifestError(f"{uri}: sample {entry.name!r} has 2 images; expected one")
        elif entry.data is None:
            images[entry.name] = _Image(entry.offset, 0, "sparse: its bytes don't lie together in the tar")
        else:
            images[entry.name] = _Image(entry.offset, len(entry.data), objection(entry.data))
    for name, suffix in texts:
        if name not in images:
            passed_over.add(f".{suffix} without an image", f"{name}.{suffix}")
    return _joined(images, texts, passed_over, number=number, uri=uri)


def _joined(
    images: Mapping[str, "_Image"],
    texts: Mapping[tuple[str, str], bytes],
    passed_over: Tally,
    *,
    number: int,
    uri: str,
) -> TarIndex:
    """Images and what is said of them, as rows."""
    rows: dict[str, tuple[str | None, str, int, int]] = {}
    refused: list[RefusedImage] = []
    for name, image in images.items():
        key, label, scalars = _described(name, texts, uri)
        reason = image.objection
        if not all(is_text(text) for text in (key, label or "", *scalars, *map(str, scalars.values()))):
            reason = "its name, label or fields are no Unicode text"
        if reason:
            refused.append(RefusedImage(key=printable(key), location=uri, reason=reason))
            continue
        if key in rows:
            raise ManifestError(f"{uri}: key {key!r} is there twice; expected distinct keys")
        rows[key] = (label, fields_text(scalars), image.offset, image.num_bytes)
    table = SampleTable(
        ids=np.arange(len(rows), dtype=np.int64) + make_id(number, 0),
        keys=list(rows),
        labels=[label for label, _, _, _ in rows.values()],
        fields=[text for _, text, _, _ in rows.values()],
        offsets=np.array([offset for _, _, offset, _ in rows.values()], np.int64),
        sizes=np.array([size for _, _, _, size in rows.values()], np.int64),
    )
    return TarIndex(table, tuple(refused), passed_over.total())


class _Image(NamedTuple):
    """Where an image lies in the tar, and why it is refused, if it is."""

    offset: int
    num_bytes: int
    objection: str | None


class _Entry(NamedTuple):
    """An entry of a tar that is an image or says something about one."""

    name: str
    """that its sample has in common"""
    suffix: str
    """lower case"""
    data: bytes | None
    """None where it is sparse"""
    offset: int


class _Counted:
    """A stream that counts its bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.num_bytes = stream, 0

    def read(self, num: int) -> bytes:
        data = self._stream.read(num)
        self.num_bytes += len(data)
        return data


def _entries(stream: BinaryIO, uri: str, passed_over: Tally) -> Iterator[_Entry]:
    """Images, JSON and classes, named as WebDataset names them; the rest is counted."""
    counted = _Counted(stream)
    names: set[str] = set()
    try:
        with tarfile.open(fileobj=cast(BinaryIO, counted), mode="r|") as tar:
            for entry in tar:
                tar.members = []  # type: ignore[attr-defined]  # else every header of the tar stays in memory
                if entry.isdir():
                    continue
                name, suffix = webdataset.tariterators.base_plus_ext(entry.name)
                suffix = (suffix or "").lower()
                kind = _kind_of_no_sample(entry, suffix)
                if kind:
                    passed_over.add(kind, entry.name)
                    continue
                if entry.name in names:
                    raise ManifestError(f"{uri}: {entry.name!r} is there twice; expected distinct names")
                names.add(entry.name)
                contents = None if entry.issparse() else tar.extractfile(entry)
                yield _Entry(name, suffix, contents.read() if contents else None, entry.offset_data)
            _check_end(tar, counted, uri)
    except tarfile.TarError as error:
        raise ManifestError(
            f"{uri} can't be read as a tar: {error} (after {counted.num_bytes} bytes); expected a whole, "
            "uncompressed tar: write or copy it again"
        ) from error


def _kind_of_no_sample(entry: tarfile.TarInfo, suffix: str) -> str | None:
    """What an entry is that neither is an image nor says something about one."""
    if not entry.isreg():
        return "link" if entry.issym() or entry.islnk() else "fifo" if entry.isfifo() else "device"
    if _NOT_SAMPLES.match(entry.name):
        return "metadata"
    if suffix not in EXTENSIONS and suffix not in _DESCRIPTIONS:
        if PurePosixPath(entry.name).name.startswith("."):
            return "hidden"
        return f".{suffix}" if suffix else "no suffix"
    return None


def _check_end(tar: tarfile.TarFile, counted: _Counted, uri: str) -> None:
    """After the last member there are two blocks of zeros or more, and nothing else."""
    rest, position = cast(BinaryIO, tar.fileobj), tar.offset + _BLOCK_BYTES
    while block := rest.read(_READ_BYTES):
        zeros = len(block) - len(block.lstrip(b"\0"))
        if zeros < len(block):
            raise ManifestError(
                f"{uri} goes on at byte {position + zeros}, after a tar's end marker: two tars one after the "
                "other? Keep them as two files, or write all as one tar"
            )
        position += len(block)
    if counted.num_bytes < tar.offset + 2 * _BLOCK_BYTES:
        raise ManifestError(
            f"{uri} is truncated: it ends after {counted.num_bytes} bytes without a tar's end marker; "
            "write or copy it again"
        )


def _described(
    name: str, texts: Mapping[tuple[str, str], bytes], uri: str
) -> tuple[str, str | None, dict[str, Scalar]]:
    """Key, label and fields of the sample `name`."""
    fields = _json(name, texts.get((name, "json")), uri)
    key, label = fields.pop("__key__", None) or name, fields.pop("label", None)
    if (name, "cls") in texts:
        label = texts[name, "cls"].decode(errors="surrogateescape").strip()
    scalars = {
        field: value
        for field, value in fields.items()
        if value is None or isinstance(value, str | int | float)
    }
    return str(key), None if label is None else str(label), scalars


def _json(name: str, text: bytes | None, uri: str) -> dict[str, Any]:
    try:
        fields = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{uri}: the JSON of sample {name!r} is damaged: {error}") from error
    return fields if isinstance(fields, dict) else {}


def _name_of(key: str) -> str:
    """The key as a name in a tar that WebDataset reads back as one sample."""
    name = "".join(_encoded(c) if c in "%.\\" or not c.isprintable() else c for c in key)
    return _encoded(name[0]) + name[1:] if name[:1] in ("/", "_") else name


def _encoded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())
