"""A group that shrinks and grows trains what one of a fixed size does: losses side by side.

    python -m pytest -s -q tests/train/test_elastic.py

prints them. The batches are real ones, augmented; the changing group has 3 workers, then 1, then 2, and each
begins with the checkpoint of the one before. Ray Train changes groups so in tests/soak/faults.py.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from namr import collectives
from namr.data import datasets
from namr.train import loop
from namr.train.run import TrainJobConfig
from namr.train.step import Trainer
from namr.train.training_data import TrainingData
from tests.ranks import on_ranks
from tests.small_training import make_dataset, make_job

NUM_STEPS = 12
SIZES = (3, 1, 2)
"""What the changing group has, for a third of all steps each."""


class Losses(NamedTuple):
    fixed: list[float]
    """Of all steps, on a group of this size."""
    changing: list[float]
    """Of the steps that the changing group did while it had this size."""


def trained(config: TrainJobConfig, state: Path | None, num_steps: int) -> tuple[Trainer, list[float]]:
    rank, world_size = collectives.rank(), collectives.world_size()
    data = TrainingData(
        datasets.open_version(config.data.dataset_uri), None, data=config.data, batch=config.batch,
        loader=config.loader, seed=config.seed, rank=rank, world_size=world_size, writes_cache=rank == 0,
    )  # fmt: skip
    trainer = loop.make_trainer(
        config.model, config.loss, config.training, data, seed=config.seed, device=torch.device("cpu")
    )
    if state is not None and state.exists():
        loop.go_on(trainer, state)
    batches = data.batches(
        trainer.model, first_step=trainer.next_step, num_steps=num_steps, augment=config.augment
    )
    return trainer, [trainer.step(*batch).total for batch in batches]


def on_each_rank(config: TrainJobConfig, folder: Path) -> Losses:
    here = SIZES.index(collectives.world_size())
    _, fixed = trained(config, None, NUM_STEPS)
    before, after = (folder / f"{number}" for number in (here, here + 1))
    part, changing = trained(config, before, NUM_STEPS // len(SIZES))
    if collectives.rank() == 0:
        after.mkdir(parents=True)
        torch.save(part.state(), after / "state.pt")
    return Losses(fixed, changing)


@pytest.mark.slow
def test_losses_are_the_same_on_1_2_3_and_on_a_changing_number_of_workers(tmp_path: Path) -> None:
    config = make_job(make_dataset(tmp_path / "set"), tmp_path, training={"num_steps": NUM_STEPS})
    results = on_ranks(on_each_rank, config, tmp_path / "states", world_sizes=SIZES)
    fixed = {size: results[size][0].fixed for size in sorted(SIZES)}
    changing = [loss for size in SIZES for loss in results[size][0].changing]
    print("\n| step | 1 worker | 2 workers | 3 workers | changing |\n| ---: | ---: | ---: | ---: | ---: |")
    for step, row in enumerate(zip(*fixed.values(), changing, strict=True)):
        size = SIZES[step * len(SIZES) // NUM_STEPS]
        print(f"| {step} | {' | '.join(f'{loss:.6f}' for loss in row)} ({size}) |")
    for losses in (fixed[2], fixed[3], changing):
        np.testing.assert_allclose(losses, fixed[1], rtol=1e-4)
    assert fixed[1][-1] < fixed[1][0]
