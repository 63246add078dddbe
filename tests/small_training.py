"""A small dataset of easy classes, and a training job on it that takes seconds."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from namr.data import datasets, images, shards
from namr.data.images import AugmentConfig
from namr.data.loading import LoaderConfig
from namr.data.sampling import PKConfig
from namr.data.shards import Sample
from namr.model import model
from namr.model.losses import LossConfig
from namr.model.model import ModelConfig
from namr.store import manifests, tables
from namr.train import loop
from namr.train.ray_group import WorkersConfig
from namr.train.recipe import TrainingConfig
from namr.train.run import TrainJobConfig
from namr.train.step import Trainer
from namr.train.training_data import DataConfig, TrainingData

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def make_dataset(root: Path, *, num_classes: int = 8, per_class: int = 5, labelled: bool = True) -> str:
    """Noise around a colour and a stripe of the class's own, in one shard."""
    samples = []
    for number in range(num_classes):
        draw = np.random.default_rng(number)
        base = draw.integers(0, 200, (3, 1, 1)) + 55 * (np.arange(32) // (2 + number) % 2)
        for at in range(per_class):
            pixels = (base + draw.integers(-20, 20, (3, 32, 32))).clip(0, 255).astype(np.uint8)
            label = f"class-{number}" if labelled else None
            samples.append(
                Sample(key=f"{number}-{at}", image=images.encode_png(pixels.transpose(1, 2, 0)),
                       extension="png", label=label)
            )  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    tar = root.parent / f"{root.name}.tar"
    table = shards.write_shard(tar, samples, number=0)
    entry = datasets.ShardEntry(
        number=0,
        tar=manifests.write_object(str(root), "shards/0.tar", tar),
        index=manifests.write_object(str(root), "shards/0.parquet", tables.encode_samples(table)),
        num_samples=len(table),
    )
    datasets.publish_version(datasets.head(str(root)), [entry], now=NOW)
    return str(root)


def make_job(
    data_uri: str, folder: Path, *, training: dict[str, Any] | None = None, **changes: Any
) -> TrainJobConfig:
    """A job of 6 steps with a tiny network; `training` and other parts can be overridden."""
    fields: dict[str, Any] = {
        "run_name": "run",
        "seed": 1,
        "storage_uri": str(folder / "runs"),
        "data": DataConfig(dataset_uri=data_uri, held_out_share=0.3),
        "batch": PKConfig(classes_per_batch=4, samples_per_class=2),
        "model": ModelConfig(
            backbone="test_efficientnet",
            weights="none",
            embedding_dim=8,
            structure_hidden_dim=8,
            image_size_px=32,
        ),
        "loss": LossConfig(base="proxy_anchor"),
        "training": TrainingConfig(
            **{"num_steps": 6, "evaluation_interval": 2, "checkpoint_interval": 1, "batchnorm": "frozen"}
            | (training or {})
        ),
        "augment": AugmentConfig(color_jitter=0),
        "loader": LoaderConfig(num_workers=0, cache_folder=folder / "cache"),
        "workers": WorkersConfig(num_workers=2, max_failures=0, wait_s=60),
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
    }
    return TrainJobConfig(**fields | changes)


def make_pretrained_job(folder: Path) -> TrainJobConfig:
    """Two steps on cached features of a frozen backbone that has its weights from a file."""
    training = {"backbone_learning_rate": 0, "augment": False, "num_steps": 2}
    job = make_job(make_dataset(folder / "data"), folder, training=training)
    weights = folder / "backbone.safetensors"
    state = model.build(job.model, seed=5).backbone.state_dict()
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    return replace(job, model=replace(job.model, weights=str(weights)))


def data_of(
    config: TrainJobConfig, *, unseen: str | None = None, rank: int = 0, world_size: int = 1
) -> TrainingData:
    """The images of a job, as its worker reads them; unseen: a dataset to validate on."""
    return TrainingData(
        datasets.open_version(config.data.dataset_uri),
        datasets.open_version(unseen) if unseen else None,
        data=config.data, batch=config.batch, loader=config.loader, seed=config.seed,
        rank=rank, world_size=world_size, writes_cache=rank == 0,
    )  # fmt: skip


def trainer_of(config: TrainJobConfig, data: TrainingData) -> Trainer:
    """A job's trainer before its first step."""
    return loop.make_trainer(
        config.model, config.loss, config.training, data, seed=config.seed, device=torch.device("cpu")
    )
