"""The main training path: fit on a small real dataset under a real Ray, resume, refuse what can't work."""

import dataclasses
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from namr.data import datasets, images, shards
from namr.data.images import AugmentConfig
from namr.data.loading import LoaderConfig
from namr.data.sampling import PKConfig
from namr.data.shards import Sample
from namr.errors import ConfigError, NamrError, StorageError
from namr.measure import validation
from namr.model import model
from namr.model.losses import LossConfig
from namr.model.model import ModelConfig
from namr.registry import registry
from namr.store import manifests, tables
from namr.train import job, lessons, ray_group
from namr.train.job import FitResult, TrainJobConfig
from namr.train.lessons import DataConfig, Lessons
from namr.train.ray_group import WorkersConfig
from namr.train.step import TrainingConfig

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


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


Make = Callable[..., TrainJobConfig]


def make_job(
    data_uri: str, folder: Path, *, training: dict[str, Any] | None = None, **changes: Any
) -> TrainJobConfig:
    """A job of 6 steps with a tiny network; `training` and other parts can be overridden."""
    fields: dict[str, Any] = {
        "run_name": "run",
        "storage_uri": str(folder / "runs"),
        "data": DataConfig(dataset_uri=data_uri, held_out_share=0.3),
        "batch": PKConfig(classes_per_batch=4, samples_per_class=2, seed=1),
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


@pytest.fixture
def make(data_uri: str, tmp_path: Path) -> Make:
    return partial(make_job, data_uri, tmp_path)


@pytest.fixture(scope="module")
def whole(
    ray_local: None,  # noqa: ARG001  a fixture that is wanted for what it starts
    data_uri: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TrainJobConfig, FitResult]:
    """A run on two workers that nothing interrupted."""
    config = make_job(data_uri, tmp_path_factory.mktemp("whole"))
    return config, job.fit(config)


def weights_of(result: FitResult) -> dict[str, torch.Tensor]:
    return model.load(Path(result.model_uri)).state_dict()


@pytest.mark.ray
def test_fit_trains_on_two_workers_and_registers_a_candidate_that_loads(
    whole: tuple[TrainJobConfig, FitResult],
) -> None:
    config, result = whole
    assert not result.was_finished
    assert result.num_steps == 6
    assert result.best_step in (2, 4, 6)
    assert set(result.validation) == {
        f"validation/{metric}/{way}"
        for metric in ("recall_at_1", "map_at_r")
        for way in ("cosine", "l2", "scale-cosine", "query-cosine", "both-cosine")
    }
    recommended = validation.name_of(result.search)
    assert result.recall_at_1 == result.validation[f"validation/recall_at_1/{recommended}"]
    runs = registry.connect(config.tracking_uri)
    version = runs.version("namr", alias="candidate")
    assert (version.version, version.run_id) == (result.model_version, result.mlflow_run_id)
    loaded = model.load(Path(result.model_uri))
    assert model.digest(loaded) == result.model_digest == version.digest
    assert loaded.search == result.search
    history = runs.history(result.mlflow_run_id, "validation/recall_at_1/cosine")
    assert [step for step, _ in history] == [2, 4, 6]
    assert [step for step, _ in runs.history(result.mlflow_run_id, "train/total")] == [6]
    stored = {path.name for path in (Path(config.storage_uri) / "run").iterdir()}
    assert {"run.json", "result.json", "model", "step-00000006"} <= stored


@pytest.mark.ray
def test_a_finished_run_answers_with_its_result(whole: tuple[TrainJobConfig, FitResult]) -> None:
    config, result = whole
    assert job.fit(config) == dataclasses.replace(result, was_finished=True)


@pytest.mark.ray
def test_a_run_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(
    whole: tuple[TrainJobConfig, FitResult], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    with monkeypatch.context() as patch:
        patch.setattr(job, "_work", _killed_at_step_3)
        with pytest.raises(NamrError, match="failed"):
            job.fit(config)
    assert not (tmp_path / "runs" / "run" / "result.json").exists()
    assert (tmp_path / "runs" / "run" / "step-00000003").is_dir()
    resumed, uninterrupted = job.fit(config), whole[1]

    assert resumed.best_step == uninterrupted.best_step
    assert resumed.validation == uninterrupted.validation
    expected, found = weights_of(uninterrupted), weights_of(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]


def _killed_at_step_3(given: Any, place: ray_group.Place) -> Any:
    """The real work, in a process that dies after the checkpoint of step 3."""
    import os

    def checkpoint(write: Any, numbers: dict[str, Any]) -> None:
        place.checkpoint(write, numbers)
        if numbers["step"] == 3:
            os._exit(1)

    return job._work(given, _PlaceWith(place, checkpoint))


class _PlaceWith:
    def __init__(self, place: ray_group.Place, checkpoint: Callable[..., None]) -> None:
        self._place, self.checkpoint = place, checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place, name)


@pytest.mark.ray
def test_one_worker_comes_to_what_two_come_to(whole: tuple[TrainJobConfig, FitResult], make: Make) -> None:
    two = whole[1]
    one = job.fit(make(workers=WorkersConfig(num_workers=1)))
    assert one.best_step == two.best_step
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    found, expected = (
        model.embed(model.load(Path(result.model_uri)), pixels, batch_size=4, device="cpu")
        for result in (one, two)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3, atol=1e-3)
    # A bias before a BatchNorm has no gradient but rounding, which Adam blows up to whole steps.
    np.testing.assert_allclose(found[1], expected[1], atol=1e-2)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_frozen_backbone_learns_from_cached_features(make: Make, tmp_path: Path) -> None:
    config = make(training={"backbone_learning_rate": 0, "augment": False, "batchnorm": "auto"})
    result = job.fit(config)
    [cached] = (tmp_path / "cache" / "features").glob("*.npy")
    assert np.load(cached).shape[0] == 40
    fresh = model.build(config.model, seed=config.training.seed).backbone.state_dict()
    learnt = model.load(Path(result.model_uri)).backbone.state_dict()
    assert all(torch.equal(fresh[name], learnt[name]) for name in fresh)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_loss_that_is_not_finite_fails_at_once_and_keeps_the_checkpoint(make: Make, tmp_path: Path) -> None:
    config = make(training={"learning_rate": 1e30, "max_gradient_norm": 1e30})
    with pytest.raises(NamrError, match=r"run 'run', step \d is not finite: total"):
        job.fit(config)
    assert list((tmp_path / "runs" / "run").glob("step-*"))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("FAILED",)]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_more_workers_than_cores_is_an_error_and_no_wait_without_end(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"4 workers with .* found no room within 2 s"):
        job.fit(make(workers=WorkersConfig(num_workers=4, wait_s=2)))


