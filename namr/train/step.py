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
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from namr import collectives, hashing
from namr.errors import ConfigError, NamrError
from namr.model import low_rank
from namr.model.losses import JointLoss, LossTerms
from namr.model.model import NamrModel, set_batchnorm_policy
from namr.train import optimiser, pieces, recipe
from namr.train.recipe import Precision, TrainingConfig
from namr.train.stopping import Standing
from namr.train.stopwatch import Stopwatch


class NotFinite(NamrError):
    """The loss or its gradient is NaN or infinite; on every rank alike, and again if the step is repeated."""


class ModelWithLoss(nn.Module):
    """Backbone, heads and loss as one forward pass from a rank's images to the global batch's loss."""

    def __init__(
        self,
        model: NamrModel,
        loss: JointLoss,
        *,
        seed: int,
        precision: Precision,
        watch: Stopwatch | None = None,
    ) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.watch = watch or Stopwatch(torch.device("cpu"))
        self.seed, self.precision = seed, precision

    def forward(self, inputs: Tensor, labels: Tensor, step: int) -> LossTerms:
        """`inputs`: (b, 3, H, W) uint8 pixels, or (b, F) float32 features; `labels`: (b,) int64."""
        return self.losses(self.features(inputs), labels, step)

    def losses(self, features: Tensor, labels: Tensor, step: int) -> LossTerms:
        """Of the global batch, by this rank's features (b, F) and labels (b,)."""
        self.watch.begin("sync")
        of_all, labels = collectives.gather(features), collectives.gather(labels)
        self.watch.begin("loss")
        embedding, structure = self.model.heads(of_all)
        return cast(LossTerms, self.loss(embedding, structure, labels, seed=self.seed, step=step))

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
        policy = recipe.batchnorm_policy(config, model.config)
        if policy == "sync" and device.type == "cpu":
            raise ConfigError('training.batchnorm is "sync", which needs GPUs; on CPUs use frozen or local')
        if config.images_per_pass is not None and not config.frozen_backbone and policy != "frozen":
            raise ConfigError(
                f"training.images_per_pass is {config.images_per_pass}, and the backbone's BatchNorm is "
                f"{policy}: its statistics would be those of pieces; set training.batchnorm to frozen"
            )
        set_batchnorm_policy(model, policy, of_structure=config.structure_batchnorm)
        model.backbone.requires_grad_(False)
        self._of_backbone = (
            [] if config.frozen_backbone else optimiser.choose(model.backbone, config.backbone, seed=seed)
        )
        self.config, self.seed, self.device = config, seed, device
        self.watch = Stopwatch(device)
        self.whole = ModelWithLoss(model, loss, seed=seed, precision=config.precision, watch=self.watch).to(
            device
        )
        self.optimiser = optimiser.make(model, loss, config)
        self._average: AveragedModel | None = None
        if config.average_decay is not None:
            mean: Any = get_ema_multi_avg_fn(config.average_decay)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(model, multi_avg_fn=mean, use_buffers=True)
        self.next_step = 0
        self.start: Start | None = None
        self.start_heads: dict[str, Tensor] | None = None
        """The heads' weights before the first step, if they came from whitened features."""
        self.published: dict[str, Tensor] | None = None
        """Weights to publish in place of those of `examined`, once all is done (`interpolation`)."""
        self.standing = Standing()
        self._policy = policy
        self._parallel: nn.Module | None = None  # made by the first step, and anew where the backbone thaws
        self._trains_backbone = self._in_pieces = self._is_settled = False

    @property
    def model(self) -> NamrModel:
        """The model that is trained."""
        return self.whole.model

    @property
    def examined(self) -> NamrModel:
        """The model that is examined and published: the average of those so far, where that is asked."""
        if self._average is None or self.next_step == 0:
            return self.model
        return cast(NamrModel, self._average.module)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        return self.next_step >= self.config.num_steps or self.standing.is_over(self.config.patience)

    def step(self, inputs: Tensor, labels: Tensor) -> StepResult:
        """One step on this rank's slice of the global batch; NotFinite if loss or gradient is not finite."""
        config, step = self.config, self.next_step
        factor = recipe.rate_factor(config, step)
        optimiser.set_rates(self.optimiser, factor)
        inputs = inputs.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        self._enter_stage()
        self.whole.train()
        if not self._is_settled:
            self._settle(inputs, labels)
        terms = self._gradients(inputs, labels)
        self.watch.begin("update")
        trained = [p for p in self.whole.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, config.max_gradient_norm)
        # One wait for the GPU.
        numbers = torch.stack([term.detach().float() for term in (*terms, norm)]).tolist()
        total, metric, ranking, mean_distance, gradient_norm = numbers
        result = StepResult(step, total, metric, ranking, mean_distance, gradient_norm, factor)
        _check_finite(result)
        self.optimiser.step()
        if self._average is not None:
            self._average.update_parameters(self.model)
        self.next_step += 1
        self.watch.end_step()
        return result

    def keep_start(self) -> None:
        """Remember the heads' weights as those that the run begins with."""
        self.start_heads = {name: value.clone() for name, value in _on_cpu(self.model.heads).items()}

    def times(self) -> dict[str, float]:
        """Seconds a step of each part of it since they were asked for last (`stopwatch`)."""
        return self.watch.read(self._parallel)

    def run(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[StepResult]:
        """Steps over (inputs, labels) until the run is over; NamrError if batches run out before."""
        if self.is_over:
            return
        for inputs, labels in batches:
            yield self.step(inputs, labels)
            if self.is_over:
                return
        raise NamrError(f"the batches ended after {self.next_step} of {self.config.num_steps} steps")

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, on the CPU; `load_state` takes it back.

        `model` is what a plain model loads; beside it what is trained, where that is another.
        """
        trained = _on_cpu(self.model)
        examined = trained if self.examined is self.model else _on_cpu(self.examined)
        state: dict[str, Any] = {
            "step": self.next_step,
            "start": self.start and self.start._asdict(),
            "start_heads": self.start_heads,
            "standing": self.standing._asdict(),
            "model": self.published or low_rank.plain_state(self.examined, examined),
            "is_interpolated": self.published is not None,
            "loss": _on_cpu(self.whole.loss),
            "optimiser": optimiser.state_of(self.optimiser, self._named()),
        }
        is_another = self.published is not None or examined is not trained
        if is_another or state["model"].keys() != trained.keys():
            state |= {"trained": trained, "examined": examined}  # stored once where they are the same tensors
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`; the next step is the one after it."""
        self.model.load_state_dict(state.get("trained", state["model"]))
        self.whole.loss.load_state_dict(state["loss"])
        optimiser.load_state(self.optimiser, state["optimiser"], self._named())
        self.next_step = int(state["step"])
        self.start = Start(**state["start"]) if state.get("start") else None
        self.start_heads = state.get("start_heads")
        self.published = state["model"] if state.get("is_interpolated") else None
        self.standing = Standing(**state.get("standing", {}))
        if self._average is not None:
            self._average.module.load_state_dict(state.get("examined", state["model"]))
            self._average.n_averaged.fill_(self.next_step)

    def _named(self) -> dict[str, nn.Parameter]:
        """What is trained at any time, by name."""
        there = {id(parameter) for group in self.optimiser.param_groups for parameter in group["params"]}
        return {name: each for name, each in self.whole.named_parameters() if id(each) in there}

    def _enter_stage(self) -> None:
        """Freeze or thaw the backbone as the recipe says of the next step, and wrap what is trained now."""
        trains = self.config.trains_backbone(self.next_step)
        if self._parallel is not None and trains == self._trains_backbone:
            return
        self._trains_backbone = trains
        for parameter in self._of_backbone:
            parameter.requires_grad_(trains)
        self.model.batchnorm = self._policy if trains else "frozen"
        self._in_pieces = trains and self.config.images_per_pass is not None
        self._parallel = self.whole
        self._is_settled = collectives.world_size() == 1 or self._in_pieces
        if not self._is_settled:
            self._parallel = DistributedDataParallel(
                self.whole,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                forward_sync_buffers=self.model.batchnorm == "local",
                gradient_as_bucket_view=True,
            )

    def _gradients(self, inputs: Tensor, labels: Tensor) -> LossTerms:
        seed = hashing.mix_of(self.seed, self.next_step, collectives.rank()) >> 1
        self.optimiser.zero_grad(set_to_none=True)
        self.watch.begin("forward")
        if self._in_pieces and not inputs.is_floating_point():
            return pieces.gradients(
                inputs,
                self.whole.features,
                lambda features: self.whole.losses(features, labels, self.next_step),
                images_per_pass=self.config.images_per_pass or len(inputs),
                seed=seed,
                parameters=self.whole.parameters(),
                begin=self.watch.begin,
            )
        torch.manual_seed(seed)
        assert self._parallel is not None
        terms: LossTerms = self._parallel(inputs, labels, self.next_step)
        self.watch.begin("backward")
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


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in module.state_dict().items()}


def _check_finite(result: StepResult) -> None:
    if all(map(math.isfinite, result)):
        return
    terms = ", ".join(f"{name} {value:g}" for name, value in result._asdict().items() if name != "step")
    raise NotFinite(
        f"step {result.step} is not finite: {terms}. The last checkpoint is good; lower the learning rates "
        "or use float32, and resume under the same name"
    )
