"""Train a model under Ray Train and register it: `fit`.

The driver checks what can be checked without a cluster, starts one MLflow run, lets Ray Train run `_work` on
every worker, and registers the best weights. A run is its name: the same name goes on from its last
checkpoint, with the data version and the MLflow run it began with; a finished one answers with its result.
One driver at a time holds a run's lease. One that lost it (it was stopped for long, or cut off from storage)
ends at its next checkpoint and publishes nothing.

Not covered: how a run is stored (`run`); how many workers there are, and what of lost ones (`ray_group`).
"""

import socket
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from namr import collectives, ray_connection
from namr import config as configuration
from namr.data.datasets import Dataset
from namr.errors import Conflict, ManifestError, ModelMismatch, NamrError, ShapeError, StorageError
from namr.measure import report, validation
from namr.model import model
from namr.model.losses import search_metric_of
from namr.registry import registry, system_metrics
from namr.registry.registry import Registry
from namr.store import lease, scratch, storage
from namr.store.lease import Lease
from namr.train import culprits, diary, interpolation, loop, machines, ray_group, sources
from namr.train import run as run_store
from namr.train.diary import Diary
from namr.train.examination import Examination
from namr.train.loop import Checkpoint, Trained
from namr.train.ray_group import Outcome, Worker
from namr.train.run import FitResult, TrainingRun, TrainJobConfig
from namr.train.step import NotFinite
from namr.train.training_data import TrainingData


def fit(config: TrainJobConfig) -> FitResult:
    """Train, or go on with, the run of that name; register its best weights.

    Raises ConfigError for data that can't be trained on, a run of that name with another configuration, and
    a cluster that doesn't have the workers' resources; Conflict where another job trains that run;
    StorageError for storage that can't be written; NamrError, naming the step, for a loss that is not finite.
    """
    config = run_store.absolute(config)
    storage.check_writable(config.run_uri)
    if result := run_store.finished(config):
        return result
    with Lease.take(_lease_uri(config), what=f"training run {config.run_name!r}") as held:
        return run_store.finished(config) or _train(config, held)


def _train(config: TrainJobConfig, held: Lease) -> FitResult:
    run = run_store.begun(config)
    train, unseen = run_store.open_datasets(config, run)
    # Made here to say what is wrong with the data before there is a cluster.
    TrainingData(train, unseen, data=config.data, batch=config.batch, loader=config.loader, seed=config.seed)
    runs = registry.connect(config.tracking_uri)
    config = replace(config, tracking_uri=runs.tracking_uri)
    ray_connection.connect(config.address)
    ray_group.check_resources(config.workers)
    if run:
        runs.go_on(run.mlflow_run_id)
    else:
        run = run_store.begin(config, runs, train, unseen)
    try:
        outcome = ray_group.run(
            _work,
            Given(config, run, held.fence, sources.digest()),
            name=config.run_name,
            storage_uri=config.storage_uri,
            num_steps=config.training.num_steps,
            workers=config.workers,
        )
        held.check()
        result = _publish(config, run, runs, train, outcome)
        _draw(runs, run.mlflow_run_id, search_metric_of(config.loss))
        held.check()
        runs.end_run(run.mlflow_run_id, "FINISHED")
        run_store.finish(config, result)
    except Conflict:  # the run is another job's by now, and so is its end in MLflow
        raise
    except BaseException:
        with suppress(StorageError):  # MLflow is away, or the lease is lost: the failure tells more
            held.check()
            runs.end_run(run.mlflow_run_id, "FAILED")
        raise
    return result


class Given(NamedTuple):
    """What every worker is given."""

    config: TrainJobConfig
    run: TrainingRun
    fence: int
    """Of the lease that the driver held when it started the workers."""
    sources: str
    """Digest of the driver's program."""


def _work(given: Given, worker: Worker) -> Trained | NamrError:
    """What each worker runs. Returns what came of it, or why no repetition would help."""
    config, run, *_ = given
    if other := sources.difference(given.sources):
        return other
    train, unseen = run_store.open_datasets(config, run)
    data = TrainingData(
        train,
        unseen,
        data=config.data,
        batch=config.batch,
        loader=config.loader,
        seed=config.seed,
        rank=worker.rank,
        world_size=worker.world_size,
        writes_cache=worker.local_rank == 0,
    )
    trainer = loop.make_trainer(
        config.model, config.loss, config.training, data, seed=config.seed, device=worker.device
    )
    unsent: list[diary.Entry] = []
    with worker.last_checkpoint() as folder:
        if folder:
            try:
                loop.go_on(trainer, folder)
            except (ManifestError, ModelMismatch) as error:
                return type(error)(f"run {config.run_name!r}: {error}")
            unsent = diary.read_unsent(folder)
    try:
        checkpoint = _fenced(worker.checkpoint, given, writes=worker.rank == 0)
        with (
            _machine(given, worker),
            _diary(given, worker, unsent) if worker.rank == 0 else nullcontext() as told,
        ):
            trained = loop.train(
                trainer,
                data,
                augment=config.augment,
                num_images=config.batch.num_samples,
                diary=told,
                checkpoint=checkpoint,
                is_warned=worker.is_warned,
            )
            if trained is None:
                worker.leave()
            interpolation.look(trainer, data, diary=told, checkpoint=checkpoint)
            return trained
    except NotFinite as error:
        augment = config.augment if config.training.augment else None
        images = culprits.named(trainer, data, augment=augment)
        return NamrError(f"run {config.run_name!r}, {error}. Of this step {images}")
    except ShapeError as error:
        return NamrError(f"run {config.run_name!r}, {error}")
    except Conflict as error:
        return error