def test_a_finished_or_begun_run_refuses_another_configuration(make: Make, tmp_path: Path) -> None:
    config = make()
    run = job.TrainingRun(
        created="", mlflow_run_id="1", config=job._texts(job._absolute(config)), data_version=1,
        data_digest="", validation_version=None, validation_digest=None,
    )  # fmt: skip
    uri = str(tmp_path / "runs" / "run")
    manifests.write_manifest(f"{uri}/run.json", run)
    other = make(training={"learning_rate": 1.0}, workers=WorkersConfig(num_workers=1))
    with pytest.raises(ConfigError, match=r"training.learning_rate was 0.0003 and is 1.0; choose another"):
        job.fit(other)
    same_but_workers = make(workers=WorkersConfig(num_workers=1))
    assert job._begun(job._absolute(same_but_workers), uri) == run


def test_storage_that_is_not_there_is_told_before_any_work(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="file"):
        job.fit(make(storage_uri=str(tmp_path / "file")))


def test_a_dataset_without_labels_can_not_be_learnt_from(make: Make, tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "unlabelled", num_classes=3, labelled=False)
    with pytest.raises(ConfigError, match="none of 15 images has a label"):
        job.fit(make(data=DataConfig(dataset_uri=uri)))


def test_fewer_classes_than_a_batch_wants_is_an_error(make: Make) -> None:
    with pytest.raises(ConfigError, match="classes_per_batch is 7, but only 6 of 6"):
        job.fit(make(batch=PKConfig(classes_per_batch=7, samples_per_class=2, seed=1)))


def test_a_batch_smaller_than_the_workers_is_an_error(make: Make) -> None:
    with pytest.raises(ConfigError, match="num_workers is 9 and a batch has 8"):
        make(workers=WorkersConfig(num_workers=9))


def test_held_out_classes_are_never_learnt_and_all_examined(make: Make) -> None:
    config = make()
    lesson = make_lessons(config)
    assert (lesson.num_classes, len(lesson.validation_ids)) == (6, 10)
    learnt = set(lesson.classes.ids.tolist())
    assert learnt.isdisjoint(lesson.validation_ids.tolist())
    built = model.build(config.model, seed=0)
    labels = [y for _, y in lesson.batches(built, first_step=0, num_steps=6, augment=None)]
    assert set(torch.cat(labels).tolist()) == set(range(6))


def test_features_and_images_give_one_examination_and_the_same_batches(make: Make) -> None:
    config = make()
    built = model.build(config.model, seed=0).eval()
    of_images, of_features = make_lessons(config), make_lessons(config)
    of_features.prepare(built)
    ways = lessons.validation.ways("l2")
    assert of_features.examine(built, ways) == of_images.examine(built, ways)
    arguments = {"first_step": 1, "num_steps": 2, "augment": None}
    with torch.no_grad():
        for (pixels, labels), (features, same) in zip(
            of_images.batches(built, **arguments), of_features.batches(built, **arguments), strict=True
        ):
            assert torch.equal(labels, same)
            torch.testing.assert_close(built.features(pixels), features, rtol=1e-4, atol=1e-4)


def make_lessons(config: TrainJobConfig) -> Lessons:
    train = datasets.open_version(config.data.dataset_uri)
    return Lessons(train, None, data=config.data, batch=config.batch, loader=config.loader)


def test_a_validation_dataset_leaves_all_classes_to_training(
    make: Make, data_uri: str, tmp_path: Path
) -> None:
    config = make()
    unseen = datasets.open_version(make_dataset(tmp_path / "unseen", num_classes=2))
    train = datasets.open_version(data_uri)
    lesson = Lessons(train, unseen, data=config.data, batch=config.batch, loader=config.loader)
    assert (lesson.num_classes, len(lesson.validation_ids)) == (8, 10)
