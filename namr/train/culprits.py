"""Which images a loss that is not finite comes from: of which rank they are, and what their keys are.

The batch of a step can be read again, and the step left the weights as they were: so each image's features
are computed once more. Where they are all finite it is the heads or the loss that are not, and the whole
batch is named.

Not covered: that a loss is not finite (`step`), and what becomes of the run then (`job`).
Legend: B images in the global batch, b on this rank, F features.
"""

import numpy as np
import torch

from namr import collectives
from namr.data.images import AugmentConfig
from namr.data.sampling import slice_of_rank
from namr.train.step import Trainer
from namr.train.training_data import TrainingData

_MOST_NAMED = 8
_AT_A_TIME = 64


def named(trainer: Trainer, data: TrainingData, *, augment: AugmentConfig | None) -> str:
    """The images behind the step that failed, in words; collective, and the same on every rank."""
    step = trainer.next_step
    batches = data.batches(trainer.model, first_step=step, num_steps=1, augment=augment)
    inputs, _ = next(iter(batches))
    with torch.no_grad():
        parts = [trainer.whole.features(part.to(trainer.device)) for part in torch.split(inputs, _AT_A_TIME)]
    is_finite = torch.cat(parts).isfinite().all(1).int().cpu()  # (b,)
    ids = data.ids_of(step)
    wrong = np.flatnonzero(collectives.gather(is_finite).numpy() == 0)
    if not len(wrong):
        return f"the features of its {len(ids)} images are finite; these are {_keys(data, ids)}"
    world_size = collectives.world_size()
    slices = [slice_of_rank(len(ids), rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [rank for rank, part in enumerate(slices) if ((part.start <= wrong) & (wrong < part.stop)).any()]
    of_ranks = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return (
        f"the features of {len(wrong)} of its {len(ids)} images, on {of_ranks}, are not finite: "
        f"{_keys(data, ids[wrong])}"
    )


def _keys(data: TrainingData, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    return ", ".join(map(repr, data.keys_of(ids[:_MOST_NAMED]))) + more
