"""The main training path under a real Ray: fit a small dataset, resume, one job at a time for a run."""

import dataclasses
import json
import os
import socket
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train.v2._internal.execution import storage as storage_of_ray

from namr.errors import Conflict, ManifestError, NamrError, ObjectMissing, StorageError
from namr.measure import validation
from namr.model import model
from namr.registry import registry
from namr.store import storage
from namr.store.lease import Lease
from namr.train import job, loop
from namr.train.examination import Examination
from namr.train.ray_group import Worker, WorkersConfig
from namr.train.recipe import BackboneRecipe
from namr.train.run import FitResult, TrainJobConfig
from tests.small_training import make_dataset, make_job

Make = Callable[..., TrainJobConfig]


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


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


def history_of_start(runs: registry.Registry, result: FitResult) -> list[tuple[int, float]]:
    """What MLflow has of step 0, of every way of searching."""
    names = [name for name in result.validation if "recall_at_1" in name]
    return [runs.history(result.mlflow_run_id, name)[0] for name in names]


def weights_of(result: FitResult) -> dict[str, torch.Tensor]:
    return model.load(Path(result.model_uri)).state_dict()


@pytest.mark.ray
def test_fit_trains_on_two_workers_and_registers_a_candidate_that_loads(
    whole: tuple[TrainJobConfig, FitResult],
) -> None:
    config, result = whole
    assert not result.was_finished
    assert result.num_steps == 6
    assert result.best_step in (0, 2, 4, 6)
    assert result.beat_its_start == (result.best_step > 0)
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
    assert [step for step, _ in history] == [0, 2, 4, 6]
    assert result.start is not None
    assert result.start.words == "random weights, since the backbone does too"
    assert any(result.start.recall_at_1 == first for _, first in history_of_start(runs, result))
    assert [step for step, _ in runs.history(result.mlflow_run_id, "train/total")] == [6]
    stored = {path.name for path in (Path(config.storage_uri) / "run").iterdir()}
    assert {"run.json", "result.json", "model", "step-00000006"} <= stored


@pytest.mark.ray
def test_a_finished_run_answers_with_its_result(whole: tuple[TrainJobConfig, FitResult]) -> None:
    config, result = whole
    assert job.fit(config) == dataclasses.replace(result, was_finished=True)


