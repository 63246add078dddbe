"""The one compiled loop of a search: candidates against their query, by the vectors that are stored of them.

A query's candidates lie here and there in files that are mapped into memory. One call finds their rows, reads
the float16 values where they lie, sums in float32 and keeps the k nearest, without Python's lock; numpy and
torch take a dozen calls and copies for it. The sums don't depend on how many queries there are.

Not covered: blocks, threads and errors (`rerank`), and float64 (`model.distances`, which has the formulas).
Legend: Q queries, M candidates of a query, D dimension, K neighbours, S shards, N samples, F files.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from namr.compiling import compiled, inlined

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Halves = npt.NDArray[np.uint16]
"""float16, as bits: numba has no such type"""
Rows = npt.NDArray[np.signedinteger]

# The order of a sum is free, so that it is fast; NaN and infinity stay what they are.
_HOW: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
_PLAIN, _BY_QUERY, _BY_BOTH = 0, 1, 2  # as in SIDES; the fourth is by scale
_AHEAD = 8
"""candidates that are fetched from memory while one is compared: it halves the time"""
_LINE = 64
"""bytes that a processor fetches at once"""


class Table(NamedTuple):
    """Where the vectors of an item lie: a shard's number and a row in it are its id."""

    starts: Ids
    """(S,) of each shard by its number, where in `rows` it begins"""
    sizes: Ids
    """(S,)"""
    rows: Rows
    """(N,) of all files; -1 for a sample that has none"""
    addresses: Ids
    """(F,) in memory, of (rows, 2, D) float16: embedding and structure"""
    firsts: Ids
    """(F + 1,) the row that each file begins with, and how many there are"""


