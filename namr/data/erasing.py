"""Erasing images from a dataset: what shards hold of them goes, and every other image stays where it is.

    the tar        the image, its JSON and their names are one filler `__erased__/<offset>` each, of zeros, as
                   long as they were: readers of WebDataset pass over it, and all other offsets stay
    the index      the row stays, so that ids stay, with size 0, no label, no fields and a digest for its key
    the version    lists both under the shard's number, and what they took the place of

Tar and index are new objects; those before are deleted when the version is published. So is what killed runs
left of shards that have a number which no run can publish any more, and receipts of packing with such a key.

Every step may be killed and repeated: what is to be done is read from the dataset itself. One erasure at a
time works on a dataset, by its `erasing.json`. Not covered: foreign shards, which are not ours to change.
"""

import json
import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from namr.data import datasets, pack_shard, records
from namr.data.datasets import Dataset, ShardEntry
from namr.data.records import Emptied
from namr.data.shards import row_of, shard_of
from namr.errors import ConfigError, ManifestError, ObjectMissing
from namr.store import manifests, read_ahead, scratch, storage, tables
from namr.store.lease import Lease

_BLOCK_BYTES = 512
_NUM_READERS = 16
_LEFT_OVER_AFTER_S = 24 * 3600.0


def alone(dataset_uri: str) -> Lease:
    """The lease of those who erase from a dataset; Conflict, which says who does, if somebody does."""
    return Lease.take(storage.join(storage.absolute(dataset_uri), "erasing.json"), what="an erasure")


def check_own(dataset: Dataset, ids: Iterable[int]) -> None:
    """ConfigError, which says where the bytes are, if one of the images is in a foreign shard."""
    entries = {entry.number: entry for entry in dataset.shards}
    foreign = sorted({id >> 32 for id in ids if entries[id >> 32].is_foreign})
    if foreign:
        tars = ", ".join(entries[number].tar.name for number in foreign)
        raise ConfigError(
            f"{dataset.uri} only indexes {tars}, where the bytes of some of these images are; they are taken "
            "down and nothing was erased: whoever keeps that tar has to write it without them, and then the "
            "dataset is to be indexed anew; erase the others without these"
        )


def empty(dataset_uri: str, ids: Collection[int], *, erasure_id: str, now: datetime) -> Dataset:
    """Publish a version of the dataset in which these rows say nothing, unless they do so already.

    Returns the current version. Raises ManifestError for a damaged shard, and Conflict if somebody published
    meanwhile; nothing is changed then.
    """
    before = datasets.head(dataset_uri)
    dataset, old = before.existing, before.existing.version
    rows = _rows_by_shard(set(ids) - records.ids_of(old.emptied, {id >> 32 for id in ids}))
    if not rows:
        return dataset
    done = {
        entry.number: _emptied(dataset, entry, rows[entry.number], erasure_id)
        for entry in dataset.shards
        if entry.number in rows
    }
    version = replace(
        old,
        version=old.version + 1,
        created=now.isoformat(timespec="seconds"),
        shards=tuple(done[each.number].entry if each.number in done else each for each in old.shards),
        tombstones=tuple(sorted({*old.tombstones, *ids})),
        history=(*old.earlier, old.version),
        emptied=(*old.emptied, *(each.record for each in done.values())),
    )
    return datasets.publish(before, version)


def delete_old(dataset: Dataset, emptied: Iterable[Emptied], keys: Collection[str], *, held: Lease) -> None:
    """Delete what these shards were before, and what killed runs and receipts of packing still tell.

    dataset: its current version. held: of `alone`.
    """
    listed = {stored.name for entry in dataset.shards for stored in (entry.tar, entry.index)}
    old = {stored.name for each in emptied for stored in (each.tar, each.index)}
    for name in _below(dataset.uri, "shards"):
        number = pack_shard.number_of(name)
        if number is not None and number < dataset.version.next_shard_number:
            old.add(name)
    old -= listed
    for name in [*sorted(old), *_receipts(dataset, keys, old)]:
        held.check()
        storage.delete(storage.join(dataset.uri, name))
    storage.clear_leftovers(dataset.uri, before=storage.now(dataset.uri) - _LEFT_OVER_AFTER_S)


