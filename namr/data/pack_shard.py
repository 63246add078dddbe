"""One shard of a packing run: the plan of it, the work, and the receipt that says it is done.

The work is a pure function of the plan and the images, and everything it writes lies under a name that its
own digest makes unique; the receipt, named by the plan, is written last. So any attempt at a plan may be
killed, repeated, or run twice at once.

Not covered: which plans there are, and running them in parallel (`packing`).
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ClassVar, cast

from namr.data import images, shards
from namr.data.datasets import ShardEntry
from namr.data.shards import Member, Sample
from namr.data.sources import SourceImage
from namr.errors import ImageRefused, ObjectMissing
from namr.store import manifests, read_ahead, storage, tables
from namr.store.manifests import StoredObject
from namr.store.tables import SampleTable

_NUM_READERS = 16


@dataclass(frozen=True, kw_only=True)
class RefusedImage:
    """An image that was not packed, and why."""

    key: str
    location: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What the task of one shard made, written last."""

    FORMAT: ClassVar[str] = "namr-shard-receipt"
    FORMAT_VERSION: ClassVar[int] = 1

    entry: ShardEntry | None
    """None where all its images were refused"""
    refused: tuple[RefusedImage, ...]


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The work of one task: images for a new shard, or a foreign tar to be indexed where it is."""

    dataset_uri: str
    number: int
    images: list[SourceImage] = field(default_factory=list)
    foreign: StoredObject | None = None
    """its URI and size; the digest is not known yet"""

    @property
    def receipt_uri(self) -> str:
        """Named by all that decides what the task makes."""
        plan = [self.number, self.foreign and (self.foreign.name, self.foreign.size_bytes)]
        listed = [
            (image.key, image.label, dict(image.fields), image.location, image.num_bytes)
            for image in self.images
        ]
        digest = storage.sha256(json.dumps([plan, listed], default=str).encode())
        return storage.join(self.dataset_uri, "packing", f"{digest}.json")


def run_plan(plan: ShardPlan) -> Receipt:
    """Make one shard and its receipt, unless an earlier attempt has.

    Where that attempt refused images they are looked at again: they may have been repaired.
    """
    return manifests.recorded(
        plan.receipt_uri, Receipt, lambda: _made(plan), holds=lambda receipt: not receipt.refused
    )


def _made(plan: ShardPlan) -> Receipt:
    refused: list[RefusedImage] = []
    if plan.foreign:
        tar, table = _index_foreign(plan.number, plan.foreign.name, refused)
    else:
        tar, table = _write_own(plan, refused)
    entry = None
    if tar and len(table):
        index = _write_named(plan, tables.encode_samples(table), "parquet")
        entry = ShardEntry(number=plan.number, tar=tar, index=index, num_samples=len(table))
    return Receipt(entry=entry, refused=tuple(refused))


def _write_own(plan: ShardPlan, refused: list[RefusedImage]) -> tuple[StoredObject, SampleTable]:
    with tempfile.TemporaryDirectory(prefix="namr-packing-") as folder:
        path = Path(folder) / "shard.tar"
        table = shards.write_shard(path, _accepted(plan.images, refused), number=plan.number)
        return _write_named(plan, path, "tar"), table


def _write_named(plan: ShardPlan, data: bytes | Path, suffix: str) -> StoredObject:
    """Under a name that its own digest makes unique, so that no attempt is ever in another's way."""
    digest = manifests.describe_object("", data).sha256
    return manifests.write_object(
        plan.dataset_uri, f"shards/shard-{plan.number:06d}-{digest[:12]}.{suffix}", data
    )


def _accepted(offered: Sequence[SourceImage], refused: list[RefusedImage]) -> Iterator[Sample]:
    """The images that decode, read some ahead; the others go to `refused`."""
    contents = read_ahead.in_order(_bytes_or_none, offered, num_threads=_NUM_READERS)
    for image, data in zip(offered, contents, strict=True):
        try:
            yield _sample(image, data)
        except ImageRefused as refusal:
            refused.append(RefusedImage(key=image.key, location=image.location, reason=refusal.reason))


def _bytes_or_none(image: SourceImage) -> bytes | None:
    if image.data is not None:
        return image.data
    try:
        return storage.read(image.location)
    except ObjectMissing:
        return None


def _sample(image: SourceImage, data: bytes | None) -> Sample:
    """The image as a shard holds it; ImageRefused for bytes that can't be packed."""
    if data is None:
        raise ImageRefused("nothing is there")
    images.decode(data)
    format = images.format_of(data)
    if format is None:
        raise ImageRefused("a format that shards don't hold")
    return Sample(
        key=image.key, image=data, extension=format.extension, label=image.label, fields=image.fields
    )


def _index_foreign(number: int, uri: str, refused: list[RefusedImage]) -> tuple[StoredObject, SampleTable]:
    with storage.open_stream(uri) as stream:
        hashing = _Hashing(stream)
        members = _accepted_members(shards.iterate(cast(BinaryIO, hashing), uri=uri), uri, refused)
        table = shards.index_members(members, number=number, uri=uri)
    return StoredObject(uri, hashing.num_bytes, hashing.digest.hexdigest()), table


def _accepted_members(members: Iterator[Member], uri: str, refused: list[RefusedImage]) -> Iterator[Member]:
    for member in members:
        try:
            images.decode(member.image)
        except ImageRefused as refusal:
            refused.append(RefusedImage(key=member.key, location=uri, reason=refusal.reason))
        else:
            yield member


class _Hashing:
    """A stream that counts and digests what is read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.num_bytes = stream, hashlib.sha256(), 0

    def read(self, num: int) -> bytes:
        data = self.stream.read(num)
        self.digest.update(data)
        self.num_bytes += len(data)
        return data
