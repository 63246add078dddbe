"""From candidates to an order by the adaptive distance.

Everything here is arrays: no index, no model, no items. The stored vectors are those of `vectors`. Not
covered: whether something outside the candidates belongs there (`certainty`).

Legend: Q queries, M candidates of a query, D dimension, K neighbours.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from namr.errors import ManifestError, ShapeError
from namr.model import distances
from namr.search.vectors import GalleryVectors
from namr.sides import SIDES, Side
from namr.store import read_ahead

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

Stop = Callable[[], None]
"""Called before each block of work; what it raises ends the search."""

_BLOCK_VALUES = 1 << 23
"""that are compared between two looks at `stop`: some milliseconds of one core where they are in memory"""
_FEW_VALUES = 1 << 19
"""that are compared sooner than another thread begins"""
_FEW = 2048
"""distances that are sorted in less time than it takes to see which are worth it"""


class Ranked(NamedTuple):
    """Neighbours, nearest first, ties by id; where there are fewer than K: id -1, distance inf."""

    ids: Ids
    """(Q, K)"""
    squared: Doubles
    """(Q, K) squared distance that they are ordered by"""
    plain_squared: Doubles
    """(Q, K) squared Euclidean distance"""


def go_on() -> None:
    """The `Stop` of a search that nothing ends."""


def rerank(
    q: Floats,
    s_q: Floats | None,
    candidate_ids: Ids,
    vectors: GalleryVectors,
    *,
    k: int,
    side: Side,
    stop: Stop = go_on,
) -> Ranked:
    """The k nearest of each query's own candidates by the adaptive distance of `side`.

    q, s_q (Q, D); candidate_ids (Q, M), -1 where there is none. Memory grows with Q k. Raises
    ManifestError for a candidate without a usable re-rank vector.
    """
    if s_q is None and side in ("query", "both"):
        raise ValueError(f"side {side!r} without structures")
    x = np.ascontiguousarray(q)
    s = x if s_q is None else np.ascontiguousarray(s_q)
    if x.shape != (len(candidate_ids), vectors.dim) or s.shape != x.shape:
        raise ShapeError(f"queries are {x.shape} and {s.shape}; expected (Q, {vectors.dim})")
    ids, shape = np.ascontiguousarray(candidate_ids), (len(x), k)
    ranked = Ranked(np.empty(shape, np.int64), np.empty(shape), np.empty(shape))
    per_query = max(1, ids.shape[1] * vectors.dim)
    share = max(-(-len(x) // vectors.num_threads), _FEW_VALUES // per_query)
    step = max(1, min(share, _BLOCK_VALUES // per_query))
    if step >= len(x):
        stop()
        _compare(x, s, ids, vectors, side, ranked)
        return ranked

    def blocks() -> Iterator[slice]:
        for start in range(0, len(x), step):
            stop()
            yield slice(start, start + step)

    def compare(rows: slice) -> None:
        into = Ranked(ranked.ids[rows], ranked.squared[rows], ranked.plain_squared[rows])
        _compare(x[rows], s[rows], ids[rows], vectors, side, into)

    for _ in read_ahead.in_order(compare, blocks(), num_threads=vectors.num_threads):
        pass
    return ranked


def _compare(
    x: Floats,
    s: Floats,
    ids: Ids,
    vectors: GalleryVectors,
    side: Side,
    into: Ranked,
) -> None:
    at = vectors.nearest(x, s, ids, *vectors.table, SIDES.index(side), *into)
    if at >= 0:
        damaged = ids.ravel()[at : at + 1]
        vectors.both(damaged)  # says so where it has none
        check_usable(np.zeros(1, np.bool_), damaged)


def merged(one: Ranked, other: Ranked, *, k: int) -> Ranked:
    """The k nearest of both; of an item that is in both, what `one` says."""
    ids = np.concatenate([one.ids, other.ids], axis=1)
    order = np.argsort(ids, axis=1, kind="stable")  # an item's first column comes before its second
    in_order = np.take_along_axis(ids, order, axis=1)
    is_again = np.zeros(ids.shape, np.bool_)
    np.put_along_axis(is_again, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
    both = _joined(one, other)
    both.squared[is_again] = np.inf
    return _filled(_nearest(both, k), k)


def nearest_exact(
    q: Floats,
    s_q: Floats | None,
    vectors: GalleryVectors,
    *,
    k: int,
    side: Side,
    hidden: Ids,
    own_ids: Ids | None = None,
    allowed: Ids | None = None,
    stop: Stop = go_on,
) -> Ranked:
    """The k nearest of the whole gallery by the adaptive distance of `side`, in one stage and float64.

    Reads every vector: for small galleries, and as the reference of what re-ranking misses. hidden: ids,
    ascending, that must not be found; own_ids (Q,): one id that each query must not find; allowed: ids,
    ascending, and no other vector is read. Raises ManifestError for a vector that is damaged.
    """
    q64, s64 = (None if of is None else torch.from_numpy(of).double() for of in (q, s_q))
    assert q64 is not None
    best = _nothing(len(q), 0)
    for ids, x, s in vectors.blocks() if allowed is None else _blocks_of(allowed, vectors):
        stop()
        kept = ~np.isin(ids, hidden)
        if not kept.any():
            continue
        at = torch.from_numpy(np.flatnonzero(kept))
        ids, x, s = ids[kept], x[at].double(), s[at].double()
        check_usable((torch.isfinite(x.sum(1) + s.sum(1)) & (s > 0).all(dim=1)).numpy(), ids)
        plain = distances.pairwise_squared(q64, x).numpy()
        squared = _pairwise(q64, s64, x, s, side).numpy() if side != "none" else plain.copy()
        block_ids = np.broadcast_to(ids, squared.shape)
        if own_ids is not None:
            squared[block_ids == own_ids[:, None]] = np.inf
        best = _nearest(_joined(best, Ranked(block_ids, squared, plain)), k)
    return _filled(best, k)


def _blocks_of(ids: Ids, vectors: GalleryVectors) -> Iterator[tuple[Ids, Tensor, Tensor]]:
    step = max(1, _BLOCK_VALUES // (2 * vectors.dim))
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        yield some, *vectors.both(some)


def check_usable(usable: npt.NDArray[np.bool_], ids: Ids) -> None:
    """ManifestError that names the first of these ids that is not."""
    if not usable.all():
        raise ManifestError(
            f"item {ids[~usable][0]} is in the index and has no re-rank vector, or a damaged one; restore "
            "the vectors or build the release anew"
        )


def _pairwise(q: Tensor, s_q: Tensor | None, x: Tensor, s: Tensor, side: Side) -> Tensor:
    if side == "scale":
        return distances.pairwise_squared(q, x) * distances.scale(s)[None, :]
    if s_q is None:
        raise ValueError(f"side {side!r} without structures")
    if side == "query":
        return distances.adaptive_squared(q, s_q, x)
    return distances.adaptive_squared_both(q, s_q, x, s)


def _nearest(ranked: Ranked, k: int) -> Ranked:
    """The k nearest columns in order, ties by id; compared in float32, where copies of an image are equal."""
    rounded, width = ranked.squared.astype(np.float32), ranked.ids.shape[1]
    if width > 4 * k and rounded.size > _FEW:  # most are far away: sort only those that can win
        kth = np.partition(rounded, k - 1, axis=1)[:, k - 1, None]
        num_near = int((rounded <= kth).sum(axis=1).max())
        near = np.argpartition(rounded, num_near - 1, axis=1)[:, :num_near]
        ranked, rounded = _columns(ranked, near), rounded[np.arange(len(near))[:, None], near]
    return _columns(ranked, np.lexsort((ranked.ids, rounded), axis=-1)[:, :k])


def _columns(ranked: Ranked, at: npt.NDArray[np.int64]) -> Ranked:
    rows = np.arange(len(at))[:, None]
    return Ranked(ranked.ids[rows, at], ranked.squared[rows, at], ranked.plain_squared[rows, at])


def _joined(one: Ranked, other: Ranked) -> Ranked:
    return Ranked(
        np.concatenate([one.ids, other.ids], axis=1),
        np.concatenate([one.squared, other.squared], axis=1),
        np.concatenate([one.plain_squared, other.plain_squared], axis=1),
    )


def _filled(ranked: Ranked, k: int) -> Ranked:
    """Exactly k columns, and what is infinitely far named as nothing."""
    if ranked.ids.shape[1] < k:
        ranked = _joined(ranked, _nothing(len(ranked.ids), k - ranked.ids.shape[1]))
    gone = np.isinf(ranked.squared)
    ranked.ids[gone], ranked.plain_squared[gone] = -1, np.inf
    return ranked


def _nothing(num_queries: int, k: int) -> Ranked:
    shape = (num_queries, k)
    return Ranked(np.full(shape, -1, np.int64), np.full(shape, np.inf), np.full(shape, np.inf))
