"""Laws of P x K sampling, for any classes, sizes, seeds and world sizes."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namr.data.sampling import (
    BatchSampler,
    ClassIndex,
    PKConfig,
    augmentation_seeds,
    global_batch,
    slice_of_rank,
)
from namr.errors import ConfigError, ShapeError


def index_of(sizes: list[int], *, seed: int = 0) -> tuple[ClassIndex, np.ndarray]:
    """An index of classes with these sizes, rows shuffled, and the label of each row; some unlabelled."""
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    labels = np.concatenate([labels, np.full(3, -1, dtype=np.int32)])
    np.random.default_rng(seed).shuffle(labels)
    return ClassIndex.from_labels(labels), labels


def config_of(classes: int, samples: int) -> PKConfig:
    return PKConfig(classes_per_batch=classes, samples_per_class=samples)


sizes_of_classes = st.lists(st.integers(0, 9), min_size=2, max_size=40).filter(
    lambda sizes: sum(size >= 2 for size in sizes) >= 2
)


@st.composite
def settings_of_batches(draw: st.DrawFn) -> tuple[list[int], PKConfig, int]:
    sizes = draw(sizes_of_classes)
    drawable = sum(size >= 2 for size in sizes)
    config = PKConfig(
        classes_per_batch=draw(st.integers(2, drawable)),
        samples_per_class=draw(st.integers(2, 7)),
    )
    return sizes, config, draw(st.integers(0, 2**63 - 1))


def test_an_index_by_hand() -> None:
    index = ClassIndex.from_labels(np.array([2, -1, 0, 2, 4, 0, 2], dtype=np.int32))
    assert index.ids.tolist() == [2, 5, 0, 3, 6, 4]
    assert index.starts.tolist() == [0, 2, 2, 5, 5, 6]
    assert (index.num_classes, index.num_excluded, index.drawn_classes.tolist()) == (5, 3, [0, 2])
    assert ClassIndex.from_labels(np.array([-1, -1], dtype=np.int32)).num_classes == 0


@given(settings_of_batches(), st.integers(0, 10**6))
@settings(deadline=None)
def test_a_batch_holds_k_of_each_of_p_distinct_classes(
    batch: tuple[list[int], PKConfig, int], step: int
) -> None:
    sizes, config, seed = batch
    index, labels = index_of(sizes)
    rows = global_batch(index, config, seed=seed, step=step)
    assert rows.dtype == np.int64
    by_class = labels[rows].reshape(config.classes_per_batch, config.samples_per_class)
    assert (by_class == by_class[:, :1]).all()
    assert len(set(by_class[:, 0].tolist())) == config.classes_per_batch
    assert all(sizes[label] >= 2 for label in by_class[:, 0])
    for picked in rows.reshape(by_class.shape):
        size = sizes[labels[picked[0]]]
        rounds, rest = divmod(config.samples_per_class, size)
        times = Counter(picked.tolist())
        assert all(rounds <= count <= rounds + 1 for count in times.values())
        assert len(times) == min(size, config.samples_per_class)
        assert sum(count == rounds + 1 for count in times.values()) == rest


@given(settings_of_batches())
@settings(max_examples=30, deadline=None)
def test_at_every_step_all_classes_were_visited_equally_often(
    batch: tuple[list[int], PKConfig, int],
) -> None:
    sizes, config, seed = batch
    index, labels = index_of(sizes)
    visits = dict.fromkeys(index.drawn_classes.tolist(), 0)
    for step in range(3 * len(visits)):
        rows = global_batch(index, config, seed=seed, step=step)
        for label in labels[rows[:: config.samples_per_class]].tolist():
            visits[label] += 1
        assert max(visits.values()) - min(visits.values()) <= 1
    assert set(visits.values()) == {3 * config.classes_per_batch}


@given(settings_of_batches(), st.integers(0, 1000), st.integers(1, 9))
@settings(deadline=None)
def test_the_union_over_ranks_is_the_global_batch(
    batch: tuple[list[int], PKConfig, int], first_step: int, world_size: int
) -> None:
    sizes, config, seed = batch
    index, _ = index_of(sizes)
    world_size = min(world_size, config.num_samples)
    samplers = [
        BatchSampler(
            index, config, seed=seed, first_step=first_step, num_steps=3, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert {len(sampler) for sampler in samplers} == {3}
    for number, parts in enumerate(zip(*samplers, strict=True)):
        step = first_step + number
        picks = [pick for part in parts for pick in part]
        assert [pick.id for pick in picks] == global_batch(index, config, seed=seed, step=step).tolist()
        assert [pick.position for pick in picks] == list(range(config.num_samples))
        assert {pick.step for pick in picks} == {step}
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(0, 10_000), st.integers(1, 300))
@settings(deadline=None)
def test_slices_are_contiguous_and_even(num: int, world_size: int) -> None:
    slices = [slice_of_rank(num, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert slices[0].start == 0 and slices[-1].stop == num
    assert all(before.stop == after.start for before, after in pairwise(slices))
    lengths = [each.stop - each.start for each in slices]
    assert max(lengths) - min(lengths) <= 1


def test_a_run_resumes_at_any_step_without_walking_there() -> None:
    index, _ = index_of([5] * 30)
    config = config_of(8, 4)
    whole = list(BatchSampler(index, config, seed=0, first_step=0, num_steps=50, rank=1, world_size=3))
    resumed = list(BatchSampler(index, config, seed=0, first_step=37, num_steps=13, rank=1, world_size=3))
    assert resumed == whole[37:]
    far = BatchSampler(index, config, seed=0, first_step=10**15, num_steps=1, rank=0, world_size=1)
    assert len(next(iter(far))) == 32
    assert list(far) == list(far)


def test_seeds_and_steps_give_different_batches() -> None:
    index, _ = index_of([6] * 50)
    batches = {
        tuple(global_batch(index, config_of(8, 4), seed=seed, step=step).tolist())
        for seed in range(5)
        for step in range(20)
    }
    assert len(batches) == 100


def test_the_batches_of_a_seed_never_change() -> None:
    """What a resumed run relies on over releases and library versions."""
    index = ClassIndex.from_labels(np.repeat(np.arange(6), 3).astype(np.int32))
    batch = global_batch(index, config_of(3, 2), seed=7, step=4)
    assert batch.tolist() == [1, 2, 4, 3, 12, 14]
    assert augmentation_seeds(7, 4, np.array([1])).tolist() == [8646227997346147910]


def test_classes_meet_evenly_and_samples_are_drawn_evenly() -> None:
    """Chi-squared over pairs of classes and over samples; the bounds are 6 standard deviations away."""
    index, labels = index_of([5] * 12)
    config = config_of(3, 2)
    together = np.zeros((12, 12))
    drawn = np.zeros(len(labels))
    num_steps = 4000
    for step in range(num_steps):
        rows = global_batch(index, config, seed=0, step=step)
        drawn[rows] += 1
        classes = labels[rows[::2]]
        together[np.ix_(classes, classes)] += 1
    pairs = together[np.triu_indices(12, 1)]
    expected = num_steps * 3 / len(pairs)
    assert ((pairs - expected) ** 2 / expected).sum() < 66 + 6 * (2 * 66) ** 0.5
    drawn = drawn[labels >= 0]
    assert ((drawn - drawn.mean()) ** 2 / drawn.mean()).sum() < 60 + 6 * (2 * 60) ** 0.5


def test_augmentation_seeds_are_distinct_and_in_range() -> None:
    seeds = {
        number
        for seed in range(3)
        for step in range(20)
        for number in augmentation_seeds(seed, step, np.arange(30)).tolist()
    }
    assert len(seeds) == 1800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_too_few_classes_are_told_with_numbers() -> None:
    index, _ = index_of([4, 4, 1, 0, 4])
    with pytest.raises(ConfigError, match=r"is 4, but only 3 of 5 classes .* \(2 have fewer\)"):
        global_batch(index, config_of(4, 2), seed=0, step=0)
    with pytest.raises(ConfigError, match="only 3 of 5"):
        BatchSampler(index, config_of(4, 2), seed=0, first_step=0, num_steps=1, rank=0, world_size=1)


def test_wrong_settings_are_named() -> None:
    index, _ = index_of([4, 4, 4])
    with pytest.raises(ConfigError, match="classes_per_batch is 1"):
        config_of(1, 4)
    with pytest.raises(ConfigError, match="samples_per_class is 1"):
        config_of(4, 1)
    with pytest.raises(ConfigError, match="step is -3"):
        global_batch(index, config_of(2, 2), seed=0, step=-3)
    with pytest.raises(ConfigError, match="2 x 2 samples leaves some of 5 ranks"):
        BatchSampler(index, config_of(2, 2), seed=0, first_step=0, num_steps=1, rank=0, world_size=5)
    with pytest.raises(ShapeError, match="class number -2"):
        ClassIndex.from_labels(np.array([0, -2], dtype=np.int32))
    with pytest.raises(ShapeError, match=r"shape \(1, 2\)"):
        ClassIndex.from_labels(np.zeros((1, 2), dtype=np.int32))