def _diary(given: Given, worker: Worker, unsent: list[diary.Entry]) -> Diary:
    runs = registry.unasked(given.config.tracking_uri)  # a worker that is replaced starts without MLflow, too
    return Diary(runs, given.run.mlflow_run_id, worker.say, unsent=unsent)


def _machine(given: Given, worker: Worker) -> AbstractContextManager[None]:
    every_s = given.config.workers.system_metrics_s
    if every_s is None or worker.local_rank > 0:
        return nullcontext()
    runs = registry.unasked(given.config.tracking_uri)
    sample = system_metrics.monitors(socket.gethostname())
    return machines.watched(runs, given.run.mlflow_run_id, sample, every_s=every_s)


def _fenced(checkpoint: Checkpoint, given: Given, *, writes: bool) -> Checkpoint:
    """`checkpoint` after the rank that writes looked at the lease; Conflict on all ranks if it was lost."""

    def checkpoint_if_held(write: loop.Write, examination: Examination) -> None:
        uri = _lease_uri(given.config)
        lost = writes and lease.fence_of(uri) != given.fence
        if int(collectives.sum_over_ranks(torch.tensor([int(lost)]))):
            raise Conflict(
                f"run {given.config.run_name!r} is trained by another job since this one could not renew its "
                f"lease {uri}; this one ends before step {examination.step} is stored, and publishes nothing"
            )
        checkpoint(write, examination)

    return checkpoint_if_held


def _lease_uri(config: TrainJobConfig) -> str:
    return storage.join(config.run_uri, "lease.json")


def _publish(
    config: TrainJobConfig, run: TrainingRun, runs: Registry, train: Dataset, outcome: Outcome
) -> FitResult:
    """The best weights with their scale folded in, saved, registered; the same again after a kill."""
    trained: Trained = outcome.value
    best = model.build(replace(config.model, weights="none"), seed=0)
    with outcome.checkpoint.as_directory() as folder:
        best.load_state_dict(loop.read_state(Path(folder))["model"])
    best.config = config.model
    model.fold_scale(best, outcome.examination.mean_distance)
    best.search = outcome.examination.search
    extra = {
        validation.TRAINED_FOR: search_metric_of(config.loss),
        "job": configuration.to_toml(config),
        "data_uri": train.uri,
        "data_version": str(train.version.version),
        "data_digest": train.published_digest,
        "share_of_the_way": f"{outcome.examination.share:g}",
    }
    with scratch.folder("model-") as temporary:
        model.save(best, Path(temporary), extra=extra)
        for name in (model.WEIGHTS_FILE, model.DESCRIPTION_FILE):
            storage.upload(Path(temporary) / name, storage.join(config.run_uri, "model", name))
        version = runs.register(
            Path(temporary),
            name=config.model_name,
            run_id=run.mlflow_run_id,
            tags={"data_digest": train.published_digest, "run_name": config.run_name},
        )
    return FitResult(
        run_name=config.run_name,
        mlflow_run_id=run.mlflow_run_id,
        model_uri=storage.join(config.run_uri, "model"),
        model_name=version.name,
        model_version=version.version,
        model_digest=version.digest,
        num_steps=trained.num_steps,
        best_step=outcome.examination.step,
        share=outcome.examination.share,
        validation=outcome.examination.named,
        recall_at_1=outcome.examination.recommended.recall_at_1,
        start=trained.start,
        search=best.search,
        images_per_s=trained.images_per_s,
    )


def _draw(runs: Registry, run_id: str, metric: str) -> None:
    """The curves of the run, as artifacts."""
    losses = {name: runs.history(run_id, f"train/{name}") for name in ("total", "metric", "ranking")}
    recall = {
        name: runs.history(run_id, f"validation/recall_at_1/{name}")
        for name in map(validation.name_of, validation.ways("l2" if metric == "l2" else "cosine"))
    }
    for name, series, unit in (("loss", losses, "loss"), ("validation", recall, "Recall@1, unseen classes")):
        plot = report.curves(name, series, x_label="step", y_label=unit)
        runs.log_text(run_id, plot.svg, f"curves/{name}.svg")
