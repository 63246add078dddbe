"""The multi-cluster ranking loss, the base losses it is added to, and their sum.

    L = L_metric(x, y) + lambda L_mcr(x, s)

Neighborhood-Adaptive Multi-cluster Ranking (NAMR), IEEE TCSVT 2022; conference version NASA,
"Neighborhood-Adaptive Structure Augmented Metric Learning", AAAI 2022. NAMR's formula for its clusters is
not public: L_mcr here generalises NASA's two groups to C >= 2 and equals NASA's loss for C = 2.

The base losses are pytorch-metric-learning's, on distances that are said explicitly: those of `distances`.

    base                           works on                                      pairs
    triplet                        L2 of x / (mean pairwise distance)            distance-weighted, on x / |x|
    margin                         L2 of x / |x|, or scaled as above             distance-weighted, on x / |x|
    contrastive                    L2 of x / |x|, or scaled as above             all
    multi_similarity               cosine                                        its own miner
    proxy_anchor                   cosine                                        none: proxies

L_mcr sees the same view of x as the base loss, and one of unit length divided by its mean pairwise distance.
Without that it is shrunk away by drawing all x into one direction: on Cars-196 with frozen features and
lambda = 2, Recall@1 of contrastive fell from 47 to 20 % and of multi-similarity from 50 to 14 %.

All is computed in float32 at full precision (float64 stays) on the global batch, on every rank alike;
gathering is not done here (`collectives`). Nothing draws from the global generator.

Legend: B images in the batch, D dimension, C clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch import Tensor, nn

from namr import checks
from namr.errors import ConfigError, ShapeError
from namr.model import distances
from namr.model.distances import Metric
from namr.model.memory import Memory
from namr.model.mining import distance_weighted_triplets

Mined = tuple[Tensor, ...] | None
"""Indices into the batch, as pytorch-metric-learning takes them: (anchor, positive, negative), or
(anchor, positive, anchor, negative), or None for all pairs."""


BaseLoss = Literal["triplet", "contrastive", "margin", "multi_similarity", "proxy_anchor"]

_OWN_WEIGHT = {
    "triplet": 1.0,
    "contrastive": 1.0,
    "margin": 0.3,
    "multi_similarity": 0.1,
    "proxy_anchor": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The base loss, and how much structure is added to it."""

    base: BaseLoss
    """The loss on labels that the ranking loss is added to."""
    ranking_weight: float | None = None
    """lambda, the weight of the multi-cluster ranking loss; 0 is exactly the plain base loss, none is the
    base loss's own: 0.1 for multi_similarity, 0.3 for margin, 1 for the others (the papers' is 2)."""
    num_clusters: int = 4
    """C, the groups that neighbours are ranked into; 2 is NASA's loss."""
    structure_side: Literal["query", "both"] = "both"
    """Whose structure weighs a distance in training: the query's (the papers' form), or both mean."""
    alpha: float = 10.0
    """How firmly a distance belongs to its nearest cluster."""
    t: float = 3.0
    """The lowest cluster lies this many standard deviations below the mean distance, or at 0.2 of it."""
    margin: float | None = None
    """Margin of triplet, contrastive (of negatives), margin and proxy_anchor; none = the loss's usual one."""
    view: Literal["unit", "scaled"] = "unit"
    """What contrastive and margin work on: unit-length x, or x divided by its mean pairwise distance."""
    memory_size: int | None = None
    """The base loss also compares the batch with the last so many images, as they were embedded then (XBM):
    negatives that a batch which fits the machine has too few of; some thousands. None: with itself alone."""
    memory_from_step: int | None = None
    """The memory counts from this step on: what the first steps embed is out of date soon. None: at once."""

    def __post_init__(self) -> None:
        checks.in_range(self, "ranking_weight", "margin", at_least=0, place="loss")
        checks.in_range(self, "num_clusters", at_least=2, place="loss")
        checks.in_range(self, "alpha", "t", above=0, place="loss")
        checks.in_range(self, "memory_size", at_least=1, place="loss")
        checks.in_range(self, "memory_from_step", at_least=0, place="loss")
        if self.memory_size is not None and self.base == "proxy_anchor":
            raise ConfigError(
                f"loss.memory_size is {self.memory_size}, but proxy_anchor has proxies to compare with: "
                "leave it out"
            )
        if self.margin is not None and self.base == "multi_similarity":
            raise ConfigError(
                f"loss.margin is {self.margin}, but multi_similarity has no margin: leave it out"
            )
        if self.view == "scaled" and self.base not in ("contrastive", "margin"):
            raise ConfigError(f'loss.view is "scaled", which {self.base} has no choice about: leave it out')

    @property
    def weight(self) -> float:
        """lambda, the base loss's own where none was said."""
        return _OWN_WEIGHT[self.base] if self.ranking_weight is None else self.ranking_weight


