"""What structure embeddings say of the images of a gallery: their spread, their neighbours, whom they help.

Five looks at the same arrays: how far s is from 1 and whether it tells images apart; whether neighbours have
the same s; hubs before and after re-ranking; queries whose first hit changed sides; the two axes on which s
deforms a neighbourhood most. All of it is exact on the images given; who has many draws a sample of them.

Not covered: reading vectors, pictures and words for people (`reports.structure_section`); averages such as
Recall@K (`metrics`).
Legend: N images, D dimension, K neighbours, M candidates, Q queries.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from namr.errors import ConfigError, ShapeError
from namr.measure import rankings as exact
from namr.sides import Side

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

_MOVES = 0.01
"""standard deviation over images from which an axis counts as different between images"""
_OUTER_PER_CENT = 0.5
_PAIRS = 1 << 14


class Spread(NamedTuple):
    """How the weights of N images and D axes are distributed."""

    mean_offset: float
    """mean of |s - 1|"""
    between_images: float
    """share of the variance of s that is between images, 0 to 1; the rest is what all images have in common,
    a weight for each axis. 0 where s is constant"""
    mean_weights: float
    """share of the variance of s that one number an image explains, its mean weight, which is all that side
    "scale" uses, 0 to 1"""
    lowest: float
    """0.5 % of all weights are below it"""
    highest: float
    """0.5 % of all weights are above it"""
    axis_deviations: tuple[float, float, float]
    """standard deviation of an axis over images: the 10 %, 50 % and 90 % quantile over axes"""
    moving_axes: float
    """share of the axes whose standard deviation over images is above 0.01"""


def effective_rank(x: Vectors) -> float:
    """In how many directions vectors (N, D) differ: exp of the entropy of the shares of the eigenvalues.

    1 to D; 0 where all are equal. Of the covariance, in float64. Roy and Vetterli, The effective rank (2007).
    """
    values = np.linalg.eigvalsh(np.atleast_2d(np.cov(x.astype(np.float64), rowvar=False))).clip(min=0)
    if not values.sum():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


class Rankings(NamedTuple):
    """The K nearest others of each image, nearest first, ties of plain distance by row number."""

    plain: Rows
    """(N, K) row numbers"""
    adaptive: Rows
    """(N, K) the nearest by adaptive distance among the first M of the plain order, ties in plain order"""


class Agreement(NamedTuple):
    """Cosines between the s of two images, each less the mean s; 0 where an s is the mean itself."""

    neighbours: Doubles
    """(N K,) of each image and its nearest others"""
    at_random: Doubles
    """of pairs of different images, drawn by the seed; as many as of neighbours, at most 16,384"""


class Hubs(NamedTuple):
    """How evenly images are found, from how often each is among the K nearest of another."""

    skewness: float
    """third standardised moment of the numbers; 0 where all are equal"""
    anti_hubs: float
    """share of the images that nobody has among their K nearest"""
    largest: int
    """how many images have the same one among their K nearest"""


class Changes(NamedTuple):
    """Labelled queries by whether their first hit is of their class, before and after re-ranking."""

    mended: Rows
    """queries that only the re-ranked order answers with their class"""
    spoiled: Rows
    """queries that only the plain order does"""
    num_labelled: int
    num_right_before: int

    @property
    def num_right_after(self) -> int:
        """What was right, with the mended and without the spoiled."""
        return self.num_right_before + len(self.mended) - len(self.spoiled)

    @property
    def is_clear(self) -> bool:
        """Whether a fair coin for each changed query would rarely (1 in 20) be so uneven."""
        num = len(self.mended) + len(self.spoiled)
        return abs(len(self.mended) - len(self.spoiled)) > 1.96 * math.sqrt(num)


class Plane(NamedTuple):
    """A neighbourhood on two axes of x, seen from the query."""

    axes: tuple[int, int]
    """on which s makes the neighbours farther most, and on which nearer most (or farther least)"""
    weights: tuple[float, float]
    """s of the query on these axes"""
    points: Doubles
    """(M, 2) x - q of the neighbours"""
    radius: float
    """median length of the points: circle and ellipse of this plain and adaptive distance pass among them"""

    @property
    def semi_axes(self) -> tuple[float, float]:
        """Of the ellipse w_a u^2 + w_b v^2 = radius^2."""
        return (self.radius / math.sqrt(self.weights[0]), self.radius / math.sqrt(self.weights[1]))


def spread(s: Vectors) -> Spread:
    """s (N, D) with N >= 1."""
    _check_two(s)
    wide = s.astype(np.float64)
    deviations = wide.std(axis=0)
    variance = float(wide.var())
    within = float(np.square(deviations).mean())
    lowest, highest = np.percentile(s, [_OUTER_PER_CENT, 100 - _OUTER_PER_CENT])
    low, middle, high = np.quantile(deviations, [0.1, 0.5, 0.9]).tolist()
    return Spread(
        mean_offset=float(np.abs(wide - 1).mean()),
        between_images=min(1.0, within / variance) if variance > 0 else 0.0,
        mean_weights=min(1.0, float(wide.mean(axis=1).var()) / variance) if variance > 0 else 0.0,
        lowest=float(lowest),
        highest=float(highest),
        axis_deviations=(low, middle, high),
        moving_axes=float((deviations > _MOVES).mean()),
    )


@torch.no_grad()
def rankings(x: Vectors, s: Vectors, *, k: int, side: Side, depth: int, block_rows: int = 64) -> Rankings:
    """Every image queries all others by brute force; the first `depth` are ordered anew by `side`.

    x as it is searched, x and s (N, D). Memory about block_rows (N + M D) numbers. K is less than k where
    there are not so many others. Neither the size of the blocks nor the number of threads decides a tie.
    """
    _check_two(x)
    if s.shape != x.shape:
        raise ShapeError(f"structures {s.shape} must have the shape of embeddings {x.shape}")
    if min(k, depth, block_rows) < 1:
        raise ConfigError(f"k {k}, depth {depth}, block_rows {block_rows}: each must be at least 1")
    all_s = torch.from_numpy(s)
    gallery = exact.make_gallery(torch.from_numpy(x - x.mean(0)), all_s, None)
    num_others = len(x) - 1
    k, depth = min(k, num_others), min(max(k, depth), num_others)
    plain, adaptive = np.empty((len(x), k), np.int64), np.empty((len(x), k), np.int64)
    for start in range(0, len(x) if k else 0, block_rows):
        rows = torch.arange(start, min(start + block_rows, len(x)))
        asked = exact.Queries(gallery.x[rows], all_s[rows], rows)
        first = exact.plain(asked, gallery, length=depth)
        plain[start : start + len(rows)] = first[:, :k].numpy()
        again = exact.reranked(asked, gallery, first, side=side, depth=depth)
        adaptive[start : start + len(rows)] = again[:, :k].numpy()
    return Rankings(plain, adaptive)


def agreement(s: Vectors, neighbours: Rows, *, seed: int) -> Agreement:
    """s (N, D), neighbours (N, K) row numbers, such as the plain ranking."""
    _check_two(s)
    offset = s.astype(np.float64) - s.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(offset, axis=1, keepdims=True)
    unit = (offset / np.where(length > 1e-6 * math.sqrt(s.shape[1]), length, np.inf)).astype(np.float32)
    of_neighbours = (
        np.stack(
            [np.einsum("nd,nd->n", unit, unit[column], dtype=np.float64) for column in neighbours.T], axis=1
        )
        if neighbours.shape[1]
        else np.empty((len(s), 0))
    )
    rng = np.random.default_rng(seed)
    num = min(_PAIRS, of_neighbours.size)
    one = rng.integers(0, len(s), num)
    other = (one + rng.integers(1, max(2, len(s)), num)) % len(s)
    at_random = np.einsum("nd,nd->n", unit[one], unit[other], dtype=np.float64)
    return Agreement(of_neighbours.ravel(), at_random)


def occurrences(neighbours: Rows, *, num: int) -> Rows:
    """N_k of Radovanovic et al., "Hubs in Space", JMLR 2010: how many images have each of `num` among
    their K nearest. neighbours (N, K) row numbers -> (num,)."""
    return np.bincount(neighbours.ravel(), minlength=num).astype(np.int64)


def hubs(found: Rows) -> Hubs:
    """found (N,) as `occurrences` counts them: skewness E[(N_k - mean)^3] / sd^3 over the images."""
    if not len(found):
        raise ShapeError("hubs of no images: expected at least one")
    offset = found - found.mean()
    deviation = float(np.sqrt(np.square(offset).mean()))
    skewness = float((offset**3).mean()) / deviation**3 if deviation > 0 else 0.0
    return Hubs(skewness, float((found == 0).mean()), int(found.max()))


def changes(labels: Rows, before: Rows, after: Rows) -> Changes:
    """Labels (Q,) of the queries, of their first plain hits and of their first re-ranked hits; -1 for none.

    A query without a label counts nowhere; a hit without one is not of the query's class.
    """
    if not labels.shape == before.shape == after.shape:
        raise ShapeError(
            f"labels {labels.shape}, before {before.shape}, after {after.shape}: expected one a query"
        )
    known = labels >= 0
    was, became = known & (before == labels), known & (after == labels)
    return Changes(
        mended=np.flatnonzero(became & ~was),
        spoiled=np.flatnonzero(was & ~became),
        num_labelled=int(known.sum()),
        num_right_before=int(was.sum()),
    )


def plane(q: Vectors, s_q: Vectors, neighbours: Vectors) -> Plane:
    """The two axes that s_q changes most in these neighbours. q, s_q (D,), D >= 2; neighbours (M, D), M >= 1.

    An axis k is judged by (s_q[k] - 1) times the mean of (q[k] - x[k])^2: what it adds to the mean squared
    distance. Coordinate axes are taken, as on others the section of an adaptive sphere has no such simple
    form: on them it is exactly the ellipse, for images that differ from the query on these two alone.
    """
    if q.shape[-1] < 2 or not len(neighbours):
        raise ShapeError(
            f"{len(neighbours)} neighbours of dimension {q.shape[-1]}; expected 1 or more, 2 or more"
        )
    apart = neighbours.astype(np.float64) - q
    added = (s_q.astype(np.float64) - 1) * np.square(apart).mean(axis=0)
    order = np.argsort(added, kind="stable")
    axes = int(order[-1]), int(order[0])
    points = apart[:, axes]
    return Plane(
        axes=axes,
        weights=(float(s_q[axes[0]]), float(s_q[axes[1]])),
        points=points,
        radius=float(np.median(np.hypot(*points.T))),
    )


def _check_two(array: Vectors) -> None:
    if array.ndim != 2 or not len(array):
        raise ShapeError(f"expected (N, D) with N >= 1, got {array.shape}")
