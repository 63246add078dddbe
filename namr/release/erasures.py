"""Receipts of erasures: what was emptied, what still holds it, and, one day, that nothing does.

    <releases>/erasures/<erasure id>.json         written when all is deleted that can be deleted at once
    <releases>/erasures/<erasure id>-gone.json    written by the collection after which nothing here holds it

A release is never changed, and those from before an erasure are kept for a while to be rolled back to: they
show nothing of what was erased, since it was taken down, and have it in their files. What else may have it
is objects that no release lists and work of builds, from before the receipt or so soon after it that a
collection would not yet delete it: then it may be of a build that was under way.

A root of releases has receipts of its own. Not covered: erasing (`erasing`), and copies elsewhere: caches on
machines, exports, earlier versions of objects that a bucket keeps, backups, and what a model has learnt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar, NamedTuple

from namr.data import datasets
from namr.data.records import Emptied
from namr.embed import erasing as of_embeddings
from namr.errors import ManifestError
from namr.release import listing
from namr.release.releases import ReleaseManifest
from namr.store import manifests, storage

_FOLDER = "erasures"
_GONE = "-gone"


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What has an erased image in its files."""

    what: str
    until: str
    """when it goes, in words"""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What an erasure did, as stored."""

    FORMAT: ClassVar[str] = "namr-erasure"
    FORMAT_VERSION: ClassVar[int] = 1

    erasure_id: str
    created: str
    """ISO 8601, UTC"""
    by: str
    """user and machine"""
    dataset_uri: str
    dataset_version: int
    """that it made, or a later one"""
    keys: tuple[str, ...]
    """digests of the images' keys, as they stand in the dataset now (`records.key_of_erased`)"""
    emptied: tuple[Emptied, ...]
    """the images' ids by shard, and the tars and indexes that were deleted"""
    embeddings_uri: str
    embeddings: tuple[str, ...]
    """files of embeddings of these shards, as they were written without the images"""
    work_uri: str | None
    """where builds worked, if not in the root"""
    holding: tuple[Holding, ...]
    """what had them still when this was written"""

    @property
    def old_tars(self) -> set[str]:
        """Digests of what the emptied shards were before."""
        return {each.tar.sha256 for each in self.emptied}


@dataclass(frozen=True, kw_only=True)
class Gone:
    """That nothing is left of an erasure, as stored."""

    FORMAT: ClassVar[str] = "namr-erasure-gone"
    FORMAT_VERSION: ClassVar[int] = 1

    erasure_id: str
    since: str
    """ISO 8601, UTC, by the store's clock"""


class Left(NamedTuple):
    """What of a root may have an erased image in its files."""

    releases: list[str]
    num_objects: int
    """that no release lists"""
    num_work: int
    """files of builds"""


def uri_of(releases_uri: str, erasure_id: str) -> str:
    """Where a receipt lies."""
    return storage.join(storage.absolute(releases_uri), _FOLDER, f"{erasure_id}.json")


def find(releases_uri: str, erasure_id: str) -> Receipt | None:
    """A receipt; None where the erasure isn't finished."""
    uri = uri_of(releases_uri, erasure_id)
    return manifests.read_manifest(uri, Receipt) if storage.exists(uri) else None


def is_gone(releases_uri: str, erasure_id: str) -> bool:
    """Whether nothing of this root holds it any more."""
    return storage.exists(uri_of(releases_uri, f"{erasure_id}{_GONE}"))


def left(
    releases_uri: str,
    dataset_uri: str,
    emptied: Sequence[Emptied],
    *,
    written_before: float,
    work_uri: str | None,
) -> Left:
    """What may have images that were erased from these shards of a dataset.

    written_before: by the store's clock, what objects and work of builds count. ManifestError for a release
    that can't be read.
    """
    root = storage.absolute(releases_uri)
    of_all = listing.list_releases(root)
    for name, error in of_all.damaged.items():
        raise ManifestError(f"what release {name} has of erased images is not known: {error}") from error
    listed = {stored.name for each in of_all.manifests for stored in each.objects()}
    old = [each.name for each in storage.list_entries(root) if each.modified < written_before]
    work = [name for name in old if name.startswith("building/")]
    if work_uri:
        work += [each.name for each in storage.list_entries(work_uri) if each.modified < written_before]
    return Left(
        releases=_with_shards(of_all.manifests, dataset_uri, emptied),
        num_objects=sum(name.startswith("objects/") and name not in listed for name in old),
        num_work=len(work),
    )


def close(releases_uri: str, *, min_age_s: float, work_uri: str | None, now: float) -> tuple[str, ...]:
    """Write down of which erasures nothing is left in this root; their ids.

    min_age_s: what is written within it after an erasure may be work from before. now: of the store. What an
    extraction that was under way then has written since is deleted.
    """
    root, closed = storage.absolute(releases_uri), []
    entries = storage.list_entries(storage.join(root, _FOLDER))
    written = {entry.name.removesuffix(".json"): entry.modified for entry in entries}
    for erasure_id, at in written.items():
        if erasure_id.endswith(_GONE) or f"{erasure_id}{_GONE}" in written:
            continue
        receipt = manifests.read_manifest(uri_of(root, erasure_id), Receipt)
        for name in of_embeddings.of_shards(receipt.embeddings_uri, receipt.old_tars):
            storage.delete(storage.join(receipt.embeddings_uri, name))
        until = at + min_age_s
        still = left(
            root,
            receipt.dataset_uri,
            receipt.emptied,
            written_before=until,
            work_uri=work_uri or receipt.work_uri,
        )
        if now >= until and not any(still):
            since = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
            gone = Gone(erasure_id=erasure_id, since=since)
            manifests.write_manifest(uri_of(root, f"{erasure_id}{_GONE}"), gone)
            closed.append(erasure_id)
    return tuple(closed)


def _with_shards(known: Iterable[ReleaseManifest], dataset_uri: str, emptied: Sequence[Emptied]) -> list[str]:
    """Releases of a version in which one of these shards had its images."""
    before, numbers = max(each.version for each in emptied), {each.number for each in emptied}
    older = [each for each in known if each.dataset_uri == dataset_uri and each.dataset_version < before]
    versions = {each.dataset_version for each in older}
    had = {version: _has_shards(dataset_uri, version, numbers) for version in versions}
    return [each.release_id for each in older if had[each.dataset_version]]


def _has_shards(dataset_uri: str, version: int, numbers: set[int]) -> bool:
    """True too where it can't be known."""
    try:
        entries = datasets.open_version(dataset_uri, version).shards
    except ManifestError:
        return True
    return not numbers.isdisjoint(entry.number for entry in entries)
