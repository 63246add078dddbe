"""Samples out of shards: as a stream, by id, and as the batches that training and evaluation want.

Extraction reads whole shards from front to back (`stream`). Training reads P classes x K samples from
anywhere: `SampleReader` takes a whole batch at once, and fills a bounded cache of whole shards on local disk
in the background while it answers from the object store. Where the dataset is larger than the cache, the
shards that fit are cached and the others stay remote.

A batch is a function of (seed, step) alone: neither rank nor number of loader workers changes a pixel.
Not covered: shuffled passes over all samples, and reading without labels (`stream` does).
"""

import fcntl
import hashlib
import os
import queue
import random
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.data

from namr import checks
from namr.data import datasets, images, sampling
from namr.data.datasets import Dataset, ShardEntry
from namr.data.images import AugmentConfig, Preprocessing
from namr.data.sample_index import SampleIndex, write_sample_index
from namr.data.sampling import BatchSampler, ClassIndex, Pick, PKConfig
from namr.data.shards import shard_of
from namr.errors import ImageRefused, ManifestError, NamrError
from namr.store import ranges, storage
from namr.store.cache import Cache

Ints = npt.NDArray[np.int64]

_CHUNK_BYTES = 1 << 20
_UNUSED_AFTER_S = 7 * 24 * 3600.0


class StreamedSample(NamedTuple):
    """A sample as `stream` yields it."""

    id: int
    key: str
    label: str | None
    image: bytes


