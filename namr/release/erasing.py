"""Erasing images: out of all answers at once, out of the files as soon as may be, with a receipt.

    take down      listed beside the pointer of every root that uses the embeddings, and tombstoned
    empty          shards without them take the place of theirs (`data.erasing`)
    embeddings     are written anew without them, for every model (`embed.erasing`)
    delete         what these took the place of
    receipt        for every root: what was emptied, what has it still, and when that goes (`erasures`)

The next night finds shards that were changed and builds its release whole, so it has nothing of them. A
collection writes down when the last release from before is gone.

Killed anywhere, the same call again finishes, and the receipt is written when all is deleted. While a night,
a collection or another erasure is under way it is refused after the take-down.

Not covered: what learnt from them (models), and copies that are not in these stores (`erasures`).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from namr.data import datasets
from namr.data import erasing as of_shards
from namr.data.datasets import Dataset
from namr.data.records import Emptied
from namr.embed import erasing as of_embeddings
from namr.errors import ConfigError
from namr.release import erasures, garbage, old_embeddings, publication, releases, takedowns, users
from namr.release.erasures import Holding, Receipt
from namr.release.garbage import CollectionConfig
from namr.store import manifests, storage


@dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """Erase images for good, by their keys: bytes, embeddings, vectors, keys; and say what holds them still.

    They leave all answers at once. A receipt says what was emptied, which older releases have them in their
    files, and when these go.
    """

    dataset_uri: str
    """the dataset: a folder or s3://bucket/name"""
    embeddings_uri: str
    """root of all embeddings"""
    releases_uri: str
    """root of the releases; other roots that use these embeddings are found by themselves"""
    keys: tuple[str, ...] = ()
    """the images' keys"""
    keys_file: Path | None = None
    """more keys, one a line"""
    work_uri: str | None = None
    """where builds work, if not in the root of the releases"""
    collection: CollectionConfig = field(default_factory=CollectionConfig)
    """what nights leave, so that the receipt can say when a release goes"""

    def __post_init__(self) -> None:
        if not self.keys and self.keys_file is None:
            raise ConfigError("keys and keys_file are empty; name the images to erase")


class Erased(NamedTuple):
    """What came of it in one root of releases."""

    releases_uri: str
    receipt: Receipt
    is_gone: bool
    """whether nothing of it is left there"""

    @property
    def in_words(self) -> str:
        """All of it, in some lines."""
        receipt, uri = self.receipt, erasures.uri_of(self.releases_uri, self.receipt.erasure_id)
        rows = sum(len(each.ids) for each in receipt.emptied)
        told = [
            f"erasure {receipt.erasure_id} emptied {rows} rows of {receipt.dataset_uri}, in "
            f"{len(receipt.emptied)} shards and {len(receipt.embeddings)} files of embeddings"
        ]
        if self.is_gone:
            told.append(f"nothing in {self.releases_uri} has them")
        else:
            told += [f"in the files of {each.what}: goes {each.until}" for each in receipt.holding]
            told.append(
                f"when all of {self.releases_uri} is without them, a collection says so beside the receipt"
            )
        return "\n  ".join([*told, f"the receipt is {uri}"])


def erase(config: EraseConfig, *, clock: Callable[[], datetime] = publication.utc_now) -> list[Erased]:
    """Erase images, or finish doing so; the receipts of all erasures that they were part of.

    Raises ConfigError for a key that the dataset doesn't have and for places where nothing is (nothing is
    changed then), and for an image in a foreign shard (it is taken down); Conflict while somebody else is at
    work on one of the roots, or changed the dataset meanwhile (the images are down, and the same call again
    goes on).
    """
    keys, now = _keys(config), clock()
    dataset_uri, embeddings_uri = (
        storage.absolute(config.dataset_uri),
        storage.absolute(config.embeddings_uri),
    )
    before = datasets.head(dataset_uri)
    ids = set(itertools.chain.from_iterable(before.existing.find_all(keys).values()))
    roots = _roots(config)
    for uri in (dataset_uri, embeddings_uri, *roots):
        storage.check_writable(uri)
    for root in roots:
        takedowns.take_down(root, dataset_uri, ids)
    if not ids <= set(before.existing.version.tombstones):
        datasets.publish_version(before, [], now=now, tombstones=ids)
    with ExitStack() as leases:
        for root in roots:
            leases.enter_context(users.write_alone(root, what="an erasure"))
        held = leases.enter_context(of_shards.alone(dataset_uri))
        dataset = datasets.open_version(dataset_uri)
        of_shards.check_own(dataset, ids)
        dataset = of_shards.empty(dataset_uri, ids, erasure_id=publication.new_id(now), now=now)
        mine = [each for each in dataset.version.emptied if not ids.isdisjoint(each.ids)]
        numbers = {each.number for each in mine}
        of_these = [each for each in dataset.version.emptied if each.number in numbers]
        of_embeddings.erase(embeddings_uri, dataset, of_these)
        of_shards.delete_old(dataset, of_these, keys, held=held)
        return [
            _received(root, dataset, [each for each in mine if each.erasure_id == erasure_id], config, now)
            for erasure_id in dict.fromkeys(each.erasure_id for each in mine)
            for root in roots
        ]


