"""One shard of a packing run: the plan of it, the work, and the receipt that says it is done.

The work is a pure function of the plan and the images, and everything it writes lies under a name that its
own digest makes unique; the receipt, named by the plan, is written last. So any attempt at a plan may be
killed, repeated, or run twice at once.

Not covered: which plans there are, and running them in parallel (`packing`).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple, cast

from namr.data import images, shards
from namr.data.datasets import ShardEntry
from namr.data.leftovers import PassedOver, RefusedImage
from namr.data.offered import SourceImage
from namr.data.shards import Sample, TarIndex
from namr.errors import ImageRefused, ObjectMissing
from namr.store import manifests, read_ahead, scratch, storage, tables
from namr.store.manifests import StoredObject
from namr.store.tables import SampleTable

_NUM_READERS = 16
_STORED_NAME = re.compile(r"shards/shard-(\d{6,})-")
_GONE = "gone"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What the task of one shard made, written last."""

    FORMAT: ClassVar[str] = "namr-shard-receipt"
    FORMAT_VERSION: ClassVar[int] = 1

    entry: ShardEntry | None
    """None where all its images were refused"""
    refused: tuple[RefusedImage, ...]
    passed_over: tuple[PassedOver, ...] = ()
    """entries of a foreign tar that are no samples"""
    sources: str = ""
    """digest of the states (`storage.state`) of all that was read, as it was read"""

    @property
    def num_images(self) -> int:
        """Packed or refused."""
        return len(self.refused) + (self.entry.num_samples if self.entry else 0)


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

    Where that attempt refused images they are looked at again: they may have been repaired. Where anything
    that it read was replaced since (other state, same name), the shard is made anew.
    """

    def holds(receipt: Receipt) -> bool:
        return not receipt.refused and receipt.sources == _digest_of(_states(plan))

    return manifests.recorded(plan.receipt_uri, Receipt, lambda: _made(plan), holds=holds)


def _states(plan: ShardPlan) -> Iterator[str]:
    """Of all that the plan reads, as it is now."""
    if plan.foreign:
        yield storage.state(plan.foreign.name)
    yield from read_ahead.in_order(_state, plan.images, num_threads=_NUM_READERS)


def _made(plan: ShardPlan) -> Receipt:
    refused: list[RefusedImage] = []
    passed_over: tuple[PassedOver, ...] = ()
    states: list[str] = []
    if plan.foreign:
        states.append(storage.state(plan.foreign.name))
        tar, (table, refused_members, passed_over) = _index_foreign(plan.number, plan.foreign.name)
        refused += refused_members
    else:
        tar, table = _write_own(plan, refused, states)
    entry = None
    if len(table):
        index = store_file(plan.dataset_uri, plan.number, tables.encode_samples(table), "parquet")
        entry = ShardEntry(number=plan.number, tar=tar, index=index, num_samples=len(table))
    return Receipt(entry=entry, refused=tuple(refused), passed_over=passed_over, sources=_digest_of(states))


def _digest_of(states: Iterable[str]) -> str:
    return storage.sha256("\n".join(states).encode())


def _write_own(
    plan: ShardPlan, refused: list[RefusedImage], states: list[str]
) -> tuple[StoredObject, SampleTable]:
    with scratch.folder("packing-") as folder:
        path = Path(folder) / "shard.tar"
        table = shards.write_shard(path, _accepted(plan.images, refused, states), number=plan.number)
        return store_file(plan.dataset_uri, plan.number, path, "tar"), table


def store_file(dataset_uri: str, number: int, data: bytes | Path, suffix: str) -> StoredObject:
    """Under a name that its own digest makes unique, so that no attempt is ever in another's way."""
    digest = manifests.describe_object("", data).sha256
    return manifests.write_object(dataset_uri, f"shards/shard-{number:06d}-{digest[:12]}.{suffix}", data)


def number_of(name: str) -> int | None:
    """The shard whose tar or index `store_file` gave this name; None for other names."""
    found = _STORED_NAME.match(name)
    return int(found[1]) if found else None


def _accepted(
    offered: Sequence[SourceImage], refused: list[RefusedImage], states: list[str]
) -> Iterator[Sample]:
    """The images that decode, read some ahead; the others go to `refused`, and what each was to `states`."""
    contents = read_ahead.in_order(_read, offered, num_threads=_NUM_READERS)
    for image, (data, state) in zip(offered, contents, strict=True):
        states.append(state)
        try:
            yield _sample(image, data)
        except ImageRefused as refusal:
            refused.append(RefusedImage(key=image.key, location=image.location, reason=refusal.reason))


class _Read(NamedTuple):
    """The bytes of an image, None where nothing is there, and its state before they were read."""

    data: bytes | None
    state: str


def _read(image: SourceImage) -> _Read:
    if image.data is not None:
        return _Read(image.data, _state(image))
    try:
        return _Read(*storage.read_with_state(image.location))
    except ObjectMissing:
        return _Read(None, _GONE)


def _state(image: SourceImage) -> str:
    """What changes whenever the bytes do."""
    if image.data is not None:
        return storage.sha256(image.data)
    try:
        return storage.state(image.location)
    except ObjectMissing:
        return _GONE


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


def _index_foreign(number: int, uri: str) -> tuple[StoredObject, TarIndex]:
    with storage.open_stream(uri) as stream:
        hashing = _Hashing(stream)
        index = shards.index_shard(cast(BinaryIO, hashing), number=number, uri=uri, objection=_objection)
    return StoredObject(uri, hashing.num_bytes, hashing.digest.hexdigest()), index


def _objection(data: bytes) -> str | None:
    try:
        images.decode(data)
    except ImageRefused as refusal:
        return refusal.reason
    return None


class _Hashing:
    """A stream that counts and digests what is read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.num_bytes = stream, hashlib.sha256(), 0

    def read(self, num: int) -> bytes:
        data = self.stream.read(num)
        self.digest.update(data)
        self.num_bytes += len(data)
        return data
