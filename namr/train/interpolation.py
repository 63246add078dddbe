"""Models on the straight line from the weights that a run began with to those that it ended with.

Fine-tuning learns the classes it is shown, with few images by heart, and forgets what the backbone knew of
all others. A model part of the way back often finds images of new classes better than both ends, and which
part is a question to classes that were held out (Wortsman et al., "Robust fine-tuning of zero-shot models",
CVPR 2022). It costs three examinations, no training, and nothing when it is served.

Only where a run began with whitened features: between random weights and trained ones nothing is to be found.
Not covered: what is better than another model (`examination`).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from namr.model import model
from namr.train import loop
from namr.train.diary import Diary
from namr.train.examination import Examination
from namr.train.loop import Checkpoint
from namr.train.step import Trainer
from namr.train.training_data import TrainingData

SHARES = (0.25, 0.5, 0.75)
"""Of the way from the start to what was trained."""


def look(trainer: Trainer, data: TrainingData, *, diary: Diary | None, checkpoint: Checkpoint) -> None:
    """Examine models between the start and the trained one, and keep the best if no step was as good.

    Collective. A run that was killed meanwhile does it again, and comes to the same.
    """
    if trainer.start_heads is None or trainer.published is not None:
        return
    done, ends = trainer.next_step, ends_of(trainer)
    mixed = model.build(replace(trainer.model.config, weights="none"), seed=0).to(trainer.device)
    best: Examination | None = None
    for share in SHARES:
        mixed.load_state_dict(between(*ends, share))
        examination = replace(loop.examine(trainer, data, mixed), share=share)
        trainer.standing = trainer.standing.after(examination.score)
        if trainer.standing.num_without == 0:
            best = examination
        if diary:
            worth = examination.recommended._asdict()
            diary.write(
                {f"interpolation/{name}": value for name, value in worth.items()}, step=round(100 * share)
            )
    if best is None:
        return
    if diary:
        diary.say(done, f"{100 * best.share:g} % of the way from its start: {loop.in_words(best)}")
    trainer.published = between(*ends, best.share)
    checkpoint(partial(loop.write_checkpoint, trainer, diary) if diary else None, best)


def ends_of(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that the run began with, and those that it would publish now, on the CPU."""
    start = model.build(trainer.model.config, seed=trainer.seed)
    assert trainer.start_heads is not None
    start.heads.load_state_dict(trainer.start_heads)
    return start.state_dict(), trainer.state()["model"]


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights that lie this share of the way from start to end; counters are those of the end."""
    return {
        name: start[name].lerp(value, share) if value.is_floating_point() else value
        for name, value in end.items()
    }
