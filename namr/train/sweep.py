"""Try settings of the training on the classes held out, and tell which is best: `sweep`.

Each setting is a training run of its own (the same data, examinations and seed as `job.fit` has), on one
worker, without a registered model. A sweep is its name: the same name goes on with the settings that have not
ended yet, with the data version and the MLflow run it began with; a finished one answers with its result. One
driver at a time holds a sweep's lease.

Not covered: checkpoints (a setting that was cut off begins anew); settings on several workers; proposing
settings that no list has.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from namr import ray_connection
from namr.errors import ShapeError, StorageError
from namr.measure import validation
from namr.progress import shown
from namr.registry import registry
from namr.registry.registry import Registry
from namr.store import storage
from namr.store.lease import Lease
from namr.train import loop, ray_group, settings, sweep_report, trials
from namr.train import run as run_store
from namr.train import sweep_run as store
from namr.train.examination import Examination
from namr.train.settings import Setting, SweepConfig
from namr.train.step import NotFinite
from namr.train.sweep_run import Point, SettingResult, SweepResult, SweepRun
from namr.train.training_data import TrainingData
from namr.train.trials import Ended, Past, Rungs, Tell, Trial


def sweep(config: SweepConfig) -> SweepResult:
    """Try, or go on to try, the settings of the sweep of that name, and tell which is best.

    Raises ConfigError for data that can't be trained on, a sweep of that name with another configuration, and
    a cluster that doesn't have a worker's resources; Conflict where another job has that sweep; StorageError
    for storage that can't be written; NamrError where all settings failed, with the first reason, and where
    some were lost with the machines that tried them.
    """
    config = settings.absolute(config)
    storage.check_writable(config.sweep_uri)
    if result := store.finished(config):
        return result
    with Lease.take(store.lease_uri(config), what=f"sweep {config.sweep_name!r}") as held:
        return store.finished(config) or _sweep(config, held)


def _sweep(config: SweepConfig, held: Lease) -> SweepResult:
    run = store.begun(config)
    job = config.job_of(settings.settings_of(config)[0])
    train, unseen = run_store.open_datasets(job, run)
    # Made here to say what is wrong with the data before there is a cluster.
    TrainingData(train, unseen, data=config.data, batch=config.batch, loader=config.loader, seed=config.seed)
    runs = registry.connect(config.tracking_uri)
    ray_connection.connect(config.address)
    ray_group.check_resources(config.workers)
    if run:
        runs.go_on(run.mlflow_run_id)
        store.settle(config, runs)
    else:
        run = store.begin(config, runs, train, unseen)
    try:
        _try_all(config, run, runs, held)
        held.check()
        return _conclude(config, run, runs)
    except BaseException:
        with suppress(StorageError):  # MLflow is away, or the sweep is another job's: the failure tells more
            held.check()
            runs.end_run(run.mlflow_run_id, "FAILED")
        raise


def _try_all(config: SweepConfig, run: SweepRun, runs: Registry, held: Lease) -> None:
    """Every setting that has not ended yet."""
    every = {setting.name: setting for setting in settings.settings_of(config)}
    past = store.results_so_far(config)
    ended_before = {result.setting.name for result in past}
    with shown(f"sweep {config.sweep_name}", len(every), interval_s=0) as show:
        num_ended = len(past)
        if past:
            show(num_ended, "ended before")

        def keep(ended: Ended) -> None:
            nonlocal num_ended
            held.check()
            result = store.keep(
                config,
                every[ended.trial.name],
                runs=runs,
                parent=run,
                state=ended.state,
                reason=ended.reason,
                points=[_point(examination) for examination in ended.examinations],
                measured=[examination.measured for examination in ended.examinations],
                numbers=[examination.named for examination in ended.examinations],
            )
            num_ended += 1
            show(num_ended, _in_words(result))

        trials.run(
            _work,
            Given(config, run, every),
            [_trial(setting) for name, setting in every.items() if name not in ended_before],
            past=[
                Past(_trial(result.setting), [(point.step, point.score) for point in result.points])
                for result in past
            ],
            rungs=Rungs(config.first_rung, config.reduction, config.training.num_steps),
            workers=config.workers,
            ended=keep,
        )


def _conclude(config: SweepConfig, run: SweepRun, runs: Registry) -> SweepResult:
    results = store.results_so_far(config)
    finding = sweep_report.find(results, lambda setting: store.scores_of(config, setting))
    result = SweepResult(
        sweep_name=config.sweep_name,
        sweep_uri=config.sweep_uri,
        mlflow_run_id=run.mlflow_run_id,
        best=finding.best.setting.name,
        best_plain=finding.plain.setting.name if finding.plain else None,
        best_ranked=finding.ranked.setting.name if finding.ranked else None,
        ranking_gain=finding.ranking_gain,
        training_gain=finding.training_gain,
        beat_start=finding.best.best.step > 0,
        words=sweep_report.words(finding, results),
        table=f"{sweep_report.table(results)}\n{sweep_report.rivals_table(finding)}",
        settings=tuple(sweep_report.in_order(results)),
    )
    files = {
        "table.md": f"{result.table}\n{result.words}\n",
        "scores.svg": sweep_report.plot(results).svg,
        "best.toml": sweep_report.training_toml(config, finding.best, data_version=run.data_version),
    }
    store.finish(config, result, runs=runs, files=files.items())
    return result


class Given(NamedTuple):
    """What every trial is given."""

    config: SweepConfig
    run: SweepRun
    settings: dict[str, Setting]


def _work(given: Given, name: str, device: torch.device, tell: Tell) -> str | None:
    """One setting's training run. -> why it failed, where no repetition would help."""
    config = given.config
    job = config.job_of(given.settings[name])
    train, unseen = run_store.open_datasets(job, given.run)
    data = TrainingData(train, unseen, data=job.data, batch=job.batch, loader=job.loader, seed=job.seed)

    def examined(_: loop.Write, examination: Examination) -> None:
        if examination.measured is not None:
            tell(examination)

    try:
        with _alone(job.loader.cache_folder) if job.training.cached_features else nullcontext():
            trainer = loop.make_trainer(job.model, job.loss, job.training, data, seed=job.seed, device=device)
        loop.train(
            trainer,
            data,
            augment=job.augment,
            num_images=job.batch.num_samples,
            diary=None,
            checkpoint=examined,
        )
    except (NotFinite, ShapeError) as error:
        return str(error)
    return None


@contextmanager
def _alone(cache_folder: Path) -> Iterator[None]:
    """One process of a machine at a time: the first computes the features, the others find them."""
    folder = cache_folder / "features"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".sweep.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _trial(setting: Setting) -> Trial:
    """A base loss competes with itself, alone and with ranking loss apart, so that one of each ends."""
    return Trial(setting.name, f"{setting.base}, {'plain' if setting.is_plain else 'ranked'}")


def _point(examination: Examination) -> Point:
    worth = examination.recommended
    return Point(
        step=examination.step,
        score=examination.score,
        recall_at_1=worth.recall_at_1,
        map_at_r=worth.map_at_r,
        search=validation.name_of(examination.search),
    )


def _in_words(result: SettingResult) -> str:
    if result.state == "failed":
        return f"{result.setting.name}: failed: {result.reason}"
    best, last = result.best, result.points[-1]
    return (
        f"{result.setting.name}: score {100 * best.score:.1f} % at step {best.step}, {result.state} after "
        f"{last.step}"
    )
