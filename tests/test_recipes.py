"""The configs for the benchmarks: one setting for three networks that timm has weights of, and NASA's own."""

from pathlib import Path

import pytest
import timm

from namr import config
from namr.measure.evaluation import EvaluationConfig
from namr.train.run import TrainJobConfig
from tests import commands

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "jobs" / "configs" / "benchmarks").glob("*.toml"))
NASA = ROOT / "jobs" / "configs" / "nasa.toml"
OF_THE_NETWORK = {"model.backbone", "training.learning_rate", "training.backbone_learning_rate"}


def recipe(path: Path) -> TrainJobConfig:
    flags = ["--run-name", "r", "--storage-uri", "runs", "--data.dataset-uri", "data"]
    return config.load(TrainJobConfig, ["--config", str(path), *flags])


@pytest.mark.parametrize("path", [*RECIPES, NASA], ids=lambda path: path.stem)
def test_timm_has_weights_for_the_network_of_a_recipe(path: Path) -> None:
    model = recipe(path).model
    assert timm.is_model_pretrained(model.backbone)
    assert (model.weights, model.embedding_dim, model.image_size_px) == ("timm", 512, 224)


def test_the_recipes_for_the_benchmarks_differ_in_the_network_alone() -> None:
    assert len(RECIPES) == 3
    first, *others = [config.to_flat(recipe(path)) for path in RECIPES]
    for other in others:
        assert {name for name in first if first[name] != other[name]} <= OF_THE_NETWORK


def test_the_recipe_of_nasa_has_what_its_authors_published() -> None:
    job = recipe(NASA)
    loss = job.loss
    assert (job.model.structure_range, loss.margin, loss.weight, loss.t, loss.alpha) == (0.5, 0.2, 2, 3, 10)
    assert (loss.base, loss.num_clusters, loss.structure_side) == ("triplet", 2, "query")
    assert (job.batch.num_samples, job.batch.samples_per_class) == (128, 4)
    training = job.training
    assert (training.num_steps, training.weight_decay) == (90 * 100, 1e-5)
    assert training.learning_rate == training.backbone_learning_rate == 5e-5
    assert training.whitening_power is None
    assert job.augment.min_area == 0.16
    told = [command for command in commands.of_toml(NASA) if "jobs/evaluate.py" in command.words]
    assert config.load(EvaluationConfig, told[0].words[2:]).depth == 32
