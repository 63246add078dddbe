"""Which images a release lost against the one that serves, in bounded memory.

They are compared one by one, so that as many new ones don't hide those that were lost. Within one dataset an
image keeps its id; in a dataset that was packed anew elsewhere it has another, and its key counts. What
somebody took out is not lost.

Not covered: how many may be lost (`gate`).
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.data import datasets, shards
from namr.data.datasets import Dataset
from namr.release import takedowns
from namr.release.releases import Release
from namr.store import item_files, scratch
from namr.store.cache import Cache
from namr.store.item_files import ItemFile
from namr.store.manifests import StoredObject

_MOST_TOLD = 10
_HASHES_AT_ONCE = 1 << 23
"""of keys: 64 MB, and a few times that while they are sorted"""

Ids = npt.NDArray[np.int64]


class Lacking(NamedTuple):
    """Some items of a file."""

    file: ItemFile
    rows: Ids
    """ascending"""


class Lost(NamedTuple):
    """Images of the current release that the draft lacks and nobody took out."""

    num: int
    keys: list[str]
    """of the first few"""


def lost_images(draft: Release, dataset: Dataset, *, current: Release) -> Lost:
    """What the draft, a release of `dataset`, lost of the current release.

    Within one dataset an image keeps its id, so files are compared side by side; in another it has another
    id, and hashes of keys are compared, in files that are mapped. Neither holds all items in memory, and of a
    release that was added to only what is new is read.
    """
    gone_uri = current.manifest.dataset_uri
    taken_out = takedowns.taken_down(current.releases_uri, gone_uri)
    lost = Lost(0, [])
    with scratch.folder("gate-") as folder:
        if gone_uri == dataset.uri:
            taken_out = np.union1d(taken_out, dataset.tombstones)
            # what both list has the same ids in it, and no other file of either has one of these
            same = {*current.manifest.items} & {*draft.manifest.items}
            lacking = _without_id_in(*(_items_but(same, release) for release in (current, draft)))
        else:
            cache = Cache(folder, max_bytes=1 << 40)
            files = ([*_mapped(release, cache)] for release in (current, draft))
            lacking = _without_key_in(*files, also=_keys_taken_out(dataset))
        for file, rows in lacking:
            of_file = rows[~shards.among(file.ids[rows], taken_out)]
            told = of_file[: _MOST_TOLD - len(lost.keys)].tolist()
            lost = Lost(lost.num + len(of_file), [*lost.keys, *(file.key(row) for row in told)])
    return lost


def _without_id_in(ours: Iterable[ItemFile], theirs: Iterable[ItemFile]) -> Iterator[Lacking]:
    """Those of our items that the others lack by id; ids ascend over all files, and few files are held."""
    known, more = np.empty(0, np.int64), iter(theirs)
    for file in ours:
        last_id = file.ids[-1] if len(file) else -1
        while not len(known) or known[-1] < last_id:
            following = next(more, None)
            if following is None:
                break
            known = np.concatenate([known, following.ids])
        yield Lacking(file, np.flatnonzero(~shards.among(file.ids, known)))
        known = known[known > last_id]


def _items_but(some: Container[StoredObject], release: Release) -> Iterator[ItemFile]:
    return (
        item_files.decode(release.read(stored)) for stored in release.manifest.items if stored not in some
    )


def _mapped(release: Release, cache: Cache) -> Iterator[ItemFile]:
    return (item_files.open_file(release.path(stored, cache)) for stored in release.manifest.items)


def _keys_taken_out(dataset: Dataset) -> Iterator[str]:
    """Keys of which no sample is live: a changed image has a tombstone too, and lives on."""
    dead = dataset.tombstones
    numbers = set(shards.shard_of(dead).tolist())
    entries = [entry for entry in dataset.shards if entry.number in numbers]
    keys = {
        table.keys[row]
        for table in datasets.read_samples(dataset.uri, entries)
        for row in np.flatnonzero(shards.among(table.ids, dead)).tolist()
    }
    for key, ids in dataset.find(keys).items():
        if not dataset.live(np.array(ids)).any():
            yield key


def _without_key_in(
    ours: Sequence[ItemFile],
    theirs: Sequence[ItemFile],
    *,
    also: Iterable[str] = (),
    at_once: int = _HASHES_AT_ONCE,
) -> Iterator[Lacking]:
    """Those of our items whose keys neither the others nor `also` have, told apart by their 64-bit hashes.

    Mapped files are best: it goes over the hashes several times, about `at_once` of the others' a time, and
    holds no more. Of n items that are lacking in N, n N / 2^64 are not seen.
    """
    others = np.array(sorted(map(item_files.hash_of, also)), np.uint64)
    num_turns = 1 + (sum(map(len, theirs)) + len(others)) // at_once
    for turn in range(num_turns):
        turns = range(turn * 2**64 // num_turns, (turn + 1) * 2**64 // num_turns)
        known = np.concatenate([others, *(file.hashes[_within(file.hashes, turns)] for file in theirs)])
        known.sort()
        for file in ours:
            some = _within(file.hashes, turns)
            hashes, rows = file.hashes[some], file.rows_by_hash[some]
            at = np.searchsorted(known, hashes).clip(max=len(known) - 1)
            lacking = known[at] != hashes if len(known) else np.ones(len(hashes), np.bool_)
            if lacking.any():
                yield Lacking(file, np.sort(rows[lacking]).astype(np.int64))


def _within(ascending: npt.NDArray[np.uint64], hashes: range) -> slice:
    """Which of them are in a range."""
    ends = np.array([hashes.start, hashes.stop - 1], np.uint64)
    return slice(
        int(np.searchsorted(ascending, ends[0], "left")), int(np.searchsorted(ascending, ends[1], "right"))
    )
