"""Triplets by distance: what is drawn how often, from the batch and from others."""

from collections import Counter

import torch
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor

from namr.model.mining import distance_weighted_triplets

LABELS = torch.arange(6).repeat_interleave(4)


def normal(num: int, dim: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, generator=generator, dtype=torch.float64)


def test_triplets_are_triplets() -> None:
    x = normal(24, 16)
    anchors, positives, negatives = distance_weighted_triplets(torch.nn.functional.normalize(x), LABELS)
    assert len(anchors) == 24 * 4
    assert (LABELS[anchors] == LABELS[positives]).all() and (anchors != positives).all()
    assert (LABELS[anchors] != LABELS[negatives]).all()


def test_negatives_follow_one_over_the_density() -> None:
    """An anchor with negatives at three distances in D = 4, where 1 / q(d) = d^-2 (1 - d^2/4)^(-1/2)."""
    cosines = torch.tensor([1.0, 0.99, 0.95, 0.5, 0.2], dtype=torch.float64)
    x = torch.zeros(5, 4, dtype=torch.float64)
    x[:, 0], x[:, 1] = cosines, (1 - cosines**2).sqrt()
    labels = torch.tensor([0, 0, 1, 2, 3])
    apart = (2 - 2 * cosines[2:]).sqrt().clamp(min=0.5)
    weights = apart**-2 * (1 - apart**2 / 4) ** -0.5
    torch.manual_seed(0)
    drawn: Counter[int] = Counter()
    for _ in range(3000):
        anchors, _, negatives = distance_weighted_triplets(x, labels)
        drawn.update(negatives[anchors == 0].tolist())
    shares = torch.tensor([drawn[place] for place in (2, 3, 4)]) / sum(drawn.values())
    torch.testing.assert_close(shares.double(), weights / weights.sum(), atol=0.03, rtol=0)


def test_an_anchor_without_weights_draws_uniformly() -> None:
    """All negatives beyond 1.4: the miner of pytorch-metric-learning has nothing to say, and drops them."""
    x = torch.zeros(9, 3, dtype=torch.float64)
    x[:2] = torch.tensor([1.0, 0.0, 0.0])
    x[2:] = torch.tensor([-1.0, 0.0, 0.0])
    x[2:, 1] = torch.linspace(0, 0.3, 7)
    x = torch.nn.functional.normalize(x)
    labels = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])
    torch.manual_seed(0)
    assert 0 not in pml_miners.DistanceWeightedMiner()(x, labels)[0].tolist()
    drawn: Counter[int] = Counter()
    for _ in range(700):
        anchors, _, negatives = distance_weighted_triplets(x, labels)
        assert set(anchors.tolist()) == {0, 1}
        drawn.update(negatives.tolist())
    assert set(drawn) == set(range(2, 9))
    assert all(300 < count < 500 for count in drawn.values())  # 400 each


def test_high_dimensions_lose_no_anchor() -> None:
    """At D = 512 the weights span hundreds of orders of magnitude and most rows vanish in float32."""
    x = normal(64, 512).float()
    labels = torch.arange(16).repeat_interleave(4)
    anchors, _, _ = distance_weighted_triplets(torch.nn.functional.normalize(x), labels)
    assert set(anchors.tolist()) == set(range(64))


def test_triplets_with_others_have_both_ends_there_and_know_no_self() -> None:
    x, others = (torch.nn.functional.normalize(normal(num, 8, seed=num)) for num in (4, 9))
    labels, other_labels = torch.tensor([0, 0, 1, 5]), torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3])
    torch.manual_seed(0)
    anchors, positives, negatives = distance_weighted_triplets(x, labels, others, other_labels)
    assert sorted(anchors.tolist()) == [0, 1, 2, 2]  # as many as the class has there; none of class 5
    assert (labels[anchors] == other_labels[positives]).all()
    assert (labels[anchors] != other_labels[negatives]).all()
