"""A dry run: what it reads, measures and says, and that it leaves nothing behind."""

from dataclasses import replace
from pathlib import Path

import pytest

from namr.train import dry_run
from namr.train.dry_run import DryRun
from namr.train.ray_group import WorkersConfig
from namr.train.recipe import BackboneRecipe
from namr.train.run import TrainJobConfig
from tests.small_training import make_dataset, make_job


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainJobConfig:
    folder = tmp_path_factory.mktemp("dry")
    return make_job(make_dataset(folder / "data"), folder, workers=WorkersConfig(num_workers=2))


@pytest.fixture(scope="module")
def told(config: TrainJobConfig) -> DryRun:
    return dry_run.look(config)


def test_it_tells_shapes_steps_and_requests(told: DryRun) -> None:
    assert told.shapes == ((4, 3, 32, 32), (4, 256), (4, 8))  # half of 8 images
    assert (told.num_images, told.num_classes) == (30, 6)
    assert told.num_evaluations == 4  # before the first of 6 steps and after every second
    assert 1 <= told.num_requests <= 8
    assert told.peak_bytes > 2**20
    assert told.num_learnt == told.num_weights
    assert told.expected_s > 6 * told.compute_s > 0
    for words in ("4 x 3 x 32 x 32", "requests", "expected  0:00:", "each image 1.6 times"):
        assert words in told.text


def test_a_step_takes_as_long_as_the_slower_of_loading_and_computing(told: DryRun) -> None:
    times = {"forward": 1.0, "backward": 2.0, "data": 9.0}
    for num_loaders, expected in ((0, 11.0), (1, 8.0), (4, 3.0)):
        loader = replace(told.config.loader, num_workers=num_loaders)
        asked = replace(told, config=replace(told.config, loader=loader), times=times, read_s=8.0)
        assert asked.step_s == expected


def test_it_leaves_no_run_and_no_features_behind(config: TrainJobConfig, told: DryRun) -> None:
    assert told.text
    assert not Path(config.storage_uri).exists()
    frozen = replace(config.training, backbone_learning_rate=0, augment=False)
    assert dry_run.look(replace(config, training=frozen)).num_learnt < told.num_learnt
    assert not (config.loader.cache_folder / "features").exists()


def test_it_measures_what_is_trained_after_the_thaw(config: TrainJobConfig) -> None:
    late = replace(config.training, backbone=BackboneRecipe(frozen_steps=2))
    assert dry_run.look(replace(config, training=late)).times["backward"] > 0
