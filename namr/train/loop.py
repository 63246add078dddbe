"""The loop of one worker: steps, examinations and checkpoints at intervals, what is told on the way.

It knows neither Ray nor the object store: checkpoints go to a function that is handed in, numbers to the
diary of rank 0. All functions are collective where there are several ranks.

Not covered: one step (`step`), where batches come from and what an examination measures (`training_data`).
"""

import pickle
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from namr import collectives
from namr.data.images import AugmentConfig
from namr.errors import ManifestError, ModelMismatch
from namr.measure import validation
from namr.model import model, whitening
from namr.model.losses import JointLoss, LossConfig, search_metric_of
from namr.model.model import ModelConfig, NamrModel
from namr.model.whitening import Whitening
from namr.train import recipe
from namr.train.diary import Diary
from namr.train.examination import Examination
from namr.train.notice import Notice
from namr.train.recipe import TrainingConfig
from namr.train.step import Start, StepResult, Trainer
from namr.train.training_data import TrainingData

_TELL_EVERY_STEPS = 10
_UNSTEADY_STEPS = 5
_STATE_FILE = "state.pt"
_MOST_WHITENED = 16_384

Write = Callable[[Path], None] | None
"""What fills a checkpoint's folder; None on all ranks but 0."""
Checkpoint = Callable[[Write, Examination], None]
"""Keep what is written, and the numbers that belong to it."""


class Trained(NamedTuple):
    """What a whole run came to, beside its checkpoints."""

    images_per_s: float
    """Of all ranks, without examinations and checkpoints, since the last start."""
    start: Start | None
    """None for a run that was begun before starts were kept."""
    num_steps: int
    """That were done: fewer than were asked for where patience ended."""


class _Speed:
    """Images a second of the whole group, of steps alone: examinations and checkpoints don't count."""

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images
        self._num_steps, self._seconds = 0, 0.0
        self._since: float | None = None
        self._skipped = 0

    def step(self) -> None:
        now = time.perf_counter()
        if self._since is not None and self._skipped >= _UNSTEADY_STEPS:
            self._num_steps += 1
            self._seconds += now - self._since
        self._skipped += 1
        self._since = now

    def pause(self) -> None:
        self._since = None

    @property
    def images_per_s(self) -> float:
        return self._num_images * self._num_steps / self._seconds if self._seconds else 0.0


def make_trainer(
    model_config: ModelConfig,
    loss: LossConfig,
    training: TrainingConfig,
    data: TrainingData,
    *,
    seed: int,
    device: torch.device,
) -> Trainer:
    """A trainer before its first step; features of a frozen backbone are cached here."""
    built = model.build(model_config, seed=seed)
    joint = JointLoss(loss, num_classes=data.num_classes, embedding_dim=model_config.embedding_dim, seed=seed)
    trainer = Trainer(built, joint, training, seed=seed, device=device)
    if training.cached_features:
        data.cache_features(built)
    return trainer


def train(
    trainer: Trainer,
    data: TrainingData,
    *,
    augment: AugmentConfig,
    num_images: int,
    diary: Diary | None,
    checkpoint: Checkpoint,
    is_warned: Callable[[], bool] | None = None,
) -> Trained | None:
    """Train to the last step. num_images: of a global batch.

    is_warned: whether to leave before (all ranks are told the same); then None, after a checkpoint.
    NotFinite, from `Trainer.step`, leaves the last checkpoint as the good one.
    """
    config = trainer.config
    if trainer.start is None and trainer.next_step == 0:
        _begin(trainer, data, diary=diary, checkpoint=checkpoint)
    batches = data.batches(
        trainer.model,
        first_step=trainer.next_step,
        num_steps=config.num_steps - trainer.next_step,
        augment=augment if config.augment else None,
    )
    speed = _Speed(num_images)
    notice = Notice(is_warned) if is_warned else None
    for result in trainer.run(batches):
        speed.step()
        done, is_last = trainer.next_step, trainer.next_step == config.num_steps
        if done % _TELL_EVERY_STEPS == 0 or is_last:
            times = trainer.times()
            if diary:
                diary.say(done, f"loss {result.total:.4f}, {speed.images_per_s:.0f} images/s")
                diary.write(_told(result, speed, times), step=done)
        examines = done % config.evaluation_interval == 0 or is_last
        leaves = notice is not None and notice.is_given() and not is_last
        if examines or leaves or done % config.checkpoint_interval == 0:
            examination = Examination(step=done, mean_distance=result.mean_distance)
            if examines:
                examination = examine(trainer, data)
                trainer.standing = trainer.standing.after(examination.score)
                if diary:
                    diary.say(done, f"loss {result.total:.4f}, {in_words(examination)}")
                    diary.write(examination.named, step=done)
            checkpoint(partial(write_checkpoint, trainer, diary) if diary else None, examination)
            speed.pause()
            trainer.watch.pause()
            if diary and trainer.is_over and not is_last:
                diary.say(done, f"ends: {config.patience} evaluations brought nothing better")
        if leaves and not trainer.is_over:
            return None
    return Trained(speed.images_per_s, trainer.start, trainer.next_step)


