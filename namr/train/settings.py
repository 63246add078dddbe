"""The settings that a sweep tries: every combination of its lists, or some that the seed draws.

For every base loss and rates that are tried the base loss alone (lambda = 0) is among them, so that a sweep
always shows what the ranking loss brings.

Not covered: trying them (`sweep`); other parameters than these (one sweep for each value does).
"""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from namr import checks
from namr.data.images import AugmentConfig
from namr.data.loading import LoaderConfig
from namr.data.sampling import PKConfig
from namr.errors import ConfigError
from namr.model.losses import BaseLoss, LossConfig
from namr.model.model import ModelConfig
from namr.store import storage
from namr.train import run
from namr.train.ray_group import WorkersConfig
from namr.train.recipe import TrainingConfig
from namr.train.run import TrainJobConfig
from namr.train.training_data import DataConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One combination, as it is tried and stored."""

    base: BaseLoss
    ranking_weight: float
    num_clusters: int
    structure_side: Literal["query", "both"]
    learning_rate: float
    backbone_learning_rate: float

    @property
    def is_plain(self) -> bool:
        """True without ranking loss; clusters and side mean nothing then."""
        return self.ranking_weight == 0

    @property
    def name(self) -> str:
        """Unique in a sweep, and fit for a file."""
        structure = "" if self.is_plain else f"-c{self.num_clusters}-{self.structure_side}"
        rates = f"-lr{_exactly(self.learning_rate)}-blr{_exactly(self.backbone_learning_rate)}"
        return f"{self.base}-w{_exactly(self.ranking_weight)}{structure}{rates}"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """One sweep: what all its training runs share, and lists of what they differ in."""

    sweep_name: str
    """The sweep's name in storage and in MLflow; the same name goes on with the sweep."""
    storage_uri: str
    """Folder of all sweeps; what came of each setting is kept there."""
    seed: int = 0
    """Of every training run, and of which settings are drawn."""
    data: DataConfig
    """The images."""
    batch: PKConfig
    """The global batch."""
    model: ModelConfig
    """The model."""
    loss: LossConfig
    """What the lists below don't say of the loss."""
    training: TrainingConfig
    """What the lists below don't say of the steps. Without augmentation and with a backbone rate of 0 the
    features are computed once for the whole sweep, which makes a setting a matter of seconds."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the images."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How images are read."""
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    """What each setting gets; one worker trains one setting, and as many are tried at once as fit."""
    bases: tuple[BaseLoss, ...] = ()
    """Base losses; none = loss.base."""
    ranking_weights: tuple[float | Literal["own"], ...] = ("own",)
    """lambda; own is the base loss's own weight. 0 is tried anyway."""
    num_clusters: tuple[int, ...] = ()
    """C; none = loss.num_clusters."""
    structure_sides: tuple[Literal["query", "both"], ...] = ()
    """Sides; none = loss.structure_side."""
    learning_rates: tuple[float, ...] = ()
    """Rates of the heads; none = training.learning_rate."""
    backbone_learning_rates: tuple[float, ...] = ()
    """Rates of the backbone; none = training.backbone_learning_rate."""
    num_settings: int | None = None
    """At most so many, drawn by the seed, each with its base loss alone; none = all combinations."""
    grace_steps: int | None = None
    """Steps that every setting may take before it can be stopped for being worse than others; none = the
    first examination's, training.num_steps = none is stopped early."""
    reduction: int = 3
    """One in so many goes on after grace_steps, after grace_steps times this, and so on (ASHA)."""
    experiment: str = "namr"
    """MLflow experiment."""
    model_name: str = "namr"
    """Name under which a training run with the best setting registers its model."""
    tracking_uri: str | None = None
    """MLflow; none = MLFLOW_TRACKING_URI, else SQLite in the current folder."""
    address: str | None = None
    """Ray's address; none = RAY_ADDRESS, else a local Ray."""

    def __post_init__(self) -> None:
        if not self.sweep_name or not all(c.isalnum() or c in "-_." for c in self.sweep_name):
            raise ConfigError(
                f"sweep_name is {self.sweep_name!r}; expected letters, digits, '-', '_' and '.'"
            )
        checks.in_range(self, "num_settings", "reduction", at_least=2)
        checks.in_range(self, "grace_steps", at_least=1, at_most=self.training.num_steps)
        if self.workers.num_workers != 1:
            raise ConfigError(
                f"workers.num_workers is {self.workers.num_workers}; one worker trains a setting of a sweep"
            )
        if self.loss.ranking_weight is not None:
            raise ConfigError(
                f"loss.ranking_weight is {self.loss.ranking_weight}; of a sweep ranking_weights says it"
            )
        every = _every(self)
        if all(setting.is_plain for setting in every):
            raise ConfigError(
                f"ranking_weights is {self.ranking_weights}; expected one above 0 at least: 0 is tried anyway"
            )
        for setting in every:
            self.job_of(setting)

    @property
    def sweep_uri(self) -> str:
        """The sweep's own folder."""
        return storage.join(self.storage_uri, self.sweep_name)

    @property
    def first_rung(self) -> int:
        """`grace_steps` with none resolved."""
        return self.grace_steps or min(self.training.evaluation_interval, self.training.num_steps)

    def job_of(self, setting: Setting) -> TrainJobConfig:
        """The training run that tries a setting; ConfigError, which names the setting, if it can't be."""
        try:
            loss = replace(
                self.loss,
                base=setting.base,
                ranking_weight=setting.ranking_weight,
                num_clusters=setting.num_clusters,
                structure_side=setting.structure_side,
            )
            training = replace(
                self.training,
                learning_rate=setting.learning_rate,
                backbone_learning_rate=setting.backbone_learning_rate,
            )
            return TrainJobConfig(
                run_name=f"{self.sweep_name}-best",
                storage_uri=self.storage_uri,
                seed=self.seed,
                data=self.data,
                batch=self.batch,
                model=self.model,
                loss=loss,
                training=training,
                augment=self.augment,
                loader=self.loader,
                workers=self.workers,
                experiment=self.experiment,
                model_name=self.model_name,
                tracking_uri=self.tracking_uri,
                address=self.address,
            )
        except ConfigError as error:
            raise ConfigError(f"setting {setting.name}: {error}") from error


