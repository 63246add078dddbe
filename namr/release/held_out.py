"""Which images only query an index and teach it nothing: decided by id, the same everywhere and every night.

The template is trained on none of them, and the release is measured with them, each left out of its own
answer. An image stays held out as long as the share does, whatever else comes into the dataset.
"""

import numpy as np
import numpy.typing as npt

from namr import hashing

_LARGEST_SHARE = 0.2


def share(num: int, num_samples: int) -> float:
    """The share to hold out for about `num` queries of a dataset version; never more than a fifth."""
    return min(_LARGEST_SHARE, num / num_samples) if num_samples else 0.0


def spread_evenly(num: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `num`, at even steps from 0."""
    most = min(num, most)
    return [at * num // most for at in range(most)]


def mask(ids: npt.NDArray[np.int64], *, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """(n,) True where held out: SplitMix64 of id and seed lies in the lowest `share` of its range."""
    with np.errstate(over="ignore"):
        mixed = hashing.mix(ids.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(hashing.GOLDEN))
    return (mixed >> np.uint64(11)).astype(np.float64) < share * 2.0**53
