"""Take-downs: ids that nobody may find, whatever release serves.

`<releases>/tombstones.json` lies beside the pointer and lists ids by dataset. A release is immutable and an
earlier one still holds what was taken out since; services read this list again and again, so an image is
gone within their poll interval and stays gone after a roll-back. It is changed by conditional put, and ids
are only ever added.

Not covered: erasing bytes (`erasing`), and the same image in another dataset, where it has another id.
"""

import itertools
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from namr.data import datasets
from namr.data.datasets import Dataset
from namr.errors import Conflict
from namr.store import manifests, storage

_MOST_ATTEMPTS = 20
_LONGEST_PAUSE_S = 0.1

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TakedownList:
    """What was taken down, as stored."""

    FORMAT: ClassVar[str] = "namr-takedowns"
    FORMAT_VERSION: ClassVar[int] = 1

    ids: Mapping[str, tuple[manifests.Id, ...]] = field(default_factory=dict)
    """by the URI of their dataset, ascending"""


def taken_down(releases_uri: str, dataset_uri: str) -> Ids:
    """(n,) ids of a dataset that no release may show, ascending; empty where nothing was taken down.

    One read of one small object. ManifestError if the list is damaged.
    """
    listed, _ = _read(releases_uri)
    return np.array(listed.ids.get(storage.absolute(dataset_uri), ()), np.int64)


def take_down(releases_uri: str, dataset_uri: str, ids: Iterable[int]) -> None:
    """Add ids to the list; those that are in it change nothing, and a repeated attempt is fine.

    Raises Conflict where others kept changing the list at the same moment.
    """
    uri, added = storage.absolute(dataset_uri), {int(each) for each in ids}
    for attempt in range(_MOST_ATTEMPTS):
        listed, etag = _read(releases_uri)
        before = listed.ids.get(uri, ())
        if added <= set(before):
            return
        changed = TakedownList(ids={**listed.ids, uri: tuple(sorted(added.union(before)))})
        try:
            storage.replace_if_match(_uri(releases_uri), manifests.encode_manifest(changed), etag=etag)
            return
        except Conflict:
            if attempt == _MOST_ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0, _LONGEST_PAUSE_S))  # so that writers don't meet again and again


def take_out(releases_uri: str, dataset_uri: str, keys: Sequence[str], *, now: datetime) -> Ids:
    """Take images down and out of their dataset, by key; returns their ids (n,), ascending.

    All ids of a key: what it was before it changed too, and what it changed to meanwhile, which a night may
    have published. They are listed first, so that answers stop whatever becomes of the dataset. Raises
    ConfigError if a key is not in the dataset, and nothing is changed then; Conflict if somebody changed the
    dataset at the same moment: the images are down then, and the same call again finishes.
    """
    before = datasets.open_version(dataset_uri)
    ids = _all_ids(before, keys)
    take_down(releases_uri, dataset_uri, ids)
    after = datasets.tombstone(dataset_uri, keys, now=now)
    if after.version.next_shard_number > before.version.next_shard_number:
        ids = _all_ids(after, keys)
        take_down(releases_uri, dataset_uri, ids)
    return np.array(ids, np.int64)


def _all_ids(dataset: Dataset, keys: Sequence[str]) -> list[int]:
    return sorted(itertools.chain.from_iterable(dataset.find_all(keys).values()))


def _read(releases_uri: str) -> tuple[TakedownList, str | None]:
    """The list and its tag; an empty one and None where there is none."""
    listed, etag = manifests.read_to_change(_uri(releases_uri), TakedownList)
    return listed or TakedownList(), etag


def _uri(releases_uri: str) -> str:
    return storage.join(storage.absolute(releases_uri), "tombstones.json")
