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


class Form(NamedTuple):
    """What an image is at some time; whatever changes it makes one of these that it never was."""

    label: str
    num_bytes: int


@dataclass
class Account:
    """What was offered and confirmed; its own lock keeps threads apart."""

    offered: dict[str, list[Form]] = field(default_factory=dict)
    """by key all that an image of the source has been, packed or not; the newest last"""
    packed: dict[str, int] = field(default_factory=dict)
    """by key which of its forms a packing which ended well had found"""
    going: set[str] = field(default_factory=set)
    """keys that a take-down names, confirmed or not"""
    gone: set[str] = field(default_factory=set)
    """keys whose take-down ended well"""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def snapshot(self) -> "Account":
        """A copy, as it is now."""
        with self.lock:
            offered = {key: list(forms) for key, forms in self.offered.items()}
            return Account(offered, dict(self.packed), set(self.going), set(self.gone))

    @property
    def num_changed(self) -> int:
        """Forms that replaced another."""
        return sum(len(forms) - 1 for forms in self.offered.values())


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
    named = {"current.json", "doomed.json", "lease.json", "compaction.json", "tombstones.json"}
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
    dead, known, live = set(dataset.version.tombstones), set[str](), list[tuple[str, Form]]()
    for table in dataset.all_samples():
        known |= set(table.keys)
        rows = zip(table.ids.tolist(), table.keys, table.labels, table.sizes.tolist(), strict=True)
        live += [(key, Form(str(label), size)) for of, key, label, size in rows if of not in dead]
    keys = [key for key, _ in live]
    after = account.snapshot()
    return [
        *_unless_empty("keys that are in the dataset twice", _twice(keys)),
        *_unless_empty("confirmed keys that the dataset lacks", before.packed.keys() - known),
        *_unless_empty("keys that nobody offered", known - after.offered.keys()),
        *_unless_empty("keys that were taken down and live", before.gone & set(keys)),
        *_unless_empty("keys that nobody took down and are dead", known - set(keys) - after.going),
        *_unless_empty(
            "keys with another image than was confirmed last",
            {
                key
                for key, form in live
                if form not in after.offered.get(key, [form])[before.packed.get(key, 0) :]
            },
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
    key_of = {
        int(of): key
        for table in dataset.all_samples()
        for key, of in zip(table.keys, table.ids.tolist(), strict=True)
    }
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
    return found or _broken_answers(release, {each: key_of[each] for each in live}, before, account, cache)


def _broken_answers(
    release: Release, live: dict[int, str], before: Account, account: Account, cache: Cache
) -> list[str]:
    """Asked for everything it has, a release answers with each live image once and with none that is gone.

    live: keys by id. What was replaced since is not answered by a release that had it.
    """
    searcher = Searcher.of(release, cache=cache, query_model=None, num_threads=1)
    hidden = takedowns.taken_down(release.releases_uri, release.manifest.dataset_uri)
    searcher.hide(hidden)
    now_dead = set(datasets.open_version(release.manifest.dataset_uri).version.tombstones)
    if not len(searcher.items):
        return []
    of = np.ones((1, release.manifest.embedding_dim), np.float32)
    options = SearchOptions(k=len(searcher.items), side="none", exact=True)
    (answer,) = searcher.search(embeddings=of, options=options)
    hits = [hit.key for hit in answer.hits]
    maybe = account.snapshot().going
    wanted = {key for of, key in live.items() if of not in now_dead}
    return [
        *_unless_empty("keys that are answered twice", _twice(hits)),
        *_unless_empty("keys that are answered and were taken down", set(hits) & before.gone),
        *_unless_empty("keys that are not answered", wanted - maybe - set(hits)),
        *_unless_empty("keys that are answered and not in it", set(hits) - set(live.values())),
    ]


def _ids_of_segments(release: Release, cache: Cache) -> np.ndarray:
    paths = [release.path(segment.file, cache) for segment in release.manifest.segments]
    return np.concatenate([index_files.ids_in(path) for path in paths])


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
