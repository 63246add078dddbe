"""Packing: a source's images into shards, in parallel, and a new version of the dataset that lists them.

`pack` makes the dataset contain what the source offers. Images that the dataset has as they are, by key, are
left alone, and so are those that were taken out of it, so a nightly run on a growing folder packs the new
ones only, and running it twice changes nothing. A changed image, or one with another label, is packed as a
new sample of its key, and the sample before is tombstoned, in one new version (what counts as changed:
`comparing`). What the source no longer has stays in the dataset.

Every image is decoded once here. What can't be decoded is refused, listed with its reason, and fails the run
above `max_bad_fraction`; what can is stored byte for byte as it came. Things that are no images are passed
over, counted and named. Shards are one Ray task each: it writes
the tar, the sample index, and last a receipt under the digest of the plan. A run that was killed anywhere
leaves the dataset as it was, and the same run again goes on from the receipts. The new version is published
last, if the pointer is still the one that was read first.

Foreign WebDataset shards ("webdataset:<folder of tars>") are read, checked and indexed, and stay where they
are (`foreign`). On a cluster every node must see the source under the same path or URI.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from namr import checks, progress, ray_connection
from namr.data import comparing, datasets, foreign
from namr.data.comparing import Compare
from namr.data.datasets import Head, ShardEntry
from namr.data.leftovers import PassedOver, RefusedImage, Tally
from namr.data.offered import Offered, Order, SourceImage
from namr.data.pack_shard import Receipt, ShardPlan, run_plan
from namr.data.records import SourceRecord
from namr.data.shards import among
from namr.data.sources import Classes, open_source
from namr.errors import ConfigError, ImageRefused, ManifestError, ObjectMissing
from namr.store import storage

_NUM_READERS = 16
_NUM_SIZES_ASKED = 256
_TAR_BYTES_PER_SAMPLE = 2048
"""two headers, the JSON, and padding"""
_SMALLEST_SHARD_BYTES = 4 << 20
_SHARDS_PER_CORE = 3


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """What to pack, and where to."""

    source: str
    """a folder of class folders, a .csv or .parquet with a path or uri column, "digits",
    "torchvision:<Name>", "cub:<folder>:<split>" (or cars196, sop, inshop, vehicleid: the files as their
    authors give them out), or "webdataset:<folder of tars>" to index foreign shards where they are"""
    dataset_uri: str
    """the dataset that the images are brought into: a folder or s3://bucket/name; made if it isn't there"""
    classes: Classes = "all"
    """all, or one half of the sorted labels, for a test on classes that training never saw"""
    compare: Compare = "size"
    """how a changed image is told from one that the dataset has: by label and size, which reads nothing, or
    by label and bytes, which reads all images of the source and of their shards"""
    order: Order = "class"
    """class: the images of a class lie together, which random reads by class like; shuffled: all mixed"""
    shard_bytes: int = 256 << 20
    """most bytes of a shard; a small data set is cut into smaller ones, so that every core has some to do"""
    seed: int = 0
    """decides the order of classes and images, whatever the size of shards"""
    max_bad_fraction: float = 0.01
    """the run fails if a larger share of the source's images is refused"""
    download_folder: Path = Path("~/.cache/namr")
    """where torchvision's data sets are downloaded to"""

    def __post_init__(self) -> None:
        checks.in_range(self, "shard_bytes", above=0)
        checks.in_range(self, "seed", at_least=0, at_most=2**63 - 1)
        checks.in_range(self, "max_bad_fraction", at_least=0, at_most=1)
        if self.classes != "all" and self.source.startswith(foreign.PREFIX):
            raise ConfigError(f"classes is {self.classes}; foreign shards are indexed whole, expected all")


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What a run found and did."""

    dataset_uri: str
    version: int
    """the current version after the run"""
    num_found: int
    num_known: int
    """were in the dataset before as they are, or were taken out of it, by key"""
    num_packed: int
    num_replaced: int
    """of those packed, images that the dataset had otherwise: what it had is tombstoned"""
    num_refused: int
    num_new_shards: int
    num_classes: int
    """of the whole dataset"""
    num_single_classes: int
    """of these, classes with one image: kept, but training can't make pairs of them"""
    num_unlabelled: int
    seconds: float
    refused: tuple[RefusedImage, ...]
    passed_over: tuple[PassedOver, ...]
    """what the source holds beside images, by kind"""


