"""Whose images are behind a loss that is not finite: by rank and key, on one rank and on several."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from namr import collectives
from namr.data import datasets
from namr.train import culprits, loop, sources
from namr.train.run import TrainJobConfig
from namr.train.step import Trainer
from namr.train.training_data import TrainingData
from tests.ranks import on_ranks
from tests.small_training import make_dataset, make_job


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainJobConfig:
    folder = tmp_path_factory.mktemp("culprits")
    return make_job(make_dataset(folder / "set"), folder)


def at_step_3(config: TrainJobConfig) -> tuple[Trainer, TrainingData]:
    data = TrainingData(
        datasets.open_version(config.data.dataset_uri), None, data=config.data, batch=config.batch,
        loader=config.loader, seed=config.seed, rank=collectives.rank(), world_size=collectives.world_size(),
    )  # fmt: skip
    trainer = loop.make_trainer(
        config.model, config.loss, config.training, data, seed=config.seed, device=torch.device("cpu")
    )
    trainer.next_step = 3
    return trainer, data


def poison(trainer: Trainer, image: torch.Tensor) -> None:
    """From now on the features of this image are NaN, and those of no other."""
    features_of = trainer.whole.features

    def poisoned(inputs: torch.Tensor) -> torch.Tensor:
        features = features_of(inputs)
        features[(inputs == image).flatten(1).all(1)] = torch.nan
        return features

    trainer.whole.features = poisoned  # type: ignore[method-assign]


def said_of_the_sixth_image(config: TrainJobConfig) -> tuple[str, str]:
    """On each rank: what is said of it, and its key. Of 8 images it is rank 1's of 2 and of 3."""
    alone, every = at_step_3(config)
    every._rank, every._world_size = 0, 1
    pixels, _ = next(every.batches(alone.model, first_step=3, num_steps=1, augment=None))
    trainer, data = at_step_3(config)
    poison(trainer, pixels[5])
    key = data.keys_of(data.ids_of(3)[5:6])[0]
    return culprits.named(trainer, data, augment=None), key


def test_the_rank_and_the_key_of_an_image_with_features_that_are_not_finite_are_named(
    config: TrainJobConfig,
) -> None:
    said, key = said_of_the_sixth_image(config)
    assert said == f"the features of 1 of its 8 images, on rank 0, are not finite: {key!r}"


def test_where_all_features_are_finite_the_batch_is_named(config: TrainJobConfig) -> None:
    trainer, data = at_step_3(config)
    keys = ", ".join(map(repr, data.keys_of(data.ids_of(3))))
    said = culprits.named(trainer, data, augment=None)
    assert said == f"the features of its 8 images are finite; these are {keys}"


def test_of_many_images_some_keys_are_named(config: TrainJobConfig) -> None:
    many = replace(config, batch=replace(config.batch, classes_per_batch=6, samples_per_class=4))
    trainer, data = at_step_3(many)
    with torch.no_grad():
        next(trainer.model.backbone.parameters()).fill_(torch.nan)
    said = culprits.named(trainer, data, augment=None)
    assert said.startswith("the features of 24 of its 24 images, on rank 0, are not finite: '")
    assert said.endswith(" and 16 more") and said.count("'") == 16


def on_each_rank(config: TrainJobConfig) -> dict[str, Any]:
    here = sources.digest()
    if collectives.rank() == collectives.world_size() - 1:
        here = "of another program"
    return {
        "culprits": said_of_the_sixth_image(config)[0],
        "same": sources.difference(sources.digest()) is None,
        "other": str(sources.difference(here)),
    }


@pytest.mark.slow
def test_all_ranks_say_the_same_of_one_ranks_image_and_of_one_ranks_program(
    config: TrainJobConfig, tmp_path: Path
) -> None:
    apart = replace(config, loader=replace(config.loader, cache_folder=tmp_path))
    for world_size, results in on_ranks(on_each_rank, apart, world_sizes=(2, 3)).items():
        last = world_size - 1
        for of_rank in results:
            assert "of 1 of its 8 images, on rank 1, are not finite" in of_rank["culprits"]
            assert of_rank["same"]
            assert of_rank["other"].startswith(f"ranks [{last}] of {world_size} run another version of namr")
