"""The loop of one worker: steps, examinations and checkpoints at intervals, what is told on the way.

It knows neither Ray nor the object store: checkpoints go to a function that is handed in, numbers to the
diary of rank 0. All functions are collective where there are several ranks.

Not covered: one step (`step`), where batches come from and what an examination measures (`training_data`).
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from namr.data.images import AugmentConfig
from namr.measure import validation
from namr.model import model
from namr.model.losses import JointLoss, LossConfig, search_metric_of
from namr.model.model import ModelConfig
from namr.train.diary import Diary
from namr.train.examination import Examination
from namr.train.step import StepResult, Trainer, TrainingConfig
from namr.train.training_data import TrainingData

_TELL_EVERY_STEPS = 10
_UNSTEADY_STEPS = 5
_STATE_FILE = "state.pt"

Write = Callable[[Path], None] | None
"""What fills a checkpoint's folder; None on all ranks but 0."""
Checkpoint = Callable[[Write, Examination], None]
"""Keep what is written, and the numbers that belong to it."""


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
) -> float:
    """Train to the last step; images a second of all ranks. num_images: of a global batch.

    NotFinite, from `Trainer.step`, leaves the last checkpoint as the good one.
    """
    config = trainer.config
    batches = data.batches(
        trainer.model,
        first_step=trainer.next_step,
        num_steps=config.num_steps - trainer.next_step,
        augment=augment if config.augment else None,
    )
    speed = _Speed(num_images)
    for result in trainer.run(batches):
        speed.step()
        done, is_last = trainer.next_step, trainer.next_step == config.num_steps
        if diary and (done % _TELL_EVERY_STEPS == 0 or is_last):
            diary.say(done, f"loss {result.total:.4f}, {speed.images_per_s:.0f} images/s")
            diary.write(_told(result, speed), step=done)
        examines = done % config.evaluation_interval == 0 or is_last
        if examines or done % config.checkpoint_interval == 0:
            examination = Examination(step=done, mean_distance=result.mean_distance)
            if examines:
                examination = _examine(trainer, data, examination)
                if diary:
                    recall = f"Recall@1 {100 * examination.score:.1f} % on unseen classes"
                    diary.say(done, f"loss {result.total:.4f}, {recall}")
                    diary.write(examination.named, step=done)
            checkpoint(partial(write_checkpoint, trainer, diary) if diary else None, examination)
            speed.pause()
    return speed.images_per_s


def write_checkpoint(trainer: Trainer, diary: Diary, folder: Path) -> None:
    """Write all that a resumed run needs."""
    torch.save(trainer.state(), folder / _STATE_FILE)
    diary.write_unsent(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """What the checkpoint in this folder holds for `Trainer.load_state`."""
    state: dict[str, Any] = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
    return state


def _told(result: StepResult, speed: _Speed) -> dict[str, float]:
    numbers = {f"train/{name}": value for name, value in result._asdict().items() if name != "step"}
    return numbers | {"train/images_per_s": speed.images_per_s}


def _examine(trainer: Trainer, data: TrainingData, before: Examination) -> Examination:
    ways = validation.ways(search_metric_of(trainer.whole.loss.config))
    results = data.examine(trainer.model, ways)
    return Examination.of(results, ways, step=before.step, mean_distance=before.mean_distance)