def search_metric_of(config: LossConfig) -> Metric:
    """The distance to search by after training with this loss; L2 of unit-length x ranks as cosine does."""
    return "l2" if config.base == "triplet" or config.view == "scaled" else "cosine"


class LossTerms(NamedTuple):
    """Scalars of one step; `total` carries the gradient."""

    total: Tensor
    metric: Tensor
    """The base loss."""
    ranking: Tensor
    """L_mcr, before its weight; 0 and not computed where the weight is 0."""
    mean_distance: Tensor
    """Mean pairwise L2 distance of the raw x over i != j, without gradient: what `fold_scale` folds in."""


def multi_cluster_ranking(
    x: Tensor,
    s: Tensor,
    *,
    num_clusters: int,
    structure_side: Literal["query", "both"],
    alpha: float = 10.0,
    t: float = 3.0,
) -> Tensor:
    """L_mcr: every adaptive distance is pulled to the cluster of distances it is nearest to.

        lo    = max(0.2 m, m - t sd)                m, sd over all B x B plain distances, without gradient
        eta_c = m + (lo - m) c / (C - 1)
        g_ijc = |d_s(i, j) - eta_c|                 "both": d_s(i, j)^2 is the mean of both directions'
        L_mcr = mean over i != j of sum_c softmax_c(-alpha g_ijc) g_ijc

    x, s: (B, D), B >= 2; s is positive, 1 = no structure -> scalar, 0 or more. Gradient flows into both.
    Memory O(C B^2). x needs a scale: a loss of this form is shrunk away by shrinking x (see the views).
    """
    num = len(x)
    if num < 2 or s.shape != x.shape:
        raise ShapeError(
            f"expected embedding and structure (B, D) with B >= 2, got {tuple(x.shape)} and {tuple(s.shape)}"
        )
    centres = _cluster_centres(x.detach(), num_clusters=num_clusters, t=t)
    if structure_side == "both":
        squared = distances.adaptive_squared_both(x, s, x, s)
    else:
        squared = distances.adaptive_squared(x, s, x)
    gaps = (distances.safe_sqrt(squared) - centres[:, None, None]).abs()  # (C, B, B)
    # With gradient through the softmax too: which cluster a pair belongs to is learnt, as in NASA's code.
    pulled = (F.softmax(-alpha * gaps, dim=0) * gaps).sum(0)
    apart = ~torch.eye(num, dtype=torch.bool, device=x.device)
    return (pulled * apart).sum() / (num * (num - 1))


@torch.no_grad()
def _cluster_centres(x: Tensor, *, num_clusters: int, t: float) -> Tensor:
    """eta (C,), from the mean down; the zero diagonal counts, as in NASA."""
    plain = distances.pairwise_squared(x, x).fill_diagonal_(0).sqrt()
    mean = plain.mean()
    lowest = torch.maximum(0.2 * mean, mean - t * plain.std())
    return mean + (lowest - mean) * torch.linspace(0, 1, num_clusters, dtype=x.dtype, device=x.device)


