"""Datasets: shards listed in numbered versions, and the pointer that says which version is current.

    <dataset>/current.json                    the pointer: "versions/<n>.json"
    <dataset>/versions/<n>.json               shards with digests and counts, tombstones; immutable
    <dataset>/shards/shard-000017-<d>.tar     images, and beside them the sample index as .parquet; immutable,
                                              <d> begins the file's own SHA-256
    <dataset>/packing/<digest>.json           receipts of packing (`pack_shard`)
    <dataset>/erasing.json                    who erases from it (`erasing`)

A night's new images are new shards and a new version; nothing that a version lists is changed, until somebody
erases images (`erasing`): a shard without them takes the place of theirs, under its number, in the next
version and whenever an earlier one is opened. A change is published by swapping the pointer as it was read
when the change began, so that of two changes at once one wins and the other is told. What the loser wrote
keeps its number, and can't be opened by it: a version lists in `history` which ones were current before it.
Tars that lie elsewhere (foreign shards) are listed by absolute URI and only their index is ours.

A tombstone takes a sample out of all later versions: its id is never read again. Its key stays known. Where
no sample of a key is live, the image was taken out, and packing the same source again doesn't bring it back;
a changed image is a new sample of its key, with another id, and the one before has a tombstone. So of a key
at most one sample is live, the last.

Not covered: collecting what killed jobs left behind.
"""

import functools
import itertools
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from namr.data import records
from namr.data.records import Emptied, SourceRecord
from namr.data.shards import MAX_SHARD_NUMBER, among, make_id
from namr.errors import ConfigError, ManifestError, ObjectMissing
from namr.store import manifests, read_ahead, storage, tables
from namr.store.manifests import Pointer, StoredObject, Upgrade
from namr.store.tables import SampleTable