@pytest.mark.ray
def test_a_run_that_was_killed_in_an_upload_goes_on_and_ends_as_if_it_had_not_been(
    whole: tuple[TrainJobConfig, FitResult], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    with monkeypatch.context() as patch:
        patch.setattr(job, "_work", _killed_in_upload_of_step_3)
        with pytest.raises(NamrError, match="failed"):
            job.fit(config)
    assert not (tmp_path / "runs" / "run" / "result.json").exists()
    with pytest.raises(ManifestError, match="can't be read"):
        loop.read_state(tmp_path / "runs" / "run" / "step-00000003")
    resumed, uninterrupted = job.fit(config), whole[1]

    assert resumed.best_step == uninterrupted.best_step
    assert resumed.validation == uninterrupted.validation
    expected, weights = weights_of(uninterrupted), weights_of(resumed)
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    assert statuses(tmp_path) == ["FINISHED"]
    runs = registry.connect(config.tracking_uri)
    logged = runs._client.get_metric_history(resumed.mlflow_run_id, "validation/recall_at_1/cosine")
    assert [entry.step for entry in logged] == [0, 2, 4, 6]


def _killed_in_upload_of_step_3(given: job.Given, worker: Worker) -> Any:
    """Killed when half of the checkpoint's file is in storage."""
    copy = storage_of_ray._pyarrow_fs_copy_files

    def copy_half(source: str, destination: str, **filesystems: Any) -> None:
        if not destination.endswith("step-00000003"):
            return copy(source, destination, **filesystems)
        state = Path(source, "state.pt").read_bytes()
        Path(destination, "state.pt").write_bytes(state[: len(state) // 2])
        os._exit(1)

    storage_of_ray._pyarrow_fs_copy_files = copy_half
    return job._work(given, worker)


def _at_step_3(given: job.Given, worker: Worker, happens: Callable[[job.Given], None]) -> Any:
    """The real work, in which something happens once the checkpoint of step 3 is on its way."""

    def checkpoint(write: Any, examination: Examination) -> None:
        worker.checkpoint(write, examination)
        if examination.step == 3 and worker.rank == 0:
            happens(given)

    return job._work(given, _WorkerWith(worker, checkpoint))  # type: ignore[arg-type]


def _replaced_at_step_3(given: job.Given, worker: Worker) -> Any:
    return _at_step_3(given, worker, lambda given: take_over(given.config))


def take_over(config: TrainJobConfig) -> None:
    """What another job leaves that found this one dead."""
    uri = f"{config.run_uri}/lease.json"
    record = json.loads(storage.read(uri))
    another = {"holder": "another job", "token": "another", "fence": record["fence"] + 1}
    storage.write(uri, json.dumps(record | another).encode())


class _WorkerWith:
    def __init__(self, worker: Worker, checkpoint: Callable[..., None]) -> None:
        self._worker, self.checkpoint = worker, checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


def statuses(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "mlflow.db") as database:
        return [status for (status,) in database.execute("select status from runs")]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_job_whose_lease_another_took_ends_at_its_next_checkpoint_and_publishes_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(workers=WorkersConfig(num_workers=2, max_failures=2))
    with monkeypatch.context() as patch:
        patch.setattr(job, "_work", _replaced_at_step_3)
        with pytest.raises(Conflict, match=r"run 'run' is trained by another job .* before step 4 is stored"):
            job.fit(config)
    stored = {path.name for path in (tmp_path / "runs" / "run").iterdir()}
    assert "step-00000003" in stored and stored.isdisjoint({"step-00000004", "model", "result.json"})
    assert statuses(tmp_path) == ["RUNNING"]  # the other's, that trains
    with pytest.raises(ObjectMissing):
        registry.connect(config.tracking_uri).versions("namr")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_job_that_loses_its_lease_when_all_steps_are_done_registers_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(workers=WorkersConfig(num_workers=1))

    def check(held: Lease) -> None:
        raise Conflict(f"{held.uri} is not held any more")

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "check", check)
        with pytest.raises(Conflict, match=r"lease.json is not held any more"):
            job.fit(config)
    assert not (tmp_path / "runs" / "run" / "model").exists()
    assert statuses(tmp_path) == ["RUNNING"]
    with pytest.raises(ObjectMissing):
        registry.connect(config.tracking_uri).versions("namr")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_run_that_is_killed_after_it_registered_registers_no_second_version(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(workers=WorkersConfig(num_workers=1))

    def killed(*_: Any) -> None:
        raise NamrError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(job, "_draw", killed)
        with pytest.raises(NamrError, match="killed"):
            job.fit(config)
    assert statuses(tmp_path) == ["FAILED"]
    result = job.fit(config)
    (version,) = registry.connect(config.tracking_uri).versions("namr")
    assert (version.version, version.digest, version.aliases) == (
        result.model_version,
        result.model_digest,
        ("candidate",),
    )
    assert statuses(tmp_path) == ["FINISHED"]


def test_a_second_job_under_one_name_is_told_who_trains_it_and_touches_nothing(
    make: Make, tmp_path: Path
) -> None:
    config = make()
    uri = f"{config.run_uri}/lease.json"
    with (
        Lease.take(uri, what="training run 'run'", renew_s=0.05),
        pytest.raises(Conflict, match=r"held by training run 'run' \(process \d+ on .*\) since"),
    ):
        job.fit(config)
    assert not (tmp_path / "mlflow.db").exists()
    assert [path.name for path in (tmp_path / "runs" / "run").iterdir() if path.suffix == ".json"] == [
        "lease.json"
    ]


@pytest.mark.ray
def test_one_worker_comes_to_what_two_come_to(whole: tuple[TrainJobConfig, FitResult], make: Make) -> None:
    two = whole[1]
    config = make(workers=WorkersConfig(num_workers=1, system_metrics_s=0.1))
    one = job.fit(config)
    assert one.best_step == two.best_step
    told = registry.connect(config.tracking_uri)._client.get_run(one.mlflow_run_id).data.metrics
    assert 0 < told[f"system/{socket.gethostname()}/system_memory_usage_percentage"] <= 100
    # Every step is a checkpoint here, and what is waited for after one doesn't count as waiting for data.
    assert {f"train/{part}_s" for part in ("forward", "loss", "backward", "update")} <= told.keys()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    alone, together = (
        model.embed(model.load(Path(result.model_uri)), pixels, batch_size=4, device="cpu")
        for result in (one, two)
    )
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-3, atol=1e-3)
    # A bias before a BatchNorm has no gradient but rounding, which Adam blows up to whole steps.
    np.testing.assert_allclose(alone[1], together[1], atol=1e-2)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_heads_on_a_frozen_backbone_are_trained_on_cached_features(make: Make, tmp_path: Path) -> None:
    config = make(training={"backbone_learning_rate": 0, "augment": False, "batchnorm": "auto"})
    result = job.fit(config)
    [cached] = (tmp_path / "cache" / "features").glob("*.npy")
    assert np.load(cached).shape[0] == 40
    fresh = model.build(config.model, seed=config.seed).backbone.state_dict()
    learnt = model.load(Path(result.model_uri)).backbone.state_dict()
    assert all(torch.equal(fresh[name], learnt[name]) for name in fresh)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_is_averaged_and_adapted_in_low_ranks_is_published_as_a_plain_model(
    make: Make,
) -> None:
    recipe = {"average_decay": 0.5, "patience": 1, "backbone": BackboneRecipe(low_rank=2)}
    config = make(training={"num_steps": 3, "evaluation_interval": 1, "learning_rate": 1e-2, **recipe})
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, backbone="test_vit"),
        workers=WorkersConfig(num_workers=1),
    )
    result = job.fit(config)
    assert result.num_steps == 1  # the start finds all, so there is nothing better to wait for
    published = model.load(Path(result.model_uri))
    assert set(published.state_dict()) == set(model.build(config.model, seed=0).state_dict())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_loss_that_is_not_finite_fails_at_once_and_keeps_the_checkpoint(make: Make, tmp_path: Path) -> None:
    config = make(training={"learning_rate": 1e30, "max_gradient_norm": 1e30})
    with pytest.raises(NamrError, match=r"run 'run', step \d is not finite: total.*Of this step .*'\d-\d'"):
        job.fit(config)
    assert list((tmp_path / "runs" / "run").glob("step-*"))
    assert statuses(tmp_path) == ["FAILED"]


def test_storage_that_is_not_there_is_told_before_any_work(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="file"):
        job.fit(make(storage_uri=str(tmp_path / "file")))
