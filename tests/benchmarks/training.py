"""What does Ray Train cost? Images a second of training on two workers against plain torchrun.

    python -m tests.benchmarks.training [--steps 30] [--rounds 2] [--backbone NAME]

Both sides take the same P x K batches from the same shards through the same loader and the same step on two
processes of one thread each, DDP over gloo. The Ray side is `job.fit` as a user runs it, MLflow and
checkpoints included; validation and the writing of checkpoints are not steady state and not timed on either
side, nor are the first five steps. Before times are compared, the losses of both sides have to agree in
every bit. Sides take turns, and each counts with its best round. Both keep freed memory (glibc's malloc would
give a step's large tensors back to the kernel and fault them in anew: torchrun lost a third by it, Ray's
processes don't).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from namr import ray_connection
from namr.data import datasets, images, shards
from namr.data.images import AugmentConfig
from namr.data.loading import LoaderConfig
from namr.data.sampling import PKConfig
from namr.data.shards import Sample
from namr.model.losses import LossConfig
from namr.model.model import ModelConfig
from namr.registry import registry
from namr.store import manifests, tables
from namr.train import job as train_job
from namr.train import loop
from namr.train.ray_group import WorkersConfig
from namr.train.recipe import TrainingConfig
from namr.train.run import TrainJobConfig
from namr.train.training_data import DataConfig, TrainingData

UNSTEADY_STEPS = 5
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(4 << 30), "MALLOC_MMAP_THRESHOLD_": str(4 << 30)}


def main() -> None:
    options = parse()
    if options.plain:
        plain_worker(options)
        return
    with tempfile.TemporaryDirectory(prefix="namr-benchmark-training-") as temporary:
        folder = Path(temporary)
        make_dataset(folder)
        os.environ.update(KEEP_FREED_MEMORY)  # for the processes that both sides start
        ray_connection.connect("local", num_cpus=2)
        speeds: dict[str, list[float]] = {"ray": [], "torchrun": []}
        losses = set()
        for number in range(options.rounds):
            for side, run in (("ray", ray_round), ("torchrun", torchrun_round)):
                speed, loss = run(options, folder, number)
                print(f"round {number}, {side}: {speed:.1f} images/s, last loss {loss:.9g}", flush=True)
                speeds[side].append(speed)
                losses.add(loss)
        ray_connection.disconnect()
        if len(losses) != 1:
            sys.exit(f"the sides did not compute the same: last losses {sorted(losses)}")
    ratio = max(speeds["ray"]) / max(speeds["torchrun"])
    print(f"training ratio {ratio:.3f} target 0.97")


def parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size-px", type=int, default=96)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def job(options: Any, folder: Path, name: str) -> TrainJobConfig:
    return TrainJobConfig(
        run_name=name,
        storage_uri=str(folder / "runs"),
        data=DataConfig(dataset_uri=str(folder / "data")),
        batch=PKConfig(classes_per_batch=12, samples_per_class=4),
        model=ModelConfig(
            backbone=options.backbone, weights="none", embedding_dim=256, image_size_px=options.size_px
        ),
        loss=LossConfig(base="multi_similarity", num_clusters=4),
        training=TrainingConfig(
            num_steps=options.steps,
            batchnorm="frozen",
            evaluation_interval=options.steps,
            checkpoint_interval=options.steps,
        ),
        loader=LoaderConfig(num_workers=0, cache_folder=folder / "cache"),
        workers=WorkersConfig(num_workers=2, max_failures=0),
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
    )


def ray_round(options: Any, folder: Path, number: int) -> tuple[float, float]:
    """Images a second, and the loss of the last step."""
    config = job(options, folder, f"ray-{number}")
    result = train_job.fit(config)
    runs = registry.connect(config.tracking_uri)
    return result.images_per_s, runs.history(result.mlflow_run_id, "train/total")[-1][1]


def torchrun_round(options: Any, folder: Path, number: int) -> tuple[float, float]:
    """The same from two processes that torchrun starts."""
    told = folder / f"plain-{number}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.benchmarks.training", "--plain", str(folder), "--steps", str(options.steps)]
    command += ["--backbone", options.backbone, "--size-px", str(options.size_px), "--rounds", str(number)]
    subprocess.run(command, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    measured = json.loads(told.read_text())
    return measured["images_per_s"], measured["loss"]


def plain_worker(options: Any) -> None:
    """One of the two: the same data, model and step, a bare loop around them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = job(options, options.plain, "plain")
    data = TrainingData(
        datasets.open_version(config.data.dataset_uri),
        None,
        data=config.data,
        batch=config.batch,
        loader=config.loader,
        seed=config.seed,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    trainer = loop.make_trainer(
        config.model, config.loss, config.training, data, seed=config.seed, device=torch.device("cpu")
    )
    batches = data.batches(trainer.model, first_step=0, num_steps=options.steps, augment=AugmentConfig())
    times, loss = [time.perf_counter()], 0.0
    for result in trainer.run(batches):
        times.append(time.perf_counter())
        loss = result.total
    steady = times[UNSTEADY_STEPS:]
    speed = config.batch.num_samples * (len(steady) - 1) / (steady[-1] - steady[0])
    if dist.get_rank() == 0:
        told = options.plain / f"plain-{options.rounds}.json"
        told.write_text(json.dumps({"images_per_s": speed, "loss": loss}))
    dist.destroy_process_group()


def make_dataset(folder: Path, num_classes: int = 32, per_class: int = 12) -> None:
    """Noise around a colour of the class's own, 160 px, in one shard."""
    draw = np.random.default_rng(0)
    samples = []
    for number in range(num_classes):
        colour = draw.integers(40, 215, 3)
        for at in range(per_class):
            pixels = (colour + draw.integers(-40, 40, (160, 160, 3))).astype(np.uint8)
            image = images.encode_png(pixels)
            samples.append(Sample(key=f"{number}-{at}", image=image, extension="png", label=str(number)))
    root = str(folder / "data")
    table = shards.write_shard(folder / "0.tar", samples, number=0)
    entry = datasets.ShardEntry(
        number=0,
        tar=manifests.write_object(root, "shards/0.tar", folder / "0.tar"),
        index=manifests.write_object(root, "shards/0.parquet", tables.encode_samples(table)),
        num_samples=len(table),
    )
    datasets.publish_version(datasets.head(root), [entry], now=datetime.now(UTC))


if __name__ == "__main__":
    main()
