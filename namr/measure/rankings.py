"""The exact ranking of a gallery for each query of a block, plain or re-ranked by the adaptive distance.

Candidates from a matrix product are ordered by their distances computed by difference, equal distances by
place in the gallery, so that no block size, rank or thread decides a tie. A query that lies in the gallery
itself comes last and infinitely far.

Not covered: what is made of rankings (`metrics`); cosine (bring the vectors to unit length before).
Legend: N rows, G of them in the gallery, D dimension, L length of the rankings, b queries in a block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from namr.errors import ShapeError
from namr.model import distances
from namr.model.distances import Side

_CHUNK_ELEMENTS = 2**22  # of the differences that are held at a time: 16 MiB


class Gallery(NamedTuple):
    """What is searched; a place is a row's place in it."""

    rows: Tensor
    """(G,) row numbers, rising, so that places order ties as row numbers do."""
    x: Tensor
    """(G, D)"""
    s: Tensor | None
    """(G, D)"""

    def places_of(self, rows: Tensor) -> Tensor:
        """(b,) where each of these rows lies in the gallery, -1 where it doesn't."""
        places = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
        return torch.where(self.rows[places] == rows, places, -1)


class Queries(NamedTuple):
    """A block of queries."""

    x: Tensor
    """(b, D)"""
    s: Tensor | None
    """(b, D)"""
    own: Tensor
    """(b,) each one's own place in the gallery, or -1"""

    def only(self, place: int) -> "Queries":
        """The one at that place of the block."""
        some = slice(place, place + 1)
        return Queries(self.x[some], None if self.s is None else self.s[some], self.own[some])


def make_gallery(x: Tensor, s: Tensor | None, rows: Tensor | None) -> Gallery:
    """Of these rows of x (N, D) and s, in any order and each once; of all where none are named."""
    if rows is None:
        return Gallery(torch.arange(len(x), device=x.device), x, s)
    chosen = torch.unique(rows)  # sorted
    if not len(chosen):
        raise ShapeError("the gallery has no rows; expected at least one")
    return Gallery(chosen, x[chosen], None if s is None else s[chosen])


def plain(asked: Queries, gallery: Gallery, *, length: int) -> Tensor:
    """The `length` nearest of each query, exactly, by (distance, place); itself last. -> (b, L) places."""
    num, dimension = gallery.x.shape
    # Products are fast and differ in their last bits with the size of the block; differences are slow and
    # don't. So products choose some more candidates than are wanted, and differences order these.
    approximate = distances.pairwise_squared(asked.x, gallery.x)
    inside = asked.own >= 0
    approximate[inside.nonzero()[:, 0], asked.own[inside]] = torch.inf
    kept = min(length + max(16, length // 4), num)
    nearest = approximate.topk(kept, largest=False)
    candidates = nearest.indices.sort(1).values  # by place, so that a stable sort settles ties by it
    squared = _by_difference(asked, gallery, candidates)
    order = squared.argsort(dim=1, stable=True)[:, :length]
    ranking = candidates.gather(1, order)
    if kept == num:
        return ranking
    # Beyond the candidates everything is at least as far as the last of them, but for rounding: at most
    # 4 D u (|q|^2 + |x|^2) for product and difference together. Where that doesn't settle it, look at all.
    largest = gallery.x.square().sum(1).max()
    rounding = 4 * dimension * 2.0**-24 * (asked.x.square().sum(1) + largest)
    unsettled = nearest.values.amax(1) - rounding <= squared.gather(1, order[:, -1:])[:, 0]
    everybody = torch.arange(num, device=asked.own.device)[None]
    for place in unsettled.nonzero()[:, 0].tolist():
        one = asked.only(place)
        order = _by_difference(one, gallery, everybody).argsort(dim=1, stable=True)
        ranking[place] = order[0, :length]
    return ranking


def reranked(asked: Queries, gallery: Gallery, ranking: Tensor, *, side: Side, depth: int) -> Tensor:
    """The first `depth` of each ranking by the adaptive distance, ties in plain order; the rest as it is."""
    first = ranking[:, :depth]
    order = _by_difference(asked, gallery, first, side=side).argsort(dim=1, stable=True)
    return torch.cat([first.gather(1, order), ranking[:, depth:]], dim=1)


def _by_difference(asked: Queries, gallery: Gallery, candidates: Tensor, *, side: Side = "none") -> Tensor:
    """Squared distance of each query to its candidates (b, L), infinite to itself. -> (b, L)"""
    chunk = max(1, _CHUNK_ELEMENTS // (candidates.shape[1] * asked.x.shape[1]))
    of_queries = asked.s if side in ("query", "both") else None
    of_gallery = gallery.s if side in ("both", "scale") else None
    squared = torch.cat(
        [
            distances.rerank_squared(
                asked.x[some],
                None if of_queries is None else of_queries[some],
                gallery.x[candidates[some]],
                None if of_gallery is None else of_gallery[candidates[some]],
                side=side,
            )
            for some in (slice(start, start + chunk) for start in range(0, len(candidates), chunk))
        ]
    )
    return squared.masked_fill(candidates == asked.own[:, None], torch.inf)
