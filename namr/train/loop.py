"""The loop of one worker: steps, validation and checkpoints at intervals, what is told on the way.

It knows neither Ray nor the object store: checkpoints go to a function that is handed in, numbers to the
diary of rank 0. All functions are collective where there are several ranks.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from namr.data.images import AugmentConfig
from namr.errors import StorageError
from namr.measure import validation
from namr.model import model
from namr.model.losses import JointLoss, LossConfig, search_metric_of
from namr.model.model import ModelConfig, SearchDefaults
from namr.registry.registry import Registry
from namr.train.lessons import Lessons
from namr.train.step import Learning, StepResult, TrainingConfig

SCORE = "score"
"""The number by which checkpoints are compared: Recall@1 on the unseen classes, searched in the way that the
checkpoint would be served in (`validation.choose`); -1 where it was not measured."""

_TELL_EVERY_STEPS = 10
_UNSTEADY_STEPS = 5
_STATE_FILE = "state.pt"

Checkpoint = Callable[[Callable[[Path], None] | None, dict[str, Any]], None]
"""Keep what a function writes into a folder (None on all ranks but 0), and the numbers that belong to it."""


class Diary:
    """What rank 0 tells: numbers to MLflow, and how far it is to whoever shows it.

    Numbers that MLflow didn't take are kept and sent with the next ones, so a server that is away for a while
    costs nothing; `close` raises StorageError if some are left.
    """

    def __init__(self, runs: Registry, run_id: str, say: Callable[[int, str], object]) -> None:
        self._runs, self._run_id, self._say = runs, run_id, say
        self._unsent: list[tuple[int, dict[str, float]]] = []

    def write(self, numbers: dict[str, float], *, step: int) -> None:
        """Keep numbers, and send what can be sent."""
        self._unsent.append((step, numbers))
        try:
            self.close()
        except StorageError as error:
            self.say(step, f"(MLflow: {error}; kept {len(self._unsent)} entries)")

    def say(self, step: int, words: str) -> None:
        """How far it is."""
        self._say(step, words)

    def close(self) -> None:
        """Send what is left."""
        while self._unsent:
            step, numbers = self._unsent[0]
            self._runs.log_metrics(self._run_id, numbers, step=step)
            self._unsent.pop(0)


class _Speed:
    """Images a second of the whole group, of steps alone: validation and checkpoints don't count."""

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


def begin(
    model_config: ModelConfig,
    loss: LossConfig,
    training: TrainingConfig,
    lessons: Lessons,
    *,
    device: torch.device,
) -> Learning:
    """A learner before its first step; features of a frozen backbone are cached here."""
    built = model.build(model_config, seed=training.seed)
    joint = JointLoss(
        loss,
        num_classes=lessons.num_classes,
        embedding_dim=model_config.embedding_dim,
        seed=training.seed,
    )
    learning = Learning(built, joint, training, device=device)
    if training.cached_features:
        lessons.prepare(built)
    return learning


def teach(
    learning: Learning,
    lessons: Lessons,
    *,
    augment: AugmentConfig,
    num_images: int,
    diary: Diary | None,
    checkpoint: Checkpoint,
) -> float:
    """Learn to the last step; images a second of all ranks. num_images: of a global batch.

    NotFinite, from `Learning.step`, leaves the last checkpoint as the good one.
    """
    config = learning.config
    batches = lessons.batches(
        learning.model,
        first_step=learning.next_step,
        num_steps=config.num_steps - learning.next_step,
        augment=augment if config.augment else None,
    )
    speed = _Speed(num_images)
    for result in learning.run(batches):
        speed.step()
        done, is_last = learning.next_step, learning.next_step == config.num_steps
        if diary and (done % _TELL_EVERY_STEPS == 0 or is_last):
            diary.say(done, f"loss {result.total:.4f}, {speed.images_per_s:.0f} images/s")
            diary.write(_told(result, speed), step=done)
        examined = done % config.evaluation_interval == 0 or is_last
        if examined or done % config.checkpoint_interval == 0:
            numbers = _examined(learning, lessons) if examined else {SCORE: -1.0}
            numbers |= {"step": done, "mean_distance": result.mean_distance}
            if diary and examined:
                told = {name: value for name, value in numbers.items() if name.startswith("validation/")}
                diary.say(
                    done, f"loss {result.total:.4f}, Recall@1 {100 * numbers[SCORE]:.1f} % on unseen classes"
                )
                diary.write(told, step=done)
            checkpoint(partial(write_state, learning) if diary else None, numbers)
            speed.pause()
    if diary:
        diary.close()
    return speed.images_per_s


def write_state(learning: Learning, folder: Path) -> None:
    """Write all that a resumed run needs."""
    torch.save(learning.state(), folder / _STATE_FILE)


def read_state(folder: Path) -> dict[str, Any]:
    """Read it back, for `Learning.load_state`."""
    state: dict[str, Any] = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
    return state


def _told(result: StepResult, speed: _Speed) -> dict[str, float]:
    numbers = {f"train/{name}": value for name, value in result._asdict().items() if name != "step"}
    return numbers | {"train/images_per_s": speed.images_per_s}


def _examined(learning: Learning, lessons: Lessons) -> dict[str, Any]:
    ways = validation.ways(search_metric_of(learning.learner.loss.config))
    return summary(lessons.examine(learning.model, ways), ways)


def summary(results: validation.Results, ways: Sequence[SearchDefaults]) -> dict[str, Any]:
    """Recall@1 and MAP@R of every way of searching, the way to recommend, and the score."""
    best = validation.choose(results, ways)
    numbers: dict[str, Any] = {
        SCORE: results[best].recall_at_1, "metric": best.metric, "structure_side": best.structure_side
    }  # fmt: skip
    for way in ways:
        name = validation.name_of(way)
        numbers[f"validation/recall_at_1/{name}"] = results[way].recall_at_1
        numbers[f"validation/map_at_r/{name}"] = results[way].map_at_r
    return numbers
