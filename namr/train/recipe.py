"""What a model is trained by: how long, how fast, and which parts of it when.

What is off by default is off exactly: the same steps, the same bits. docs/training.md says when each pays.

Not covered: doing it (`step`), which parameter is in which group (`optimiser`).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from namr import checks
from namr.errors import ConfigError
from namr.model import whitening
from namr.model.model import BatchNormPolicy, ModelConfig

Precision = Literal["float32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class BackboneRecipe:
    """Which parts of the backbone are trained, when and how fast."""

    layer_decay: float | None = None
    """Each layer's rate is this times the next one's, so that the first layers hardly move: 0.65 to 0.8 is
    usual for a vision transformer that is fine-tuned whole. None: one rate for all."""
    frozen_layers: int | None = None
    """The first so many layers stay as they are (a transformer's patches are the first): less memory and
    time, and less to forget, where there are few images. None: all are trained."""
    frozen_steps: int | None = None
    """Only the heads are trained for so many steps, then the backbone thaws: where heads start at random
    their first gradients would spoil it. None: from the first step."""
    low_rank: int | None = None
    """LoRA: of the backbone only a product of two matrices of this rank, added to each linear layer, is
    trained, at the backbone's rate (10 times the usual one). 4 to 32; for large transformers and few images.
    It is folded into the weights of what is published."""

    def __post_init__(self) -> None:
        checks.in_range(self, "layer_decay", above=0, at_most=1, place="training.backbone")
        counts = ("frozen_layers", "frozen_steps", "low_rank")
        checks.in_range(self, *counts, at_least=1, place="training.backbone")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast and with what rules a model is trained."""

    num_steps: int
    """Steps of the optimiser; one step is one global batch of P x K images."""
    learning_rate: float = 3e-4
    """Peak rate of the two heads (AdamW)."""
    backbone_learning_rate: float = 1e-4
    """Peak rate of the backbone; 0 freezes it."""
    proxy_learning_rate: float = 1e-2
    """Peak rate of what the loss itself learns (the proxies of proxy_anchor)."""
    weight_decay: float = 1e-5
    """AdamW's decoupled weight decay, of matrices and kernels: norms, biases, positions and what the loss
    learns have none."""
    warmup_steps: int = 0
    """Steps over which the rates rise linearly from 0 to their peaks."""
    schedule: Literal["constant", "cosine", "stairs"] = "constant"
    """What the rates do after the warm-up: stay, fall along a half cosine to 0, or fall to a fifth after 4/9,
    6/9 and 8/9 of all steps (NASA's)."""
    batchnorm: Literal["auto", "frozen", "sync", "local"] = "auto"
    """The backbone's BatchNorm. auto: frozen on a pre-trained backbone, local on one from scratch.
    sync needs GPUs; local statistics depend on the number of workers."""
    structure_batchnorm: Literal["local", "frozen"] = "local"
    """The structure head's, which sees the global batch on every rank; frozen from the first step on is
    NASA's habit."""
    precision: Precision = "float32"
    """Arithmetic of the backbone; heads and losses always use float32."""
    images_per_pass: int | None = None
    """Images of a worker that its backbone takes at a time, where the global batch is larger than memory:
    each goes through it twice then, and heads and losses see the whole batch as ever. None: all at once."""
    max_gradient_norm: float = 10.0
    """Gradients with a longer norm are shortened to this."""
    whitening_power: float | None = whitening.POWER
    """The sample head starts from the backbone's features, each axis divided by its variance to this power:
    0 is PCA, 0.5 makes all axes alike. None starts at random, as a backbone from scratch does anyway."""
    augment: bool = True
    """Random crops, flips and colours. Without it and with a frozen backbone, features are computed once."""
    evaluation_interval: int = 200
    """Steps between two evaluations on the validation classes; the last step is always evaluated."""
    checkpoint_interval: int = 200
    """Steps between two checkpoints; every evaluation makes one too."""
    average_decay: float | None = None
    """What is evaluated and published is a moving average (EMA) of the weights, which keeps this share of
    itself at each step: 0.99 averages about 100 steps, 0.999 about 1000. It pays for long runs at constant or
    high rates; after a cosine's end there is little left to average. None: the weights themselves."""
    patience: int | None = None
    """Training ends after so many evaluations in a row without a better score. For runs whose length nobody
    knows yet; a cosine that is cut short misses its end. None: all steps."""
    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    """Parts of the backbone."""

    def __post_init__(self) -> None:
        steps = ("num_steps", "evaluation_interval", "checkpoint_interval", "images_per_pass", "patience")
        checks.in_range(self, *steps, at_least=1, place="training")
        rates = ("learning_rate", "proxy_learning_rate", "max_gradient_norm")
        checks.in_range(self, *rates, above=0, place="training")
        may_be_0 = ("backbone_learning_rate", "weight_decay", "warmup_steps")
        checks.in_range(self, *may_be_0, at_least=0, place="training")
        checks.in_range(self, "whitening_power", at_least=0, at_most=1, place="training")
        checks.in_range(self, "average_decay", above=0, below=1, place="training")
        if self.frozen_backbone and self.backbone != BackboneRecipe():
            raise ConfigError(
                f"training.backbone_learning_rate is 0, which trains no part of the backbone, and "
                f"training.backbone is {self.backbone}; expected a rate above 0"
            )
        if (self.backbone.frozen_steps or 0) >= self.num_steps:
            raise ConfigError(
                f"training.backbone.frozen_steps is {self.backbone.frozen_steps} of {self.num_steps} steps; "
                "expected fewer, or backbone_learning_rate = 0, which trains the heads alone"
            )

    @property
    def frozen_backbone(self) -> bool:
        """True if only the heads are trained, to the end."""
        return self.backbone_learning_rate == 0

    def trains_backbone(self, step: int) -> bool:
        """Whether the backbone is trained in 0-based `step`."""
        return not self.frozen_backbone and step >= (self.backbone.frozen_steps or 0)

    @property
    def cached_features(self) -> bool:
        """True if an image's features never change, so that they are computed once."""
        return self.frozen_backbone and not self.augment


def whitening_power(config: TrainingConfig, model: ModelConfig) -> float | None:
    """What the start is whitened by if there are images enough; None where the heads start at random."""
    return None if model.weights == "none" else config.whitening_power


def batchnorm_policy(config: TrainingConfig, model: ModelConfig) -> BatchNormPolicy:
    """The backbone's policy with `auto` resolved; a frozen backbone's statistics are frozen too."""
    if config.frozen_backbone:
        return "frozen"
    if config.batchnorm == "auto":
        return "local" if model.weights == "none" else "frozen"
    return config.batchnorm


def rate_factor(config: TrainingConfig, step: int) -> float:
    """What the peak rates are multiplied by in 0-based `step`, in (0, 1]: warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "stairs":
        return float(0.2 ** sum(9 * step >= ninths * config.num_steps for ninths in (4, 6, 8)))
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