def _as_pointer(_: Any, address: Any) -> tuple[Any, Any]:
    def cast(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(address), cast


_pointer: Any = intrinsic(_as_pointer)


def _as_prefetch(_: Any, address: Any) -> tuple[Any, Any]:
    def prefetch(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        pointer, number = ir.PointerType(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        at = builder.inttoptr(values[0], pointer)
        builder.call(function, [at, number(0), number(3), number(1)])  # to read, to keep, data
        return context.get_dummy_value()

    return types.void(address), prefetch


_prefetch: Any = intrinsic(_as_prefetch)


@functools.cache
def nearest(dtype_of_rows: np.dtype[np.signedinteger]) -> Callable[..., int]:
    """`_nearest` for a table of such rows; the first time takes seconds if nothing was kept.

    Its arrays have to be contiguous, of the types that are told, and of the same D as the files.
    """

    def array(of: Any, ndim: int, *, is_written: bool = False) -> Any:
        return types.Array(of, ndim, "C", readonly=not is_written)

    signature = types.int64(
        *(array(of, 2) for of in (types.float32, types.float32, types.int64)),
        *(array(of, 1) for of in (types.int64, types.int64, numba.from_dtype(dtype_of_rows))),
        *(array(of, 1) for of in (types.int64, types.int64)),
        types.int64,
        *(array(of, 2, is_written=True) for of in (types.int64, types.float64, types.float64)),
    )
    return compiled(_nearest, signature, **_HOW)


def _nearest(
    q: Floats,
    s_q: Floats,
    candidates: Ids,
    starts: Ids,
    sizes: Ids,
    rows: Rows,
    addresses: Ids,
    firsts: Ids,
    side: int,
    ids: Ids,
    squared: Doubles,
    plain_squared: Doubles,
) -> int:
    """Fills the last three (Q, K) as `rerank.Ranked` has them, and returns -1.

    Or where in candidates (Q, M), counted through all rows, the first is that has no usable vector. side: its
    place in SIDES; s_q is read for "query" and "both". Ids below 0 are no candidates.
    """
    num_queries, num_candidates = candidates.shape
    k, dim = ids.shape[1], q.shape[1]
    places = np.empty(num_candidates, np.int64)
    for row in range(num_queries):
        for column in range(num_candidates):
            item = candidates[row, column]
            places[column] = 0 if item < 0 else _address(item, starts, sizes, rows, addresses, firsts, dim)
            if places[column] < 0:
                return int(row * num_candidates + column)
        best, of_best, num = ids[row], squared[row], 0
        size = 4 * dim if side >= _BY_BOTH else 2 * dim
        for column in range(min(_AHEAD, num_candidates)):
            _fetch(places[column], size)
        for column in range(num_candidates):
            if column + _AHEAD < num_candidates:
                _fetch(places[column + _AHEAD], size)
            item = candidates[row, column]
            if item < 0:
                continue
            x, s = _vectors(places[column], dim)
            if side == _PLAIN:
                distance = _plain(q[row], x)
            elif side == _BY_QUERY:
                distance = _by_query(q[row], s_q[row], x)
            elif side == _BY_BOTH:
                distance = _by_both(q[row], s_q[row], x, s)
            else:
                distance = _plain(q[row], x) * _scale(s)
            if not 0 <= distance < np.inf:
                return int(row * num_candidates + column)
            if num < k:
                best[num], of_best[num] = item, distance
                num += 1
                if num == k:
                    _as_heap(best, of_best, k)
            elif distance < of_best[0] or (distance == of_best[0] and item < best[0]):
                best[0], of_best[0] = item, distance
                _sink(best, of_best, 0, k)
        if num < k:
            _as_heap(best, of_best, num)
            best[num:], of_best[num:], plain_squared[row, num:] = -1, np.inf, np.inf
        for last in range(num - 1, 0, -1):
            _swap(best, of_best, 0, last)
            _sink(best, of_best, 0, last)
        for at in range(num):
            if side == _PLAIN:
                plain_squared[row, at] = of_best[at]
            else:
                x, s = _vectors(_address(best[at], starts, sizes, rows, addresses, firsts, dim), dim)
                plain_squared[row, at] = _plain(q[row], x)
    return -1


@inlined(**_HOW)
def _address(item: int, starts: Ids, sizes: Ids, rows: Rows, addresses: Ids, firsts: Ids, dim: int) -> int:
    """Where in memory the vectors of an item lie; -1 where there are none."""
    shard, at = item >> 32, item & 0xFFFFFFFF
    if shard >= len(sizes) or at >= sizes[shard]:
        return -1
    place, file = int(rows[starts[shard] + at]), 0
    if place < 0 or place >= firsts[-1]:
        return -1
    while place >= firsts[file + 1]:
        file += 1
    return int(addresses[file] + (place - firsts[file]) * 4 * dim)


@inlined(**_HOW)
def _fetch(address: int, size: int) -> None:
    """Have so many bytes brought into the cache; of no address it does nothing."""
    for offset in range(0, size, _LINE):
        _prefetch(address + offset)


@inlined(**_HOW)
def _vectors(address: int, dim: int) -> tuple[Halves, Halves]:
    """(D,) embedding and structure."""
    return numba.carray(_pointer(address), dim), numba.carray(_pointer(address + 2 * dim), dim)


@inlined(**_HOW)
def _float(half: np.uint16) -> np.float32:
    """The value of a float16, NaN as infinity; nothing that only some processors can."""
    bits = np.uint32(half & np.uint16(0x7FFF)) << np.uint32(13)
    sign = np.uint32(half & np.uint16(0x8000)) << np.uint32(16)
    if bits >= np.uint32(0x0F800000):
        return np.float32(np.inf)
    # Read as float32 it is 2^112 times too small, for the exponents are counted from 15 and from 127.
    value: np.float32 = np.uint32(bits | sign).view(np.float32)
    return value * np.float32(2.0**112)


@inlined(**_HOW)
def _plain(q: Floats, x: Halves) -> np.float32:
    total = np.float32(0)
    for d in range(len(q)):
        difference = q[d] - _float(x[d])
        total += difference * difference
    return total


@inlined(**_HOW)
def _by_query(q: Floats, s_q: Floats, x: Halves) -> np.float32:
    total = np.float32(0)
    for d in range(len(q)):
        difference = q[d] - _float(x[d])
        total += s_q[d] * (difference * difference)
    return total


@inlined(**_HOW)
def _by_both(q: Floats, s_q: Floats, x: Halves, s: Halves) -> np.float32:
    total = np.float32(0)
    for d in range(len(q)):
        difference = q[d] - _float(x[d])
        total += (s_q[d] + _float(s[d])) * (difference * difference)
    return total / np.float32(2)


@inlined(**_HOW)
def _scale(s: Halves) -> np.float32:
    total = np.float32(0)
    for d in range(len(s)):
        total += _float(s[d])
    scale: np.float32 = np.sqrt(total / np.float32(len(s)))
    return scale


@inlined(**_HOW)
def _as_heap(ids: Ids, squared: Doubles, num: int) -> None:
    """Order the first num so that none is farther than the one at half its place."""
    for at in range(num // 2 - 1, -1, -1):
        _sink(ids, squared, at, num)


@inlined(**_HOW)
def _sink(ids: Ids, squared: Doubles, at: int, num: int) -> None:
    """Restore that order of a heap where the one at this place may be too near to be there."""
    while 2 * at + 1 < num:
        child = 2 * at + 1
        if child + 1 < num and _is_farther(ids, squared, child + 1, child):
            child += 1
        if not _is_farther(ids, squared, child, at):
            return
        _swap(ids, squared, at, child)
        at = child


@inlined(**_HOW)
def _is_farther(ids: Ids, squared: Doubles, one: int, other: int) -> bool:
    if squared[one] == squared[other]:
        return bool(ids[one] > ids[other])
    return bool(squared[one] > squared[other])


@inlined(**_HOW)
def _swap(ids: Ids, squared: Doubles, one: int, other: int) -> None:
    ids[one], ids[other] = ids[other], ids[one]
    squared[one], squared[other] = squared[other], squared[one]
