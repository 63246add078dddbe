"""Early stopping: the best score so far, and for how many evaluations there was no better one.

The scores are those of one rank, broadcast, so that no rank goes on alone.
"""

from typing import NamedTuple

import torch

from namr import collectives


class Standing(NamedTuple):
    """How a run stands; kept with its checkpoints."""

    best_score: float = -1.0
    """Of all evaluations, the one before the first step included."""
    num_without: int = 0
    """Evaluations since then."""

    def after(self, score: float) -> "Standing":
        """With one more evaluation; rank 0's score counts. Collective."""
        score = float(collectives.broadcast(torch.tensor(score, dtype=torch.float64)))
        if score > self.best_score:
            return Standing(score, 0)
        return self._replace(num_without=self.num_without + 1)

    def is_over(self, patience: int | None) -> bool:
        """Whether a run that has so much patience ends."""
        return patience is not None and self.num_without >= patience
