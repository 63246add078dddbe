"""P x K global batches as a pure function of (seed, step), sliced by rank.

A batch holds K samples of each of P distinct classes. Classes come in epochs: each epoch visits every
class once, in an order of its own, and batches run on over its end without repeating a class. Where P is
more than half of the classes it is the left-out classes that come in such epochs. So every class is
visited equally often, and any step is computed directly: resuming costs nothing and keeps no state.

Which samples of a class: n samples, K wanted. Every sample floor(K / n) times, and K mod n distinct ones
once more; so no repetition for n >= K. Classes with fewer than 2 samples have no pairs and are left out
(`ClassIndex.num_excluded` counts them).

All draws are hashes of integers, so no library's random stream has to stay as it is. Not covered: reading
the samples (`reading`) and plain shuffled epochs over samples.

Legend: N rows, C classes, P classes in a batch, K samples of a class in a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from namr import checks, hashing
from namr.errors import ConfigError, ShapeError
from namr.hashing import Hashes

Ints = NDArray[np.int64]

# What a hash is for; no two draws share a stream.
_ORDER, _SAMPLES, _SHUFFLE, _AUGMENTATION = range(4)


@dataclass(frozen=True, eq=False)
class ClassIndex:
    """The samples of each class: those of class c are ids[starts[c]:starts[c + 1]]. May be memory-mapped."""

    ids: Ints
    """(n,) int64, sorted by class: ids of samples in a dataset, or rows where an array holds the samples."""
    starts: Ints
    """(C + 1,) int64."""

    @classmethod
    def from_labels(cls, class_of_row: NDArray[np.integer]) -> "ClassIndex":
        """From the class number of each row (N,), whose ids are the rows; -1 = no label, never drawn."""
        if class_of_row.ndim != 1:
            raise ShapeError(f"class_of_row has shape {class_of_row.shape}, expected one class number a row")
        if len(class_of_row) and class_of_row.min() < -1:
            raise ShapeError(f"class number {class_of_row.min()}: expected 0 and up, or -1 for no label")
        labelled = np.flatnonzero(class_of_row >= 0)
        classes = class_of_row[labelled]
        rows = labelled[np.argsort(classes, kind="stable")].astype(np.int64)
        return cls(ids=rows, starts=np.concatenate([[0], np.cumsum(np.bincount(classes))]).astype(np.int64))

    @property
    def num_classes(self) -> int:
        """Number of classes, empty ones and those with one sample included."""
        return len(self.starts) - 1

    @cached_property
    def drawn_classes(self) -> Ints:
        """The classes with at least 2 samples."""
        return np.flatnonzero(np.diff(self.starts) >= 2)

    @property
    def num_excluded(self) -> int:
        """How many classes have fewer than 2 samples and are never drawn."""
        return self.num_classes - len(self.drawn_classes)


@dataclass(frozen=True, kw_only=True)
class PKConfig:
    """A global batch: P classes times K samples, over all ranks together."""

    classes_per_batch: int
    """P: distinct classes in a global batch."""
    samples_per_class: int
    """K: samples of each of them."""

    def __post_init__(self) -> None:
        checks.in_range(self, "classes_per_batch", "samples_per_class", at_least=2)  # fewer make no pairs

    @property
    def num_samples(self) -> int:
        """P * K."""
        return self.classes_per_batch * self.samples_per_class


class Pick(NamedTuple):
    """One sample of a batch."""

    id: int
    step: int
    position: int
    """Place in the global batch."""


def check_drawable(index: ClassIndex, config: PKConfig) -> None:
    """ConfigError unless the index has P classes with at least 2 samples."""
    num_drawn = len(index.drawn_classes)
    if num_drawn < config.classes_per_batch:
        advice = f"set it to {num_drawn} or less, or add images"
        if num_drawn < 2:
            advice = "add images of more classes: a batch needs two, beside those that validation holds out"
        raise ConfigError(
            f"classes_per_batch is {config.classes_per_batch}, but only {num_drawn} of {index.num_classes} "
            f"classes have at least 2 samples ({index.num_excluded} have fewer): "
            f"{advice}"
        )


def global_batch(index: ClassIndex, config: PKConfig, *, seed: int, step: int) -> Ints:
    """The ids of one global batch (P * K,) int64, class by class: the K samples of a class lie together.

    seed: 0 to 2^63 - 1.
    """
    check_drawable(index, config)
    if step < 0:
        raise ConfigError(f"step is {step}, expected 0 or more")
    places = _class_places(len(index.drawn_classes), config, seed=seed, step=step)
    classes = index.drawn_classes[places]
    sizes = index.starts[classes + 1] - index.starts[classes]
    draws = _hash(_SAMPLES, seed, step, np.arange(config.num_samples))
    within = _subsets(sizes, config.samples_per_class, draws)
    ids: Ints = index.ids[index.starts[classes][:, None] + within].ravel()
    return ids


def slice_of_rank(num: int, *, rank: int, world_size: int) -> slice:
    """The rank's contiguous part of `num` places; sizes differ by at most one, longer ones first."""
    size, longer = divmod(num, world_size)
    start = rank * size + min(rank, longer)
    return slice(start, start + size + (rank < longer))


