"""What a source offers, held against what the dataset has: new, as it is there, or changed.

    size     label and number of bytes, which the sample index knows: nothing is read; the default
    bytes    and, where these are the same, the bytes: every image of the source and its shard are read

By size, other bytes of the same number go unnoticed, and all other bytes where the size would take a request
(a table of URIs). Of images that a library holds in memory, whose bytes are of our own making, the label
alone is compared. Fields alone make no image another. A key that was taken out or erased is left alone,
whatever is offered.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from namr import ray_connection
from namr.data import reading, records
from namr.data.datasets import Dataset, ShardEntry
from namr.data.offered import Offered, SourceImage
from namr.errors import ObjectMissing
from namr.store import read_ahead, storage

Compare = Literal["size", "bytes"]

_NUM_READERS = 16


class _Pairs(NamedTuple):
    """Images of a source that seem to be as they are in one shard."""

    dataset: Dataset
    entry: ShardEntry
    images: dict[str, SourceImage]
    """by key"""


def keep_new(offered: Offered, dataset: Dataset, compare: Compare) -> int:
    """Leave in `offered` what is new or changed; how many were taken out of it."""
    erased: set[str] = set()
    for table in dataset.all_samples():
        offered.meet(table, live=dataset.live(table.ids))
        erased.update(table.keys[row] for row in np.flatnonzero(table.sizes == 0))
    if erased:
        salt = dataset.version.dataset_id
        offered.set_taken_out(lambda key: records.key_of_erased(salt, key) in erased)
    if compare == "bytes":
        ray_connection.connect()
        for _, keys in ray_connection.map_tasks(_changed, _pairs(offered, dataset)):
            offered.set_changed(keys)
    return offered.remove_known()


def _pairs(offered: Offered, dataset: Dataset) -> Iterator[_Pairs]:
    for entry in dataset.shards:
        images = {image.key: image for image in offered.same_in(entry.number)}
        if images:
            yield _Pairs(dataset, entry, images)


def _changed(pairs: _Pairs) -> list[str]:
    """Keys of the images whose bytes are others than the shard's."""
    ours = (each for each in reading.stream(pairs.dataset, pairs.entry) if each.key in pairs.images)
    theirs = read_ahead.in_order(
        lambda each: (each, _read(pairs.images[each.key])), ours, num_threads=_NUM_READERS
    )
    return [each.key for each, data in theirs if data not in (None, each.image)]


def _read(image: SourceImage) -> bytes | None:
    """None where nothing is there any more: then nothing changed it."""
    try:
        return storage.read(image.location)
    except ObjectMissing:
        return None
