"""What does a global batch need that goes through the backbone in pieces (`training.images_per_pass`)?

    python -m tests.benchmarks.pieces [--backbone NAME] [--size-px 96] [--images 192] [--pieces 96 48 16]

A step of fine-tuning (triplet loss, lambda = 1, D = 256, BatchNorm frozen) on one batch, whole and in pieces
of so many images, each in a process of its own with one thread: processor time of its second step, and memory
at its highest above what the process had before. The loss has to be the same. The last line is the ratio of
the memory of the whole batch to that of the last pieces.
"""

import argparse
import time
from typing import NamedTuple

import torch

from namr.model import model
from namr.model.losses import JointLoss, LossConfig
from namr.model.model import ModelConfig
from namr.train.recipe import TrainingConfig
from namr.train.step import Trainer
from tests.measured import Process

IMAGES_PER_CLASS = 4


class Step(NamedTuple):
    """The second step of a training."""

    loss: float
    cpu_s: float


def main() -> None:
    options = parse()
    peaks = []
    losses = []
    for size in (None, *options.pieces):
        with Process() as process:
            step, used = process.call(second_step, options.backbone, options.size_px, options.images, size)
        what = "whole" if size is None else f"in pieces of {size}"
        peak = f"{used.peak_bytes / 1e6:,.0f} MB"
        print(f"{options.images} images {what}: {peak} above the process's own, {step.cpu_s:.2f} s a step")
        peaks.append(used.peak_bytes)
        losses.append(step.loss)
    torch.testing.assert_close(losses, losses[:1] * len(losses), rtol=1e-4, atol=0)
    print(f"pieces ratio {peaks[0] / peaks[-1]:.2f} target 1")


def second_step(backbone: str, size_px: int, num_images: int, images_per_pass: int | None) -> Step:
    torch.set_num_threads(1)
    config = ModelConfig(backbone=backbone, weights="none", embedding_dim=256, image_size_px=size_px)
    num_classes = num_images // IMAGES_PER_CLASS
    loss = JointLoss(LossConfig(base="triplet"), num_classes=num_classes, embedding_dim=256)
    training = TrainingConfig(num_steps=2, batchnorm="frozen", augment=False, images_per_pass=images_per_pass)
    built = model.build(config, seed=0)
    trainer = Trainer(built, loss, training, seed=0, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_images, 3, size_px, size_px), dtype=torch.uint8, generator=draw)
    labels = torch.arange(num_classes).repeat_interleave(IMAGES_PER_CLASS)
    trainer.step(pixels, labels)
    begun = time.process_time()
    terms = trainer.step(pixels, labels)
    return Step(float(terms.total), time.process_time() - begun)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size-px", type=int, default=96)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--pieces", type=int, nargs="+", default=[96, 48, 16])
    return parser.parse_args()


if __name__ == "__main__":
    main()
