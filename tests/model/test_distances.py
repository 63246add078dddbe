"""The distances against plain loops, their numerics against float64, and the laws of re-ranking."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from namr.errors import ShapeError
from namr.model import distances


def points(num: int, dim: int, *, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Embeddings (num, dim) and structures in (0.5, 1.5)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    s = 0.5 + torch.rand(num, dim, generator=generator, dtype=torch.float64)
    return x.to(dtype), s.to(dtype)


def looped(x: Tensor, s: Tensor, y: Tensor, s_y: Tensor, side: str) -> Tensor:
    """Squared distances, entry by entry, from the formulas."""
    result = torch.empty(len(x), len(y), dtype=torch.float64)
    for i in range(len(x)):
        for j in range(len(y)):
            total = 0.0
            mean_structure = sum(s_y[j].tolist()) / s_y.shape[1]
            for k in range(x.shape[1]):
                weight = {
                    "none": 1.0,
                    "query": s[i, k].item(),
                    "both": (s[i, k].item() + s_y[j, k].item()) / 2,
                    "scale": mean_structure**0.5,
                }[side]
                total += weight * (x[i, k].item() - y[j, k].item()) ** 2
            result[i, j] = total
    return result


def test_hand_worked_distances() -> None:
    q, s_q = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.5, 0.5]])
    x, s_x = torch.tensor([[2.0, 4.0]]), torch.tensor([[0.5, 1.5]])
    assert distances.pairwise_squared(q, x).item() == pytest.approx(20)
    assert distances.adaptive_squared(q, s_q, x).item() == pytest.approx(1.5 * 4 + 0.5 * 16)
    assert distances.adaptive_squared_both(q, s_q, x, s_x).item() == pytest.approx(20)
    assert distances.scale(torch.tensor([[0.25, 0.75, 0.5]])).item() == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("side", ["none", "query", "both", "scale"])
def test_every_form_equals_two_loops(side: distances.Side) -> None:
    x, s = points(5, 3, seed=0)
    y, s_y = points(4, 3, seed=1)
    expected = looped(x, s, y, s_y, side)
    candidates, of_candidates = y.expand(5, 4, 3), s_y.expand(5, 4, 3)
    reranked = distances.rerank_squared(x, s, candidates, of_candidates, side=side)
    torch.testing.assert_close(reranked, expected, rtol=1e-12, atol=1e-12)
    products = {
        "none": lambda: distances.pairwise_squared(x, y),
        "query": lambda: distances.adaptive_squared(x, s, y),
        "both": lambda: distances.adaptive_squared_both(x, s, y, s_y),
        "scale": lambda: distances.pairwise_squared(x, y) * distances.scale(s_y),
    }
    torch.testing.assert_close(products[side](), expected, rtol=1e-12, atol=1e-12)


def test_scale_takes_the_kept_numbers_too() -> None:
    x, s = points(3, 4, seed=0)
    candidates, s_candidates = x.expand(3, 3, 4), s.expand(3, 3, 4)
    whole = distances.rerank_squared(x, None, candidates, s_candidates, side="scale")
    kept = distances.rerank_squared(x, None, candidates, distances.scale(s).expand(3, 3), side="scale")
    torch.testing.assert_close(kept, whole)


def test_structure_of_one_is_the_plain_distance() -> None:
    x, _ = points(6, 5, seed=2)
    ones = torch.ones_like(x)
    plain = distances.pairwise_squared(x, x)
    torch.testing.assert_close(distances.adaptive_squared(x, ones, x), plain)
    torch.testing.assert_close(distances.adaptive_squared_both(x, ones, x, ones), plain)


def test_gradients_in_float64() -> None:
    x, s = points(5, 3, seed=3)
    y, s_y = points(4, 3, seed=4)
    inputs = tuple(t.requires_grad_() for t in (x, s, y, s_y))
    assert torch.autograd.gradcheck(lambda *three: distances.adaptive_squared(*three[:3]), inputs)
    assert torch.autograd.gradcheck(distances.adaptive_squared_both, inputs)
    assert torch.autograd.gradcheck(lambda x, *_: distances.mean_pairwise(x), inputs)
    assert torch.autograd.gradgradcheck(distances.inner, (x, y))


def test_mean_pairwise_leaves_the_diagonal_out() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert distances.mean_pairwise(x).item() == pytest.approx(20 / 6, abs=1e-5)
    with pytest.raises(ShapeError, match="1 point"):
        distances.mean_pairwise(x[:1])


def test_equal_points_give_finite_gradients() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    distances.mean_pairwise(x).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_an_offset_costs_no_accuracy() -> None:
    x, s = points(64, 128, seed=5)
    x = x + 3
    exact = distances.adaptive_squared(x, s, x)
    single = distances.adaptive_squared(x.float(), s.float(), x.float())
    assert ((single - exact).norm() / exact.norm()).item() < 1e-6
    exact, single = distances.pairwise_squared(x, x), distances.pairwise_squared(x.float(), x.float())
    assert ((single - exact).norm() / exact.norm()).item() < 1e-6


def test_squared_distances_of_near_duplicates_are_not_negative() -> None:
    x, s = points(32, 64, seed=6, dtype=torch.float32)
    x = torch.cat([x, x + 1e-6, x])
    s = torch.cat([s, s, s])
    for squared in (
        distances.pairwise_squared(x, x),
        distances.adaptive_squared(x, s, x),
        distances.adaptive_squared_both(x, s, x, s),
    ):
        assert squared.min() >= 0


@pytest.fixture
def coarse_products() -> Iterator[None]:
    """float32 products in bfloat16 or TF32 where the machine can, as users set it for their backbones."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("coarse_products")
