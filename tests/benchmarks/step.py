"""What does the joint loss add to a step of fine-tuning, and what is `channels_last` worth?

    python -m tests.benchmarks.step [--backbone NAME] [--size-px 96] [--steps 10] [--rounds 3] [--threads N]

A step on 24 x 4 images, triplet loss, D = 256, lambda = 0 is timed whole. What the joint loss (C = 4,
"both") adds is timed apart, on the step of the two heads alone: beside the backbone's seconds its
milliseconds would be lost in the noise. Both count with their fastest step, in CPU time. Beside it, without
a target, forward and backward of the backbone alone in both memory formats, which have to agree. The last
line is the ratio of the step without the joint loss to that with it.
"""

import argparse
import itertools
import os
import time
from dataclasses import replace

import torch
from torch import Tensor

from namr.model import model
from namr.model.losses import JointLoss, LossConfig
from namr.model.model import ModelConfig
from namr.train.recipe import TrainingConfig
from namr.train.step import Trainer

CLASSES, SAMPLES = 24, 4
TRAINING = TrainingConfig(num_steps=1, learning_rate=1e-3, backbone_learning_rate=3e-4, augment=False)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    labels = torch.arange(CLASSES).repeat_interleave(SAMPLES)
    draw = torch.Generator().manual_seed(0)
    shape = (len(labels), 3, options.size_px, options.size_px)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    config = ModelConfig(
        backbone=options.backbone, weights="none", embedding_dim=256, image_size_px=options.size_px
    )
    whole = fastest_step(config, TRAINING, 0.0, pixels, labels, options.steps)
    with torch.no_grad():
        features = model.build(config, seed=0).eval().features(pixels)
    heads = replace(TRAINING, backbone_learning_rate=0.0)
    without, joint = (
        fastest_step(config, heads, weight, features, labels, 10 * options.steps) for weight in (0.0, 1.0)
    )
    print(
        f"{options.backbone}, {len(labels)} images of {options.size_px} px, {options.threads} threads: "
        f"{1e3 * whole:.0f} ms a step with lambda = 0, of it {1e3 * without:.1f} ms in heads and loss; "
        f"{1e3 * joint:.1f} ms there with the joint loss"
    )
    backbone = model.build(config, seed=0).backbone.train()
    inputs = (pixels.float() / 127.5 - 1).requires_grad_()
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    made = {}
    for name, memory_format in formats.items():
        backbone.to(memory_format=memory_format)
        of_format = inputs.detach().contiguous(memory_format=memory_format).requires_grad_()
        made[name], fastest = forward_and_backward(backbone, of_format, options.rounds)
        print(f"forward and backward of the backbone, {name}: {1e3 * fastest:.0f} ms")
    torch.testing.assert_close(made["contiguous"], made["channels_last"], rtol=1e-3, atol=1e-3)
    print(f"step ratio {whole / (whole + joint - without):.3f} target 0.97")


def fastest_step(
    config: ModelConfig, training: TrainingConfig, weight: float, inputs: Tensor, labels: Tensor, num: int
) -> float:
    """Seconds; the first two steps, which allocate, don't count."""
    loss = JointLoss(
        LossConfig(base="triplet", ranking_weight=weight), num_classes=CLASSES, embedding_dim=256
    )
    built = model.build(config, seed=0)
    trainer = Trainer(built, loss, replace(training, num_steps=num), seed=0, device=torch.device("cpu"))
    ends = [time.process_time() for _ in trainer.run(itertools.repeat((inputs, labels), num))]
    return min(after - before for before, after in itertools.pairwise(ends[1:]))


def forward_and_backward(backbone: torch.nn.Module, inputs: Tensor, rounds: int) -> tuple[Tensor, float]:
    fastest = float("inf")
    for _ in range(rounds + 1):
        start = time.process_time()
        features = backbone(inputs)
        features.square().mean().backward()
        fastest = min(fastest, time.process_time() - start)
    return features.detach(), fastest


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size-px", type=int, default=96)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