def _keys(config: EraseConfig) -> list[str]:
    keys = list(config.keys)
    if config.keys_file:
        try:
            keys += filter(None, config.keys_file.read_text("utf-8").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"keys_file {config.keys_file} can't be read: {error}") from error
    if not keys:
        raise ConfigError(f"keys_file {config.keys_file} is empty; name the images to erase, one key a line")
    return keys


def _roots(config: EraseConfig) -> list[str]:
    """All roots of releases that may have such an image; ConfigError for a URI that is a slip.

    Nothing would be found there, and nothing said.
    """
    root = storage.absolute(config.releases_uri)
    users_of_it = old_embeddings.users_of(config.embeddings_uri)
    there = [
        each
        for each in {root: None, **dict.fromkeys(users_of_it)}
        if releases.read_pointer(each) or users.is_at_home(each)
    ]
    if root not in there:
        raise ConfigError(f"{root} has no releases, nor had a night; check releases_uri; nothing was changed")
    if not storage.list_names(storage.absolute(config.embeddings_uri)):
        raise ConfigError(f"{config.embeddings_uri} is empty; check embeddings_uri; nothing was changed")
    return there


def _received(
    root: str, dataset: Dataset, emptied: list[Emptied], config: EraseConfig, now: datetime
) -> Erased:
    """The receipt of one erasure in one root, written unless it is there."""
    erasure_id = emptied[0].erasure_id
    receipt = erasures.find(root, erasure_id)
    if receipt is None:
        receipt = _receipt(root, dataset, emptied, config, now)
        manifests.write_manifest(erasures.uri_of(root, erasure_id), receipt)
    return Erased(root, receipt, erasures.is_gone(root, erasure_id))


def _receipt(
    root: str, dataset: Dataset, emptied: list[Emptied], config: EraseConfig, now: datetime
) -> Receipt:
    entries = {entry.number: entry for entry in dataset.shards}
    keys: set[str] = set()
    for each in emptied:
        of_shard = dataset.samples(entries[each.number]).keys
        keys.update(of_shard[id & 0xFFFFFFFF] for id in each.ids)
    embeddings_uri = storage.absolute(config.embeddings_uri)
    return Receipt(
        erasure_id=emptied[0].erasure_id,
        created=now.isoformat(timespec="seconds"),
        by=publication.operator(),
        dataset_uri=dataset.uri,
        dataset_version=dataset.version.version,
        keys=tuple(sorted(keys)),
        emptied=tuple(emptied),
        embeddings_uri=embeddings_uri,
        embeddings=tuple(
            of_embeddings.of_shards(embeddings_uri, (entries[each.number].tar.sha256 for each in emptied))
        ),
        work_uri=storage.absolute(config.work_uri) if config.work_uri else None,
        holding=tuple(_holding(root, dataset, emptied, config)),
    )


def _holding(root: str, dataset: Dataset, emptied: list[Emptied], config: EraseConfig) -> Iterator[Holding]:
    """What has the images still, and when the collection takes it."""
    still = erasures.left(root, dataset.uri, emptied, written_before=math.inf, work_uri=config.work_uri)
    when = garbage.when_they_go(root, config.collection)
    for name in still.releases:
        yield Holding(what=f"release {name}", until=when.get(name, "by the next collection"))
    old = f"by the first collection {config.collection.min_age_hours:g} hours after they were written"
    if still.num_objects:
        yield Holding(what=f"{still.num_objects} objects that no release lists, perhaps", until=old)
    if still.num_work:
        yield Holding(what=f"{still.num_work} files of builds, perhaps", until=old)