def test_products_stay_exact_under_autocast_and_coarse_precision() -> None:
    x, s = points(256, 128, seed=7)
    exact_x, single_x = x.clone().requires_grad_(), x.float().requires_grad_()
    exact = distances.adaptive_squared(exact_x, s, exact_x)
    exact.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        single = distances.adaptive_squared(single_x, s.float(), single_x)
    single.square().sum().backward()
    assert single.dtype == torch.float32
    assert exact_x.grad is not None and single_x.grad is not None
    assert ((single - exact).norm() / exact.norm()).item() < 1e-6
    assert ((single_x.grad - exact_x.grad).norm() / exact_x.grad.norm()).item() < 1e-5
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # the user's setting is as it was


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, s = points(8, 16, seed=8, dtype=dtype)
    assert distances.pairwise_squared(x, x).dtype == torch.float32
    expected = distances.adaptive_squared(x.double(), s.double(), x.double())
    torch.testing.assert_close(distances.adaptive_squared(x, s, x).double(), expected, rtol=1e-4, atol=1e-4)
    reranked = distances.rerank_squared(x, s, x.expand(8, 8, 16), None, side="query")
    torch.testing.assert_close(reranked.double(), expected, rtol=1e-4, atol=1e-4)


def test_for_search_is_unit_length_for_cosine_alone() -> None:
    x, _ = points(4, 3, seed=11)
    x[2] = 0
    assert torch.equal(distances.for_search(x, "l2"), x.float())
    unit = distances.for_search(x, "cosine")
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit.norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_a_refused_candidate_has_no_distance() -> None:
    x, s = points(1, 4, seed=12)
    candidates = torch.stack([x[0], torch.full((4,), torch.nan)])[None]
    squared = distances.rerank_squared(x, s, candidates, None, side="query")
    assert squared[0, 0] == 0
    assert squared[0, 1].isnan()


def test_wrong_shapes_are_named() -> None:
    x, s = points(3, 4, seed=13)
    with pytest.raises(ShapeError, match=r"\(3, 4\) and \(3, 2\)"):
        distances.pairwise_squared(x, x[:, :2])
    with pytest.raises(ShapeError, match=r"structure \(2, 4\).*\(3, 4\)"):
        distances.adaptive_squared(x, s[:2], x)
    with pytest.raises(ShapeError, match="side 'both' needs s_candidates"):
        distances.rerank_squared(x, s, x[:, None], None, side="both")
    with pytest.raises(ShapeError, match="side 'query' needs s_q"):
        distances.rerank_squared(x, None, x[:, None], None, side="query")