class JointLoss(nn.Module):
    """Base loss + lambda * multi-cluster ranking loss on one global batch.

    Its parameters are the proxies of proxy_anchor, (num_classes, D), drawn by `seed`; else it has none.
    """

    def __init__(self, config: LossConfig, *, num_classes: int, embedding_dim: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.base = _base_loss(config, num_classes=num_classes, embedding_dim=embedding_dim)
        self._miner = _miner(config)
        self.memory = Memory(config.memory_size, embedding_dim) if config.memory_size is not None else None

    def forward(
        self,
        embedding: Tensor,
        structure: Tensor,
        labels: Tensor,
        *,
        seed: int,
        step: int,
        mined: Mined = None,
    ) -> LossTerms:
        """embedding, structure (B, D); labels (B,) int64. Pairs are mined by (seed, step) unless given."""
        self._check(embedding, structure, labels)
        with torch.autocast(embedding.device.type, enabled=False):
            if embedding.dtype in (torch.float16, torch.bfloat16):
                embedding, structure = embedding.float(), structure.float()
            scaled = _is_scaled(self.config)
            with torch.set_grad_enabled(scaled and torch.is_grad_enabled()):
                mean_distance = distances.mean_pairwise(embedding)
            view = partial(torch.div, other=mean_distance) if scaled else partial(F.normalize, dim=1)
            x = view(embedding)
            if mined is None:
                mined = self.mine(embedding, labels, seed=seed, step=step)
            metric = self.base(x, labels, mined)
            if self.memory is not None:
                if step >= (self.config.memory_from_step or 0):
                    metric = metric + self._against_memory(self.memory, x, labels, view, seed=seed, step=step)
                self.memory.keep(embedding, labels)
            if self.config.weight == 0:
                # Nothing, but DDP gets its gradient of every parameter, and a NaN that mining drops is seen.
                nothing = (embedding * 0).sum() + (structure * 0).sum()
                total = metric + nothing
                return LossTerms(total, metric.detach(), nothing.detach(), mean_distance.detach())
            ranking = multi_cluster_ranking(
                # Of unit length alone, L_mcr would be lowered by drawing all x into one direction.
                x if scaled else x / distances.mean_pairwise(x),
                structure,
                num_clusters=self.config.num_clusters,
                structure_side=self.config.structure_side,
                alpha=self.config.alpha,
                t=self.config.t,
            )
            total = metric + self.config.weight * ranking
            return LossTerms(total, metric.detach(), ranking.detach(), mean_distance.detach())

    def mine(self, embedding: Tensor, labels: Tensor, *, seed: int, step: int) -> Mined:
        """The pairs or triplets of a batch, a function of its values and (seed, step)."""
        return self._mined((seed, step), F.normalize(embedding, dim=1), labels)

    def _mined(self, seeds: tuple[int, ...], *sets: Tensor) -> Mined:
        """Of x and labels, or of those against another x and labels."""
        if self._miner is None:
            return None
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # all draws are made on the CPU
            state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]))
            return self._miner(*sets)

    def _against_memory(
        self,
        memory: Memory,
        x: Tensor,
        labels: Tensor,
        view: Callable[[Tensor], Tensor],
        *,
        seed: int,
        step: int,
    ) -> Tensor:
        """The base loss of pairs of the batch and the memory, through the batch's own view."""
        others, other_labels = memory.held()
        if not len(others):
            return x.new_zeros(())
        sets = (F.normalize(x, dim=1), labels, F.normalize(others, dim=1), other_labels)
        mined = self._mined((seed, step, 1), *sets)
        of_pairs: Tensor = self.base(x, labels, mined, view(others), other_labels)
        return of_pairs

    def _check(self, embedding: Tensor, structure: Tensor, labels: Tensor) -> None:
        if embedding.ndim != 2 or structure.shape != embedding.shape or labels.shape != embedding.shape[:1]:
            raise ShapeError(
                f"expected embedding (B, D), structure (B, D), labels (B,); got {tuple(embedding.shape)}, "
                f"{tuple(structure.shape)}, {tuple(labels.shape)}"
            )
        if self.config.base == "proxy_anchor":
            least, most = (int(bound) for bound in labels.aminmax())
            if least < 0 or most >= self.num_classes:
                raise ShapeError(
                    f"labels go from {least} to {most}; proxies exist for 0 to {self.num_classes - 1}"
                )


def _is_scaled(config: LossConfig) -> bool:
    return config.base == "triplet" or config.view == "scaled"


def _base_loss(config: LossConfig, *, num_classes: int, embedding_dim: int) -> Any:
    margin = {"margin": config.margin} if config.margin is not None else {}
    match config.base:
        case "triplet":
            return pml_losses.TripletMarginLoss(**({"margin": 0.2} | margin), distance=_Euclidean())
        case "margin":
            return pml_losses.MarginLoss(**({"margin": 0.2} | margin), distance=_Euclidean())
        case "contrastive":
            negative = 1.0 if config.margin is None else config.margin
            return pml_losses.ContrastiveLoss(pos_margin=0, neg_margin=negative, distance=_Euclidean())
        case "multi_similarity":
            return pml_losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, distance=_Cosine())
        case "proxy_anchor":
            return pml_losses.ProxyAnchorLoss(
                num_classes, embedding_dim, **({"margin": 0.1} | margin), alpha=32, distance=_Cosine()
            )


def _miner(config: LossConfig) -> Callable[..., tuple[Tensor, ...]] | None:
    match config.base:
        case "triplet" | "margin":
            return distance_weighted_triplets
        case "multi_similarity":
            miner: Callable[..., tuple[Tensor, ...]] = pml_miners.MultiSimilarityMiner(
                epsilon=0.1, distance=_Cosine()
            )
            return miner
        case _:
            return None


class _Euclidean(LpDistance):  # type: ignore[misc]
    """L2 as `distances` defines it, of x as it is: LpDistance would normalise it."""

    def __init__(self) -> None:
        super().__init__(normalize_embeddings=False, p=2, power=1)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return distances.safe_sqrt(distances.pairwise_squared(query_emb, ref_emb))


class _Cosine(CosineSimilarity):  # type: ignore[misc]
    """Cosine at full precision: multi-similarity multiplies its rounding by 50."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return distances.inner(query_emb, ref_emb)
