"""A whole sweep under a real Ray, on small pictures with frozen features: its result, and going on."""

import json
import sqlite3
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from namr import config as configuration
from namr.errors import ConfigError, Conflict, NamrError
from namr.registry import registry
from namr.store.lease import Lease
from namr.train import sweep
from namr.train.ray_group import WorkersConfig
from namr.train.recipe import TrainingConfig
from namr.train.run import TrainJobConfig
from namr.train.settings import SweepConfig
from namr.train.sweep_run import SweepResult
from tests.small_training import make_dataset, make_job


def make(folder: Path, **changes: Any) -> SweepConfig:
    """Six settings of six steps."""
    uri = make_dataset(folder / "set")
    job = make_job(uri, folder, training={"backbone_learning_rate": 0, "augment": False})
    shared = {name: getattr(job, name) for name in ("seed", "data", "batch", "model", "loss", "training",
                                                    "augment", "loader", "tracking_uri")}  # fmt: skip
    fields: dict[str, Any] = shared | {
        "sweep_name": "s",
        "storage_uri": str(folder / "sweeps"),
        "workers": WorkersConfig(max_failures=0, wait_s=60),
        "bases": ("triplet", "margin"),
        "ranking_weights": ("own", 2.0),
    }
    return SweepConfig(**fields | changes)


def statuses(folder: Path, parent: str) -> list[str]:
    """Of the runs below a run of MLflow."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        children = "select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?"
        query = f"select status from runs where run_uuid in ({children})"
        return [status for (status,) in database.execute(query, (parent,))]


@pytest.fixture(scope="module")
def whole(
    ray_local: None,  # noqa: ARG001  a fixture that is wanted for what it starts
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[SweepConfig, SweepResult, Path]:
    folder = tmp_path_factory.mktemp("whole")
    config = make(folder)
    return config, sweep.sweep(config), folder


@pytest.mark.ray
def test_a_sweep_tries_all_settings_and_leaves_a_table_a_plot_a_config_and_runs_below_its_own(
    whole: tuple[SweepConfig, SweepResult, Path],
) -> None:
    config, result, folder = whole
    assert {(each.setting.base, each.setting.ranking_weight) for each in result.settings} == {
        ("triplet", 0), ("triplet", 1), ("triplet", 2), ("margin", 0), ("margin", 0.3), ("margin", 2)
    }  # fmt: skip
    assert all(each.state in ("finished", "stopped") for each in result.settings)
    assert len({each.points[0].score for each in result.settings}) == 1, "all begin with the same model"
    ends = {
        each.setting.is_plain: each.points[-1].step for each in result.settings if each.state == "finished"
    }
    assert ends == {True: 6, False: 6}, "one of each is trained to its end"
    assert result.ranking_gain is not None
    assert statuses(folder, result.mlflow_run_id) == ["FINISHED"] * 6
    stored = folder / "sweeps" / "s"
    assert result.table in (stored / "table.md").read_text()
    assert (stored / "scores.svg").read_text().lstrip().startswith("<?xml")
    job = configuration.load(TrainJobConfig, ["--config", result.config_uri])
    best = next(each.setting for each in result.settings if each.setting.name == result.best)
    assert (job.loss.base, job.loss.weight) == (best.base, best.ranking_weight)
    assert job.run_name == "s-best" and job.data == config.data
    caches = list((folder / "cache" / "features").glob("*.npy"))
    assert len(caches) == 1, "features are computed once for all settings"
    runs = registry.connect(config.tracking_uri)
    assert runs._client.get_run(result.mlflow_run_id).info.status == "FINISHED"


@pytest.mark.ray
def test_a_finished_sweep_answers_with_its_result_and_what_is_missing_alone_is_tried_again(
    whole: tuple[SweepConfig, SweepResult, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result, folder = whole
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_sweep", None)
        assert sweep.sweep(config) == replace(result, was_finished=True)
    stored = folder / "sweeps" / "s"
    (stored / "result.json").unlink()
    again = result.settings[2]
    (stored / "settings" / f"{again.setting.name}.json").unlink()
    repeated = sweep.sweep(config)
    before = {each.setting.name: each for each in result.settings}
    for each in repeated.settings:
        if each.setting == again.setting:
            assert each.mlflow_run_id != again.mlflow_run_id
            assert each.points == again.points[: len(each.points)]
        else:
            assert each == before[each.setting.name]
    assert len(statuses(folder, result.mlflow_run_id)) == 7


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_when_every_setting_fails_the_sweep_says_so_with_the_first_reason(tmp_path: Path) -> None:
    config = make(tmp_path, bases=("triplet",), ranking_weights=(1.0,), learning_rates=(1e30,))
    with pytest.raises(NamrError, match=r"all 2 settings failed, triplet-.*: step \d is not finite"):
        sweep.sweep(config)
    run = json.loads((tmp_path / "sweeps" / "s" / "sweep.json").read_text())["mlflow_run_id"]
    assert statuses(tmp_path, run) == ["FAILED", "FAILED"]


def test_another_job_under_the_name_and_another_configuration_are_refused(tmp_path: Path) -> None:
    config = make(tmp_path)
    with (
        Lease.take(str(tmp_path / "sweeps" / "s" / "lease.json"), what="another", renew_s=0.05),
        pytest.raises(Conflict, match="held by another"),
    ):
        sweep.sweep(config)


def test_data_without_enough_classes_is_refused_before_there_is_a_cluster(tmp_path: Path) -> None:
    batch = replace(make(tmp_path).batch, classes_per_batch=50)
    with pytest.raises(ConfigError, match="classes_per_batch"):
        sweep.sweep(make(tmp_path / "again", batch=batch))
    assert not (tmp_path / "again" / "mlflow.db").exists()


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_sweep_whose_driver_was_killed_goes_on_with_what_had_not_ended(tmp_path: Path, python: str) -> None:
    steps = TrainingConfig(
        num_steps=300, evaluation_interval=100, backbone_learning_rate=0, augment=False, batchnorm="frozen"
    )
    (tmp_path / "sweep.toml").write_text(configuration.to_toml(make(tmp_path, training=steps)))
    words = [python, "jobs/sweep.py", "--config", str(tmp_path / "sweep.toml")]
    stored, root = tmp_path / "sweeps" / "s", Path(__file__).parents[2]
    driver = subprocess.Popen(words, cwd=root)
    try:
        while not list((stored / "settings").glob("*.json")):
            assert driver.poll() is None, "the driver ended by itself"
            time.sleep(0.01)
    finally:
        driver.kill()
        driver.wait()
    before = {path: path.read_bytes() for path in (stored / "settings").glob("*.json")}
    assert 1 <= len(before) < 6
    subprocess.run(words, cwd=root, check=True)
    result = json.loads((stored / "result.json").read_text())
    assert len(result["settings"]) == 6
    assert {path: path.read_bytes() for path in before} == before
    ended = statuses(tmp_path, result["mlflow_run_id"])
    assert ended.count("FINISHED") == 6
    assert set(ended) <= {"FINISHED", "KILLED"}, "none is left running"
