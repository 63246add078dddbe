"""The exact neighbours of many queries by every side, in one pass over the stored vectors.

A structure weight is at least w, so an item whose plain squared distance is above U / w can't be nearer than
the k-th neighbour, U, by that side. One matrix product of float32 for a block tells which pairs may belong to
an answer, whatever the side; where they are too many, another by the query's weights tells more, of the mean
of both weights too. The pairs that are left are compared by difference in float64, so an answer depends
neither on the blocks nor on rounding.

**Bound.** A squared distance by products is off by at most g (|q| + |x|)^2 times the largest weight,
g = (D + 8) 2^-23: a sum of n products has a relative error of n 2^-24 (Higham, Accuracy and Stability, 3.1),
and the rest is for the weights and for taking away the centre.

Legend: S sides in the order of `SIDES`, Q queries, n rows of a block, m pairs, D dimension, K neighbours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from namr.data.shards import among
from namr.errors import ShapeError
from namr.model import distances
from namr.search import rerank
from namr.search.queries import Queries
from namr.search.vectors import Block, GalleryVectors
from namr.sides import SIDES, Side

Ids = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

_FEW_OF = 128
"""pairs that may belong to an answer are few where they are less than one of so many"""
_PAIRS_AT_ONCE = 1 << 12
_PENDING = 1 << 15
"""compared pairs that are kept before they are sorted"""
_ROUNDED = 1 + 2.0**-22
"""what is equal in float32 differs by less"""


class Exact(NamedTuple):
    """The neighbours by each side, nearest first, ties of float32 by id; id -1, inf where there are fewer."""

    ids: Ids
    """(S, Q, K)"""
    squared: Doubles
    """(S, Q, K) squared distance by the side"""

    def of(self, side: Side) -> Ids:
        """(Q, K) ids by one side."""
        ids: Ids = self.ids[SIDES.index(side)]
        return ids


class Search:
    """A search that is shown the gallery block by block. Memory grows with Q n."""

    def __init__(
        self, asked: Queries, *, k: int, bounds: Doubles | None = None, hidden: Ids | None = None
    ) -> None:
        """bounds (S, Q): no k-th neighbour is farther, squared; what is farther is left out.

        Good ones (`bounds_of`) save most of the work. A side with -inf isn't searched by. hidden: ids,
        ascending, that are passed over: only where they are near, so that no block is copied without them.
        """
        if asked.s is None:
            raise ShapeError("every side needs structures with the embeddings; give them")
        self._asked, self._k = asked, k
        self._hidden = np.empty(0, np.int64) if hidden is None else hidden
        x, s = torch.from_numpy(asked.x), torch.from_numpy(asked.s)
        self._best = _Best(asked, s, k, bounds, self._hidden)
        self._centre = x.mean(0)
        self._products = _Products(x - self._centre, s)
        self._room = torch.empty(0, x.shape[1] + 2)

    def add(self, block: Block) -> None:
        """Compare with these rows; ManifestError where a vector is damaged."""
        if not len(block.ids):
            return
        if len(self._room) < len(block.ids):  # kept: to get so much anew takes as long as to fill it
            self._room = torch.ones(len(block.ids), self._room.shape[1])
        best, centred = self._best, _Centred.of(block, self._centre, self._room[: len(block.ids)])
        usable = centred.are_usable
        if not usable.all():  # what is hidden may be damaged
            rerank.check_usable(usable | among(block.ids, self._hidden), block.ids)
            self.add(only(block, usable))
            return
        plain = self._products.plain(centred)
        if np.isposinf(best.kth).any():
            num = min(len(block.ids), self._k + (self._asked.own_ids is not None))
            columns = torch.from_numpy(plain).topk(num, largest=False).indices.numpy()
            first = _Best(self._asked, best.s_q, self._k, None, self._hidden)
            first.compare_all(np.repeat(np.arange(len(plain)), num), columns.ravel(), block)
            best.kth = np.minimum(best.kth, first.kth)
        for side, rows, columns in self._products.near(plain, centred, best.kth):
            best.compare(side, rows, columns, block)

    def found(self) -> Exact:
        """The k nearest of all blocks by each side, without each query's own."""
        self._best.settle()
        return Exact(self._best.ids, self._best.squared)


def without(block: Block, hidden: Ids) -> Block:
    """The rows of a block whose ids are not among these, ascending."""
    return only(block, ~among(block.ids, hidden)) if len(hidden) else block


def only(block: Block, kept: npt.NDArray[np.bool_]) -> Block:
    """Some rows of a block."""
    at = torch.from_numpy(np.flatnonzero(kept))
    return Block(block.ids[kept], block.x[at], block.s[at])


def bounds_of(asked: Queries, candidates: Ids, vectors: GalleryVectors, *, k: int) -> Doubles:
    """(S, Q) squared distance of the k-th of each query's candidates (Q, M), ids or -1; inf for fewer.

    Candidates are those that an answer may hold, each once: so no k-th neighbour is farther.
    """
    if asked.s is None:
        raise ShapeError("every side needs structures with the embeddings; give them")
    best = _Best(asked, torch.from_numpy(asked.s), k, None, np.empty(0, np.int64))
    rows, columns = np.nonzero(candidates >= 0)
    ids = candidates[rows, columns]
    for start in range(0, len(ids), _PENDING):
        some = slice(start, start + _PENDING)
        block = Block(ids[some], *vectors.both(ids[some]))
        best.compare_all(rows[some], np.arange(len(block.ids)), block)
    return best.kth


