"""Foreign shards: tars that somebody else wrote, found in a folder and indexed where they are.

Not covered: how a tar is indexed (`shards`, `pack_shard`). A key of theirs is never replaced: what they hold
is theirs, and an indexed tar that changes is an error.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from namr.data import datasets, files
from namr.data.datasets import Head, ShardEntry
from namr.data.leftovers import Tally
from namr.data.pack_shard import ShardPlan
from namr.errors import ConfigError, ManifestError
from namr.store import storage
from namr.store.manifests import StoredObject

PREFIX = "webdataset:"
"""of a source that is a folder of tars"""


class Found(NamedTuple):
    """What a folder of tars has."""

    plans: list[ShardPlan]
    """one for each tar that the dataset doesn't list yet"""
    num_known: int
    """images of those that it lists"""


def plans(source: str, before: Head, passed_over: Tally) -> Found:
    """What is to be indexed; ManifestError for a tar that changed, ConfigError where there is none."""
    folder = storage.absolute(source.removeprefix(PREFIX))
    if storage.is_local(folder) and not Path(folder).is_dir():
        raise ConfigError(f"{folder} is not a folder; check the path")
    tars = []
    for name, _ in sorted(files.below(folder, passed_over)):
        if name.endswith(".tar"):
            tars.append(storage.join(folder, name))
        else:
            passed_over.add(PurePosixPath(name).suffix.lower() or "no suffix", name)
    if not tars:
        raise ConfigError(f"{folder} has no .tar files; check the path (compressed tars can't be indexed)")
    known = {entry.tar.name: entry for entry in before.dataset.shards} if before.dataset else {}
    new: list[ShardPlan] = []
    for uri in tars:
        size_bytes = storage.size(uri)
        if uri not in known:
            number = before.next_shard_number + len(new)
            foreign = StoredObject(uri, size_bytes, sha256="")
            new.append(ShardPlan(dataset_uri=before.uri, number=number, foreign=foreign))
        elif known[uri].tar.size_bytes != size_bytes:
            raise ManifestError(
                f"{uri} has {size_bytes} bytes and had {known[uri].tar.size_bytes} when it was indexed; "
                "an indexed shard must not change: restore it, or put new images in new shards"
            )
    return Found(new, sum(known[uri].num_samples for uri in tars if uri in known))


def check_keys(before: Head, entries: Sequence[ShardEntry]) -> None:
    """Foreign shards bring their keys along: each must be one image's, in the whole dataset."""
    places: dict[str, str] = {}
    for entry, table in zip(entries, datasets.read_samples(before.uri, entries), strict=True):
        for key in table.keys:
            if key in places:
                raise ConfigError(
                    f"key {key!r} is in {places[key]} and in {entry.tar.name}; a key is one image's identity "
                    "in a dataset: index them as two datasets, or write the shards anew with other keys"
                )
            places[key] = entry.tar.name
    known = before.dataset.find(places) if before.dataset else {}
    if known:
        key = min(known)
        raise ConfigError(f"key {key!r} of {places[key]} is in the dataset already; nothing was published")