def write_checkpoint(trainer: Trainer, diary: Diary, folder: Path) -> None:
    """Write all that a resumed run needs."""
    torch.save(trainer.state(), folder / _STATE_FILE)
    diary.write_unsent(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """What the checkpoint in this folder holds for `Trainer.load_state`; else ManifestError."""
    try:
        state: dict[str, Any] = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ManifestError(f"the checkpoint's {_STATE_FILE} can't be read: {error}") from error
    return state


def go_on(trainer: Trainer, folder: Path) -> None:
    """From the checkpoint in this folder; ModelMismatch where it is of another model, loss or optimiser."""
    state = read_state(folder)
    try:
        trainer.load_state(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reasons = [line.strip() for line in str(error).splitlines()]
        raise ModelMismatch(
            f"the checkpoint of step {state.get('step')} is not of the model that is trained here "
            f"({' '.join(reasons[:3])}); choose another run_name, or go on with the versions it began with"
        ) from error


def _told(result: StepResult, speed: _Speed, times: dict[str, float]) -> dict[str, float]:
    numbers = {f"train/{name}": value for name, value in result._asdict().items() if name != "step"}
    seconds = {f"train/{part}_s": value for part, value in times.items()}
    others = {"train/images_per_s": speed.images_per_s, "train/num_workers": collectives.world_size()}
    return numbers | seconds | others


def _begin(trainer: Trainer, data: TrainingData, *, diary: Diary | None, checkpoint: Checkpoint) -> None:
    """Give the sample head its first weights, and examine and keep the model as it is before its first step.

    So training that never beats its start leaves the start as the best.
    """
    words = _whiten(trainer, data)
    examination = examine(trainer, data)
    trainer.start = Start(words, *examination.recommended)
    trainer.standing = trainer.standing.after(examination.score)
    if diary:
        diary.say(0, f"starts from {words}: {in_words(examination)}")
        diary.write(examination.named, step=0)
    checkpoint(partial(write_checkpoint, trainer, diary) if diary else None, examination)


def _whiten(trainer: Trainer, data: TrainingData) -> str:
    """Where the sample head's weights come from, in words; whitened features' where there are any."""
    model, config = trainer.model, trainer.config
    power = recipe.whitening_power(config, model.config)
    if power is None:
        is_asked = config.whitening_power is not None
        return "random weights, since the backbone does too" if is_asked else "random weights"
    features = data.sample_features(model, num=_MOST_WHITENED)
    dim = model.config.embedding_dim
    if len(features) <= dim:
        return f"random weights, since {len(features)} images are too few to whiten {dim} dimensions"
    start = whitening.whitening(features, dim=dim, power=power)
    # An eigensolver may round otherwise on another machine; all ranks begin with the first one's bits.
    start = Whitening(*(collectives.broadcast(torch.from_numpy(part)).numpy() for part in start))
    whitening.start_from(model.heads.sample, start)
    trainer.keep_start()
    return f"the whitened features of {len(features)} images (power {power:g})"


def in_words(examination: Examination) -> str:
    """For whoever watches."""
    return f"Recall@1 {100 * examination.recommended.recall_at_1:.1f} % on unseen classes"


def examine(trainer: Trainer, data: TrainingData, examined: NamrModel | None = None) -> Examination:
    """What the trainer's model, or another one in its place, is worth now. Collective."""
    ways = validation.ways(search_metric_of(trainer.whole.loss.config))
    results, mean_distance = data.examine(examined or trainer.examined, ways)
    return Examination.of(results, ways, step=trainer.next_step, mean_distance=mean_distance)