class _Work(NamedTuple):
    """What a run is to do."""

    plans: Iterable[ShardPlan]
    """each made when it is its turn"""
    new: Offered
    """images that are packed, not indexed"""
    num_to_pack: int
    """images; shards where num_found is None"""
    num_known: int
    num_found: int | None
    """None where only reading the shards will tell"""
    refused: tuple[RefusedImage, ...]
    """before any was read"""
    passed_over: Tally


def pack(config: PackingConfig, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> PackReport:
    """Bring the images of a source into a dataset, as new shards and a new version.

    Raises ConfigError for a source that is empty, unclear or has a key twice, StorageError where the dataset
    can't be written, ImageRefused above `max_bad_fraction`, ManifestError for a damaged foreign shard or
    dataset, Conflict if another run published meanwhile (run again: what is new is worked out anew).
    """
    started = time.monotonic()
    uri = storage.absolute(config.dataset_uri)
    storage.check_writable(uri)
    before = datasets.head(uri)
    is_foreign = config.source.startswith(foreign.PREFIX)
    work = _foreign_work(config, before) if is_foreign else _own_work(config, before)
    receipts = _run(work, config.max_bad_fraction)
    entries = [receipt.entry for receipt in receipts if receipt.entry]
    refused = work.refused + tuple(image for receipt in receipts for image in receipt.refused)
    for receipt in receipts:
        work.passed_over.add_all(receipt.passed_over)
    num_packed = sum(entry.num_samples for entry in entries)
    num_found = work.num_known + num_packed + len(refused)
    if work.num_found not in (None, num_found):
        raise ManifestError(f"{config.source}: {work.num_found} images found, {num_found} accounted for")
    _check_refused(refused, num_found, config.max_bad_fraction)
    if is_foreign:
        foreign.check_keys(before, entries)
    images_of_class, replaced = _counted(before, entries, work.new)
    record = SourceRecord(
        source=config.source,
        num_found=num_found,
        num_known=work.num_known,
        num_refused=len(refused),
        num_packed=num_packed,
        first_shard_number=before.next_shard_number,
        num_replaced=len(replaced),
    )
    if entries:
        dataset = datasets.publish_version(before, entries, now=clock(), tombstones=replaced, source=record)
    elif before.dataset:
        dataset = before.dataset
    else:
        raise ConfigError(f"{config.source}: all {num_found} images were refused, nothing was packed")
    num_unlabelled = images_of_class.pop(None, 0)
    return PackReport(
        dataset_uri=uri,
        version=dataset.version.version,
        num_found=num_found,
        num_known=work.num_known,
        num_packed=num_packed,
        num_replaced=len(replaced),
        num_refused=len(refused),
        num_new_shards=len(entries),
        num_classes=len(images_of_class),
        num_single_classes=sum(num == 1 for num in images_of_class.values()),
        num_unlabelled=num_unlabelled,
        seconds=time.monotonic() - started,
        refused=refused,
        passed_over=work.passed_over.total(),
    )


def _own_work(config: PackingConfig, before: Head) -> _Work:
    source = open_source(config.source, classes=config.classes, download_folder=config.download_folder)
    new = source.images
    num_found = len(new) + len(source.refused)
    num_known = comparing.keep_new(new, before.dataset, config.compare) if before.dataset else 0
    _guess_sizes(new, config.seed)
    shard_bytes = _shard_bytes(new, config)
    plans = (
        ShardPlan(dataset_uri=before.uri, number=before.next_shard_number + place, images=images)
        for place, images in enumerate(cut(new, config, shard_bytes=shard_bytes))
    )
    passed_over = Tally()
    passed_over.add_all(source.passed_over)
    return _Work(plans, new, len(new), num_known, num_found, source.refused, passed_over)


def _shard_bytes(new: Offered, config: PackingConfig) -> int:
    """Small enough that every core of the Ray that packs has some shards to make.

    A power of two times the smallest, so that a run that goes on for one that was killed cuts alike even
    where the cluster has meanwhile grown a little.
    """
    if not len(new):
        return config.shard_bytes
    ray_connection.connect()
    num_bytes = new.num_bytes + len(new) * _TAR_BYTES_PER_SAMPLE
    wanted = num_bytes // (_SHARDS_PER_CORE * max(1, ray_connection.total_cpus()))
    doublings = max(0, (wanted // _SMALLEST_SHARD_BYTES).bit_length() - 1)
    return min(config.shard_bytes, _SMALLEST_SHARD_BYTES << doublings)


def _foreign_work(config: PackingConfig, before: Head) -> _Work:
    passed_over = Tally()
    plans, num_known = foreign.plans(config.source, before, passed_over)
    return _Work(plans, Offered(), len(plans), num_known, None, (), passed_over)


def cut(offered: Offered, config: PackingConfig, *, shard_bytes: int) -> Iterator[list[SourceImage]]:
    """The images of each shard, in order: a seeded shuffle, by class or of all, cut near `shard_bytes`.

    By class, a class is cut only if it is larger than a shard, so that its images are one range. Images
    without a label count as one class, the last. The order doesn't depend on where it is cut.
    """
    part: list[SourceImage] = []
    filled, last = 0, None
    placed = offered.in_order(config.order, seed=config.seed, more_bytes=_TAR_BYTES_PER_SAMPLE)
    for image, group, group_bytes in placed:
        size = (image.num_bytes or 0) + _TAR_BYTES_PER_SAMPLE
        begins = not part or group != last
        wanted = group_bytes if begins and group_bytes <= shard_bytes else size
        if part and filled + wanted > shard_bytes:
            yield part
            part, filled = [], 0
        part.append(image)
        filled, last = filled + size, group
    if part:
        yield part


def _guess_sizes(offered: Offered, seed: int) -> None:
    """The size of remote images, which none is known of yet: the mean of a seeded sample."""
    num_remote = sum(1 for _ in offered.of_unknown_size())
    places = np.random.default_rng(seed).integers(max(1, num_remote), size=_NUM_SIZES_ASKED)
    asked = set(places.tolist())
    remote = [location for place, location in enumerate(offered.of_unknown_size()) if place in asked]
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        sizes = list(readers.map(_size_or_zero, remote))
    offered.set_unknown_sizes(sum(sizes) // max(1, len(sizes)))


def _size_or_zero(uri: str) -> int:
    try:
        return storage.size(uri)
    except ObjectMissing:
        return 0  # reading it will refuse it, with the reason


def _run(work: _Work, max_bad_fraction: float) -> list[Receipt]:
    """The receipts in plan order; ends early once too many images are refused."""
    if not work.num_to_pack:
        return []
    ray_connection.connect()
    receipts: dict[int, Receipt] = {}
    refused = list(work.refused)
    num_done, what = 0, "indexing shards" if work.num_found is None else "packing images"
    with progress.shown(what, work.num_to_pack) as show:
        for place, receipt in ray_connection.map_tasks(run_plan, work.plans):
            receipts[place] = receipt
            refused += receipt.refused
            if work.num_found:
                _check_refused(refused, work.num_found, max_bad_fraction)
            num_done += 1 if work.num_found is None else receipt.num_images
            show(num_done, f"({len(refused)} images refused)" if refused else "")
    return [receipts[place] for place in sorted(receipts)]


def _check_refused(refused: Sequence[RefusedImage], num_found: int, max_bad_fraction: float) -> None:
    if len(refused) > max_bad_fraction * num_found:
        first = refused[0]
        raise ImageRefused(
            f"{len(refused)} of {num_found} images, more than max_bad_fraction {max_bad_fraction} allows; "
            f"the first is {first.location} (key {first.key!r}): {first.reason}. Nothing was published; "
            "repair or remove them, or allow more"
        )


class _Counted(NamedTuple):
    """What the dataset will have."""

    images_of_class: Counter[str | None]
    """live images of each label; None counts those without one"""
    replaced: set[int]
    """ids of samples that have a newer one of their key"""


def _counted(before: Head, entries: Sequence[ShardEntry], new: Offered) -> _Counted:
    """With these new shards.

    It is read back before anything is published: a worker node that wrote to a disk of its own is found out.
    """
    counts: Counter[str | None] = Counter()
    replaced: set[int] = set()
    for table in datasets.read_samples(before.uri, entries):
        counts.update(table.labels)
        replaced.update(new.old_ids(table.keys))
    gone = np.array(sorted(replaced), np.int64)
    for table in before.dataset.all_samples() if before.dataset else ():
        live = before.dataset.live(table.ids) & ~among(table.ids, gone) if before.dataset else ()
        counts.update(label for label, is_live in zip(table.labels, live, strict=True) if is_live)
    return _Counted(counts, replaced)
