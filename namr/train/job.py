"""Train a model under Ray Train and register it: `fit`.

The driver checks what can be checked without a cluster, starts one MLflow run, lets Ray Train run `_work` on
every worker, and registers the best weights. A run is its name: the same name goes on from its last
checkpoint, with the data version and the MLflow run it began with; a finished one answers with its result.

    <storage>/<run>/run.json          what the run is: configuration, data, MLflow run; written first
    <storage>/<run>/step-00000200/    checkpoints, kept by Ray Train: the best and the last
    <storage>/<run>/model/            the model that was registered
    <storage>/<run>/result.json       written last

Not covered: two drivers that work on one run name at once; elastic training (the number of workers is fixed
while a run lasts, and may differ when it goes on).
"""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from namr import config as configuration
from namr import ray_connection
from namr.data import datasets
from namr.data.datasets import Dataset
from namr.data.images import AugmentConfig
from namr.data.loading import LoaderConfig
from namr.data.sampling import PKConfig
from namr.errors import ConfigError, ManifestError, NamrError, StorageError
from namr.measure import report, validation
from namr.model import model
from namr.model.losses import LossConfig, search_metric_of
from namr.model.model import ModelConfig, SearchDefaults
from namr.registry import registry
from namr.registry.registry import Registry
from namr.store import manifests, scratch, storage
from namr.train import loop, ray_group
from namr.train.lessons import DataConfig, Lessons
from namr.train.loop import Diary
from namr.train.ray_group import Outcome, Place, WorkersConfig
from namr.train.step import NotFinite, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class TrainJobConfig:
    """One training run, from a dataset to a registered model version."""

    run_name: str
    """The run's name in storage and in MLflow; the same name goes on with the run."""
    storage_uri: str
    """Folder for checkpoints and results of all runs; reachable by all workers."""
    data: DataConfig
    """The images."""
    batch: PKConfig
    """The global batch."""
    model: ModelConfig
    """The model."""
    loss: LossConfig
    """The loss."""
    training: TrainingConfig
    """The learning."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the images."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How each worker reads images."""
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    """The processes that train."""
    experiment: str = "namr"
    """MLflow experiment."""
    model_name: str = "namr"
    """Name under which the model is registered, with alias candidate."""
    tracking_uri: str | None = None
    """MLflow; none = MLFLOW_TRACKING_URI, else SQLite in the current folder."""
    address: str | None = None
    """Ray's address; none = RAY_ADDRESS, else a local Ray."""

    def __post_init__(self) -> None:
        if not self.run_name or not all(c.isalnum() or c in "-_." for c in self.run_name):
            raise ConfigError(f"run_name is {self.run_name!r}; expected letters, digits, '-', '_' and '.'")
        if self.batch.num_samples < self.workers.num_workers:
            raise ConfigError(
                f"workers.num_workers is {self.workers.num_workers} and a batch has {self.batch.num_samples} "
                "images; expected at least one for each worker"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What a run is, as stored when it begins."""

    FORMAT: ClassVar[str] = "namr-training-run"
    FORMAT_VERSION: ClassVar[int] = 1

    created: str
    mlflow_run_id: str
    config: dict[str, str]
    """by dotted name"""
    data_version: int
    data_digest: str
    validation_version: int | None
    validation_digest: str | None


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What came out of a run, as stored when it ends."""

    FORMAT: ClassVar[str] = "namr-training-result"
    FORMAT_VERSION: ClassVar[int] = 1

    run_name: str
    mlflow_run_id: str
    model_uri: str
    """folder that `model.load` reads"""
    model_name: str
    model_version: str
    model_digest: str
    num_steps: int
    best_step: int
    """steps that were done when validation was best"""
    validation: dict[str, float]
    """of the best step: Recall@1 and MAP@R by way of searching"""
    recall_at_1: float
    """of the best step, searched in the way that validation recommends"""
    search: SearchDefaults
    """the way of searching that validation recommends"""
    images_per_s: float
    """of all workers, without validation and checkpoints, since the last start"""
    was_finished: bool = False
    """True where `fit` found the run finished and only told of it"""


_MAY_CHANGE = ("workers.", "loader.", "tracking_uri", "address", "data.dataset_version")
"""Fields in which a run that goes on may differ from how it began."""


def fit(config: TrainJobConfig) -> FitResult:
    """Train, or go on with, the run of that name; register its best weights.

    Raises ConfigError for data that can't be learnt from, a run of that name with another configuration, and
    a cluster that doesn't have the workers' resources; StorageError for storage that can't be written;
    NamrError, naming the step, for a loss that is not finite.
    """
    config = _absolute(config)
    uri = storage.join(config.storage_uri, config.run_name)
    storage.check_writable(uri)
    run = _begun(config, uri)
    if run and storage.exists(storage.join(uri, "result.json")):
        finished = manifests.read_manifest(storage.join(uri, "result.json"), FitResult)
        return replace(finished, was_finished=True)
    train, unseen = _datasets(config, run)
    Lessons(train, unseen, data=config.data, batch=config.batch, loader=config.loader)  # says what is wrong
    runs = registry.connect(config.tracking_uri)
    config = replace(config, tracking_uri=runs.tracking_uri)
    ray_connection.connect(config.address)
    ray_group.check_resources(config.workers)
    run = run or _begin(config, uri, runs, train, unseen)
    try:
        outcome = ray_group.run(
            _work,
            (config, run),
            name=config.run_name,
            storage_uri=config.storage_uri,
            num_steps=config.training.num_steps,
            score=loop.SCORE,
            workers=config.workers,
        )
        fitted = _exported(config, run, uri, runs, train, outcome)
        _draw(runs, run.mlflow_run_id, search_metric_of(config.loss))
    except BaseException:
        with suppress(StorageError):  # what failed is worth more than that MLflow doesn't know
            runs.end_run(run.mlflow_run_id, "FAILED")
        raise
    manifests.write_manifest(storage.join(uri, "result.json"), fitted)
    runs.end_run(run.mlflow_run_id, "FINISHED")
    return fitted


def _absolute(config: TrainJobConfig) -> TrainJobConfig:
    """Ray's workers run in folders of their own."""
    unseen = config.data.validation_uri
    weights = config.model.weights
    return replace(
        config,
        storage_uri=storage.absolute(config.storage_uri),
        data=replace(
            config.data,
            dataset_uri=storage.absolute(config.data.dataset_uri),
            validation_uri=storage.absolute(unseen) if unseen else None,
        ),
        model=replace(
            config.model, weights=weights if weights in ("timm", "none") else storage.absolute(weights)
        ),
        loader=replace(config.loader, cache_folder=config.loader.cache_folder.expanduser().absolute()),
    )


def _texts(config: TrainJobConfig) -> dict[str, str]:
    return {name: str(value) for name, value in configuration.to_flat(config).items()}


def _begun(config: TrainJobConfig, uri: str) -> TrainingRun | None:
    """The run of that name, if there is one; ConfigError if it was another one."""
    if not storage.exists(storage.join(uri, "run.json")):
        return None
    run = manifests.read_manifest(storage.join(uri, "run.json"), TrainingRun)
    now = _texts(config)
    changed = [
        f"{name} was {run.config.get(name)} and is {now.get(name)}"
        for name in sorted(run.config.keys() | now.keys())
        if run.config.get(name) != now.get(name) and not name.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"run {config.run_name!r} exists in {config.storage_uri} with another configuration: "
            f"{'; '.join(changed[:3])}; choose another run_name, or go on with the old values"
        )
    return run


def _datasets(config: TrainJobConfig, run: TrainingRun | None) -> tuple[Dataset, Dataset | None]:
    """The versions that the run began with, or those it begins with now."""
    train = datasets.open_version(
        config.data.dataset_uri, run.data_version if run else config.data.dataset_version
    )
    unseen = None
    if config.data.validation_uri:
        unseen = datasets.open_version(config.data.validation_uri, run.validation_version if run else None)
    digests = (train.digest, unseen.digest if unseen else None)
    if run and digests != (run.data_digest, run.validation_digest):
        raise ManifestError(
            f"{config.data.dataset_uri} is not the dataset that run {config.run_name!r} began with: the "
            "manifest of its version has another digest; choose another run_name"
        )
    return train, unseen


def _begin(
    config: TrainJobConfig, uri: str, runs: Registry, train: Dataset, unseen: Dataset | None
) -> TrainingRun:
    tags = {
        "data_uri": train.uri,
        "data_version": str(train.version.version),
        "data_digest": train.digest,
        "validation_uri": unseen.uri if unseen else "held-out classes of data_uri",
    }
    run_id = runs.create_run(
        config.experiment, run_name=config.run_name, params=configuration.to_flat(config), tags=tags
    )
    runs.log_text(run_id, configuration.to_toml(config), "job.toml")
    run = TrainingRun(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        mlflow_run_id=run_id,
        config=_texts(config),
        data_version=train.version.version,
        data_digest=train.digest,
        validation_version=unseen.version.version if unseen else None,
        validation_digest=unseen.digest if unseen else None,
    )
    manifests.write_manifest(storage.join(uri, "run.json"), run)
    return run


def _work(given: tuple[TrainJobConfig, TrainingRun], place: Place) -> float | NamrError:
    """What each worker runs. Returns images a second, or why no repetition would help."""
    config, run = given
    train, unseen = _datasets(config, run)
    lessons = Lessons(
        train,
        unseen,
        data=config.data,
        batch=config.batch,
        loader=config.loader,
        rank=place.rank,
        world_size=place.world_size,
        writes_cache=place.local_rank == 0,
    )
    learning = loop.begin(config.model, config.loss, config.training, lessons, device=place.device)
    with place.last_checkpoint() as folder:
        if folder:
            learning.load_state(loop.read_state(folder))
    diary = None
    if place.rank == 0:
        diary = Diary(registry.connect(config.tracking_uri), run.mlflow_run_id, place.say)
    try:
        return loop.teach(
            learning,
            lessons,
            augment=config.augment,
            num_images=config.batch.num_samples,
            diary=diary,
            checkpoint=place.checkpoint,
        )
    except NotFinite as error:
        return NamrError(f"run {config.run_name!r}, {error}")


def _exported(
    config: TrainJobConfig, run: TrainingRun, uri: str, runs: Registry, train: Dataset, outcome: Outcome
) -> FitResult:
    """The best weights with their scale folded in, saved, registered."""
    numbers = outcome.numbers
    best = model.build(replace(config.model, weights="none"), seed=0)
    with outcome.checkpoint.as_directory() as folder:
        best.load_state_dict(loop.read_state(Path(folder))["model"])
    best.config = config.model
    model.fold_scale(best, numbers["mean_distance"])
    best.search = SearchDefaults(metric=numbers["metric"], structure_side=numbers["structure_side"])
    extra = {
        validation.TRAINED_FOR: search_metric_of(config.loss),
        "job": configuration.to_toml(config),
        "data_uri": train.uri,
        "data_version": str(train.version.version),
        "data_digest": train.digest,
    }
    with scratch.folder("model-") as temporary:
        model.save(best, Path(temporary), extra=extra)
        for name in (model.WEIGHTS_FILE, model.DESCRIPTION_FILE):
            storage.upload(Path(temporary) / name, storage.join(uri, "model", name))
        version = runs.register(
            Path(temporary),
            name=config.model_name,
            run_id=run.mlflow_run_id,
            tags={"data_digest": train.digest, "run_name": config.run_name},
        )
    return FitResult(
        run_name=config.run_name,
        mlflow_run_id=run.mlflow_run_id,
        model_uri=storage.join(uri, "model"),
        model_name=version.name,
        model_version=version.version,
        model_digest=version.digest,
        num_steps=config.training.num_steps,
        best_step=numbers["step"],
        validation={name: value for name, value in numbers.items() if name.startswith("validation/")},
        recall_at_1=numbers[loop.SCORE],
        search=best.search,
        images_per_s=outcome.value,
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
