"""What a training run is: its configuration, how it is stored when it begins and when it ends.

    <storage>/<run>/lease.json        who trains it now
    <storage>/<run>/run.json          what the run is: configuration, data, MLflow run; written first
    <storage>/<run>/step-00000200/    checkpoints, kept by Ray Train: the best and the last
    <storage>/<run>/model/            the model that was registered
    <storage>/<run>/result.json       written last

Not covered: training it (`job`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, ClassVar

from namr import checks
from namr import config as configuration
from namr.data import datasets
from namr.data.datasets import Dataset
from namr.data.images import AugmentConfig
from namr.data.loading import LoaderConfig
from namr.data.sampling import PKConfig
from namr.errors import ConfigError, ManifestError
from namr.model.losses import LossConfig
from namr.model.model import ModelConfig, SearchDefaults
from namr.registry.registry import Registry
from namr.store import manifests, storage
from namr.train.ray_group import WorkersConfig
from namr.train.recipe import TrainingConfig
from namr.train.step import Start
from namr.train.training_data import DataConfig

_MOST_IMAGES = 2**16
"""Of a global batch: the loss compares all pairs, so this many are 17 GB for each of its matrices."""
_MAY_CHANGE = ("workers.", "loader.", "tracking_uri", "address", "dry_run", "data.dataset_version")
"""Fields in which a run that goes on may differ from how it began."""
_RUN_TAG = "namr.run"


@dataclass(frozen=True, kw_only=True)
class TrainJobConfig:
    """One training run, from a dataset to a registered model version."""

    MOVED: ClassVar[dict[str, str]] = {"batch.seed": "seed", "training.seed": "seed"}

    run_name: str
    """The run's name in storage and in MLflow; the same name goes on with the run."""
    storage_uri: str
    """Folder for checkpoints and results of all runs; reachable by all workers."""
    seed: int = 0
    """Decides all that is drawn: heads, proxies, held-out classes, batches, augmentation and mining."""
    data: DataConfig
    """The images."""
    batch: PKConfig
    """The global batch."""
    model: ModelConfig
    """The model."""
    loss: LossConfig
    """The loss."""
    training: TrainingConfig
    """The steps."""
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
    dry_run: bool = False
    """Train nothing: read a batch, do a few steps in this process, and say what the run will take."""

    def __post_init__(self) -> None:
        if not self.run_name or not all(c.isalnum() or c in "-_." for c in self.run_name):
            raise ConfigError(f"run_name is {self.run_name!r}; expected letters, digits, '-', '_' and '.'")
        checks.in_range(self, "seed", at_least=0, at_most=2**63 - 1)
        if self.batch.num_samples > _MOST_IMAGES:
            raise ConfigError(
                f"batch.classes_per_batch is {self.batch.classes_per_batch} and batch.samples_per_class is "
                f"{self.batch.samples_per_class}, a batch of {self.batch.num_samples} images; expected "
                f"{_MOST_IMAGES} or fewer"
            )
        if self.batch.num_samples < self.workers.most:
            raise ConfigError(
                f"workers.num_workers is {self.workers.most} and a batch has {self.batch.num_samples} "
                "images; expected at least one for each worker"
            )

    @property
    def run_uri(self) -> str:
        """The run's own folder."""
        return storage.join(self.storage_uri, self.run_name)


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
    share: float = 1.0
    """of the way from the start to what was trained by then: less than 1 where a model between was best"""
    validation: dict[str, float]
    """of the best step: Recall@1 and MAP@R by way of searching"""
    recall_at_1: float
    """of the best step, searched in the way that validation recommends"""
    search: SearchDefaults
    """the way of searching that validation recommends"""
    images_per_s: float
    """of all workers, without validation and checkpoints, since the last start"""
    start: Start | None = None
    """the model before its first step; None for a run that was begun before starts were kept"""
    was_finished: bool = False
    """True where `fit` found the run finished and only told of it"""

    @property
    def beat_its_start(self) -> bool:
        """False where no step was better than none."""
        return self.best_step > 0

    @property
    def place(self) -> str:
        """Which weights of the run the model has, in words."""
        step = f"step {self.best_step} of {self.num_steps}"
        return step if self.share == 1 else f"{100 * self.share:g} % of the way from the start to {step}"

    @property
    def against_start(self) -> str:
        """Whether training paid, in words."""
        if self.start is None:
            return "what it began with was not kept"
        began = f"it began with {self.start.words} at {100 * self.start.recall_at_1:.1f} %"
        return began if self.beat_its_start else f"{began} and NO STEP WAS BETTER: that start is this model"


