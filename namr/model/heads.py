"""Twin heads: from the features of an image to its embedding and its structure embedding.

They compute in the type of their own weights (float32) even under autocast, because the losses take
differences of nearly equal distances.

Not covered: what makes the features (`backbones`), what the heads learn from (`losses`).
Legend: B batch, F features, D embedding dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Embeddings(NamedTuple):
    """What the heads make of features."""

    embedding: Tensor
    """x (B, D), the vector that is indexed."""
    structure: Tensor
    """s (B, D) in 1 - r .. 1 + r, how the neighbourhood is stretched along each axis."""


class TwinHeads(nn.Module):
    """x = W f + b and s = 1 + r (2 sigmoid(g(f)) - 1), g = linear - BatchNorm - linear - BatchNorm.

    (NASA, AAAI 2022.) With r = 0 there is no g and s is 1 exactly. In training mode the BatchNorms need two
    rows or more.
    """

    def __init__(self, num_features: int, dim: int, *, hidden_dim: int, structure_range: float) -> None:
        super().__init__()
        self.structure_range = structure_range
        self.sample = nn.Linear(num_features, dim)
        self.structure = (
            nn.Sequential(
                nn.Linear(num_features, hidden_dim),
                nn.BatchNorm1d(hidden_dim),
                nn.Linear(hidden_dim, dim),
                nn.BatchNorm1d(dim),
            )
            if structure_range
            else None
        )

    def forward(self, features: Tensor) -> Embeddings:
        """(B, F) of any float type -> (B, D) twice, in the type of the weights."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.sample.weight.dtype)
            embedding = self.sample(features)
            if self.structure is None:
                return Embeddings(embedding, torch.ones_like(embedding))
            stretch = 2 * torch.sigmoid(self.structure(features)) - 1
            return Embeddings(embedding, 1 + self.structure_range * stretch)
