"""Plain and structure-weighted distances: the one definition for losses, metrics and search.

    d(q, x)^2   = sum_k (q[k] - x[k])^2
    d_s(q, x)^2 = sum_k s_q[k] (q[k] - x[k])^2                    side "query"
    d_s(q, x)^2 = sum_k (s_q[k] + s_x[k]) / 2 (q[k] - x[k])^2     side "both"
    d_s(q, x)^2 = sqrt(mean_k s_x[k]) d(q, x)^2                   side "scale"

Torch in, torch out, on the device of the input; float16 and bfloat16 are computed in float32, float64
stays float64. The functions of two sets are matrix products, with O(A B) memory. Distances don't change
when all points move together but rounding does, so the products are taken after the mean of y is
subtracted; they run at full float32 precision (no TF32, no bfloat16) forward and backward, under autocast
too. Not here: anything approximate, and indexes (`ivf`).

Legend: A, B numbers of points, D dimension, Q queries, M candidates of a query, N gallery.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from namr.errors import ShapeError
from namr.sides import Metric as Metric
from namr.sides import Side as Side


def pairwise_squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances. x (A, D), y (B, D) -> (A, B), at least 0.

    The distance of a point to itself is small but not exactly 0.
    """
    x, y = _centred(x, y)
    squared = x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2 * inner(x, y)
    return squared.clamp(min=0)


def adaptive_squared(x: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """sum_k s_i[k] (x_i[k] - y_j[k])^2. x and s (A, D), y (B, D) -> (A, B), at least 0."""
    return _adaptive(x, s, y).clamp(min=0)


def adaptive_squared_both(x: Tensor, s: Tensor, y: Tensor, s_y: Tensor) -> Tensor:
    """sum_k (s_i[k] + s_y_j[k]) / 2 (x_i[k] - y_j[k])^2. All (A, D) or (B, D) -> (A, B), at least 0."""
    forth = _adaptive(x, s, y)
    back = forth if (x is y and s is s_y) else _adaptive(y, s_y, x)
    return ((forth + back.T) / 2).clamp(min=0)


def _adaptive(x: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """sum_k s x x - 2 (s x) y + s (y y): two matrix products and a row sum, not yet clamped."""
    _check_same_shape("structure", s, "embedding", x)
    x, y = _centred(x, y)
    s = _widened(s)
    weighted = s * x
    return (weighted * x).sum(1)[:, None] - 2 * inner(weighted, y) + inner(s, y * y)


def scale(s: Tensor) -> Tensor:
    """sqrt(mean_k s[k]): the one number that the "scale" side keeps of an image. (N, D) -> (N,)."""
    return _widened(s).mean(-1).sqrt()


def safe_sqrt(squared: Tensor, *, eps: float = 1e-12) -> Tensor:
    """sqrt(max(squared, eps)): its gradient is 0, not infinite, where squared is below eps."""
    return squared.clamp(min=eps).sqrt()


def mean_pairwise(x: Tensor) -> Tensor:
    """Mean distance over all ordered pairs i != j, with gradient. x (B, D), B >= 2 -> scalar."""
    num = len(x)
    if num < 2:
        raise ShapeError(f"the mean pairwise distance of {num} point(s) does not exist: give at least 2")
    apart = ~torch.eye(num, dtype=torch.bool, device=x.device)
    return (safe_sqrt(pairwise_squared(x, x)) * apart).sum() / (num * (num - 1))


def rerank_squared(
    q: Tensor, s_q: Tensor | None, candidates: Tensor, s_candidates: Tensor | None, *, side: Side
) -> Tensor:
    """Squared distance of each query to its own candidates, by difference, so exact for near-duplicates.

    q, s_q (Q, D); candidates (Q, M, D) -> (Q, M). s_candidates is (Q, M, D) for "both", (Q, M, D) or the
    scales (Q, M) for "scale", and not read for "none" and "query". s_q is read for "query" and "both".
    A NaN candidate (a refused image) gets a NaN distance.
    """
    # In place wherever it can be: large temporaries cost more than what is computed in them.
    squared = (_widened(candidates) - _widened(q)[:, None, :]).square_()
    if side == "none":
        return squared.sum(-1)
    if side == "scale":
        weights = _widened(_required(s_candidates, "s_candidates", side))
        return squared.sum(-1) * (weights if weights.ndim == 2 else scale(weights))
    weights = _widened(_required(s_q, "s_q", side))[:, None, :]
    if side == "both":
        of_candidates = _required(s_candidates, "s_candidates", side)
        _check_same_shape("s_candidates", of_candidates, "candidates", candidates)
        return (_widened(of_candidates) + weights).mul_(squared).sum(-1) / 2
    return squared.mul_(weights).sum(-1)


def for_search(x: Tensor, metric: Metric) -> Tensor:
    """What is indexed and searched by L2: x itself, or x / |x| for "cosine". (N, D) -> (N, D) float32.

    A zero vector has no direction and stays zero.
    """
    x = x.float()
    return F.normalize(x, dim=-1) if metric == "cosine" else x


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a b' at full precision whatever autocast and TF32 say, backward too. (A, D), (B, D) -> (A, B)."""
    product: Tensor = _Inner.apply(_widened(a), _widened(b))
    return product


class _Inner(torch.autograd.Function):
    """The precision settings are process-wide and read when a product runs, so backward sets them again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with _full_precision(a.device.type):
            return a @ b.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        a, b = ctx.saved_tensors
        grad_a = inner(grad, b.T) if ctx.needs_input_grad[0] else None
        grad_b = inner(grad.T, a.T) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    backends: Any = torch.backends  # not fully typed
    matmul = backends.cuda.matmul if device_type == "cuda" else backends.mkldnn.matmul
    before = matmul.fp32_precision
    with torch.autocast(device_type, enabled=False):
        if before in ("none", "ieee"):
            yield
            return
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "none"  # inherit again, where it was inherited
            if matmul.fp32_precision != before:
                matmul.fp32_precision = before


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ShapeError(f"expected (A, D) and (B, D), got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = _widened(x), _widened(y)
    centre = y.detach().mean(0) if len(y) else y.new_zeros(y.shape[1])
    return x - centre, y - centre


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _required(x: Tensor | None, name: str, side: Side) -> Tensor:
    if x is None:
        raise ShapeError(f"side {side!r} needs {name}: give it, or ask for another side")
    return x


def _check_same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ShapeError(f"{name} {tuple(x.shape)} must have the shape of {other_name} {tuple(other.shape)}")
