"""The nearest of some centroids, the same for a vector in whatever company it comes.

A matrix product costs a tenth of differences, but its last bits depend on how many vectors are compared at
once and, with the kernels of some processors, on a vector's place among them. So it decides only what it can
be sure of: where the nearest is closer than any other by more than the product may be wrong. The rest, close
calls, are compared by difference in float64, with those centroids alone that may be the nearest.

Not covered: more than one neighbour, and threads (the product takes those that numpy's BLAS has).
Legend: n vectors, D dimension, L centroids.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_BLOCK_VALUES = 1 << 20
"""of a product, 4 MiB: what stays in a processor's cache between two looks at it"""
_FEWEST_ROWS, _MOST_ROWS = 256, 4096
_PAIRS = 1 << 12
"""close calls that are compared at a time"""


def nearest(x: Floats, centroids: Floats) -> Ids:
    """The row of the nearest of centroids (L, D) for each of x (n, D), (n,); of two as near, the first.

    A function of the vector and the centroids alone, whatever else is in x and on any number of threads. The
    product gives |c|^2 - 2 x.c, off by at most (D + 4) 2^-24 (|x| + |c|)^2 (Higham, Accuracy and Stability,
    3.1): a lead of twice that is one. Few vectors have less, unless all lie far from the origin and near each
    other.
    """
    num, dim = x.shape
    found = np.empty(num, np.int64)
    size = min(max(_BLOCK_VALUES // len(centroids), _FEWEST_ROWS), _MOST_ROWS, max(num, 1))
    squares = np.square(centroids, dtype=np.float64).sum(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is a close call
        weights = np.concatenate([-2 * centroids.T, squares[None].astype(np.float32)])  # (D + 1, L)
        asked, product = np.ones((size, dim + 1), np.float32), np.empty((size, len(centroids)), np.float32)
        for start in range(0, num, size):
            block = x[start : start + size]
            rows = np.arange(len(block))
            asked[: len(block), :dim] = block
            values = np.matmul(asked[: len(block)], weights, out=product[: len(block)])
            first = values.argmin(axis=1)
            least = values[rows, first].astype(np.float64)
            values[rows, first] = np.inf
            reach = np.sqrt(np.einsum("nd,nd->n", block, block).astype(np.float64)) + np.sqrt(squares.max())
            limits = least + 2 * (dim + 4) * 2.0**-24 * reach**2
            unsure = np.flatnonzero(~(values.min(axis=1) > limits))
            values[rows, first] = least
            if len(unsure):
                maybe = ~(values[unsure] > limits[unsure, None])
                first[unsure] = _by_pairs(block[unsure], centroids, maybe)
            found[start : start + len(block)] = first
    return found


def _by_pairs(x: Floats, centroids: Floats, maybe: npt.NDArray[np.bool_]) -> Ids:
    """`nearest` among the centroids that `maybe` (n, L) marks, at least one a row, by difference."""
    rows, columns = np.nonzero(maybe)
    squared: Doubles = np.concatenate(
        [
            np.square(
                np.subtract(x[rows[at : at + _PAIRS]], centroids[columns[at : at + _PAIRS]], dtype=np.float64)
            ).sum(axis=1)
            for at in range(0, len(rows), _PAIRS)
        ]
    )
    least = np.minimum.reduceat(squared, np.searchsorted(rows, np.arange(len(x))))
    at = np.flatnonzero(squared == least[rows])
    return columns[at[np.searchsorted(rows[at], np.arange(len(x)))]]
