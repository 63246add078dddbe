"""From a shard to batches of pixels: read, verified and decoded beside the model, a bounded number ahead.

One thread reads the shard from front to back and hands blocks of images to those that decode: threads of this
process, or Ray tasks on any node of the cluster. What comes back is in the order of the rows and the same
bytes, whoever decoded it. In memory are a few blocks and a few batches, however large the shard is.

Not covered: the model (`extraction`), and what is done with rows that are refused.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from namr import ray_connection
from namr.data import images, reading
from namr.data.datasets import Dataset, ShardEntry
from namr.data.images import Preprocessing
from namr.data.reading import StreamedSample
from namr.errors import ImageRefused
from namr.store import read_ahead

_BLOCK_IMAGES = 16
_BLOCK_BYTES = 16 << 20
_BATCHES_AHEAD = 2

Pixels = npt.NDArray[np.uint8]


class Batch(NamedTuple):
    """Rows of a shard, in order."""

    samples: list[StreamedSample]
    """those that were decoded, without their bytes"""
    pixels: Pixels
    """(n, 3, size, size)"""
    refused: list[tuple[StreamedSample, str]]
    """those that were not, without their bytes, each with the reason"""


@dataclass
class Clock:
    """What the stages before the model have taken so far, in seconds over all threads."""

    read_s: float = 0.0
    decode_s: float = 0.0


class _Block(NamedTuple):
    samples: list[StreamedSample]
    images: list[bytes]


class _Decoded(NamedTuple):
    samples: list[StreamedSample]
    pixels: list[Pixels | ImageRefused]
    seconds: float


def batches(
    dataset: Dataset,
    entry: ShardEntry,
    prep: Preprocessing,
    *,
    batch_size: int,
    num_threads: int,
    num_tasks: int,
    clock: Clock,
) -> Generator[Batch, Any, None]:
    """All rows of a shard that were not erased, `batch_size` decoded ones at a time; the last may be fewer.

    num_tasks: Ray tasks of one core each that decode at once; 0: `num_threads` threads do. Tombstones are not
    looked at. Raises ManifestError where the shard is not what its manifest says, at its end at the latest.
    """

    def decode(block: _Block) -> _Decoded:
        return _decode(block, prep)

    blocks = _blocks(dataset, entry, clock)
    if num_tasks:
        decoded = ray_connection.tasks_in_order(decode, blocks, max_in_flight=num_tasks)
    else:
        decoded = read_ahead.in_order(decode, blocks, num_threads=num_threads)
    return read_ahead.beside(_joined(decoded, prep, batch_size, clock), num_ahead=_BATCHES_AHEAD)


def _blocks(dataset: Dataset, entry: ShardEntry, clock: Clock) -> Iterator[_Block]:
    """The rows in pieces that are worth a call, of few images where these are large."""
    all_rows = replace(dataset, version=replace(dataset.version, tombstones=()))
    samples: list[StreamedSample] = []
    encoded: list[bytes] = []
    begun = time.perf_counter()
    for sample in reading.stream(all_rows, entry):
        samples.append(sample._replace(image=b""))
        encoded.append(sample.image)
        if len(samples) == _BLOCK_IMAGES or sum(map(len, encoded)) >= _BLOCK_BYTES:
            clock.read_s += time.perf_counter() - begun
            yield _Block(samples, encoded)
            samples, encoded, begun = [], [], time.perf_counter()
    clock.read_s += time.perf_counter() - begun
    if samples:
        yield _Block(samples, encoded)


def _decode(block: _Block, prep: Preprocessing) -> _Decoded:
    begun = time.perf_counter()
    pixels = [_pixels(data, prep) for data in block.images]
    return _Decoded(block.samples, pixels, time.perf_counter() - begun)


def _pixels(data: bytes, prep: Preprocessing) -> Pixels | ImageRefused:
    try:
        return images.prepare(data, prep)
    except ImageRefused as refusal:
        return refusal


def _joined(
    decoded: Iterator[_Decoded], prep: Preprocessing, batch_size: int, clock: Clock
) -> Generator[Batch, Any, None]:
    """Blocks of rows as batches of decoded ones."""

    def empty() -> Batch:
        return Batch([], np.empty((batch_size, 3, prep.size_px, prep.size_px), np.uint8), [])

    batch = empty()
    for block in decoded:
        clock.decode_s += block.seconds
        for sample, pixels in zip(block.samples, block.pixels, strict=True):
            if isinstance(pixels, ImageRefused):
                batch.refused.append((sample, pixels.reason))
                continue
            batch.pixels[len(batch.samples)] = pixels
            batch.samples.append(sample)
            if len(batch.samples) == batch_size:
                yield batch
                batch = empty()
    if batch.samples or batch.refused:
        yield batch._replace(pixels=batch.pixels[: len(batch.samples)])
