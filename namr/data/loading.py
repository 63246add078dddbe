"""The batches of training and evaluation: pixels, labels and places, loaded by processes of each rank.

A batch is a function of (seed, step) alone: neither rank nor number of loader workers changes a pixel. What a
loader process will decode later it reads while it decodes, so an object store's latency costs no time of its.
Not covered: shuffled passes over all samples, and reading without labels (`reading.stream` does).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.data

from namr import checks
from namr.data import images, sample_index, sampling
from namr.data.datasets import Dataset
from namr.data.images import AugmentConfig, Preprocessing
from namr.data.reading import SampleReader
from namr.data.sample_index import SampleIndex
from namr.data.sampling import BatchSampler, ClassIndex, Pick, PKConfig
from namr.errors import ImageRefused
from namr.store.cache import Cache

Ints = npt.NDArray[np.int64]

_BATCHES_AHEAD = 2
"""that a loader process reads before it is asked for them"""


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
        checks.in_range(self, "num_workers", at_least=0, at_most=1024, place="loader")
        checks.in_range(self, "prefetch_batches_per_worker", at_least=1)
        checks.in_range(self, "cache_bytes", above=0)


class Asked(NamedTuple):
    """What a loader process is told to make."""

    picks: Sequence[Pick]
    soon: Sequence[Pick]
    """What it will be asked for `_BATCHES_AHEAD` batches later, to be read meanwhile; none at the end."""


class PKDataset(torch.utils.data.Dataset[Batch]):
    """Whole batches for lists of picks; `torch.utils.data.DataLoader` asks for each batch at once."""

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
        self._threads: ThreadPoolExecutor | None = None  # made in the process that reads
        self._under_way: dict[Pick, Future[list[bytes]]] = {}

    def __getitems__(self, asked: Asked) -> Batch:
        """One batch; ImageRefused, naming the id, for an image that does not decode."""
        picks = asked.picks
        under_way = self._under_way.pop(picks[0], None)
        if asked.soon:
            self._threads = self._threads or ThreadPoolExecutor(
                _BATCHES_AHEAD, thread_name_prefix="namr-read"
            )
            self._under_way[asked.soon[0]] = self._threads.submit(self._read, asked.soon)
        encoded = under_way.result() if under_way else self._read(picks)
        ids = _ids(picks)
        positions = np.array([pick.position for pick in picks], np.int64)
        seeds = sampling.augmentation_seeds(self._seed, picks[0].step, positions).tolist()
        pixels = np.empty((len(picks), 3, self._prep.size_px, self._prep.size_px), np.uint8)
        for data, seed, out, id in zip(encoded, seeds, pixels, ids.tolist(), strict=True):
            try:
                if self._augment is None:
                    images.prepare(data, self._prep, out)
                else:
                    images.augment(data, self._prep, self._augment, seed=seed, out=out)
            except ImageRefused as refusal:
                uri = self._reader.dataset.uri
                raise ImageRefused(f"{refusal.reason} (sample {id} of {uri})") from refusal
        return Batch(
            pixels=torch.from_numpy(pixels),
            labels=torch.from_numpy(self._index.classes(self._index.places(ids))),
            positions=torch.from_numpy(positions),
            ids=torch.from_numpy(ids),
        )

    def __getitem__(self, asked: Asked) -> Batch:
        return self.__getitems__(asked)

    def _read(self, picks: Sequence[Pick]) -> list[bytes]:
        ids = _ids(picks)
        places = self._index.places(ids)
        return self._reader.read(ids, self._index.offsets(places), self._index.sizes(places))


def _ids(picks: Sequence[Pick]) -> Ints:
    return np.array([pick.id for pick in picks], np.int64)


class _Asking(torch.utils.data.Sampler[Asked]):
    """The batches of a sampler, each with what the process that gets it will be asked for later."""

    def __init__(self, batches: "BatchSampler | InOrder", *, num_workers: int) -> None:
        self._batches = batches
        self._distance = _BATCHES_AHEAD * max(1, num_workers)  # the DataLoader asks its workers in turn

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Asked]:
        held: deque[list[Pick]] = deque()
        for picks in self._batches:
            held.append(picks)
            if len(held) > self._distance:
                yield Asked(held.popleft(), picks)
        while held:
            yield Asked(held.popleft(), ())


class InOrder:
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
    seed: int,
    rank: int,
    world_size: int,
    first_step: int,
    num_steps: int,
    prep: Preprocessing,
    augment: AugmentConfig | None,
    classes: ClassIndex | None = None,
) -> "torch.utils.data.DataLoader[Batch]":
    """The rank's slices of the P x K global batches first_step .. first_step + num_steps - 1.

    seed: of the batches and the augmentation, 0 to 2^63 - 1. classes: which to draw from, None is all of
    them. Labels are class numbers of the whole dataset. ConfigError where there are too few classes with two
    images or more.
    """
    index = sample_index.build(dataset, config.cache_folder)
    sampler = BatchSampler(
        classes or index.class_index,
        batches,
        seed=seed,
        first_step=first_step,
        num_steps=num_steps,
        rank=rank,
        world_size=world_size,
    )
    return _loader(dataset, config, index, sampler, prep=prep, augment=augment, seed=seed)


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
    index = sample_index.build(dataset, config.cache_folder)
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
        batch_sampler=_Asking(sampler, num_workers=config.num_workers),  # type: ignore[arg-type]
        num_workers=config.num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )


def _as_it_is(batch: Any) -> Any:
    return batch  # `PKDataset` returns whole batches
