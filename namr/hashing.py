"""Hashes of integers that mean the same on every machine and in every version of every library.

    mix(z) = SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64 bits in which each
    bit of z moves about half of the others.

Whoever draws by hashing says how its numbers are combined into z. Not covered: digests of bytes (SHA-256 in
`store.storage`).
"""

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / the golden ratio: what SplitMix64 steps by"""
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def mix(values: Hashes) -> Hashes:
    """(...) uint64 -> (...) uint64, well mixed."""
    with np.errstate(over="ignore"):
        mixed = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_SECOND)
    return mixed ^ (mixed >> np.uint64(31))


def mix_of(*numbers: int) -> int:
    """64 well-mixed bits of some integers, in their order: mix of what came before + golden + the next."""
    mixed = np.zeros(1, np.uint64)
    for number in numbers:
        with np.errstate(over="ignore"):
            mixed = mix(mixed + np.uint64(GOLDEN) + np.uint64(number & _MASK))
    return int(mixed[0])