_NUM_READERS = 8


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard as a dataset version lists it."""

    number: int
    """given once, never used again in this dataset"""
    tar: StoredObject
    """named relative to the dataset, or by absolute URI if the tar is a foreign one"""
    index: StoredObject
    """the sample index, named relative to the dataset"""
    num_samples: int

    @property
    def is_foreign(self) -> bool:
        """Whether somebody else wrote the tar and keeps it."""
        return "://" in self.tar.name or self.tar.name.startswith("/")


@dataclass(frozen=True, kw_only=True)
class DatasetVersion:
    """One version of a dataset, as stored."""

    FORMAT: ClassVar[str] = "namr-dataset"
    FORMAT_VERSION: ClassVar[int] = 2
    EARLIER: ClassVar[dict[int, Upgrade]] = {1: dict}  # whoever knows of no erasure would pack it again

    dataset_id: str
    version: int
    created: str
    """ISO 8601, UTC"""
    num_samples: int
    """rows of all shards, tombstoned ones included"""
    next_shard_number: int
    shards: tuple[ShardEntry, ...]
    tombstones: tuple[manifests.Id, ...]
    """ids, ascending"""
    sources: tuple[SourceRecord, ...]
    history: tuple[int, ...] | None = None
    """numbers of the versions that were current before this one, ascending; None where an older namr wrote
    it: then every number below its own counts"""
    emptied: tuple[Emptied, ...] = ()
    """what was erased, oldest first"""

    @property
    def earlier(self) -> Sequence[int]:
        """Numbers of the versions that were current before this one, ascending."""
        return range(1, self.version) if self.history is None else self.history


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset at one version, open for reading."""

    uri: str
    version: DatasetVersion
    digest: str
    """SHA-256 of the version's manifest; where images were erased since, of that and what is left"""
    published_digest: str
    """SHA-256 of the version's manifest"""

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """All shards, by ascending number."""
        return self.version.shards

    @property
    def num_live(self) -> int:
        """Samples that are not tombstoned."""
        return self.version.num_samples - len(self.version.tombstones)

    @functools.cached_property
    def tombstones(self) -> npt.NDArray[np.int64]:
        """Ids that are gone, ascending."""
        return np.array(self.version.tombstones, np.int64)

    def live(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """(n,) mask of the ids that are not tombstoned."""
        return ~among(ids, self.tombstones)

    def shard_uri(self, entry: ShardEntry) -> str:
        """Where the tar lies."""
        return entry.tar.name if entry.is_foreign else storage.join(self.uri, entry.tar.name)

    def samples(self, entry: ShardEntry) -> SampleTable:
        """The verified sample index of a shard, tombstoned rows included; else ManifestError."""
        return next(read_samples(self.uri, [entry]))

    def all_samples(self) -> Iterator[SampleTable]:
        """`samples` of all shards in order, some read ahead."""
        return read_samples(self.uri, self.shards)

    def find(self, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """All ids, ascending, of each of those keys that the dataset has: no other than the last is live.

        Erased ones are found too.
        """
        asked = {key: key for key in keys}
        if self.version.emptied:
            asked |= {records.key_of_erased(self.version.dataset_id, key): key for key in asked}
        found: dict[str, tuple[int, ...]] = {}
        for table in self.all_samples() if asked else ():
            for row, stored in enumerate(table.keys):
                if (key := asked.get(stored)) is not None:
                    found[key] = (*found.get(key, ()), int(table.ids[row]))
        return found

    def find_all(self, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """`find`, where the dataset has to have all of the keys; else ConfigError."""
        wanted = set(keys)
        found = self.find(wanted)
        unknown = sorted(wanted - set(found))
        if unknown:
            raise ConfigError(
                f"{len(unknown)} of {len(wanted)} keys are not in {self.uri}, for one {unknown[0]!r}; "
                "nothing was changed"
            )
        return found


@dataclass(frozen=True)
class Head:
    """What a dataset was when a change of it began."""

    uri: str
    dataset: Dataset | None
    """None: there was no dataset yet"""
    pointer: Pointer | None

    @property
    def existing(self) -> Dataset:
        """The dataset; ManifestError where there was none."""
        if self.dataset is None:
            raise ManifestError(
                f"{self.uri} is no dataset: it has no current.json; check the URI, or pack one (jobs/pack.py)"
            )
        return self.dataset

    @property
    def next_shard_number(self) -> int:
        """The first number that was never given."""
        return self.dataset.version.next_shard_number if self.dataset else 0


def open_version(dataset_uri: str, version: int | None = None) -> Dataset:
    """A version of a dataset, the current one if None.

    Raises ManifestError where there is no dataset or it is damaged, and for a version that was never the
    current one: a change that lost the race, or died before it published, left it behind.
    """
    current = head(dataset_uri).existing
    return current if version in (None, current.version.version) else open_earlier(current, version or 0)


def open_earlier(dataset: Dataset, version: int) -> Dataset:
    """A version that was current before this one of the same dataset; else ManifestError.

    Shards that this one has otherwise, since images were erased from them, are what is left of them.
    """
    if version not in dataset.version.earlier:
        known = [*dataset.version.earlier[-5:], dataset.version.version]
        raise ManifestError(
            f"{dataset.uri} has no such version as {version}, or it was never current; the newest that were "
            f"are {', '.join(map(str, known))}: name one of these, or none for the current one"
        )
    return _as_left(_open(dataset.uri, f"versions/{version}.json"), dataset)


def _as_left(old: Dataset, now: Dataset) -> Dataset:
    entries = {entry.number: entry for entry in now.shards}
    shards = tuple(entries.get(entry.number, entry) for entry in old.shards)
    changed = {new.number: new.tar.sha256 for new, was in zip(shards, old.shards, strict=True) if new != was}
    if not changed:
        return old
    gone = records.ids_of(now.version.emptied, changed)
    tombstones = tuple(sorted(gone.union(old.version.tombstones)))
    version = replace(old.version, shards=shards, tombstones=tombstones, emptied=now.version.emptied)
    return replace(old, version=version, digest=storage.sha256(f"{old.digest} {changed}".encode()))


def head(dataset_uri: str) -> Head:
    """The current state, to be changed by `publish_version`."""
    uri = storage.absolute(dataset_uri)
    pointer = manifests.read_pointer(_pointer_uri(uri))
    return Head(uri, _open(uri, pointer.target) if pointer else None, pointer)


def read_samples(dataset_uri: str, entries: Sequence[ShardEntry]) -> Iterator[SampleTable]:
    """The sample indexes of shards, verified; ManifestError for one that is gone, damaged or another's."""
    read = functools.partial(_read_samples, dataset_uri)
    return read_ahead.in_order(read, entries, num_threads=_NUM_READERS)


def publish_version(
    before: Head,
    shards: Sequence[ShardEntry],
    *,
    now: datetime,
    tombstones: Iterable[int] = (),
    source: SourceRecord | None = None,
) -> Dataset:
    """Make the next version: what was there `before`, and these shards and tombstones; make it current.

    Raises Conflict if somebody else published since `before` was read (nothing is changed then), and
    ConfigError for shard numbers that were given before and tombstones that are no ids of the dataset.
    """
    old = before.dataset.version if before.dataset else None
    numbers = sorted(entry.number for entry in shards)
    first = before.next_shard_number
    if len(set(numbers)) < len(numbers) or not all(first <= n <= MAX_SHARD_NUMBER for n in numbers):
        raise ConfigError(
            f"{before.uri}: shard numbers {numbers[:3]}... ; expected distinct ones from {first} to "
            f"{MAX_SHARD_NUMBER}, never given before"
        )
    all_shards = (old.shards if old else ()) + tuple(sorted(shards, key=lambda entry: entry.number))
    dead = set(tombstones)
    num_rows = {entry.number: entry.num_samples for entry in all_shards}
    unknown = [id for id in dead if not 0 <= id & 0xFFFFFFFF < num_rows.get(id >> 32, 0)]
    if unknown:
        raise ConfigError(
            f"{before.uri}: tombstone {unknown[0]} is the id of no sample; expected ids of this dataset"
        )
    version = DatasetVersion(
        dataset_id=old.dataset_id if old else uuid.uuid4().hex,
        version=old.version + 1 if old else 1,
        created=now.isoformat(timespec="seconds"),
        num_samples=sum(entry.num_samples for entry in all_shards),
        next_shard_number=max([first, *(number + 1 for number in numbers)]),
        shards=all_shards,
        tombstones=tuple(sorted(dead.union(old.tombstones if old else ()))),
        sources=(old.sources if old else ()) + ((source,) if source else ()),
        history=(*old.earlier, old.version) if old else (),
        emptied=old.emptied if old else (),
    )
    return publish(before, version)


def publish(before: Head, version: DatasetVersion) -> Dataset:
    """Write a version that was made of what was there `before`, and make it current; Conflict as above."""
    version = _write_under_next_number(before.uri, version)
    target = f"versions/{version.version}.json"
    manifests.swap_pointer(_pointer_uri(before.uri), target, expected=before.pointer, token=uuid.uuid4().hex)
    return _open(before.uri, target)


def tombstone(dataset_uri: str, keys: Sequence[str], *, now: datetime) -> Dataset:
    """Take images out, by key, in a new version; if all are out already the current version is returned.

    Raises ConfigError if a key is not in the dataset, and nothing is changed then.
    """
    before = head(dataset_uri)
    ids = set(itertools.chain.from_iterable(before.existing.find_all(keys).values()))
    if ids <= set(before.existing.version.tombstones):
        return before.existing
    return publish_version(before, [], now=now, tombstones=ids)


def _read_samples(dataset_uri: str, entry: ShardEntry) -> SampleTable:
    uri = storage.join(dataset_uri, entry.index.name)
    try:
        table = tables.decode_samples(manifests.read_object(dataset_uri, entry.index))
    except ObjectMissing as error:
        raise ManifestError(
            f"shard {entry.number} has no index: {uri} is missing: {why_gone(dataset_uri, entry.index)}"
        ) from error
    if not np.array_equal(table.ids, make_id(entry.number, 0) + np.arange(entry.num_samples)):
        raise ManifestError(
            f"{uri} is not the index of shard {entry.number} with {entry.num_samples} samples: it has "
            f"{len(table)} rows; restore it, or pack the dataset anew"
        )
    return table


def why_gone(dataset_uri: str, stored: StoredObject) -> str:
    """Why the tar or the index of a shard is not there, and what to do."""
    current = head(dataset_uri).dataset
    why = records.why_gone(current.version.emptied, stored) if current else None
    return why or "a version of the dataset lists it; restore it, or pack the dataset anew"


def _write_under_next_number(dataset_uri: str, version: DatasetVersion) -> DatasetVersion:
    """Write the manifest; a number that a run used which died before it published is passed over."""
    while not storage.write_if_absent(
        storage.join(dataset_uri, f"versions/{version.version}.json"), manifests.encode_manifest(version)
    ):
        version = replace(version, version=version.version + 1)
    return version


def _open(dataset_uri: str, name: str) -> Dataset:
    uri = storage.join(dataset_uri, name)
    try:
        data = storage.read(uri)
    except ObjectMissing as error:
        raise ManifestError(f"{uri} is missing, so there is no such version of the dataset") from error
    version = manifests.decode_manifest(data, DatasetVersion, uri)
    dead = version.tombstones
    if dead and not (dead[0] >= 0 and dead[-1] < 2**63 and dead == tuple(sorted(set(dead)))):
        raise ManifestError(f"{uri} is damaged: its tombstones are no ascending ids; restore it")
    uri, digest = storage.absolute(dataset_uri), storage.sha256(data)
    return Dataset(uri=uri, version=version, digest=digest, published_digest=digest)


def _pointer_uri(dataset_uri: str) -> str:
    return storage.join(dataset_uri, "current.json")
