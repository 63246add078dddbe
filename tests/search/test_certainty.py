"""What is said of an answer: where it is proved, brute force agrees; and what the last candidate is."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namr.index import ivf
from namr.search import certainty, rerank
from namr.search.certainty import Level
from namr.search.first_stage import Candidates
from namr.sides import SIDES, Side
from tests.search.test_rerank import brute, make, queries, store


def test_an_adaptive_search_doubles_depth_and_lists_up_to_all_of_them() -> None:
    doubled = certainty.levels(100, 3, num_lists=20)
    assert doubled == [Level(100, 3), Level(200, 6), Level(400, 12), Level(800, 20), Level(1600, 20)]
    assert certainty.levels(7, 1, num_lists=0)[-1] == Level(7 * 2**certainty.NUM_DOUBLINGS, 0)


def test_the_last_candidate_is_the_last_there_is_and_codes_are_not_believed(tmp_path: Path) -> None:
    gallery = make(tmp_path)
    q, _ = queries(3, 8)
    ids = np.concatenate([gallery.ids[[[5, 9, 2], [7, 1, 3]]], [[-1, -1, -1]]])
    ids[1, 1:] = -1
    codes = Candidates(ids, np.where(ids < 0, np.inf, 0.5).astype(np.float32))
    plain = brute(q, q, gallery.x, gallery.s, "none")
    for depth, first in ((3, 2), (2, 9), (1, 5)):
        last = certainty.last_squared(codes, depth, q, gallery.vectors, is_compressed=True)
        np.testing.assert_allclose(last, [plain[0, first], plain[1, 7], 0], rtol=1e-5)
    said = certainty.last_squared(codes, 3, q, gallery.vectors, is_compressed=False)
    assert said.tolist() == [0.5, 0.5, 0]


def test_a_tie_at_the_border_is_not_calibrated_and_neither_is_nothing() -> None:
    q, last = np.zeros((3, 4)), np.array([2.0, 2.0, 0.0])
    told = certainty.is_calibrated(np.array([1.0, 0.99, 0.0]), last, q, weight=0.5)
    assert told.tolist() == [False, True, False]
    assert not certainty.is_calibrated(np.full(3, np.inf), last, q, weight=1.0).any()


@pytest.mark.parametrize("side", SIDES)
def test_no_adaptive_distance_is_below_the_least_weight(tmp_path: Path, side: Side) -> None:
    gallery = make(tmp_path)
    q, s_q = queries(7, 8)
    least = certainty.least_weight(s_q, side=side, gallery_min=float(gallery.s.min()), num_queries=7)
    adaptive = brute(q, s_q, gallery.x, gallery.s, side)
    plain = brute(q, s_q, gallery.x, gallery.s, "none")
    assert (adaptive >= least[:, None] * plain * (1 - 1e-12)).all()


@settings(max_examples=200, deadline=None)
@given(
    dim=st.integers(1, 40), offset=st.sampled_from([0.0, 3.0, 100.0]),
    spread=st.sampled_from([1e-4, 1.0, 30.0]), num_queries=st.sampled_from([1, 25]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_nothing_left_out_is_nearer_than_the_bound(
    dim: int, offset: float, spread: float, seed: int, num_queries: int
) -> None:
    """25 queries make FAISS compute |q|^2 + |x|^2 - 2 q x, which cancels; 1 query is by difference."""
    rng = np.random.default_rng(seed)
    x = (offset + spread * rng.standard_normal((50, dim))).astype(np.float32)
    q = (offset + spread * rng.standard_normal((num_queries, dim))).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.faiss")
        ivf.build_part(
            ivf.train_template(x, "Flat", seed=0, num_threads=1), [(x, np.arange(50))], path, num_threads=1
        )
        squared, ids = ivf.open_index(path).search(q, 10)
    true = ((q[:, None].astype(np.float64) - x.astype(np.float16).astype(np.float64)) ** 2).sum(2)
    np.put_along_axis(true, ids, np.inf, axis=1)
    bound = certainty.outside_squared(squared[:, -1].astype(np.float64), q)
    assert (bound <= true.min(axis=1)).all()
    if offset == 0:
        assert (bound >= 0.9 * squared[:, -1] - 1e-7).all()  # not so careful that it is of no use


@settings(max_examples=150, deadline=None)
@given(
    side=st.sampled_from(SIDES), num=st.integers(1, 60), dim=st.integers(1, 12), k=st.integers(1, 8),
    depth=st.integers(1, 60), spread=st.sampled_from([0.02, 0.2, 0.5]), copies=st.integers(0, 5),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_what_is_proved_is_brute_force(
    side: Side, num: int, dim: int, k: int, depth: int, spread: float, copies: int, seed: int
) -> None:
    assert_proofs_hold(side, num, dim, k, max(k, depth), spread, copies, seed)


def assert_proofs_hold(
    side: Side, num: int, dim: int, k: int, depth: int, spread: float, copies: int, seed: int
) -> int:
    """Compares every proved answer with brute force; returns how many there were."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num, dim)).astype(np.float32)
    x[rng.integers(0, num, copies)] = x[0]
    s = rng.uniform(1 - spread, 1 + spread, (num, dim)).astype(np.float32)
    q = rng.standard_normal((25, dim)).astype(np.float32)
    s_q = rng.uniform(1 - spread, 1 + spread, (25, dim)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        gallery = store(Path(folder), x, s, num_shards=min(3, num))
        path = Path(folder, "index.faiss")
        template = ivf.train_template(x, "Flat", seed=0, num_threads=1)
        ivf.build_part(template, [(x, gallery.ids)], path, num_threads=1)
        squared, ids = ivf.open_index(path).search(q, depth)
        ranked = rerank.rerank(q, s_q, ids, gallery.vectors, k=k, side=side)
    proved = certainty.is_proved(
        ranked.squared[:, -1], squared[:, -1].astype(np.float64), q, s_q, side=side,
        gallery_min=float(gallery.s.min()),
    )  # fmt: skip
    true = brute(q, s_q, gallery.x, gallery.s, side)
    for row in np.flatnonzero(proved):
        order = np.lexsort((gallery.ids, true[row].astype(np.float32)))[:k]
        np.testing.assert_allclose(ranked.squared[row, : len(order)], true[row, order], rtol=1e-5, atol=1e-12)
        swapped = ranked.ids[row, : len(order)] != gallery.ids[order]  # only where float32 sees a tie
        at = {int(item): place for place, item in enumerate(gallery.ids)}
        for place in np.flatnonzero(swapped):
            own = true[row, at[int(ranked.ids[row, place])]]
            np.testing.assert_allclose(own, true[row, order[place]], rtol=1e-6)
    return int(proved.sum())


@pytest.mark.parametrize("side", SIDES)
def test_proofs_are_found_and_not_always(side: Side) -> None:
    num_proved = assert_proofs_hold(side, num=60, dim=6, k=2, depth=30, spread=0.2, copies=0, seed=4)
    assert num_proved >= 3
    assert assert_proofs_hold(side, num=60, dim=6, k=10, depth=10, spread=0.5, copies=0, seed=4) < 25


def test_a_tie_at_the_border_is_no_proof() -> None:
    q = np.zeros((1, 4))
    s_q = np.ones((1, 4))
    kth = np.array([1.0])
    assert not certainty.is_proved(kth, np.array([1.0]), q, s_q, side="query", gallery_min=1.0)[0]
    assert certainty.is_proved(kth, np.array([1.01]), q, s_q, side="query", gallery_min=1.0)[0]
    assert certainty.is_proved(kth, np.array([np.inf]), q, s_q, side="query", gallery_min=1.0)[0]
