"""What a training run will take, told before it: one batch is read, a few steps are done, nothing is kept.

One process does what one worker would, with its share of a global batch, on the processor or GPU it finds.
The loss is that of this share, so with several workers it takes longer than is told here, and they wait for
each other, which is not in it either.

Not covered: whether a cluster has the workers' resources (`ray_group.check_resources`).
"""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor

from namr.data import sample_index, sampling
from namr.data.datasets import Dataset
from namr.data.shards import shard_of
from namr.model.model import NamrModel
from namr.store import ranges
from namr.store.storage import Range
from namr.train import interpolation, loop, recipe
from namr.train import run as run_store
from namr.train.run import TrainJobConfig
from namr.train.step import Trainer
from namr.train.training_data import TrainingData

_NUM_STEPS = 3
"""The first one, in which libraries choose their ways, is not counted."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What was measured and what follows from it."""

    config: TrainJobConfig
    device: str
    num_images: int
    """to train on"""
    num_classes: int
    num_examined: int
    """images that each evaluation embeds"""
    shapes: tuple[tuple[int, ...], ...]
    """of a worker's pixels, features and embeddings"""
    num_learnt: int
    num_weights: int
    peak_bytes: int
    """of the GPU, or of this process"""
    read_s: float
    """to read and prepare a worker's share of a batch, by one loader process"""
    times: dict[str, float]
    """seconds a step, by part of it"""
    num_requests: int
    """to the store, for a global batch, while no shard is cached"""

    @property
    def compute_s(self) -> float:
        """A step whose batch is there already."""
        return sum(seconds for part, seconds in self.times.items() if part != "data")

    @property
    def step_s(self) -> float:
        """A step, which takes as long as the slower of computing and loading."""
        num_loaders = self.config.loader.num_workers
        return max(self.compute_s, self.read_s / num_loaders) if num_loaders else self.compute_s + self.read_s

    @property
    def num_evaluations(self) -> int:
        """The one before the first step included, and those on the way back after the last."""
        training = self.config.training
        starts_at_random = recipe.whitening_power(training, self.config.model) is None
        num_back = 0 if starts_at_random else len(interpolation.SHARES)
        return 1 + -(-training.num_steps // training.evaluation_interval) + num_back

    @property
    def evaluation_s(self) -> float:
        """An evaluation: its images through the backbone, without the search."""
        per_image = (self.times["forward"] + self.read_s) / self.shapes[0][0]
        return per_image * self.num_examined / self.config.workers.most

    @property
    def expected_s(self) -> float:
        """The whole run."""
        return self.step_s * self.config.training.num_steps + self.evaluation_s * self.num_evaluations

    @property
    def text(self) -> str:
        """All that as lines."""
        return "\n".join(_lines(self))


def look(config: TrainJobConfig) -> DryRun:
    """Measure; ConfigError for what could not be trained on. The weights are had as a run has them."""
    config = run_store.absolute(config)
    train, unseen = run_store.open_datasets(config, None)
    alone = replace(config.loader, num_workers=0)
    data = TrainingData(
        train, unseen, data=config.data, batch=config.batch, loader=alone, seed=config.seed,
        world_size=config.workers.most,
    )  # fmt: skip
    device = torch.device("cuda" if config.workers.use_gpu and torch.cuda.is_available() else "cpu")
    # With augmentation features are not cached, which would be the whole dataset's.
    training = replace(config.training, augment=True)
    trainer = loop.make_trainer(config.model, config.loss, training, data, seed=config.seed, device=device)
    began = time.perf_counter()
    augment = config.augment if config.training.augment else None
    batch = next(data.batches(trainer.model, first_step=0, num_steps=1, augment=augment))
    read_s = time.perf_counter() - began
    times = _steps(trainer, *batch)
    weights = [parameter.numel() for parameter in trainer.whole.parameters()]
    learnt = [parameter.numel() for group in trainer.optimiser.param_groups for parameter in group["params"]]
    return DryRun(
        config=config,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        num_images=len(data.classes.ids),
        num_classes=data.num_classes,
        num_examined=len(data.searched_ids),
        shapes=_shapes(trainer.model, batch[0]),
        num_learnt=sum(learnt),
        num_weights=sum(weights),
        peak_bytes=_peak_bytes(device),
        read_s=read_s,
        times=times,
        num_requests=_num_requests(config, train, data),
    )


def _steps(trainer: Trainer, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Seconds by part of a step, from the first step that trains all that the run will train."""
    trainer.next_step = trainer.config.backbone.frozen_steps or 0
    trainer.step(inputs, labels)
    trainer.times()
    for _ in range(_NUM_STEPS - 1):
        trainer.step(inputs, labels)
    return trainer.times()


@torch.no_grad()
def _shapes(model: NamrModel, pixels: Tensor) -> tuple[tuple[int, ...], ...]:
    model.eval()
    features = model.features(pixels[:1].to(next(model.parameters()).device))
    num = len(pixels)
    return tuple(pixels.shape), (num, features.shape[1]), (num, model.config.embedding_dim)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _num_requests(config: TrainJobConfig, train: Dataset, data: TrainingData) -> int:
    """Of all workers for the first batch; near images are read together."""
    index = sample_index.build(train, config.loader.cache_folder)
    ids = sampling.global_batch(data.classes, config.batch, seed=config.seed, step=0)
    places = index.places(ids)
    uris = {entry.number: train.shard_uri(entry) for entry in train.shards}
    wanted = [
        Range(uris[number], start, start + size)
        for number, start, size in zip(
            shard_of(ids).tolist(), index.offsets(places).tolist(), index.sizes(places).tolist(), strict=True
        )
    ]
    shares = np.array_split(np.arange(len(wanted)), config.workers.most)
    return sum(len(ranges.join([wanted[place] for place in share])[0]) for share in shares)


def _lines(told: DryRun) -> Iterator[str]:
    config = told.config
    training, batch, workers = config.training, config.batch, config.workers
    pixels, features, embeddings = (" x ".join(map(str, shape)) for shape in told.shapes)
    epochs = training.num_steps * batch.num_samples / told.num_images
    parts = ", ".join(f"{part} {told.times[part]:.3f}" for part in told.times if part != "data")
    yield f"run {config.run_name!r}: one batch was read and {_NUM_STEPS} steps were done; nothing was stored"
    yield (
        f"data      {told.num_images:,} images of {told.num_classes:,} classes to train on; each evaluation "
        f"embeds {told.num_examined:,}"
    )
    yield (
        f"batch     {batch.num_samples:,} images of {batch.classes_per_batch:,} classes on "
        f"{workers.most} worker(s); a worker's pixels {pixels}, features {features}, embeddings "
        f"{embeddings}"
    )
    yield f"learns    {told.num_learnt:,} of {told.num_weights:,} weights"
    yield f"memory    {told.peak_bytes / 2**30:.2f} GiB at the peak, on {told.device}"
    yield f"step      {told.step_s:.3f} s: {parts} s; reading takes {told.read_s:.3f} s of a loader process"
    yield (
        f"steps     {training.num_steps:,}, each image {epochs:.1f} times; {told.num_evaluations} "
        f"evaluations of about {told.evaluation_s:.1f} s"
    )
    yield (
        f"requests  {told.num_requests:,} a batch, {told.num_requests * 3600 / told.step_s:,.0f} an hour, "
        "while no shard is cached (none at all for data on local disk)"
    )
    yield f"expected  {timedelta(seconds=round(told.expected_s))} in all, without waiting for other workers"
