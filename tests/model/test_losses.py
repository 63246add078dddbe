"""The ranking loss against loops and NASA's formula, its numerics, and the base losses on their distances."""

import math
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import losses as pml_losses
from torch import Tensor

from namr.errors import ConfigError, ShapeError
from namr.model import distances, losses
from namr.model.losses import (
    JointLoss,
    LossConfig,
    multi_cluster_ranking,
    search_metric_of,
)

BASES: tuple[Literal["triplet", "contrastive", "margin", "multi_similarity", "proxy_anchor"], ...] = (
    "triplet", "contrastive", "margin", "multi_similarity", "proxy_anchor"
)  # fmt: skip
SIDES: tuple[Literal["query", "both"], ...] = ("query", "both")
LABELS = torch.arange(6).repeat_interleave(4)


def batch(num: int = 24, dim: int = 16, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Embeddings and structures of a batch, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    s = 0.5 + torch.rand(num, dim, generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, s)]


def joint(base: str, **settings: object) -> JointLoss:
    config = LossConfig(base=base, **settings)  # type: ignore[arg-type]
    return JointLoss(config, num_classes=6, embedding_dim=16)


def looped(x: Tensor, s: Tensor, *, num_clusters: int, side: str, alpha: float, t: float) -> float:
    """DESIGN's formula, one pair and one cluster at a time."""
    num, dim = x.shape

    def adaptive(i: int, j: int) -> float:
        return sum(s[i, k].item() * (x[i, k].item() - x[j, k].item()) ** 2 for k in range(dim))

    plain = [math.dist(x[i].tolist(), x[j].tolist()) for i in range(num) for j in range(num)]
    mean = sum(plain) / len(plain)
    deviation = (sum((d - mean) ** 2 for d in plain) / (len(plain) - 1)) ** 0.5
    low = max(0.2 * mean, mean - t * deviation)
    total = 0.0
    for i in range(num):
        for j in range(num):
            if i == j:
                continue
            squared = adaptive(i, j) if side == "query" else (adaptive(i, j) + adaptive(j, i)) / 2
            gaps = [
                abs(math.sqrt(squared) - (mean + (low - mean) * c / (num_clusters - 1)))
                for c in range(num_clusters)
            ]
            weights = [math.exp(-alpha * gap) for gap in gaps]
            total += sum(w * gap for w, gap in zip(weights, gaps, strict=True)) / sum(weights)
    return total / (num * (num - 1))


def nasa(x: Tensor, s: Tensor) -> Tensor:
    """NASA's two groups, anchor by anchor: each neighbour is drawn to the far or to the near centre."""
    every = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    far = every.mean().detach()
    near = torch.maximum(far - 3 * every.std(), 0.2 * far).detach()
    losses = []
    for anchor in range(len(x)):
        others = torch.arange(len(x)) != anchor
        difference = x[anchor] - x[others]
        stretched = (s[anchor] * difference * difference).sum(1).sqrt()
        to_far, to_near = (stretched - far).abs(), (stretched - near).abs()
        belongs_far = torch.sigmoid(10 * (to_near - to_far))
        losses.append(belongs_far * to_far + (1 - belongs_far) * to_near)
    return torch.cat(losses).mean()


# The multi-cluster ranking loss