def absolute(config: TrainJobConfig) -> TrainJobConfig:
    """The same for processes that work in folders of their own, as Ray's workers do."""
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
        loss=replace(config.loss, ranking_weight=config.loss.weight),  # what a run is named by, said
        loader=replace(config.loader, cache_folder=config.loader.cache_folder.expanduser().absolute()),
    )


def begin(config: TrainJobConfig, runs: Registry, train: Dataset, unseen: Dataset | None) -> TrainingRun:
    """Start the MLflow run and store what the run is; the caller holds the run's lease."""
    tag = storage.sha256(config.run_uri.encode())[:32]
    for left in runs.running(config.experiment, tag=_RUN_TAG, value=tag):  # begun, and killed before run.json
        runs.end_run(left, "KILLED")
    tags = {
        _RUN_TAG: tag,
        "data_uri": train.uri,
        "data_version": str(train.version.version),
        "data_digest": train.published_digest,
        "validation_uri": unseen.uri if unseen else "held-out classes of data_uri",
    }
    run_id = runs.create_run(
        config.experiment, run_name=config.run_name, params=configuration.to_flat(config), tags=tags
    )
    runs.log_text(run_id, configuration.to_toml(config), "job.toml")
    run = TrainingRun(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        mlflow_run_id=run_id,
        config=texts(config),
        data_version=train.version.version,
        data_digest=train.published_digest,
        validation_version=unseen.version.version if unseen else None,
        validation_digest=unseen.published_digest if unseen else None,
    )
    manifests.write_manifest(storage.join(config.run_uri, "run.json"), run)
    return run


def begun(config: TrainJobConfig) -> TrainingRun | None:
    """The run of that name, if there is one; ConfigError if it was another one."""
    uri = storage.join(config.run_uri, "run.json")
    if not storage.exists(uri):
        return None
    run = manifests.read_manifest(uri, TrainingRun)
    if changed := changes(_with_one_seed(run.config), texts(config)):
        raise ConfigError(
            f"run {config.run_name!r} exists in {config.storage_uri} with another configuration: "
            f"{changed}; choose another run_name, or go on with the old values"
        )
    return run


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What must not differ between a job that began and one that goes on with it; empty if nothing does."""
    changed = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(_MAY_CHANGE)
    ]
    return "; ".join(changed[:3])


def finish(config: TrainJobConfig, result: FitResult) -> None:
    """Store what came out of the run: it is finished from now on."""
    manifests.write_manifest(storage.join(config.run_uri, "result.json"), result)


def finished(config: TrainJobConfig) -> FitResult | None:
    """What came out of the run of that name, if it is finished; ConfigError if it was another one."""
    uri = storage.join(config.run_uri, "result.json")
    if begun(config) is None or not storage.exists(uri):
        return None
    return replace(manifests.read_manifest(uri, FitResult), was_finished=True)


def open_datasets(config: TrainJobConfig, run: TrainingRun | None) -> tuple[Dataset, Dataset | None]:
    """The versions that the run began with, or those it begins with now: to train on, and to validate on."""
    train = datasets.open_version(
        config.data.dataset_uri, run.data_version if run else config.data.dataset_version
    )
    unseen = None
    if config.data.validation_uri:
        unseen = datasets.open_version(config.data.validation_uri, run.validation_version if run else None)
    digests = (train.published_digest, unseen.published_digest if unseen else None)
    if run and digests != (run.data_digest, run.validation_digest):
        raise ManifestError(
            f"{config.data.dataset_uri} is not the dataset that run {config.run_name!r} began with: the "
            "manifest of its version has another digest; choose another run_name"
        )
    return train, unseen


def texts(config: Any) -> dict[str, str]:
    """A job's configuration as it is stored, by dotted name."""
    return {name: str(value) for name, value in configuration.to_flat(config).items()}


def _with_one_seed(config: dict[str, str]) -> dict[str, str]:
    """Runs were begun with two seeds, of which one can be made where they are the same number."""
    seeds = {config.get("batch.seed"), config.get("training.seed")}
    if None in seeds or len(seeds) > 1:
        return config
    others = {name: value for name, value in config.items() if name not in ("batch.seed", "training.seed")}
    return others | {"seed": config["batch.seed"]}