def joined(parts: Sequence[Exact]) -> Exact:
    """The nearest of several galleries, no item in two of them: a function of what is in all together."""
    ids = np.concatenate([part.ids for part in parts], axis=2)
    squared = np.concatenate([part.squared for part in parts], axis=2)
    order = np.lexsort((ids, squared.astype(np.float32)), axis=-1)[:, :, : parts[0].ids.shape[2]]
    return Exact(np.take_along_axis(ids, order, axis=2), np.take_along_axis(squared, order, axis=2))


class _Centred(NamedTuple):
    """A block in float32, around the centre of the queries."""

    with_norms: Tensor
    """(n, D + 2) the vectors, their squared norms, and ones"""
    scales: Tensor
    """(n,) what side "scale" multiplies by"""
    least: Tensor
    """(n,) smallest weight"""

    @classmethod
    def of(cls, block: Block, centre: Tensor, room: Tensor) -> "_Centred":
        """room: ones (n, D + 2), or what was in it before."""
        s = block.s.float()
        centred = cls(room, distances.scale(s), s.amin(1))
        torch.sub(block.x, centre, out=centred.x)
        torch.linalg.vecdot(centred.x, centred.x, out=centred.norms_squared)
        return centred

    @property
    def are_usable(self) -> npt.NDArray[np.bool_]:
        """(n,) False for damaged vectors."""
        usable = torch.isfinite(self.norms_squared + self.scales) & (self.least > 0)
        return np.asarray(usable.numpy())

    @property
    def x(self) -> Tensor:
        """(n, D)"""
        return self.with_norms[:, :-2]

    @property
    def norms_squared(self) -> Tensor:
        """(n,)"""
        return self.with_norms[:, -2]


class _Products:
    """What matrix products say of the queries' distances to a block, and which pairs may be near."""

    def __init__(self, q: Tensor, s_q: Tensor) -> None:
        self._q, self._s_q = q, s_q
        norms_squared, weighted = q.square().sum(1, keepdim=True), s_q * q
        self._plain = torch.cat([-2 * q, torch.ones_like(norms_squared), norms_squared], dim=1)
        self._by_query = torch.cat([-2 * weighted, s_q, (weighted * q).sum(1, keepdim=True)], dim=1)
        self._norms = norms_squared[:, 0].double().sqrt().numpy()
        self._least, self._most = s_q.amin(1).double().numpy(), s_q.amax(1).double().numpy()
        self._g = (q.shape[1] + 8) * 2.0**-23

    def plain(self, block: _Centred) -> Floats:
        """(Q, n) squared plain distances, off by up to g (|q| + |x|)^2."""
        squared: Floats = distances.inner(self._plain, block.with_norms).numpy()
        return squared

    def near(self, plain: Floats, block: _Centred, kth: Doubles) -> list[tuple[Side, Ids, Ids]]:
        """Of each side the pairs, rows (m,) of queries and columns (m,), that may be within kth (S, Q)."""
        error = self._g * (self._norms + float(block.norms_squared.max().double().sqrt())) ** 2
        scales, least = block.scales.double().numpy() * (1 - self._g), block.least.double().numpy()
        within = dict(zip(SIDES, kth * _ROUNDED, strict=True))
        unweighted = np.maximum(within["none"], within["scale"] / scales.min())
        weighted = np.maximum(within["query"], within["both"] * 2 / (1 + least.min() / self._least))
        some = plain <= _above(np.maximum(unweighted, weighted / self._least) + error)[:, None]
        if np.count_nonzero(some) * _FEW_OF < some.size:
            rows, columns = np.divmod(np.flatnonzero(some), some.shape[1])
            by_query = self._pairs_by_query(rows, columns, block)
        else:
            products = self._products_by_query(block)
            # both sides' distance is the mean of the query's and one of at least plain * least
            farthest = np.maximum(within["query"], within["both"] * 2 / (1 + least.min() / self._most))
            some = products <= _above(farthest + 2 * self._most * error)[:, None]
            some |= plain <= _above(unweighted + error)[:, None]
            rows, columns = np.divmod(np.flatnonzero(some), some.shape[1])
            by_query = products[rows, columns]
        surely = plain[rows, columns] - error[rows]
        surely_by_query = by_query - (self._most * error)[rows]
        surely_by_both = (surely_by_query + least[columns] * surely) / 2
        lowest = {
            "none": surely,
            "scale": scales[columns] * surely,
            "query": surely_by_query,
            "both": surely_by_both,
        }
        pairs = ((side, lowest[side] <= within[side][rows]) for side in SIDES)
        return [(side, rows[may], columns[may]) for side, may in pairs]

    def _products_by_query(self, block: _Centred) -> Floats:
        """(Q, n) squared distances by the query's weights, off by up to the largest of them times that."""
        right = torch.cat([block.x, block.x.square(), torch.ones_like(block.x[:, :1])], dim=1)
        squared: Floats = distances.inner(self._by_query, right).numpy()
        return squared

    def _pairs_by_query(self, rows: Ids, columns: Ids, block: _Centred) -> Floats:
        """The same of pairs (m,), by difference."""
        squared = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            r, c = torch.from_numpy(rows[some]), torch.from_numpy(columns[some])
            of_some = distances.rerank_squared(
                self._q[r], self._s_q[r], block.x[c][:, None], None, side="query"
            )
            squared[some] = of_some[:, 0].numpy()
        return squared


