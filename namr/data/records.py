"""What a dataset version remembers beside its shards: what each packing run brought, and what was erased.

An erased row keeps its place, so that no other id changes, and says nothing any more: its size is 0, it has
no label and no fields, and its key is a digest. The digest is there so that packing the same source again
doesn't bring the image back, and so that the same erasure can be asked for twice; it is salted with the id
of the dataset, which keeps it from being compared with other lists. Who has the dataset and guesses a key
can still tell whether that key was erased.

Not covered: packing, and emptying a shard (`erasing`).
"""

import hashlib
import hmac
from collections.abc import Container, Iterable
from dataclasses import dataclass

from namr.store import manifests
from namr.store.manifests import StoredObject


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """What one packing run brought."""

    source: str
    num_found: int
    """images that the source had"""
    num_known: int
    """of these, keys that the dataset had already (tombstoned ones too): left alone"""
    num_refused: int
    num_packed: int
    first_shard_number: int
    num_replaced: int = 0
    """of those packed, images that the dataset had otherwise"""


@dataclass(frozen=True, kw_only=True)
class Emptied:
    """A shard that took the place of another of its number, because images of that were erased."""

    number: int
    erasure_id: str
    version: int
    """of the dataset: no lower one is without the images"""
    ids: tuple[manifests.Id, ...]
    """of the erased images, ascending"""
    tar: StoredObject
    """what the shard was before; it is gone, or about to go"""
    index: StoredObject


def key_of_erased(dataset_id: str, key: str) -> str:
    """What stands in the place of the key of an erased image."""
    digest = hmac.new(dataset_id.encode(), key.encode(), hashlib.sha256).hexdigest()
    return f"erased/{digest}"


def ids_of(emptied: Iterable[Emptied], numbers: Container[int]) -> set[int]:
    """Ids that were erased of shards with these numbers."""
    return {each_id for each in emptied if each.number in numbers for each_id in each.ids}


def why_gone(emptied: Iterable[Emptied], stored: StoredObject) -> str | None:
    """Why a tar or a sample index is there no more, and what to do; None where no erasure took it."""
    for each in emptied:
        if stored in (each.tar, each.index):
            return (
                f"erasure {each.erasure_id} emptied the shard since this run began; run the same command "
                "again, which goes on without the erased images"
            )
    return None
