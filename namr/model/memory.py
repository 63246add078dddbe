"""Cross-batch memory: embeddings of the batches before, for a loss to compare the batch with.

(Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020.) It holds the last so many images of the
global batch, as they were embedded then, in buffers: it is the same on every rank, since every rank hands in
the global batch, and it is in the checkpoint.

Not covered: what a loss makes of it (`losses`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Held(NamedTuple):
    """What is in a memory, in no order."""

    embeddings: Tensor
    """(m, D) raw embeddings, without gradient"""
    labels: Tensor
    """(m,) int64"""


class Memory(nn.Module):
    """The last `size` embeddings that were kept."""

    embeddings: Tensor
    labels: Tensor
    num_kept: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("num_kept", torch.tensor(0))

    def held(self) -> Held:
        """What was kept so far, copied; no rows at first."""
        num = min(int(self.num_kept), len(self.labels))
        return Held(self.embeddings[:num].clone(), self.labels[:num].clone())

    @torch.no_grad()
    def keep(self, embeddings: Tensor, labels: Tensor) -> None:
        """Put a batch (B, D), (B,) in the place of the oldest."""
        size = len(self.labels)
        embeddings, labels = embeddings[-size:], labels[-size:]
        places = (self.num_kept + torch.arange(len(labels), device=labels.device)) % size
        self.embeddings[places] = embeddings.detach().to(self.embeddings.dtype)
        self.labels[places] = labels
        self.num_kept += len(labels)
