"""Samples out of shards: whole shards as a stream, and images by id from anywhere.

Extraction reads whole shards from front to back (`stream`). Training reads P classes x K samples from
anywhere: `SampleReader` takes a whole batch at once, and fills a bounded cache of whole shards on local disk
in the background while it answers from the object store. Where the dataset is larger than the cache, the
shards that fit are cached and the others stay remote. `Pictures` is for showing what was found.

A shard that an erasure emptied meanwhile has every other image where it was: who reads goes on with what took
its place.

Not covered: which images are read together (`loading`).
"""

import hashlib
import os
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from namr.data import datasets, records
from namr.data.datasets import Dataset, ShardEntry
from namr.data.shards import among, shard_of
from namr.errors import ManifestError, NamrError, ObjectMissing
from namr.store import ranges, storage
from namr.store.cache import Cache

Ints = npt.NDArray[np.int64]

_CHUNK_BYTES = 1 << 20


class StreamedSample(NamedTuple):
    """A sample as `stream` yields it."""

    id: int
    key: str
    label: str | None
    image: bytes


def stream(dataset: Dataset, entry: ShardEntry) -> Iterator[StreamedSample]:
    """The live samples of a shard, in row order, the tar read once from front to back.

    What came counts only when the stream has ended: ManifestError is raised where the tar is gone or shorter
    than its index says, and at the end if its digest is not the manifest's.
    """
    table, uri = dataset.samples(entry), dataset.shard_uri(entry)
    live = dataset.live(table.ids) & (table.sizes > 0)
    digest = hashlib.sha256()
    with _opened(dataset, entry) as file:
        for row, (offset, size) in enumerate(zip(table.offsets, table.sizes, strict=True)):
            _pass_over(file, int(offset), digest, uri)
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


def _opened(dataset: Dataset, entry: ShardEntry) -> BinaryIO:
    uri = dataset.shard_uri(entry)
    try:
        return storage.open_stream(uri)
    except ObjectMissing as error:
        raise ManifestError(f"{uri} is missing: {datasets.why_gone(dataset.uri, entry.tar)}") from error


def _pass_over(file: BinaryIO, offset: int, digest: "hashlib._Hash", uri: str) -> None:
    """What lies before `offset` may be anything, of any size: it is not held whole."""
    while (num_bytes := offset - file.tell()) > 0:
        _take(file, min(num_bytes, _CHUNK_BYTES), digest, uri)


def _take(file: BinaryIO, num_bytes: int, digest: "hashlib._Hash", uri: str) -> bytes:
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        raise ManifestError(f"{uri} is truncated: it ends inside a sample that its index lists; restore it")
    digest.update(data)
    return data


class SampleReader:
    """Reads many images at once, wherever their shards lie.

    With a cache, shards of a remote dataset are copied to local disk in the background, as many as fit, and
    read from there as soon as they are whole. If that fails (a full disk, a damaged shard), the next read
    raises what went wrong. Many threads may read at once. Every process makes its own reader; it can be
    pickled to get there.
    """

    def __init__(self, dataset: Dataset, *, cache: Cache | None) -> None:
        self.cache = cache
        self._filler: _Filler | None = None
        self._beginning = threading.Lock()
        self._open(dataset)

    def _open(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._entries = {entry.number: entry for entry in dataset.shards}
        erased = records.ids_of(dataset.version.emptied, self._entries)
        self._erased = np.array(sorted(erased), np.int64)

    def read(self, ids: Ints, offsets: Ints, sizes: Ints) -> list[bytes]:
        """The images' bytes, in the order asked; (b,) each. A sample may be asked for twice.

        Raises ManifestError for an image that was erased since the caller learnt where it lies.
        """
        before = self.dataset  # another thread may open it anew meanwhile
        try:
            return self._read(ids, offsets, sizes)
        except ObjectMissing:
            self._open(datasets.open_version(before.uri, before.version.version))
            if self.dataset.shards == before.shards:
                raise
            return self._read(ids, offsets, sizes)

    def _read(self, ids: Ints, offsets: Ints, sizes: Ints) -> list[bytes]:
        erased = ids[among(ids, self._erased)]
        if len(erased):
            raise ManifestError(
                f"image {erased[0]} of {self.dataset.uri} was erased since this run began; run the same "
                "command again, which goes on without it"
            )
        numbers = shard_of(ids).tolist()
        places = {number: self._place(number) for number in set(numbers)}  # cached ones stay while these live
        uris = {number: str(place) for number, place in places.items()}
        self._fill(uris)
        wanted = [
            storage.Range(uris[number], start, start + size)
            for number, start, size in zip(numbers, offsets.tolist(), sizes.tolist(), strict=True)
        ]
        return ranges.read_near(wanted)

    def _place(self, number: int) -> Path | str:
        try:
            entry = self._entries[number]
        except KeyError:
            raise ManifestError(
                f"{self.dataset.uri} has no shard {number} in version {self.dataset.version.version}"
            ) from None
        cached = self.cache.get(entry.tar.sha256) if self.cache else None
        return cached or self.dataset.shard_uri(entry)

    def _fill(self, uris: dict[int, str]) -> None:
        with self._beginning:
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
                if storage.is_local(uri):
                    continue
                with suppress(ObjectMissing):  # emptied since: read where it is
                    if self._cache.path_if_room(uri, sha256=entry.tar.sha256) is None:
                        break  # the rest is somebody else's, who uses it
        except (NamrError, OSError) as error:
            self._failures.put(error)