def settings_of(config: SweepConfig) -> tuple[Setting, ...]:
    """What is tried, in an order drawn by the seed; the same list for the same configuration.

    Of `num_settings` a part are base losses alone, one for each base loss and rates among the others.
    """
    drawn = _drawn(_every(config), config.seed)
    if config.num_settings is None or len(drawn) <= config.num_settings:
        return drawn
    chosen: dict[Setting, None] = {}
    for setting in drawn:
        pair = {} if setting.is_plain else {setting: None, plain_of(setting, drawn): None}
        if len(chosen | pair) <= config.num_settings:
            chosen |= pair
    return _drawn(chosen, config.seed)


def plain_of(setting: Setting, among: Iterable[Setting]) -> Setting:
    """The same base loss at the same rates without ranking loss."""
    return next(each for each in among if each.is_plain and _shared(each) == _shared(setting))


def absolute(config: SweepConfig) -> SweepConfig:
    """The same for processes that work in folders of their own, as Ray's workers do."""
    job = run.absolute(config.job_of(_every(config)[0]))
    return replace(config, storage_uri=job.storage_uri, data=job.data, model=job.model, loader=job.loader)


def _every(config: SweepConfig) -> tuple[Setting, ...]:
    """All combinations, each once, the base losses alone first."""
    shared = itertools.product(
        config.bases or (config.loss.base,),
        config.learning_rates or (config.training.learning_rate,),
        config.backbone_learning_rates or (config.training.backbone_learning_rate,),
    )
    settings: dict[Setting, None] = {}
    for base, rate, backbone_rate in shared:
        own = replace(config.loss, base=base, margin=None, view="unit").weight
        plain = Setting(
            base=base,
            ranking_weight=0.0,
            num_clusters=config.loss.num_clusters,
            structure_side=config.loss.structure_side,
            learning_rate=float(rate),
            backbone_learning_rate=float(backbone_rate),
        )
        settings[plain] = None
        structures = itertools.product(
            config.ranking_weights,
            config.num_clusters or (config.loss.num_clusters,),
            config.structure_sides or (config.loss.structure_side,),
        )
        for weight, clusters, side in structures:
            if weight != 0:
                number = own if weight == "own" else float(weight)
                settings[
                    replace(plain, ranking_weight=number, num_clusters=clusters, structure_side=side)
                ] = None
    return tuple(settings)


def _exactly(number: float) -> str:
    """As short as it can be told from every other number."""
    return repr(float(number)).removesuffix(".0")


def _shared(setting: Setting) -> tuple[str, float, float]:
    return setting.base, setting.learning_rate, setting.backbone_learning_rate


def _drawn(settings: Iterable[Setting], seed: int) -> tuple[Setting, ...]:
    """By the hash of name and seed, which no library's generator can change."""
    return tuple(sorted(settings, key=lambda s: hashlib.sha256(f"{seed} {s.name}".encode()).digest()))
