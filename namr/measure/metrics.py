"""Retrieval metrics on arrays: Recall@K, MAP@R, R-precision, NMI.

Leave-one-out: every row queries all others. Query against gallery: some rows query some rows; one that is
in both never finds itself. A query's ranking is exact and reproducible: candidates from a matrix product are
ordered by their distances computed by difference, equal distances by row number, so neither the size of the
blocks nor the number of ranks or threads decides a tie. With a `side`, the first `depth` of the plain ranking
are ordered anew by the adaptive distance; what comes after them stays.

Definitions, for a query whose class has R (other) images in the gallery:
    Recall@K      1 if any of the first K is of the class, else 0
    R-precision   (number of the class among the first R) / R
    MAP@R         (1 / R) sum over i <= R of (precision at i if the i-th is of the class, else 0);
                  Musgrave et al., "A Metric Learning Reality Check", ECCV 2020. Not mAP@k.
each averaged over queries. Rows whose class has no (other) image in the gallery are no queries, and counted.

Everything runs where the embeddings lie: arrays on the CPU, tensors on their device. Not covered: recall of
an approximate index against exact search (`assessment`); per-class averages.

Legend: N images, G of them in the gallery, D dimension, L length of the rankings, b queries in a block.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from namr import collectives
from namr.errors import ConfigError, ShapeError
from namr.measure import rankings
from namr.measure.rankings import Queries
from namr.model import distances
from namr.model.distances import Metric, Side

Array = NDArray[np.floating] | Tensor
Ints = NDArray[np.integer] | Tensor


@dataclass(frozen=True, kw_only=True)
class RetrievalMetrics:
    """Averages over queries, each 0 to 1."""

    recall_at_k: dict[int, float]
    map_at_r: float
    r_precision: float
    num_queries: int
    num_skipped: int
    """Rows that could not be queries: the gallery has no (other) image of their class."""
    scores: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    """(num_queries,) of each query, in the order of the rows: the mean of its hit at 1 and its AP@R."""
    classes: NDArray[np.int64] = field(
        default_factory=lambda: np.empty(0, np.int64), compare=False, repr=False
    )
    """(num_queries,) the class of each query."""

    @property
    def recall_at_1(self) -> float:
        """Share of queries whose nearest neighbour is of their class."""
        return self.recall_at_k[1]


class RetrievalSums(NamedTuple):
    """What `combine` divides: sums over some of the queries, to be added up over blocks or ranks."""

    ks: tuple[int, ...]
    """Rising, 1 included."""
    hits: tuple[int, ...]
    """For each k, the number of queries with a hit among the first k."""
    average_precision: float
    r_precision: float
    num_queries: int
    num_skipped: int
    scores: NDArray[np.float64]
    """(num_queries,) as in `RetrievalMetrics`."""
    classes: NDArray[np.int64]
    """(num_queries,)"""


class Difference(NamedTuple):
    """How much better one way of searching is than another, on the same queries."""

    mean: float
    standard_error: float
    """Of the mean, over classes: the queries of one class are wrong together."""


@torch.no_grad()
def retrieval_sums(
    embeddings: Array,
    labels: Ints,
    *,
    structures: Array | None = None,
    side: Side = "none",
    metric: Metric = "l2",
    depth: int = 100,
    ks: Sequence[int] = (1, 2, 4, 8),
    block_rows: int = 1024,
    query_rows: Ints | None = None,
    gallery_rows: Ints | None = None,
) -> RetrievalSums:
    """The sums over the queries `query_rows` (all if not given) against `gallery_rows` (all if not given).

    embeddings (N, D) as the model gives them, for "cosine" too; structures (N, D), wanted unless side is
    "none"; labels (N,), 0 and up; depth: how many are re-ranked; gallery_rows in any order, each counts once.
    Memory about (block_rows + D) N numbers. ShapeError names the first row that holds a NaN or infinity.
    """
    x, s, y = _checked(embeddings, structures, labels, side=side)
    if min(ks, default=0) < 1 or depth < 1 or block_rows < 1:
        raise ConfigError(f"ks {tuple(ks)}, depth {depth}, block_rows {block_rows}: each must be at least 1")
    x = distances.for_search(x, metric)
    searched = None if gallery_rows is None else _tensor(gallery_rows).to(x.device, torch.int64)
    x = x - (x if searched is None else x[searched]).mean(0)  # changes no distance, and makes rounding small
    gallery = rankings.make_gallery(x, s, searched)
    rows = torch.arange(len(x)) if query_rows is None else _tensor(query_rows)
    rows = rows.to(x.device)
    classes = y[gallery.rows]
    others = torch.bincount(classes, minlength=int(y.max()) + 1)[y]  # (N,): R of each row
    others[gallery.rows] -= 1
    queries = rows[others[rows] > 0]
    ks = tuple(sorted({1, *ks}))
    most = int(others[queries].max()) if len(queries) else 0
    length = min(max(ks[-1], most, depth if side != "none" else 0), len(classes))

    hits = [0] * len(ks)
    average_precisions: list[float] = []
    r_precisions: list[float] = []
    scores: list[Tensor] = []
    for block in (queries[start : start + block_rows] for start in range(0, len(queries), block_rows)):
        asked = Queries(x[block], None if s is None else s[block], gallery.places_of(block))
        ranking = rankings.plain(asked, gallery, length=length)
        if s is not None:
            ranking = rankings.reranked(asked, gallery, ranking, side=side, depth=depth)
        # A query's own place would count as correct, but comes last, after the R that are.
        correct = classes[ranking] == y[block][:, None]
        for place, k in enumerate(ks):
            hits[place] += int(correct[:, :k].any(1).sum())
        of_block = _precisions(correct, others[block])
        average_precisions += of_block.average_precision.tolist()
        r_precisions += of_block.r_precision.tolist()
        scores.append((correct[:, 0].double() + of_block.average_precision) / 2)
    return RetrievalSums(
        ks=ks,
        hits=tuple(hits),
        average_precision=math.fsum(average_precisions),
        r_precision=math.fsum(r_precisions),
        num_queries=len(queries),
        num_skipped=len(rows) - len(queries),
        scores=torch.cat([torch.empty(0, dtype=torch.float64), *(part.cpu() for part in scores)]).numpy(),
        classes=y[queries].cpu().numpy(),
    )


def combine(sums: Iterable[RetrievalSums]) -> RetrievalMetrics:
    """Add up and divide. ShapeError if there was no query at all."""
    parts = list(sums)
    if len({part.ks for part in parts}) != 1:
        raise ShapeError(f"sums of one kind wanted, got those for ks {[part.ks for part in parts]}")
    num_queries = sum(part.num_queries for part in parts)
    num_skipped = sum(part.num_skipped for part in parts)
    if num_queries == 0:
        raise ShapeError(
            f"no queries: for each of {num_skipped} images the gallery has no other one of its class"
        )
    hits = np.sum([part.hits for part in parts], axis=0)
    return RetrievalMetrics(
        recall_at_k={k: int(num) / num_queries for k, num in zip(parts[0].ks, hits, strict=True)},
        map_at_r=math.fsum(part.average_precision for part in parts) / num_queries,
        r_precision=math.fsum(part.r_precision for part in parts) / num_queries,
        num_queries=num_queries,
        num_skipped=num_skipped,
        scores=np.concatenate([part.scores for part in parts]),
        classes=np.concatenate([part.classes for part in parts]),
    )


def difference(one: RetrievalMetrics, other: RetrievalMetrics) -> Difference:
    """By how much the scores of `one` exceed those of `other`, query by query; both of the same queries.

    The standard error is that of a mean over clusters (classes), N queries in C classes:
    sqrt(C / (C - 1) sum_c (sum_{q in c} (d_q - mean))^2) / N; infinite for one class. (Liang and Zeger, 1986)
    """
    gains = _gains(one, other)
    mean = float(gains.mean())
    names, numbers = np.unique(one.classes, return_inverse=True)
    if len(names) < 2:
        return Difference(mean, math.inf)
    of_classes = np.bincount(numbers, weights=gains - mean)
    variance = len(names) / (len(names) - 1) * float(np.square(of_classes).sum())
    return Difference(mean, math.sqrt(variance) / len(gains))


def interval(
    one: RetrievalMetrics, other: RetrievalMetrics, *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Where the mean gain of `one` over `other`, query by query, lies: a bootstrap over classes.

    Whole classes are drawn with replacement, 2,000 times, by `seed`; percentiles of their mean gains. None
    for one class. (Field and Welsh, "Bootstrapping clustered data", JRSS B 2007)
    """
    numbers = np.unique(one.classes, return_inverse=True)[1]
    gains = np.bincount(numbers, weights=_gains(one, other))
    if len(gains) < 2:
        return None
    found = scipy.stats.bootstrap(
        (gains, np.bincount(numbers)),
        lambda of_class, num, axis: of_class.sum(axis) / num.sum(axis),
        paired=True,
        confidence_level=confidence,
        n_resamples=2000,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(found.low), float(found.high)


def _gains(one: RetrievalMetrics, other: RetrievalMetrics) -> NDArray[np.float64]:
    """(num_queries,) by how much each query's score is higher; ShapeError for other queries."""
    if not np.array_equal(one.classes, other.classes):
        raise ShapeError(f"{one.num_queries} and {other.num_queries} queries; expected the same ones")
    gains: NDArray[np.float64] = one.scores - other.scores
    return gains


def sum_over_ranks(sums: RetrievalSums) -> RetrievalSums:
    """The sums of all ranks, on every rank."""
    numbers = torch.tensor([*sums.hits, *sums[2:6]], dtype=torch.float64)
    total = collectives.sum_over_ranks(numbers).tolist()
    *hits, average_precision, r_precision, num_queries, num_skipped = total
    return RetrievalSums(
        ks=sums.ks,
        hits=tuple(int(num) for num in hits),
        average_precision=average_precision,
        r_precision=r_precision,
        num_queries=int(num_queries),
        num_skipped=int(num_skipped),
        scores=collectives.gather(torch.from_numpy(sums.scores)).numpy(),
        classes=collectives.gather(torch.from_numpy(sums.classes)).numpy(),
    )


def nmi(embeddings: Array, labels: Ints, *, seed: int) -> float:
    """Normalised mutual information of the classes and as many k-means clusters of the embeddings, 0 to 1.

    One run of k-means++ by `seed`, Euclidean: for cosine pass `distances.for_search` of the embeddings.
    """
    x, _, y = _checked(embeddings, None, labels, side="none")
    clusters = KMeans(n_clusters=len(torch.unique(y)), n_init=1, random_state=seed).fit_predict(
        x.cpu().numpy()
    )
    return float(normalized_mutual_info_score(y.cpu().numpy(), clusters))


def _checked(
    embeddings: Array, structures: Array | None, labels: Ints, *, side: Side
) -> tuple[Tensor, Tensor | None, Tensor]:
    x = _tensor(embeddings)
    if x.ndim != 2 or not len(x):
        raise ShapeError(f"expected embeddings (N, D) with N >= 1, got {tuple(x.shape)}")
    x = _finite(x, "embeddings")
    y = _tensor(labels).to(x.device, torch.int64)
    if y.shape != (len(x),):
        raise ShapeError(f"expected one label for each of {len(x)} embeddings, got labels {tuple(y.shape)}")
    if int(y.min()) < 0:
        raise ShapeError(
            f"label {int(y.min())} at row {int(y.argmin())}: expected 0 and up; leave out what has no label"
        )
    if side == "none":
        return x, None, y
    if structures is None:
        raise ShapeError(f"side {side!r} needs the structure embeddings: give structures, or side 'none'")
    s = _tensor(structures).to(x.device)
    if s.shape != x.shape:
        raise ShapeError(f"structures {tuple(s.shape)} must have the shape of embeddings {tuple(x.shape)}")
    return x, _finite(s, "structures"), y


def _tensor(x: Array | Ints) -> Tensor:
    """Shares memory with the array, except with a read-only one (memory-mapped), which torch can't hold."""
    return x if isinstance(x, Tensor) else torch.from_numpy(x if x.flags.writeable else x.copy())


def _finite(x: Tensor, name: str) -> Tensor:
    x = x.float()
    bad = (~torch.isfinite(x).all(1)).nonzero()
    if len(bad):
        raise ShapeError(f"{name}: {len(bad)} of {len(x)} rows hold NaN or infinity, first row {int(bad[0])}")
    return x


class _Precisions(NamedTuple):
    average_precision: Tensor
    r_precision: Tensor


def _precisions(correct: Tensor, others: Tensor) -> _Precisions:
    """AP@R and R-precision of each query. correct (b, L) bool, with L >= R; others (b,) is R, at least 1."""
    place = torch.arange(1, correct.shape[1] + 1, device=correct.device)
    within = correct & (place <= others[:, None])
    precision = within.cumsum(1).double() / place
    return _Precisions((precision * within).sum(1) / others, within.sum(1).double() / others)
