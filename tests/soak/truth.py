"""What a store has to hold whatever was killed: the crasher's own account, and the store compared with it.

The account has what was confirmed, that is, whose command ended well. What is under way may have happened or
not. The store is read while others change it: what is confirmed before the look has to be there, and nothing
that was never offered.

Not covered: what a running service answers (the reader in `crasher` looks at that).
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from namr.data import datasets
from namr.data.datasets import Dataset
from namr.errors import ManifestError, NamrError
from namr.index import index_files
from namr.release import listing, publication, releases, takedowns, users
from namr.release.releases import Release
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.store import storage
from namr.store.cache import Cache


@dataclass
class Account:
    """What was offered and confirmed; its own lock keeps threads apart."""

    offered: set[str] = field(default_factory=set)
    """keys of images that the source has, packed or not"""
    packed: set[str] = field(default_factory=set)
    """keys that a packing which ended well had found"""
    going: set[str] = field(default_factory=set)
    """keys that a take-down names, confirmed or not"""
    gone: set[str] = field(default_factory=set)
    """keys whose take-down ended well"""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def snapshot(self) -> "Account":
        """A copy, as it is now."""
        with self.lock:
            return Account(set(self.offered), set(self.packed), set(self.going), set(self.gone))


class Places(NamedTuple):
    """Where everything lies."""

    dataset_uri: str
    embeddings_uri: str
    releases_uri: str


def broken(account: Account, places: Places, cache: Cache) -> list[str]:
    """What is not as it has to be, in words; empty where all is well."""
    before = account.snapshot()
    dataset = datasets.head(places.dataset_uri).dataset
    if dataset is None:
        return ["packing was confirmed, and there is no dataset"] if before.packed else []
    found = _broken_dataset(dataset, before, account)
    pointer = releases.read_pointer(places.releases_uri)
    names = kept(places.releases_uri)
    if pointer and pointer.target not in names:
        again = releases.read_pointer(places.releases_uri)
        if again and again.target == pointer.target:
            found.append(f"the current release {pointer.target} has no manifest")
    for release_id in names:
        try:
            said = _broken_release(release_id, dataset, before, account, places, cache)
        except NamrError as error:
            said = [f"{type(error).__name__}: {error}"]
        if said and _is_there(places.releases_uri, release_id):
            found += [f"release {release_id}: {each}" for each in said]
    return found


def left_over(places: Places) -> list[str]:
    """Objects that nothing names, after a collection that nobody disturbed."""
    uri = places.releases_uri
    of_all = listing.list_releases(uri)
    named = {"current.json", "doomed.json", "lease.json", "tombstones.json"}
    for manifest in of_all.manifests:
        named |= {f"{manifest.release_id}/manifest.json", *(stored.name for stored in manifest.objects())}
    names = [name for name in storage.list_names(uri) if not name.startswith(users.FOLDER)]
    return [f"{uri}/{name} is named by nothing" for name in names if name not in named]


def kept(releases_uri: str) -> list[str]:
    """Ids of the releases that are there."""
    names = [name.partition("/") for name in storage.list_names(releases_uri)]
    return [release_id for release_id, _, rest in names if rest == "manifest.json"]


def _is_there(releases_uri: str, release_id: str) -> bool:
    """Whether a release was not collected meanwhile: its manifest goes before its objects."""
    return storage.exists(releases.manifest_uri(storage.absolute(releases_uri), release_id))


def _broken_dataset(dataset: Dataset, before: Account, account: Account) -> list[str]:
    id_of = _ids_by_key(dataset)
    keys = [key for table in dataset.all_samples() for key in table.keys]
    dead = set(dataset.version.tombstones)
    after = account.snapshot()
    return [
        *_unless_empty("keys that are in the dataset twice", _twice(keys)),
        *_unless_empty("confirmed keys that the dataset lacks", before.packed - set(keys)),
        *_unless_empty("keys that nobody offered", set(keys) - after.offered),
        *_unless_empty(
            "keys that were taken down and live", {key for key in before.gone if id_of.get(key) not in dead}
        ),
        *_unless_empty(
            "keys that nobody took down and are dead",
            {key for key, of in id_of.items() if of in dead} - after.going,
        ),
    ]


def _broken_release(
    release_id: str, head: Dataset, before: Account, account: Account, places: Places, cache: Cache
) -> list[str]:
    release = releases.open_release(places.releases_uri, release_id)
    publication.verify(release.releases_uri, release.manifest)
    manifest = release.manifest
    dataset = head
    if manifest.dataset_version != head.version.version:
        dataset = datasets.open_earlier(head, manifest.dataset_version)
    key_of = {of: key for key, of in _ids_by_key(dataset).items()}
    live = set(key_of) - set(dataset.version.tombstones)
    entries = np.concatenate([_ids_of_segments(release, cache), np.empty(0, np.int64)]).tolist()
    dead = set(release.tombstones().tolist())
    items = [each for file in release.items() for each in file.ids.tolist()]
    counts = manifest.counts
    found = [
        *_unless_empty("ids that are in the index twice", _twice(entries)),
        *_unless_empty("live ids that the index lacks", live - set(entries)),
        *_unless_empty("ids that the index has and nobody should find", set(entries) - dead - live),
        *_unless_empty("ids with an entry or an item, not both", set(entries) ^ set(items)),
        *_unless_empty("ids with two items", _twice(items)),
    ]
    if not counts.num_indexed == len(live) == len(set(entries) - dead):
        found.append(
            f"the manifest counts {counts.num_indexed} images, the index {len(set(entries) - dead)}, the "
            f"dataset {len(live)}"
        )
    return found or _broken_answers(release, {key_of[each] for each in live}, before, account, cache)


def _broken_answers(
    release: Release, live: set[str], before: Account, account: Account, cache: Cache
) -> list[str]:
    """Asked for everything it has, a release answers with each live image once and with none that is gone."""
    searcher = Searcher.of(release, cache=cache, query_model=None, num_threads=1)
    searcher.hide(takedowns.taken_down(release.releases_uri, release.manifest.dataset_uri))
    if not len(searcher.items):
        return []
    of = np.ones((1, release.manifest.embedding_dim), np.float32)
    options = SearchOptions(k=len(searcher.items), side="none", exact=True)
    (answer,) = searcher.search(embeddings=of, options=options)
    hits = [hit.key for hit in answer.hits]
    maybe = account.snapshot().going
    return [
        *_unless_empty("keys that are answered twice", _twice(hits)),
        *_unless_empty("keys that are answered and were taken down", set(hits) & before.gone),
        *_unless_empty("keys that are not answered", live - maybe - set(hits)),
        *_unless_empty("keys that are answered and not in it", set(hits) - live),
    ]


def _ids_of_segments(release: Release, cache: Cache) -> np.ndarray:
    paths = [release.path(segment.file, cache) for segment in release.manifest.segments]
    return np.concatenate([index_files.ids_in(path) for path in paths])


def _ids_by_key(dataset: Dataset) -> dict[str, int]:
    return {
        key: int(of)
        for table in dataset.all_samples()
        for key, of in zip(table.keys, table.ids.tolist(), strict=True)
    }


def _twice(things: Iterable[object]) -> set[object]:
    seen: set[object] = set()
    return {each for each in things if each in seen or seen.add(each)}  # type: ignore[func-returns-value]


def _unless_empty(what: str, found: Iterable[object]) -> list[str]:
    listed = sorted(map(str, found))
    return [f"{len(listed)} {what}, among them {', '.join(listed[:3])}"] if listed else []


def version_of(places: Places) -> int:
    """The dataset's current version; 0 where there is none."""
    dataset = datasets.head(places.dataset_uri).dataset
    return dataset.version.version if dataset else 0


def num_segments(places: Places) -> int:
    """Of the current release; 0 where there is none."""
    release = releases.current(places.releases_uri)
    return len(release.manifest.segments) if release else 0


def published_since(places: Places, release_id: str, version: int) -> str | None:
    """What is wrong with a night that ended well with this release; version: the dataset's when it began."""
    try:
        made_of = releases.open_release(places.releases_uri, release_id).manifest.dataset_version
    except ManifestError:  # it was rolled back from, and collected
        return None
    if made_of < version:
        return f"a night that began with dataset version {version} ended with {release_id}, of {made_of}"
    return None