def test_two_points_by_hand() -> None:
    """Distances 0 and 1, twice each: mean 1/2, centres 1/2 and 1/10; one pair, twice."""
    x, s = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    far, near = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(4))
    loss = multi_cluster_ranking(x, s, num_clusters=2, structure_side="query")
    assert loss.item() == pytest.approx(0.5 * far + 0.9 * near, rel=1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("num_clusters", [2, 3, 5])
def test_it_equals_two_loops(num_clusters: int, side: Literal["query", "both"]) -> None:
    x, s = batch(9, 4)
    x = x * 0.3
    expected = looped(x, s, num_clusters=num_clusters, side=side, alpha=7.0, t=1.5)
    loss = multi_cluster_ranking(x, s, num_clusters=num_clusters, structure_side=side, alpha=7.0, t=1.5)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_two_clusters_are_the_loss_of_nasa() -> None:
    x, s = batch(20, 8)
    ours = multi_cluster_ranking(x, s, num_clusters=2, structure_side="query")
    gradients = torch.autograd.grad(ours, (x, s))
    theirs = nasa(x, s)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-13)
    for one, other in zip(gradients, torch.autograd.grad(theirs, (x, s)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("num_clusters", [2, 4])
def test_its_gradient_in_float64(
    num_clusters: int, side: Literal["query", "both"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The centres are constants of the loss, which numeric differences would move: so they are held."""
    x, s = batch(6, 3)
    centres = losses._cluster_centres(x.detach(), num_clusters=num_clusters, t=3.0)
    monkeypatch.setattr(losses, "_cluster_centres", lambda *_, **__: centres)
    assert torch.autograd.gradcheck(
        lambda x, s: multi_cluster_ranking(x, s, num_clusters=num_clusters, structure_side=side), (x, s)
    )


@pytest.mark.parametrize("side", SIDES)
def test_without_structure_both_sides_are_the_plain_distance(side: Literal["query", "both"]) -> None:
    x, _ = batch(12, 5)
    ones = torch.ones_like(x)
    loss = multi_cluster_ranking(x, ones, num_clusters=3, structure_side=side)
    plain = looped(x, ones, num_clusters=3, side="query", alpha=10.0, t=3.0)
    assert loss.item() == pytest.approx(plain, rel=1e-12)


def errors_of_float32(side: Literal["query", "both"], *, gap: float) -> list[float]:
    """Relative errors of loss, gradient of x, gradient of s; each point has a near-duplicate `gap` away."""
    x, s = (t.detach() for t in batch(96, 64))
    x[48:] = x[:48] + gap * x[:48].roll(1, 0)
    x = (x / distances.mean_pairwise(x) + 3).float()
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = x.to(dtype).requires_grad_(), s.float().to(dtype).requires_grad_()
        loss = multi_cluster_ranking(*leaves, num_clusters=4, structure_side=side)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    return [((two - one).norm() / one.norm()).item() for one, two in zip(*results, strict=True)]


@pytest.mark.parametrize("side", SIDES)
def test_float32_with_an_offset_agrees_with_float64(side: Literal["query", "both"]) -> None:
    """Without centring the gradients are 1 to 4 % off."""
    assert max(errors_of_float32(side, gap=1.0)) < 3e-6


@pytest.mark.parametrize("side", SIDES)
def test_float32_with_near_duplicates_agrees_with_float64(side: Literal["query", "both"]) -> None:
    of_loss, of_x, of_s = errors_of_float32(side, gap=0.01)
    assert of_loss < 1e-5 and of_x < 1e-3 and of_s < 1e-5
    # so near that float32 products can't tell them from the same point: only their own direction is lost
    of_loss, of_x, of_s = errors_of_float32(side, gap=1e-6)
    assert of_loss < 1e-4 and of_x < 0.1 and of_s < 1e-3


def test_memory_is_clusters_times_pairs() -> None:
    """Nothing that is kept for the backward pass is as large as pairs times dimension."""
    num, dim, num_clusters = 16, 512, 3
    x, s = batch(num, dim, dtype=torch.float32)
    sizes: list[int] = []

    def keep(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        multi_cluster_ranking(x, s, num_clusters=num_clusters, structure_side="both").backward()
    assert sizes
    assert max(sizes) <= max(num_clusters * num * num, num * dim)


def test_a_collapsed_batch_is_finite() -> None:
    x = torch.ones(8, 4, requires_grad=True)
    loss = multi_cluster_ranking(x, torch.ones(8, 4), num_clusters=4, structure_side="both")
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_a_batch_of_one_or_of_two_shapes_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"B >= 2, got \(1, 4\)"):
        multi_cluster_ranking(torch.ones(1, 4), torch.ones(1, 4), num_clusters=2, structure_side="query")
    with pytest.raises(ShapeError, match=r"\(3, 4\) and \(3, 5\)"):
        multi_cluster_ranking(torch.ones(3, 4), torch.ones(3, 5), num_clusters=2, structure_side="query")


# The base losses


def reference(base: str, x: Tensor, proxies: Tensor | None, mined: tuple[Tensor, ...] | None) -> Tensor:
    """pytorch-metric-learning's loss on its own distances, of the views of x in DESIGN 2.1."""
    unit = x / x.norm(dim=1, keepdim=True)
    apart = (x[:, None] - x[None]).square().sum(2)[~torch.eye(len(x), dtype=torch.bool)].sqrt()
    lp, cosine = pml_distances.LpDistance(normalize_embeddings=False), pml_distances.CosineSimilarity()
    match base:
        case "triplet":
            loss, view = pml_losses.TripletMarginLoss(margin=0.2, distance=lp), x / apart.mean()
        case "contrastive":
            loss, view = pml_losses.ContrastiveLoss(pos_margin=0, neg_margin=1, distance=lp), unit
        case "margin":
            loss, view = pml_losses.MarginLoss(margin=0.2, beta=1.2, distance=lp), unit
        case "multi_similarity":
            loss, view = pml_losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, distance=cosine), unit
        case _:
            loss, view = pml_losses.ProxyAnchorLoss(6, x.shape[1], margin=0.1, alpha=32), unit
            assert proxies is not None
            loss.proxies.data = proxies.detach().clone()
    result: Tensor = loss(view, LABELS, mined)
    return result


@pytest.mark.parametrize("base", BASES)
def test_weight_zero_is_exactly_the_plain_base_loss(base: str) -> None:
    x, s = batch()
    loss = joint(base, ranking_weight=0.0).double()
    terms = loss(x, s, LABELS, seed=1, step=2)
    of_x, of_s = torch.autograd.grad(terms.total, (x, s))
    assert torch.equal(terms.total, terms.metric) and terms.ranking == 0
    assert torch.equal(of_s, torch.zeros_like(s))  # there, for DDP, and without effect
    assert [t.requires_grad for t in terms] == [True, False, False, False]
    mined = loss.mine(x, LABELS, seed=1, step=2)
    view = x / distances.mean_pairwise(x) if base == "triplet" else torch.nn.functional.normalize(x, dim=1)
    plain = loss.base(view, LABELS, mined)
    assert torch.equal(terms.total, plain)
    assert torch.equal(of_x, torch.autograd.grad(plain, x)[0])


@pytest.mark.parametrize("base", BASES)
def test_base_losses_work_on_the_distance_that_is_said(base: str) -> None:
    x, s = batch()
    x.data += 0.5
    loss = joint(base, ranking_weight=0.0).double()
    mined = loss.mine(x, LABELS, seed=1, step=2)
    ours = loss(x, s, LABELS, seed=1, step=2).total
    theirs = reference(base, x, next(loss.parameters(), None), mined)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    gradients = [torch.autograd.grad(each, x)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("base", BASES)
def test_the_joint_loss_is_the_sum(base: str, side: Literal["query", "both"]) -> None:
    x, s = batch()
    loss = joint(base, ranking_weight=3.0, num_clusters=4, structure_side=side).double()
    terms = loss(x, s, LABELS, seed=1, step=2)
    plain = joint(base, ranking_weight=0.0).double()(x, s, LABELS, seed=1, step=2)
    view = x / distances.mean_pairwise(x) if base == "triplet" else x / x.norm(dim=1, keepdim=True)
    view = view / distances.mean_pairwise(view)
    ranking = multi_cluster_ranking(view, s, num_clusters=4, structure_side=side)
    assert terms.metric.item() == plain.total.item()
    assert terms.ranking.item() == pytest.approx(ranking.item(), rel=1e-12)
    assert terms.total.item() == pytest.approx(plain.total.item() + 3 * ranking.item(), rel=1e-12)
    apart = torch.pdist(x.detach()).mean()
    assert terms.mean_distance.item() == pytest.approx(apart.item(), rel=1e-9)
    assert [t.requires_grad for t in terms] == [True, False, False, False]


def test_scaled_view_of_contrastive_and_margin() -> None:
    x, s = batch()
    for base in ("contrastive", "margin"):
        loss = joint(base, ranking_weight=0.0, view="scaled").double()
        value = loss(x, s, LABELS, seed=0, step=0).total
        same = loss(7 * x, s, LABELS, seed=0, step=0).total  # no unit length, and yet no scale
        assert value.item() == pytest.approx(same.item(), rel=1e-9)
        assert value.item() != joint(base, ranking_weight=0.0).double()(x, s, LABELS, seed=0, step=0).total


def test_the_metric_to_search_by_follows_the_view() -> None:
    expected = {
        "triplet": "l2", "contrastive": "cosine", "margin": "cosine",
        "multi_similarity": "cosine", "proxy_anchor": "cosine",
    }  # fmt: skip
    assert {base: search_metric_of(LossConfig(base=base)) for base in BASES} == expected
    assert search_metric_of(LossConfig(base="margin", view="scaled")) == "l2"


@pytest.mark.parametrize("base", BASES)
def test_every_loss_teaches(base: str) -> None:
    """Points move until neighbours are of one class, for each base loss."""
    x, s = batch(dtype=torch.float32)
    loss = joint(base)
    optimiser = torch.optim.Adam([x, s, *loss.parameters()], lr=0.05)
    for step in range(150 if base == "proxy_anchor" else 60):
        optimiser.zero_grad()
        loss(x, s, LABELS, seed=0, step=step).total.backward()
        optimiser.step()
    apart = distances.pairwise_squared(*(2 * [torch.nn.functional.normalize(x.detach())]))
    nearest = apart.fill_diagonal_(torch.inf).argmin(1)
    assert (LABELS[nearest] == LABELS).double().mean() > 0.9  # a sixth at the start


@pytest.mark.parametrize("base", BASES)
def test_one_class_alone_is_no_failure(base: str) -> None:
    x, s = batch(8)
    terms = joint(base).double()(x, s, torch.zeros(8, dtype=torch.int64), seed=0, step=0)
    terms.total.backward()
    assert x.grad is not None
    assert torch.isfinite(terms.total) and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.parametrize("base", BASES)
def test_a_row_that_is_no_number_is_not_swallowed(base: str, weight: float) -> None:
    """Mining and reducing drop what they can't compare; the total has to say it nevertheless."""
    x, s = batch()
    x.data[3, 5] = torch.nan
    assert joint(base, ranking_weight=weight).double()(x, s, LABELS, seed=0, step=0).total.isnan()


@pytest.fixture
def coarse_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("coarse_products")
@pytest.mark.parametrize("base", BASES)
def test_losses_stay_exact_under_autocast(base: str) -> None:
    x, s = batch(dtype=torch.float32)
    loss = joint(base)
    mined = loss.mine(x, LABELS, seed=0, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss(x, s, LABELS, seed=0, step=0, mined=mined)
    (gradient,) = torch.autograd.grad(terms.total, x)
    exact_x = x.detach().double().requires_grad_()
    exact = loss.double()(exact_x, s.double(), LABELS, seed=0, step=0, mined=mined).total
    (exact_gradient,) = torch.autograd.grad(exact, exact_x)
    assert terms.total.dtype == torch.float32
    assert terms.total.item() == pytest.approx(exact.item(), rel=1e-5)
    assert ((gradient - exact_gradient).norm() / exact_gradient.norm()).item() < 1e-4


# Mining


def test_mining_is_a_function_of_seed_and_step_alone() -> None:
    x, _ = batch()
    loss = joint("triplet")
    torch.manual_seed(1)
    first = loss.mine(x, LABELS, seed=3, step=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = loss.mine(x, LABELS, seed=3, step=5)
    assert torch.equal(before, torch.get_rng_state())
    others = [loss.mine(x, LABELS, seed=seed, step=step) for seed, step in ((3, 6), (4, 5))]
    assert first is not None and again is not None
    assert all(map(torch.equal, first, again))
    for other in others:
        assert other is not None
        assert not all(map(torch.equal, first, other))


# Proxies, errors


def test_proxies_are_parameters_by_seed_and_travel_in_the_state() -> None:
    config = LossConfig(base="proxy_anchor")
    before = torch.get_rng_state()
    one, same, other = (JointLoss(config, num_classes=6, embedding_dim=16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    (proxies,) = one.parameters()
    assert proxies.shape == (6, 16)
    assert torch.equal(proxies, next(same.parameters()))
    assert not torch.equal(proxies, next(other.parameters()))
    other.load_state_dict(one.state_dict())
    assert torch.equal(proxies, next(other.parameters()))
    assert all(not list(joint(base).parameters()) for base in BASES if base != "proxy_anchor")


def test_shapes_and_labels_are_checked() -> None:
    x, s = batch(8)
    labels = torch.arange(4).repeat_interleave(2)
    with pytest.raises(ShapeError, match=r"\(8, 16\), \(7, 16\), \(8,\)"):
        joint("triplet").double()(x, s[:7], labels, seed=0, step=0)
    with pytest.raises(ShapeError, match=r"labels \(B,\).*\(7,\)"):
        joint("triplet").double()(x, s, labels[:7], seed=0, step=0)
    with pytest.raises(ShapeError, match="labels go from 0 to 9; proxies exist for 0 to 5"):
        joint("proxy_anchor").double()(x, s, labels * 3, seed=0, step=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranking_weight": -1.0}, "ranking_weight is -1"),
        ({"ranking_weight": math.nan}, "ranking_weight is nan"),
        ({"num_clusters": 1}, "num_clusters is 1"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"t": -3.0}, "t is -3"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"view": "scaled"}, "which triplet has no choice about"),
        ({"base": "multi_similarity", "margin": 0.1}, "multi_similarity has no margin"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        joint(**({"base": "triplet"} | settings))  # type: ignore[arg-type]


def test_each_base_loss_has_a_weight_of_its_own_unless_one_is_said() -> None:
    weights = {base: LossConfig(base=base).weight for base in BASES}
    assert weights["multi_similarity"] < weights["margin"] < weights["triplet"] == 1.0
    assert LossConfig(base="triplet", ranking_weight=0).weight == 0
    assert LossConfig(base="multi_similarity", ranking_weight=2).weight == 2


# Cross-batch memory


def remembering(base: str, **settings: object) -> JointLoss:
    return joint(base, memory_size=32, ranking_weight=0.0, **settings).double()


@pytest.mark.parametrize("base", ["contrastive", "margin", "multi_similarity", "triplet"])
def test_the_batch_is_compared_with_the_batches_before(base: str) -> None:
    loss, (x, s), (earlier, _) = remembering(base), batch(), batch(seed=1)
    first = loss(earlier, s, LABELS, seed=0, step=0).metric
    assert torch.equal(first, joint(base, ranking_weight=0.0)(earlier, s, LABELS, seed=0, step=0).metric)
    terms = loss(x, s, LABELS, seed=0, step=1)
    alone = joint(base, ranking_weight=0.0)(x, s, LABELS, seed=0, step=1).metric
    assert terms.metric > alone
    terms.total.backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert earlier.grad is None


def test_contrastive_adds_all_pairs_of_batch_and_memory() -> None:
    """By hand: a positive pair at distance d costs d, a negative one 1 - d below 1, each kind's mean of
    those that cost something."""
    loss, (x, s), (earlier, _) = remembering("contrastive"), batch(8), batch(8, seed=1)
    labels = torch.arange(4).repeat_interleave(2)
    loss(earlier, s, labels, seed=0, step=0)
    metric = loss(x, s, labels, seed=0, step=1).metric
    alone = joint("contrastive", ranking_weight=0.0)(x, s, labels, seed=0, step=1).metric
    ours, theirs = (torch.nn.functional.normalize(each.detach()) for each in (x, earlier))
    costs: dict[bool, list[float]] = {True: [], False: []}
    for i in range(8):
        for j in range(8):
            apart = math.dist(ours[i].tolist(), theirs[j].tolist())
            same = bool(labels[i] == labels[j])
            costs[same].append(apart if same else max(0.0, 1 - apart))
    expected = sum(sum(each) / max(1, sum(cost > 0 for cost in each)) for each in costs.values())
    assert (metric - alone).item() == pytest.approx(expected, rel=1e-6)


def test_a_memory_counts_from_its_step_on_and_fills_before() -> None:
    loss = remembering("contrastive", memory_from_step=2)
    plain = joint("contrastive", ranking_weight=0.0)
    differs = []
    for step in range(4):
        x, s = batch(seed=step)
        with_memory = loss(x, s, LABELS, seed=0, step=step).metric
        differs.append(bool(with_memory != plain(x, s, LABELS, seed=0, step=step).metric))
    assert differs == [False, False, True, True]


def test_a_memory_is_refused_where_it_has_nothing_to_do() -> None:
    with pytest.raises(ConfigError, match="memory_size is 8, but proxy_anchor has proxies"):
        LossConfig(base="proxy_anchor", memory_size=8)
    with pytest.raises(ConfigError, match=r"loss.memory_size is 0"):
        LossConfig(base="triplet", memory_size=0)
