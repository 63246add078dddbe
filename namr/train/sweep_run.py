"""What a sweep is: how it is stored when it begins, when a setting ends, and when it ends.

    <storage>/<sweep>/lease.json              who sweeps now
    <storage>/<sweep>/sweep.json              configuration, data, MLflow run; written first
    <storage>/<sweep>/scores/<setting>.npz    of each query, before training and at best
    <storage>/<sweep>/settings/<setting>.json what came of a setting; written after its scores
    <storage>/<sweep>/table.md, scores.svg    for people
    <storage>/<sweep>/best.toml               for jobs/train.py
    <storage>/<sweep>/result.json             written last

Not covered: trying settings (`sweep`), choosing among them (`sweep_report`).
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from namr import config as configuration
from namr.data.datasets import Dataset
from namr.errors import ConfigError
from namr.measure.metrics import RetrievalMetrics
from namr.registry.registry import Registry, RunStatus
from namr.store import manifests, storage
from namr.train import run as run_store
from namr.train.run import TrainingRun
from namr.train.settings import Setting, SweepConfig, settings_of

_TAG = "namr.sweep"
_SETTING_TAG = "namr.sweep_setting"

State = Literal["finished", "stopped", "failed"]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SweepRun(TrainingRun):
    """What a sweep is, as stored when it begins."""

    FORMAT: ClassVar[str] = "namr-sweep"


class Point(NamedTuple):
    """One examination of a setting, searched in the way that it recommends."""

    step: int
    score: float
    """The mean of Recall@1 and MAP@R."""
    recall_at_1: float
    map_at_r: float
    search: str


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """What came of a setting, as stored when it ends."""

    FORMAT: ClassVar[str] = "namr-sweep-setting"
    FORMAT_VERSION: ClassVar[int] = 1

    setting: Setting
    mlflow_run_id: str
    state: State
    reason: str
    """why it failed"""
    points: tuple[Point, ...]
    """by step, the first is before training"""

    @property
    def best(self) -> Point:
        """Of equals the earliest; a failed setting has none."""
        return max(self.points, key=lambda point: (point.score, -point.step))


class Gain(NamedTuple):
    """By how much one score exceeds another on the same queries, with a 95 % interval over classes."""

    mean: float
    low: float | None
    """None where the queries are of one class."""
    high: float | None


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What came out of a sweep, as stored when it ends."""

    FORMAT: ClassVar[str] = "namr-sweep-result"
    FORMAT_VERSION: ClassVar[int] = 1

    sweep_name: str
    sweep_uri: str
    mlflow_run_id: str
    best: str
    """name of the setting with the highest score"""
    best_plain: str | None
    """of those without ranking loss; None where all of them failed"""
    best_ranked: str | None
    """of those with it"""
    ranking_gain: Gain | None
    """best_ranked over best_plain"""
    training_gain: Gain
    """the best over the model before its first step"""
    beat_start: bool
    words: str
    """all that in words"""
    table: str
    """Markdown"""
    settings: tuple[SettingResult, ...]
    """best first, failed ones last"""
    was_finished: bool = False
    """True where `sweep` found the sweep finished and only told of it"""

    @property
    def config_uri(self) -> str:
        """The training run with the best setting, for `jobs/train.py --config`."""
        return storage.join(self.sweep_uri, "best.toml")


class Scores(NamedTuple):
    """What was measured of each query, before training and at the best examination."""

    start: RetrievalMetrics
    best: RetrievalMetrics


def lease_uri(config: SweepConfig) -> str:
    """Where the lease of the sweep lies."""
    return storage.join(config.sweep_uri, "lease.json")


def begun(config: SweepConfig) -> SweepRun | None:
    """The sweep of that name, if there is one; ConfigError if it was another one."""
    uri = storage.join(config.sweep_uri, "sweep.json")
    if not storage.exists(uri):
        return None
    run = manifests.read_manifest(uri, SweepRun)
    if changed := run_store.changes(run.config, run_store.texts(config)):
        raise ConfigError(
            f"sweep {config.sweep_name!r} exists in {config.storage_uri} with another configuration: "
            f"{changed}; choose another sweep_name, or go on with the old values"
        )
    return run


def begin(config: SweepConfig, runs: Registry, train: Dataset, unseen: Dataset | None) -> SweepRun:
    """Start the MLflow run that stands above those of the settings, and store what the sweep is."""
    tags = {
        _TAG: _tag(config),
        "data_uri": train.uri,
        "data_version": str(train.version.version),
        "data_digest": train.published_digest,
        "validation_uri": unseen.uri if unseen else "held-out classes of data_uri",
    }
    for left in runs.running(config.experiment, tag=_TAG, value=_tag(config)):  # killed before sweep.json
        runs.end_run(left, "KILLED")
    run_id = runs.create_run(
        config.experiment, run_name=config.sweep_name, params=configuration.to_flat(config), tags=tags
    )
    runs.log_text(run_id, configuration.to_toml(config), "job.toml")
    run = SweepRun(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        mlflow_run_id=run_id,
        config=run_store.texts(config),
        data_version=train.version.version,
        data_digest=train.published_digest,
        validation_version=unseen.version.version if unseen else None,
        validation_digest=unseen.published_digest if unseen else None,
    )
    manifests.write_manifest(storage.join(config.sweep_uri, "sweep.json"), run)
    return run