class BatchSampler:
    """The rank's slices of the global batches first_step .. first_step + num_steps - 1.

    Iterates lists of `Pick`; may be iterated again. Every rank gets the same number of batches.
    ConfigError where a global batch is smaller than the world: a rank would get nothing.
    """

    def __init__(
        self,
        index: ClassIndex,
        config: PKConfig,
        *,
        seed: int,
        first_step: int,
        num_steps: int,
        rank: int,
        world_size: int,
    ) -> None:
        check_drawable(index, config)
        if config.num_samples < world_size:
            raise ConfigError(
                f"a global batch of {config.classes_per_batch} x {config.samples_per_class} samples "
                f"leaves some of {world_size} ranks without any: make it larger, or take fewer workers"
            )
        self._index = index
        self._config = config
        self._seed = seed
        self._steps = range(first_step, first_step + num_steps)
        self._slice = slice_of_rank(config.num_samples, rank=rank, world_size=world_size)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Pick]]:
        start = self._slice.start
        for step in self._steps:
            ids = global_batch(self._index, self._config, seed=self._seed, step=step)
            mine = ids[self._slice].tolist()
            yield [Pick(id, step, position) for position, id in enumerate(mine, start)]


def augmentation_seeds(seed: int, step: int, positions: Ints) -> Ints:
    """The seeds of samples' augmentation (b,), 0 to 2^63 - 1: neither rank nor loader worker matters."""
    return (_hash(_AUGMENTATION, seed, step, positions) >> np.uint64(1)).astype(np.int64)


def _class_places(num: int, config: PKConfig, *, seed: int, step: int) -> Ints:
    """Which P of `num` classes the step takes, in an order of its own."""
    taken = config.classes_per_batch
    if 2 * taken <= num:
        places = _window(num, taken, seed=seed, step=step)
    else:
        kept = np.ones(num, dtype=bool)
        kept[_window(num, num - taken, seed=seed, step=step)] = False
        places = np.flatnonzero(kept)
    return places[np.argsort(_hash(_SHUFFLE, seed, step, places), kind="stable")]


def _window(num: int, width: int, *, seed: int, step: int) -> Ints:
    """Places step * width .. + width of the endless row of epochs: distinct, for 2 * width <= num."""
    if width == 0:
        return np.empty(0, dtype=np.int64)
    epoch, start = divmod(step * width, num)
    end = start + width
    here = _epoch(np.arange(start, min(end, num)), num, width, seed=seed, epoch=epoch)
    if end <= num:
        return here
    return np.concatenate([here, _epoch(np.arange(end - num), num, width, seed=seed, epoch=epoch + 1)])


def _epoch(places: Ints, num: int, width: int, *, seed: int, epoch: int) -> Ints:
    """The classes at these places of an epoch, which are a permutation of range(num).

    Where a batch runs over from the epoch before, the head of this epoch (the rest of that batch) must not
    repeat its tail: such classes change places with the next ones that aren't in it. The swaps stay within
    the first `width` places and tails within the last, so an epoch depends on one other and on no more.
    """
    tail_size = (epoch * num) % width
    if tail_size == 0:
        return _permuted(places, num, seed=seed, epoch=epoch)
    tail = _permuted(np.arange(num - tail_size, num), num, seed=seed, epoch=epoch - 1)
    moved = np.arange(width)
    in_tail = np.isin(_permuted(moved, num, seed=seed, epoch=epoch), tail)
    head_size = width - tail_size
    wrong = np.flatnonzero(in_tail[:head_size])
    right = head_size + np.flatnonzero(~in_tail[head_size:])[: len(wrong)]  # the tail has too few to run out
    moved[wrong], moved[right] = right, wrong
    sources = np.where(places < width, moved[np.minimum(places, width - 1)], places)
    return _permuted(sources, num, seed=seed, epoch=epoch)


def _permuted(places: Ints, num: int, *, seed: int, epoch: int) -> Ints:
    """A permutation of range(num) at some places, in O(len(places)): a Feistel network, walked into range."""
    half_bits = max(1, -(-(num - 1).bit_length() // 2))
    half = np.uint64(half_bits)
    mask = np.uint64(2**half_bits - 1)
    value = places.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(_ORDER, seed, epoch * 4 + turn, right) & mask)
        value[outside] = (left << half) | right
        outside = value >= num
    return value.astype(np.int64)


def _subsets(sizes: Ints, num: int, draws: Hashes) -> Ints:
    """`num` picks out of range(size) for each size (P,): whole rounds, and the rest by Floyd's algorithm.

    -> (P, num); a rest of m is a uniform subset of m, drawn without a list of the class's samples.
    """
    picks = np.empty((len(sizes), num), dtype=np.int64)
    draws = draws.reshape(len(sizes), num)
    in_rounds = num // sizes * sizes
    for place in range(num):
        last = sizes - num + place
        drawn = (draws[:, place] % np.maximum(last + 1, 1).astype(np.uint64)).astype(np.int64)
        of_rest = np.arange(place) >= in_rounds[:, None]
        again = ((picks[:, :place] == drawn[:, None]) & of_rest).any(1)
        last_of_rest = np.where(again, last, drawn)
        picks[:, place] = np.where(place < in_rounds, place % sizes, last_of_rest)
    return picks


def _hash(purpose: int, seed: int, number: int, values: NDArray[np.integer]) -> Hashes:
    """64 well-mixed bits for each value (n,), by splitmix64's finaliser over the four integers."""
    mixed = np.zeros(len(values), dtype=np.uint64)
    for part in (purpose, seed, number, values):
        mixed = hashing.mix(mixed + np.uint64(hashing.GOLDEN) + np.asarray(part).astype(np.uint64))
    return mixed
