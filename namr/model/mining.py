"""Which triplets of a batch a loss is to look at, drawn by the distances of their points.

Not covered: the losses, and miners of pytorch-metric-learning's own that they use (`losses`).
Legend: B images in the batch, D dimension, M others.
"""

import torch
from pytorch_metric_learning.utils.loss_and_miner_utils import get_random_triplet_indices
from torch import Tensor

from namr.model import distances


def distance_weighted_triplets(
    x: Tensor,
    labels: Tensor,
    others: Tensor | None = None,
    other_labels: Tensor | None = None,
    *,
    cutoff: float = 0.5,
    farthest: float = 1.4,
) -> tuple[Tensor, ...]:
    """Triplets whose negatives are spread evenly over distance (Wu et al., ICCV 2017). x (B, D), |x| = 1.

    Positives and negatives are the batch's, or those of `others` (M, D) with their labels (M,), if given.

    An anchor's negative at distance d, not nearer than `cutoff`, is drawn with weight 1 / q(d), where
    q(d) = d^(D-2) (1 - d^2/4)^((D-3)/2) is the density of distances on the sphere; none beyond `farthest`.
    An anchor all of whose weights vanish (against the largest of the batch, in x's precision) draws
    uniformly from its negatives: pytorch-metric-learning's own miner drops such anchors, which are most of
    them at D = 512. As many triplets an anchor as its class has images; none for classes with one image.
    Draws from torch's global CPU generator.
    """
    dimension = x.shape[1]
    apart = distances.safe_sqrt(distances.pairwise_squared(x, x if others is None else others))
    apart = apart.clamp(min=cutoff)
    negative = labels[:, None] != (labels if other_labels is None else other_labels)[None, :]
    log_weights = (2.0 - dimension) * apart.log() - (dimension - 3) / 2 * (1 - apart.square() / 4).log()
    log_weights = log_weights.masked_fill(~negative | (apart >= farthest), -torch.inf)
    weights = (log_weights - log_weights.max()).exp()  # 1 / q(d) itself overflows: d^-510 at D = 512
    drawable = weights.sum(1, keepdim=True) > 0  # False where no weight is left, NaN included
    weights = torch.where(drawable, weights, negative.to(x.dtype))
    given = {} if other_labels is None else {"ref_labels": other_labels.cpu()}
    mined: tuple[Tensor, ...] = get_random_triplet_indices(labels.cpu(), weights=weights.cpu(), **given)
    return tuple(indices.to(x.device) for indices in mined)