class _Done(NamedTuple):
    """What a shard is now, and what it was."""

    entry: ShardEntry
    record: Emptied


def _emptied(dataset: Dataset, entry: ShardEntry, rows: list[int], erasure_id: str) -> _Done:
    table = dataset.samples(entry)
    keys, labels, fields = list(table.keys), list(table.labels), list(table.fields)
    sizes = table.sizes.copy()
    sizes[rows] = 0
    for row in rows:
        keys[row] = records.key_of_erased(dataset.version.dataset_id, table.keys[row])
        labels[row], fields[row] = None, "{}"
    left = replace(table, keys=keys, labels=labels, fields=fields, sizes=sizes)
    with scratch.folder("erasing-") as folder:
        path, uri = Path(folder) / "shard.tar", dataset.shard_uri(entry)
        storage.download(uri, path)
        if manifests.describe_object(entry.tar.name, path) != entry.tar:
            raise ManifestError(f"{uri} is damaged: its SHA-256 is not the manifest's; restore it first")
        _blank(path, {int(table.offsets[row]) for row in rows}, uri)
        tar = pack_shard.store_file(dataset.uri, entry.number, path, "tar")
    index = pack_shard.store_file(dataset.uri, entry.number, tables.encode_samples(left), "parquet")
    ids = tuple(table.ids[rows].tolist())
    record = Emptied(
        number=entry.number,
        erasure_id=erasure_id,
        version=dataset.version.version + 1,
        ids=ids,
        tar=entry.tar,
        index=entry.index,
    )
    return _Done(replace(entry, tar=tar, index=index), record)


def _blank(path: Path, offsets: set[int], uri: str) -> None:
    """Make fillers of all members of the samples whose images begin there; the file is changed in place."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    names: dict[int, str] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name = member.name.partition(".")[0]  # in a tar of ours no key has a dot
            end = member.offset_data + -(-member.size // _BLOCK_BYTES) * _BLOCK_BYTES
            spans[name].append((member.offset, end))  # a long name has blocks of its own before the header
            names[member.offset_data] = name
    lacking = offsets - names.keys()
    if lacking:
        raise ManifestError(f"{uri}: no image begins at byte {min(lacking)}, as its index says; restore both")
    with path.open("r+b") as file:
        for name in sorted(names[offset] for offset in offsets):
            for start, end in spans[name]:
                filler = tarfile.TarInfo(f"__erased__/{start}")
                filler.size = end - start - _BLOCK_BYTES
                file.seek(start)
                file.write(filler.tobuf(tarfile.GNU_FORMAT))
                file.write(bytes(filler.size))


def _rows_by_shard(ids: Collection[int]) -> dict[int, list[int]]:
    ascending = np.array(sorted(ids), np.int64)
    rows: dict[int, list[int]] = defaultdict(list)
    for number, row in zip(shard_of(ascending).tolist(), row_of(ascending).tolist(), strict=True):
        rows[number].append(row)
    return rows


def _below(dataset_uri: str, folder: str) -> Iterator[str]:
    for name in storage.list_names(storage.join(dataset_uri, folder)):
        yield f"{folder}/{name}"


def _receipts(dataset: Dataset, keys: Collection[str], old: Collection[str]) -> Iterator[str]:
    """Receipts of packing that name one of the keys or of the old objects; nobody needs one any more."""
    texts = [json.dumps(text, ensure_ascii=False).encode() for text in (*keys, *old)]

    def told(name: str) -> tuple[str, bool]:
        try:
            data = storage.read(storage.join(dataset.uri, name))
        except ObjectMissing:
            return name, False
        return name, any(text in data for text in texts)

    for name, is_told in read_ahead.in_order(told, _below(dataset.uri, "packing"), num_threads=_NUM_READERS):
        if is_told:
            yield name