def finished(config: SweepConfig) -> SweepResult | None:
    """What came out of the sweep of that name, if it is finished; ConfigError if it was another one."""
    uri = storage.join(config.sweep_uri, "result.json")
    if begun(config) is None or not storage.exists(uri):
        return None
    return replace(manifests.read_manifest(uri, SweepResult), was_finished=True)


def results_so_far(config: SweepConfig) -> list[SettingResult]:
    """What came of the settings that ended, in the order in which they are tried."""
    uris = [_setting_uri(config, setting) for setting in settings_of(config)]
    return [manifests.read_manifest(uri, SettingResult) for uri in uris if storage.exists(uri)]


def keep(
    config: SweepConfig,
    setting: Setting,
    *,
    runs: Registry,
    parent: SweepRun,
    state: State,
    reason: str,
    points: Sequence[Point],
    measured: Sequence[RetrievalMetrics | None],
    numbers: Sequence[dict[str, float]],
) -> SettingResult:
    """Keep what came of a setting, in MLflow below the sweep's run and in storage: it has ended from now on.

    measured, numbers: of each point, query by query and as MLflow has them.
    """
    uri = _setting_uri(config, setting)
    run_id = runs.create_run(
        config.experiment,
        run_name=setting.name,
        params=configuration.to_flat(config.job_of(setting)),
        tags={_SETTING_TAG: _tag(config), "state": state},
        parent_run_id=parent.mlflow_run_id,
    )
    for point, named in zip(points, numbers, strict=True):
        runs.log_metrics(run_id, {**named, "validation/score": point.score}, step=point.step)
    if reason:
        runs.log_text(run_id, reason, "reason.txt")
    result = SettingResult(
        setting=setting, mlflow_run_id=run_id, state=state, reason=reason, points=tuple(points)
    )
    if state != "failed":
        best = measured[result.points.index(result.best)]
        storage.write(_scores_uri(config, setting), _encode(measured[0], best))
    manifests.write_manifest(uri, result)
    runs.end_run(run_id, _status(result))
    return result


def settle(config: SweepConfig, runs: Registry) -> None:
    """End what a kill left running in MLflow: runs of settings that ended, or that have to be tried again."""
    ended = {result.mlflow_run_id: _status(result) for result in results_so_far(config)}
    for left in runs.running(config.experiment, tag=_SETTING_TAG, value=_tag(config)):
        runs.end_run(left, ended.get(left, "KILLED"))


def scores_of(config: SweepConfig, setting: Setting) -> Scores:
    """What `keep` kept of a setting that did not fail."""
    with np.load(io.BytesIO(storage.read(_scores_uri(config, setting)))) as stored:
        classes = stored["classes"]
        start, best = (_metrics(stored[name], classes) for name in ("start", "best"))
    return Scores(start, best)


def finish(
    config: SweepConfig, result: SweepResult, *, runs: Registry, files: Iterable[tuple[str, str]]
) -> None:
    """Store what came out of the sweep, with its (name, text) files: it is finished from now on."""
    for name, text in files:
        storage.write(storage.join(config.sweep_uri, name), text.encode())
        runs.log_text(result.mlflow_run_id, text, name)
    runs.end_run(result.mlflow_run_id, "FINISHED")
    manifests.write_manifest(storage.join(config.sweep_uri, "result.json"), result)


def _tag(config: SweepConfig) -> str:
    return storage.sha256(config.sweep_uri.encode())[:32]


def _status(result: SettingResult) -> RunStatus:
    return "FAILED" if result.state == "failed" else "FINISHED"


def _setting_uri(config: SweepConfig, setting: Setting) -> str:
    return storage.join(config.sweep_uri, "settings", f"{setting.name}.json")


def _scores_uri(config: SweepConfig, setting: Setting) -> str:
    return storage.join(config.sweep_uri, "scores", f"{setting.name}.npz")


def _encode(start: RetrievalMetrics | None, best: RetrievalMetrics | None) -> bytes:
    assert start is not None and best is not None
    buffer = io.BytesIO()
    np.savez_compressed(buffer, start=start.scores, best=best.scores, classes=best.classes)
    return buffer.getvalue()


def _metrics(scores: Floats, classes: Ints) -> RetrievalMetrics:
    """As much of them as `metrics.difference` looks at."""
    return RetrievalMetrics(
        recall_at_k={},
        map_at_r=float("nan"),
        r_precision=float("nan"),
        num_queries=len(scores),
        num_skipped=0,
        scores=scores,
        classes=classes,
    )
