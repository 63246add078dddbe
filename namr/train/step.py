"""One step of training on the global batch, its schedule, and the state that makes a run resumable.

`ModelWithLoss` is backbone, heads and loss in one module, so that DDP wraps the whole forward: every rank
computes the features of its slice, `collectives.gather` hands all of them to every rank with their
gradient, and heads and losses run on the global batch everywhere. Gather sums gradients over ranks and DDP
averages them, so nothing is multiplied by the number of ranks. `Trainer` adds optimiser, schedule and step
counter.

A batch that is larger than memory goes through the backbone in `pieces`.

Not covered: where batches come from (`training_data`), what happens between steps (`loop`), Ray.
Legend: B images in the global batch, b on this rank, F features, D dimension.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from namr import checks, collectives, hashing
from namr.errors import ConfigError, NamrError
from namr.model import whitening
from namr.model.losses import JointLoss, LossTerms
from namr.model.model import BatchNormPolicy, ModelConfig, NamrModel, set_batchnorm_policy
from namr.train import pieces

Precision = Literal["float32", "bf16"]


class NotFinite(NamrError):
    """The loss or its gradient is NaN or infinite; on every rank alike, and again if the step is repeated."""


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
    """AdamW's decoupled weight decay, for all parameters but the loss's own."""
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

    def __post_init__(self) -> None:
        steps = ("num_steps", "evaluation_interval", "checkpoint_interval", "images_per_pass")
        checks.in_range(self, *steps, at_least=1, place="training")
        rates = ("learning_rate", "proxy_learning_rate", "max_gradient_norm")
        checks.in_range(self, *rates, above=0, place="training")
        may_be_0 = ("backbone_learning_rate", "weight_decay", "warmup_steps")
        checks.in_range(self, *may_be_0, at_least=0, place="training")
        checks.in_range(self, "whitening_power", at_least=0, at_most=1, place="training")

    @property
    def frozen_backbone(self) -> bool:
        """True if only the heads are trained."""
        return self.backbone_learning_rate == 0

    @property
    def cached_features(self) -> bool:
        """True if an image's features never change, so that they are computed once."""
        return self.frozen_backbone and not self.augment


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


class ModelWithLoss(nn.Module):
    """Backbone, heads and loss as one forward pass from a rank's images to the global batch's loss."""

    def __init__(self, model: NamrModel, loss: JointLoss, *, seed: int, precision: Precision) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.seed, self.precision = seed, precision

    def forward(self, inputs: Tensor, labels: Tensor, step: int) -> LossTerms:
        """`inputs`: (b, 3, H, W) uint8 pixels, or (b, F) float32 features; `labels`: (b,) int64."""
        return self.losses(self.features(inputs), labels, step)

    def losses(self, features: Tensor, labels: Tensor, step: int) -> LossTerms:
        """Of the global batch, by this rank's features (b, F) and labels (b,)."""
        embedding, structure = self.model.heads(collectives.gather(features))
        return cast(
            LossTerms, self.loss(embedding, structure, collectives.gather(labels), seed=self.seed, step=step)
        )

    def features(self, inputs: Tensor) -> Tensor:
        """(b, F) float32; features pass through as they are."""
        if inputs.is_floating_point():
            return inputs
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model.features(inputs).float()


class StepResult(NamedTuple):
    """What one step did: its 0-based number, the terms of the loss (`LossTerms`), and how it moved."""

    step: int
    total: float
    metric: float
    ranking: float
    mean_distance: float
    gradient_norm: float
    """Before it was shortened."""
    rate_factor: float
    """What all peak rates were multiplied by."""


class Start(NamedTuple):
    """What a run began with, before its first step."""

    words: str
    """Where the sample head's weights came from."""
    recall_at_1: float
    """On the unseen classes, searched in the way that was recommended then."""
    map_at_r: float