class _Pairs(NamedTuple):
    """Queries (m,) each with a row (m,) of a block."""

    rows: Ids
    block: Block


class _Best:
    """The k nearest so far, pairs that wait until they are worth a comparison, and those compared since."""

    def __init__(self, asked: Queries, s_q: Tensor, k: int, bounds: Doubles | None, hidden: Ids) -> None:
        self._x, self.s_q = torch.from_numpy(asked.x), s_q
        self._own_ids, self._k = asked.own_ids, k
        self._hidden = hidden
        shape = (len(SIDES), len(asked.x), k)
        self.ids, self.squared = np.full(shape, -1, np.int64), np.full(shape, np.inf)
        self.kth = np.full(shape[:2], np.inf) if bounds is None else bounds.copy()
        """(S, Q) no k-th neighbour is farther"""
        self._waiting: dict[Side, list[_Pairs]] = {side: [] for side in SIDES}
        self._num_waiting = dict.fromkeys(SIDES, 0)
        self._pending: dict[Side, list[tuple[Ids, Ids, Doubles]]] = {side: [] for side in SIDES}
        self._num_pending = 0

    def compare_all(self, rows: Ids, columns: Ids, block: Block) -> None:
        """`compare` by every side, sorted in at once."""
        for side in SIDES:
            self.compare(side, rows, columns, block)
        self.settle()

    def compare(self, side: Side, rows: Ids, columns: Ids, block: Block) -> None:
        """Queries (m,) with rows of the block (m,), a pair once only."""
        ids, x, s = block
        wanted = ~among(ids[columns], self._hidden)
        if self._own_ids is not None:
            wanted &= self._own_ids[rows] != ids[columns]
        rows, columns = rows[wanted], columns[wanted]
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            c = torch.from_numpy(columns[some])
            self._waiting[side].append(_Pairs(rows[some], Block(ids[columns[some]], x[c], s[c])))
            self._num_waiting[side] += len(c)
            if self._num_waiting[side] >= _PAIRS_AT_ONCE:
                self._measure(side)

    def _measure(self, side: Side) -> None:
        """Squared distances of the pairs that wait; of what is near enough they are kept."""
        waiting = self._waiting[side]
        if not waiting:
            return
        blocks = [each.block for each in waiting]
        rows = np.concatenate([each.rows for each in waiting])
        ids = np.concatenate([block.ids for block in blocks])
        x, s = torch.cat([block.x for block in blocks]), torch.cat([block.s for block in blocks])
        waiting.clear()
        self._num_waiting[side] = 0
        r = torch.from_numpy(rows)
        squared = distances.rerank_squared(
            self._x[r].double(),
            self.s_q[r].double(),
            x.double()[:, None],
            s.double()[:, None],
            side=side,
        )[:, 0].numpy()
        near = np.flatnonzero(squared <= self.kth[SIDES.index(side)][rows] * _ROUNDED)
        self._pending[side].append((rows[near], ids[near], squared[near]))
        self._num_pending += len(near)
        if self._num_pending > _PENDING:
            self._settle_pending()

    def settle(self) -> None:
        """Compare what waits, and sort it in."""
        for side in SIDES:
            self._measure(side)
        self._settle_pending()

    def _settle_pending(self) -> None:
        for number, side in enumerate(SIDES):
            self._settle(number, self._pending[side])
        self._num_pending = 0

    def _settle(self, number: int, pending: list[tuple[Ids, Ids, Doubles]]) -> None:
        if not pending:
            return
        num = self.ids.shape[1]
        rows = np.concatenate([np.repeat(np.arange(num), self._k), *(each[0] for each in pending)])
        ids = np.concatenate([self.ids[number].ravel(), *(each[1] for each in pending)])
        squared = np.concatenate([self.squared[number].ravel(), *(each[2] for each in pending)])
        pending.clear()
        order = np.lexsort((ids, squared.astype(np.float32), rows))
        starts = np.searchsorted(rows[order], np.arange(num))
        first = order[starts[:, None] + np.arange(self._k)]
        self.ids[number], self.squared[number] = ids[first], squared[first]
        self.kth[number] = np.minimum(self.kth[number], self.squared[number, :, -1])


def _above(values: Doubles) -> Floats:
    """As float32, none smaller."""
    with np.errstate(over="ignore"):
        return np.nextafter(values.astype(np.float32), np.float32(np.inf))
