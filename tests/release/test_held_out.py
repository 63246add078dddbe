import numpy as np
import pytest

from namr.release import held_out

IDS = (np.arange(50, dtype=np.int64)[:, None] << 32 | np.arange(400, dtype=np.int64)).ravel()


def test_about_the_share_is_held_out_and_from_every_shard() -> None:
    chosen = held_out.mask(IDS, share=0.1, seed=3)
    assert chosen.mean() == pytest.approx(0.1, abs=0.01)
    assert len(np.unique(IDS[chosen] >> 32)) == 50


def test_an_id_is_held_out_whatever_stands_beside_it() -> None:
    chosen = held_out.mask(IDS, share=0.1, seed=3)
    order = np.random.default_rng(0).permutation(len(IDS))
    np.testing.assert_array_equal(held_out.mask(IDS[order][:999], share=0.1, seed=3), chosen[order][:999])


def test_a_smaller_share_is_a_part_of_the_larger_and_seeds_differ() -> None:
    large, small = (held_out.mask(IDS, share=share, seed=3) for share in (0.2, 0.1))
    assert not (small & ~large).any()
    both = large & held_out.mask(IDS, share=0.2, seed=4)
    assert both.mean() == pytest.approx(0.04, abs=0.01)


@pytest.mark.parametrize(
    ("num", "most", "expected"), [(0, 5, []), (3, 5, [0, 1, 2]), (10, 4, [0, 2, 5, 7]), (100, 1, [0])]
)
def test_steps_are_even(num: int, most: int, expected: list[int]) -> None:
    assert held_out.spread_evenly(num, most) == expected


def test_the_share_is_bounded() -> None:
    assert held_out.share(500, 1_000_000) == 0.0005
    assert held_out.share(500, 600) == 0.2
    assert held_out.share(500, 0) == 0.0
    assert not held_out.mask(IDS, share=0.0, seed=0).any()