class Trainer:
    """A model with its loss, optimiser and place in the schedule.

    `next_step` counts the steps that are done. Anything random inside a step is drawn from (seed, step,
    rank), so that no generator's state needs to be kept and a run resumes on any number of ranks.
    """

    def __init__(
        self, model: NamrModel, loss: JointLoss, config: TrainingConfig, *, seed: int, device: torch.device
    ) -> None:
        policy = batchnorm_policy(config, model.config)
        if policy == "sync" and device.type == "cpu":
            raise ConfigError('training.batchnorm is "sync", which needs GPUs; on CPUs use frozen or local')
        self._in_pieces = config.images_per_pass is not None and not config.frozen_backbone
        if self._in_pieces and policy != "frozen":
            raise ConfigError(
                f"training.images_per_pass is {config.images_per_pass}, and the backbone's BatchNorm is "
                f"{policy}: its statistics would be those of pieces; set training.batchnorm to frozen"
            )
        set_batchnorm_policy(model, policy, of_structure=config.structure_batchnorm)
        model.backbone.requires_grad_(not config.frozen_backbone)
        self.config, self.seed, self.device = config, seed, device
        self.whole = ModelWithLoss(model, loss, seed=seed, precision=config.precision).to(device)
        self.next_step = 0
        self.start: Start | None = None
        self._peaks = {
            "backbone": config.backbone_learning_rate,
            "heads": config.learning_rate,
            "loss": config.proxy_learning_rate,
        }
        self.optimiser = torch.optim.AdamW(self._groups())
        self._parallel: nn.Module = self.whole
        self._is_settled = collectives.world_size() == 1 or self._in_pieces
        if not self._is_settled:
            self._parallel = DistributedDataParallel(
                self.whole,
                device_ids=[device] if device.type == "cuda" else None,
                forward_sync_buffers=policy == "local",
                gradient_as_bucket_view=True,
            )

    @property
    def model(self) -> NamrModel:
        """The model that is trained."""
        return self.whole.model

    def step(self, inputs: Tensor, labels: Tensor) -> StepResult:
        """One step on this rank's slice of the global batch; NotFinite if loss or gradient is not finite."""
        config, step = self.config, self.next_step
        factor = rate_factor(config, step)
        for group in self.optimiser.param_groups:
            group["lr"] = self._peaks[group["name"]] * factor
        inputs = inputs.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        self.whole.train()
        if not self._is_settled:
            self._settle(inputs, labels)
        terms = self._gradients(inputs, labels)
        trained = [p for p in self.whole.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, config.max_gradient_norm)
        # One wait for the GPU.
        numbers = torch.stack([term.detach().float() for term in (*terms, norm)]).tolist()
        total, metric, ranking, mean_distance, gradient_norm = numbers
        result = StepResult(step, total, metric, ranking, mean_distance, gradient_norm, factor)
        _check_finite(result)
        self.optimiser.step()
        self.next_step += 1
        return result

    def run(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[StepResult]:
        """Steps over (inputs, labels) until the configured number is done; NamrError if batches run out."""
        if self.next_step >= self.config.num_steps:
            return
        for inputs, labels in batches:
            yield self.step(inputs, labels)
            if self.next_step >= self.config.num_steps:
                return
        raise NamrError(f"the batches ended after {self.next_step} of {self.config.num_steps} steps")

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, on the CPU; `load_state` takes it back."""
        return {
            "step": self.next_step,
            "start": self.start and self.start._asdict(),
            "model": {name: value.cpu() for name, value in self.model.state_dict().items()},
            "loss": {name: value.cpu() for name, value in self.whole.loss.state_dict().items()},
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`; the next step is the one after it."""
        self.model.load_state_dict(state["model"])
        self.whole.loss.load_state_dict(state["loss"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.next_step = int(state["step"])
        self.start = Start(**state["start"]) if state.get("start") else None

    def _gradients(self, inputs: Tensor, labels: Tensor) -> LossTerms:
        seed = hashing.mix_of(self.seed, self.next_step, collectives.rank()) >> 1
        self.optimiser.zero_grad(set_to_none=True)
        if self._in_pieces and not inputs.is_floating_point():
            return pieces.gradients(
                inputs,
                self.whole.features,
                lambda features: self.whole.losses(features, labels, self.next_step),
                images_per_pass=self.config.images_per_pass or len(inputs),
                seed=seed,
                parameters=self.whole.parameters(),
            )
        torch.manual_seed(seed)
        terms: LossTerms = self._parallel(inputs, labels, self.next_step)
        terms.total.backward()  # type: ignore[no-untyped-call]
        return terms

    def _settle(self, inputs: Tensor, labels: Tensor) -> None:
        """One pass that leaves no trace but in DDP, which orders its buckets anew after its first pass.

        The order decides in which sequence 3 ranks or more add up their gradients, so without this the
        first step after a resume would differ in its last bits from that of a run that was never stopped.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.whole.buffers()]
        self._gradients(inputs, labels)
        for buffer, before in buffers:
            buffer.copy_(before)
        self._is_settled = True

    def _groups(self) -> list[dict[str, Any]]:
        parts: dict[str, nn.Module] = {
            "backbone": self.model.backbone, "heads": self.model.heads, "loss": self.whole.loss
        }  # fmt: skip
        groups = []
        for name, part in parts.items():
            params = [p for p in part.parameters() if p.requires_grad]
            decay = 0.0 if name == "loss" else self.config.weight_decay
            if params:
                groups.append(
                    {"name": name, "params": params, "lr": self._peaks[name], "weight_decay": decay}
                )
        return groups


def _check_finite(result: StepResult) -> None:
    if all(map(math.isfinite, result)):
        return
    terms = ", ".join(f"{name} {value:g}" for name, value in result._asdict().items() if name != "step")
    raise NotFinite(
        f"step {result.step} is not finite: {terms}. The last checkpoint is good; lower the learning rates "
        "or use float32, and resume under the same name"
    )
