"""Hashes: the published numbers of SplitMix64, and that nothing collides by design."""

import numpy as np

from namr import hashing


def test_the_hashes_are_splitmix64_s_own() -> None:
    state = (np.arange(1, 4, dtype=np.uint64) * np.uint64(hashing.GOLDEN)).astype(np.uint64)
    # The first outputs of the generator with seed 0, as its authors' reference implementation gives them.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hashing.mix(state).tolist() == expected


def test_different_numbers_have_different_hashes() -> None:
    mixed = hashing.mix(np.arange(100_000, dtype=np.uint64))
    assert len(np.unique(mixed)) == 100_000
    assert abs(np.mean(mixed >> np.uint64(63)) - 0.5) < 0.01


def test_the_order_and_the_sign_of_numbers_count() -> None:
    hashes = {hashing.mix_of(*numbers) for numbers in ((1, 2), (2, 1), (1,), (-1,), ())}
    assert len(hashes) == 5
    assert all(0 <= each < 2**64 for each in hashes)
