"""What a sweep keeps: in storage, and in MLflow below its own run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from namr.data import datasets
from namr.errors import ConfigError
from namr.measure.metrics import RetrievalMetrics
from namr.registry import registry
from namr.registry.registry import Registry
from namr.train import settings, sweep_run
from namr.train.settings import SweepConfig
from namr.train.sweep_run import Point, SweepRun
from namr.train.training_data import DataConfig
from tests.small_training import make_dataset
from tests.train.test_settings import make


def measured(scores: list[float]) -> RetrievalMetrics:
    return RetrievalMetrics(recall_at_k={1: 0.5}, map_at_r=0.5, r_precision=0.5, num_queries=3, num_skipped=0,
                            scores=np.array(scores), classes=np.array([0, 0, 1]))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a dataset, and one MLflow for all tests: making one takes seconds."""
    made = tmp_path_factory.mktemp("sweeps")
    make_dataset(made / "set")
    return made


@pytest.fixture
def begun(folder: Path, request: pytest.FixtureRequest) -> tuple[SweepConfig, Registry, SweepRun]:
    uri = str(folder / "set")
    config = make(sweep_name=request.node.name, storage_uri=str(folder), data=DataConfig(dataset_uri=uri))
    runs = registry.connect(f"sqlite:///{folder}/mlflow.db")
    return config, runs, sweep_run.begin(config, runs, datasets.open_version(uri), None)


def keep(config: SweepConfig, runs: Registry, parent: SweepRun, **changes: Any) -> sweep_run.SettingResult:
    fields: dict[str, Any] = {
        "state": "finished",
        "reason": "",
        "points": [
            Point(0, 0.4, 0.4, 0.4, "l2"),
            Point(3, 0.7, 0.8, 0.6, "l2"),
            Point(6, 0.7, 0.7, 0.7, "l2"),
        ],
        "measured": [measured([0.2, 0.4, 0.6]), measured([0.6, 0.7, 0.8]), measured([0.7, 0.7, 0.7])],
        "numbers": [{"validation/recall_at_1/l2": share} for share in (0.4, 0.8, 0.7)],
    }
    setting = settings.settings_of(config)[0]
    return sweep_run.keep(config, setting, runs=runs, parent=parent, **fields | changes)


def test_a_setting_is_kept_with_its_scores_and_as_a_child_of_the_sweeps_run(
    begun: tuple[SweepConfig, Registry, SweepRun],
) -> None:
    config, runs, parent = begun
    kept = keep(*begun)
    assert sweep_run.results_so_far(config) == [kept]
    assert kept.best.step == 3
    scores = sweep_run.scores_of(config, kept.setting)
    assert scores.start.scores.tolist() == [0.2, 0.4, 0.6]
    assert scores.best.scores.tolist() == [0.6, 0.7, 0.8]
    assert scores.best.classes.tolist() == [0, 0, 1]
    child = runs._client.get_run(kept.mlflow_run_id)
    assert child.data.tags["mlflow.parentRunId"] == parent.mlflow_run_id
    assert child.info.status == "FINISHED"
    assert child.data.params["loss.base"] == "triplet"
    assert runs.history(kept.mlflow_run_id, "validation/score") == [(0, 0.4), (3, 0.7), (6, 0.7)]


def test_a_failed_setting_is_kept_with_its_reason(begun: tuple[SweepConfig, Registry, SweepRun]) -> None:
    config, runs, _ = begun
    kept = keep(*begun, state="failed", reason="not finite", points=[], measured=[], numbers=[])
    assert sweep_run.results_so_far(config) == [kept]
    assert kept.reason == "not finite"
    assert runs._client.get_run(kept.mlflow_run_id).info.status == "FAILED"


def test_runs_that_a_kill_left_are_ended_as_what_was_stored_says(
    begun: tuple[SweepConfig, Registry, SweepRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, runs, parent = begun
    with monkeypatch.context() as patch:  # as if killed just before the end
        patch.setattr(Registry, "end_run", lambda *_: None)
        kept = keep(*begun)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep_run.manifests, "write_manifest", interrupted)
        keep(*begun)
    sweep_run.settle(config, runs)
    experiment = runs._client.get_experiment_by_name("namr").experiment_id
    children = runs._client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.mlflow_run_id}'")
    statuses = {run.info.run_id: run.info.status for run in children}
    assert statuses.pop(kept.mlflow_run_id) == "FINISHED"
    assert list(statuses.values()) == ["KILLED"]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_name_that_was_used_with_another_configuration_is_refused(
    begun: tuple[SweepConfig, Registry, SweepRun],
) -> None:
    config, _, run = begun
    assert sweep_run.begun(config) == run
    assert sweep_run.finished(config) is None
    moved = replace(config, workers=replace(config.workers, wait_s=1.0))
    assert sweep_run.begun(moved) == run
    with pytest.raises(ConfigError, match=r"ranking_weights was \('own',\) and is \(2.0,\); choose another"):
        sweep_run.begun(replace(config, ranking_weights=(2.0,)))