class Batch(NamedTuple):
    """Images of one step, as one rank sees them."""

    pixels: torch.Tensor
    """uint8 (b, 3, size, size)"""
    labels: torch.Tensor
    """int64 (b,), class numbers of the SampleIndex"""
    positions: torch.Tensor
    """int64 (b,), places in the global batch (in the whole pass, for evaluation)"""
    ids: torch.Tensor
    """int64 (b,)"""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a rank gets its batches."""

    num_workers: int = 2
    """loader processes of each rank; 0 loads in the training process"""
    prefetch_batches_per_worker: int = 2
    """batches that each loader process holds ready"""
    cache_folder: Path = Path("~/.cache/namr/reading")
    """local disk for whole shards and the class index, shared by all ranks of a node"""
    cache_bytes: int = 50 << 30
    """limit of the shard cache; not used for datasets on local disk"""

    def __post_init__(self) -> None:
        checks.in_range(self, "num_workers", at_least=0)
        checks.in_range(self, "prefetch_batches_per_worker", at_least=1)
        checks.in_range(self, "cache_bytes", above=0)


def stream(dataset: Dataset, entry: ShardEntry) -> Iterator[StreamedSample]:
    """The live samples of a shard, in row order, the tar read once from front to back.

    What came counts only when the stream has ended: ManifestError is raised where the tar is shorter than
    its index says, and at the end if its digest is not the manifest's.
    """
    table, uri = dataset.samples(entry), dataset.shard_uri(entry)
    live = dataset.live(table.ids) & (table.sizes > 0)
    digest = hashlib.sha256()
    with storage.open_stream(uri) as file:
        for row, (offset, size) in enumerate(zip(table.offsets, table.sizes, strict=True)):
            _take(file, int(offset) - file.tell(), digest, uri)
            image = _take(file, int(size), digest, uri)
            if live[row]:
                yield StreamedSample(int(table.ids[row]), table.keys[row], table.labels[row], image)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != entry.tar.sha256:
        raise ManifestError(
            f"{uri} is damaged: its SHA-256 is {digest.hexdigest()}, version {dataset.version.version} of "
            f"{dataset.uri} says {entry.tar.sha256}; restore it"
        )


def _take(file: BinaryIO, num_bytes: int, digest: "hashlib._Hash", uri: str) -> bytes:
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        raise ManifestError(f"{uri} is truncated: it ends inside a sample that its index lists; restore it")
    digest.update(data)
    return data


def build_class_index(dataset: Dataset, folder: Path) -> SampleIndex:
    """The sample index of a dataset version in `folder`, written by the first process of a node to ask.

    The others wait for it. Labels are taken from the shards' sample indexes.
    """
    target = folder.expanduser().absolute() / "indexes" / dataset.digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{dataset.digest}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _remove_unused(target.parent)
            with_live = ((table, dataset.live(table.ids)) for table in dataset.all_samples())
            write_sample_index(target, with_live)
        os.utime(target)
    return SampleIndex(target)


def _remove_unused(folder: Path) -> None:
    """Indexes of versions that nobody opened for a week; who has one mapped keeps it."""
    for path in folder.iterdir():
        if path.is_dir() and path.stat().st_mtime < time.time() - _UNUSED_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)


class SampleReader:
    """Reads many images at once, wherever their shards lie.

    With a cache, shards of a remote dataset are copied to local disk in the background, as many as fit, and
    read from there as soon as they are whole. If that fails (a full disk, a damaged shard), the next read
    raises what went wrong. Every process makes its own reader; it can be pickled to get there.
    """

    def __init__(self, dataset: Dataset, *, cache: Cache | None) -> None:
        self.dataset, self.cache = dataset, cache
        self._entries = {entry.number: entry for entry in dataset.shards}
        self._filler: _Filler | None = None

    def read(self, ids: Ints, offsets: Ints, sizes: Ints) -> list[bytes]:
        """The images' bytes, in the order asked; (b,) each. A sample may be asked for twice."""
        numbers = shard_of(ids).tolist()
        uris = {number: self._uri(number) for number in set(numbers)}
        self._fill(uris)
        wanted = [
            storage.Range(uris[number], start, start + size)
            for number, start, size in zip(numbers, offsets.tolist(), sizes.tolist(), strict=True)
        ]
        return ranges.read_near(wanted)

    def _uri(self, number: int) -> str:
        try:
            entry = self._entries[number]
        except KeyError:
            raise ManifestError(
                f"{self.dataset.uri} has no shard {number} in version {self.dataset.version.version}"
            ) from None
        cached = self.cache.get(entry.tar.sha256) if self.cache else None
        return str(cached) if cached else self.dataset.shard_uri(entry)

    def _fill(self, uris: dict[int, str]) -> None:
        if self._filler:
            self._filler.check()
        elif self.cache and not all(storage.is_local(uri) for uri in uris.values()):
            self._filler = _Filler(self.dataset, self.cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reader, (self.dataset, self.cache)


def _reader(dataset: Dataset, cache: Cache | None) -> SampleReader:
    return SampleReader(dataset, cache=cache)


class Pictures:
    """Encoded images of a dataset version, for showing; the version is opened by the first one asked for.

    May be used by many threads at once.
    """

    def __init__(self, dataset_uri: str, dataset_version: int) -> None:
        self._where = dataset_uri, dataset_version
        self._opening = threading.Lock()
        self._reader: SampleReader | None = None

    def read(self, id: int, offset: int, size: int) -> bytes:
        """The bytes of one; ManifestError where the version or the shard is gone."""
        return self.read_many([id], [offset], [size])[0]

    def read_many(self, ids: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """The bytes of some, in the order asked, with few requests."""
        with self._opening:
            if self._reader is None:
                self._reader = SampleReader(datasets.open_version(*self._where), cache=None)
        return self._reader.read(*(np.array(column, np.int64) for column in (ids, offsets, sizes)))


class _Filler:
    """A thread that copies shards to the cache, one after the other, until all that fit are there."""

    def __init__(self, dataset: Dataset, cache: Cache) -> None:
        self._dataset, self._cache = dataset, cache
        self._failures: queue.SimpleQueue[NamrError | OSError] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="namr-shard-cache", daemon=True).start()

    def check(self) -> None:
        """Raise what went wrong, if something did."""
        if not self._failures.empty():
            raise self._failures.get()

    def _run(self) -> None:
        fitting, filled = [], 0
        for entry in self._dataset.shards:
            filled += entry.tar.size_bytes
            if filled > self._cache.max_bytes:
                break
            fitting.append(entry)
        random.Random(os.getpid()).shuffle(fitting)  # processes of a node start with different shards
        try:
            for entry in fitting:
                uri = self._dataset.shard_uri(entry)
                if not storage.is_local(uri):
                    self._cache.path(uri, sha256=entry.tar.sha256)
        except (NamrError, OSError) as error:
            self._failures.put(error)


class PKDataset(torch.utils.data.Dataset[Batch]):
    """Whole batches for a list of picks; `torch.utils.data.DataLoader` asks for each batch at once."""

    def __init__(
        self,
        reader: SampleReader,
        index: SampleIndex,
        *,
        prep: Preprocessing,
        augment: AugmentConfig | None,
        seed: int,
    ) -> None:
        """augment: None prepares images as search does. seed: of the augmentation, with step and position."""
        self._reader, self._index = reader, index
        self._prep, self._augment, self._seed = prep, augment, seed

    def __getitems__(self, picks: Sequence[Pick]) -> Batch:
        """One batch; ImageRefused, naming the id, for an image that does not decode."""
        ids = np.array([pick.row for pick in picks], np.int64)
        places = self._index.places(ids)
        found = self._reader.read(ids, self._index.offsets(places), self._index.sizes(places))
        pixels = np.empty((len(picks), 3, self._prep.size_px, self._prep.size_px), np.uint8)
        for place, (pick, data) in enumerate(zip(picks, found, strict=True)):
            try:
                pixels[place] = self._pixels(data, pick)
            except ImageRefused as refusal:
                uri = self._reader.dataset.uri
                raise ImageRefused(f"{refusal.reason} (sample {pick.row} of {uri})") from refusal
        return Batch(
            pixels=torch.from_numpy(pixels),
            labels=torch.from_numpy(self._index.classes(places)),
            positions=torch.tensor([pick.position for pick in picks]),
            ids=torch.from_numpy(ids),
        )

    def __getitem__(self, pick: Pick) -> Batch:
        return self.__getitems__([pick])

    def _pixels(self, data: bytes, pick: Pick) -> npt.NDArray[np.uint8]:
        if self._augment is None:
            return images.prepare(data, self._prep)
        seed = sampling.augmentation_seed(self._seed, pick.step, pick.position)
        return images.augment(data, self._prep, self._augment, seed=seed)


class InOrder(torch.utils.data.Sampler[list[Pick]]):
    """A rank's part of some samples, each once, in the order given, in batches; the last may be smaller."""

    def __init__(self, ids: Ints, *, batch_size_per_worker: int, rank: int, world_size: int) -> None:
        self._slice = sampling.slice_of_rank(len(ids), rank=rank, world_size=world_size)
        self._ids, self._batch_size = ids[self._slice], batch_size_per_worker

    def __len__(self) -> int:
        return -(-len(self._ids) // self._batch_size)

    def __iter__(self) -> Iterator[list[Pick]]:
        for step in range(len(self)):
            start = step * self._batch_size
            ids = self._ids[start : start + self._batch_size].tolist()
            yield [Pick(id, step, self._slice.start + start + place) for place, id in enumerate(ids)]


def make_loader(
    dataset: Dataset,
    config: LoaderConfig,
    *,
    batches: PKConfig,
    rank: int,
    world_size: int,
    first_step: int,
    num_steps: int,
    prep: Preprocessing,
    augment: AugmentConfig | None,
    classes: ClassIndex | None = None,
) -> "torch.utils.data.DataLoader[Batch]":
    """The rank's slices of the P x K global batches first_step .. first_step + num_steps - 1.

    classes: which to draw from, rows are ids; None is all of them. Labels are class numbers of the whole
    dataset. ConfigError where there are too few classes with two images or more.
    """
    index = build_class_index(dataset, config.cache_folder)
    sampler = BatchSampler(
        classes or index.class_index,
        batches,
        first_step=first_step,
        num_steps=num_steps,
        rank=rank,
        world_size=world_size,
    )
    return _loader(dataset, config, index, sampler, prep=prep, augment=augment, seed=batches.seed)


def make_evaluation_loader(
    dataset: Dataset,
    config: LoaderConfig,
    *,
    batch_size_per_worker: int,
    rank: int,
    world_size: int,
    prep: Preprocessing,
    ids: Ints | None = None,
) -> "torch.utils.data.DataLoader[Batch]":
    """Every live, labelled sample (or those of `ids`) once over all ranks, in order, as search sees it."""
    index = build_class_index(dataset, config.cache_folder)
    sampler = InOrder(
        index.labelled_ids if ids is None else ids,
        batch_size_per_worker=batch_size_per_worker,
        rank=rank,
        world_size=world_size,
    )
    return _loader(dataset, config, index, sampler, prep=prep, augment=None, seed=0)


def _loader(
    dataset: Dataset,
    config: LoaderConfig,
    index: SampleIndex,
    sampler: BatchSampler | InOrder,
    *,
    prep: Preprocessing,
    augment: AugmentConfig | None,
    seed: int,
) -> "torch.utils.data.DataLoader[Batch]":
    folder = config.cache_folder.expanduser().absolute()
    reader = SampleReader(dataset, cache=Cache(folder / "shards", config.cache_bytes))
    workers: dict[str, Any] = {}
    if config.num_workers:
        workers = {
            "multiprocessing_context": "spawn",  # torch, Arrow and S3 connections don't survive a fork
            "persistent_workers": True,
            "prefetch_factor": config.prefetch_batches_per_worker,
        }
    return torch.utils.data.DataLoader(
        PKDataset(reader, index, prep=prep, augment=augment, seed=seed),
        batch_sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )


def _as_it_is(batch: Any) -> Any:
    return batch  # `PKDataset` returns whole batches
