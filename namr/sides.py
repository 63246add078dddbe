"""What a search can weigh by and what a model is compared by, as words.

No arrays here, so that programs may name them that have neither numpy nor torch.
"""

from typing import Literal, get_args

Side = Literal["none", "query", "both", "scale"]
"""Whose structure weighs a distance; `model.distances` has the formulas."""
SIDES: tuple[Side, ...] = get_args(Side)

Metric = Literal["l2", "cosine"]
