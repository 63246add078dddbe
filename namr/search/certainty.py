"""How sure an answer is: whether something outside the candidates may belong to it.

**Proved.** A first stage that is exact returns the nearest candidates, so whatever it left out has a plain
squared distance of at least that of the last candidate, L. No structure weight is below w, so no item left
out has an adaptive squared distance below w L. If the k-th of the re-ranked candidates is nearer than that,
the k nearest of the whole gallery are among the candidates. `outside_squared` makes L smaller by what
rounding may have changed: the sums of float32 in the index and the float16 of the re-rank vectors.

**Calibrated.** The same comparison with a weight w that was measured, see `release.calibrated`, and with any
first stage: L is then the distance of the last candidate's re-rank vector where the index has only its code.

An adaptive search goes through the `levels` of a release until its answer is one or the other.

Not covered: measuring the weights (`nightly.calibration`).
Legend: Q queries, M candidates of a query, D dimension.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.search import rerank
from namr.search.first_stage import Candidates
from namr.search.rerank import Doubles, Floats, Stop, go_on
from namr.search.vectors import GalleryVectors
from namr.sides import Side

Flags = npt.NDArray[np.bool_]

NUM_DOUBLINGS = 4
"""of the release's depth and lists: an adaptive search compares at most 16 times its depth, last"""
_FLOAT16_HALF_STEP = 2.0**-11
_FLOAT16_SMALLEST_HALF_STEP = 2.0**-25
_FLOAT32_HALF_STEP = 2.0**-24


class Level(NamedTuple):
    """How far a search looks."""

    depth: int
    """candidates"""
    nprobe: int
    """lists, all of them at most; 0 where there are none"""


def doubled(num: int) -> list[int]:
    """Candidates, or lists, of the levels of an adaptive search that begins with so many."""
    return [num << doublings for doublings in range(NUM_DOUBLINGS + 1)]


def levels(depth: int, nprobe: int, *, num_lists: int) -> list[Level]:
    """Those of an adaptive search: depth and lists as given, and each twice that of the one before."""
    of_all = zip(doubled(depth), doubled(nprobe), strict=True)
    return [Level(candidates, min(lists, num_lists)) for candidates, lists in of_all]


def outside_squared(last_squared: Doubles, q: Floats) -> Doubles:
    """The least squared distance between q and a re-rank vector that an exact first stage left out.

    last_squared (Q,): what the index said of the last candidate, inf where it left nothing out. q (Q, D).
    The index computed it in float32, at worst as |q|^2 + |x|^2 - 2 q x, with an error of at most
    g (|q| + |x|)^2, g = (D + 4) 2^-23 (Higham, Accuracy and Stability, 3.1); a re-rank vector is off by at
    most half a step of float16 in each coordinate. |x| is at most |q| + d.
    """
    norm, dim = np.linalg.norm(q.astype(np.float64), axis=1), q.shape[1]
    last = np.where(np.isinf(last_squared), 0, last_squared)
    g = (dim + 4) * 2 * _FLOAT32_HALF_STEP
    # the smallest d with d^2 + g (2 |q| + d)^2 >= last
    rest = np.maximum(last - 4 * g * norm**2, 0)
    d = np.maximum(np.sqrt((2 * g * norm) ** 2 + (1 + g) * rest) - 2 * g * norm, 0) / (1 + g)
    moved = _FLOAT16_HALF_STEP * (norm + d) + _FLOAT16_SMALLEST_HALF_STEP * np.sqrt(dim)
    bound = np.maximum(d - moved, 0) ** 2
    return np.where(np.isinf(last_squared), np.inf, bound)


def least_weight(s_q: Floats | None, *, side: Side, gallery_min: float, num_queries: int) -> Doubles:
    """(Q,) what an adaptive squared distance is at least, as a multiple of the plain one."""
    if side == "none":
        return np.ones(num_queries)
    if side == "scale":
        return np.full(num_queries, np.sqrt(gallery_min))
    if s_q is None:
        raise ValueError(f"side {side!r} without structures")
    least: Doubles = s_q.min(axis=1).astype(np.float64)
    return least if side == "query" else (least + gallery_min) / 2


def is_proved(
    kth_squared: Doubles,
    last_squared: Doubles,
    q: Floats,
    s_q: Floats | None,
    *,
    side: Side,
    gallery_min: float,
) -> Flags:
    """(Q,) True where everything that an exact first stage left out is farther than the k-th re-ranked.

    kth_squared (Q,): adaptive squared distance of the k-th. last_squared (Q,): plain squared distance of
    the last candidate as the index gave it, inf where nothing was left out. gallery_min: the smallest
    structure weight in the gallery.
    """
    least = least_weight(s_q, side=side, gallery_min=gallery_min, num_queries=len(q))
    nothing_left = np.isinf(last_squared)
    return nothing_left | (kth_squared * _rounding(q) < least * outside_squared(last_squared, q))


def last_squared(
    first: Candidates,
    depth: int,
    q: Floats,
    vectors: GalleryVectors,
    *,
    is_compressed: bool,
    stop: Stop = go_on,
) -> Doubles:
    """(Q,) plain squared distance of the last of the first `depth` candidates; 0 where there is none.

    Where the index is compressed its own distances are those of codes, so that of the re-rank vector.
    """
    num = (first.ids[:, :depth] >= 0).sum(axis=1)
    rows, at = np.arange(len(num)), np.maximum(num - 1, 0)
    if not is_compressed:
        return np.where(num > 0, first.squared[rows, at].astype(np.float64), 0.0)
    last = first.ids[rows, at][:, None]
    refined = rerank.rerank(q, None, last, vectors, k=1, side="none", stop=stop).squared[:, 0]
    return np.where(num > 0, refined, 0.0)


def is_calibrated(kth_squared: Doubles, last_squared: Doubles, q: Floats, *, weight: float) -> Flags:
    """(Q,) True where the k-th, by adaptive distance, is nearer than `weight` times `last_squared`."""
    return kth_squared * _rounding(q) < weight * last_squared


def _rounding(q: Floats) -> float:
    """At most what an adaptive squared distance that was summed in float32 is too small by, as a factor."""
    return 1 + (int(q.shape[1]) + 8) * 2 * _FLOAT32_HALF_STEP
