"""Re-ranking against brute force in float64."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namr.errors import ManifestError, ShapeError
from namr.release.places import Places, rows_of
from namr.search import rerank, vectors
from namr.search.vectors import GalleryVectors
from namr.sides import SIDES, Side

NOTHING_HIDDEN = np.empty(0, np.int64)


def brute(q: np.ndarray, s_q: np.ndarray, x: np.ndarray, s: np.ndarray, side: Side) -> np.ndarray:
    """(Q, N) squared distances in float64, one query and one item at a time."""
    q, s_q, x, s = (of.astype(np.float64) for of in (q, s_q, x, s))
    squared = np.empty((len(q), len(x)))
    for i in range(len(q)):
        for j in range(len(x)):
            weights = {
                "none": np.ones(q.shape[1]),
                "query": s_q[i],
                "both": (s_q[i] + s[j]) / 2,
                "scale": np.full(q.shape[1], np.sqrt(s[j].mean())),
            }[side]
            squared[i, j] = (weights * (q[i] - x[j]) ** 2).sum()
    return squared


class Gallery(NamedTuple):
    ids: np.ndarray
    x: np.ndarray
    s: np.ndarray
    vectors: GalleryVectors


def store(
    folder: Path,
    x: np.ndarray,
    s: np.ndarray,
    *,
    num_shards: int,
    num_files: int = 2,
    lacking: Sequence[int] = (),
) -> Gallery:
    """x and s as float16, in any order: of shards numbered with gaps, without those that are lacking."""
    x, s = x.astype(np.float16), s.astype(np.float16)
    sizes = [len(rows) for rows in np.array_split(np.arange(len(x)), num_shards)]
    shards = np.array([(3 * at, size) for at, size in enumerate(sizes)], np.int64)
    ids = np.concatenate([(number << 32) + np.arange(size) for number, size in shards])
    order = np.random.default_rng(len(x)).permutation(np.setdiff1d(np.arange(len(x)), lacking))
    paths = [folder / f"vectors-{number}.npy" for number in range(num_files)]
    for path, rows in zip(paths, np.array_split(order, num_files), strict=True):
        np.save(path, np.stack([x[rows], s[rows]], axis=1))
    places = Places(shards, rows_of(ids[order], shards))
    return Gallery(ids, x, s, GalleryVectors(paths, places, dim=x.shape[1]))


def make(folder: Path, *, num: int = 60, dim: int = 8, seed: int = 0, **layout: int) -> Gallery:
    rng = np.random.default_rng(seed)
    return store(
        folder,
        rng.standard_normal((num, dim)),
        rng.uniform(0.5, 1.5, (num, dim)),
        **{"num_shards": 4, **layout},
    )


def queries(num: int, dim: int, *, seed: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, s_q = rng.standard_normal((num, dim)), rng.uniform(0.5, 1.5, (num, dim))
    return q.astype(np.float32), s_q.astype(np.float32)


@pytest.mark.parametrize("side", SIDES)
def test_re_ranking_orders_the_candidates_as_brute_force_does(tmp_path: Path, side: Side) -> None:
    gallery = make(tmp_path)
    q, s_q = queries(7, 8)
    rng = np.random.default_rng(1)
    at = np.stack([rng.permutation(60)[:20] for _ in range(7)])
    ranked = rerank.rerank(q, s_q, gallery.ids[at], gallery.vectors, k=5, side=side)
    squared = brute(q, s_q, gallery.x, gallery.s, side)
    plain = brute(q, s_q, gallery.x, gallery.s, "none")
    for row in range(7):
        best = at[row][np.argsort(squared[row, at[row]])[:5]]
        assert ranked.ids[row].tolist() == gallery.ids[best].tolist()
        np.testing.assert_allclose(ranked.squared[row], squared[row, best], rtol=1e-5)
        np.testing.assert_allclose(ranked.plain_squared[row], plain[row, best], rtol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("most", [1, 7, 60, 100, 1000])
def test_re_ranking_in_blocks_by_several_threads_is_re_ranking_at_once(
    tmp_path: Path, most: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = make(tmp_path)
    q, s_q = queries(7, 8)
    ids = np.tile(gallery.ids, (7, 1))
    at_once = rerank.rerank(q, s_q, ids, gallery.vectors, k=60, side="both")
    stops: list[str] = []
    monkeypatch.setattr(rerank, "_BLOCK_VALUES", most * 8)
    monkeypatch.setattr(rerank, "_FEW_VALUES", 1)
    monkeypatch.setattr(gallery.vectors, "num_threads", num_threads)
    in_blocks = rerank.rerank(
        q,
        s_q,
        ids,
        gallery.vectors,
        k=60,
        side="both",
        stop=lambda: stops.append(threading.current_thread().name),
    )
    np.testing.assert_array_equal(at_once.ids, in_blocks.ids)
    np.testing.assert_array_equal(at_once.squared, in_blocks.squared)
    np.testing.assert_array_equal(at_once.plain_squared, in_blocks.plain_squared)
    step = min(max(1, most // 60), -(-7 // num_threads))
    assert stops == ["MainThread"] * -(-7 // step)


def test_a_search_that_is_stopped_compares_no_further_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = make(tmp_path)
    q, s_q = queries(40, 8)
    monkeypatch.setattr(rerank, "_BLOCK_VALUES", 1)
    looks = iter([None, None, TimeoutError("enough")])

    def stop() -> None:
        if (error := next(looks)) is not None:
            raise error

    with pytest.raises(TimeoutError, match="enough"):
        rerank.rerank(q, s_q, np.tile(gallery.ids, (40, 1)), gallery.vectors, k=3, side="both", stop=stop)


def test_queries_of_another_dimension_than_the_files_are_refused(tmp_path: Path) -> None:
    gallery = make(tmp_path)
    with pytest.raises(ShapeError, match=r"queries are \(2, 9\).*expected \(Q, 8\)"):
        rerank.rerank(
            queries(2, 9)[0], None, gallery.ids[None, :3].repeat(2, 0), gallery.vectors, k=1, side="none"
        )
    with pytest.raises(ValueError, match="without structures"):
        rerank.rerank(queries(1, 8)[0], None, gallery.ids[None, :3], gallery.vectors, k=1, side="both")


def test_all_candidates_stay_whatever_their_order(tmp_path: Path) -> None:
    gallery = make(tmp_path)
    q, s_q = queries(3, 8)
    ids = np.stack([gallery.ids[:10], gallery.ids[10:20], gallery.ids[40:50]])
    ranked = rerank.rerank(q, s_q, ids, gallery.vectors, k=10, side="both")
    np.testing.assert_array_equal(np.sort(ranked.ids, axis=1), ids)


def test_missing_candidates_come_last_as_nothing(tmp_path: Path) -> None:
    gallery = make(tmp_path)
    q, s_q = queries(2, 8)
    ids = np.array([[gallery.ids[3], -1, gallery.ids[2]], [-1, -1, -1]])
    ranked = rerank.rerank(q, s_q, ids, gallery.vectors, k=4, side="query")
    assert sorted(ranked.ids[0, :2].tolist()) == gallery.ids[2:4].tolist()
    assert ranked.ids[0, 2:].tolist() == [-1, -1]
    assert ranked.ids[1].tolist() == [-1] * 4
    assert np.isinf(ranked.squared[0, 2:]).all()
    assert np.isinf(ranked.plain_squared[1]).all()
    nothing = rerank.rerank(q, s_q, np.full((2, 3), -1), gallery.vectors, k=2, side="query")
    assert nothing.ids.tolist() == [[-1, -1]] * 2


def test_copies_of_an_image_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    x, s = np.ones((6, 4)), np.ones((6, 4))
    gallery = store(tmp_path, x, s, num_shards=2)
    q, s_q = queries(1, 4)
    ranked = rerank.rerank(q, s_q, gallery.ids[None, [4, 1, 5, 0, 2, 3]], gallery.vectors, k=4, side="both")
    assert ranked.ids[0].tolist() == gallery.ids[:4].tolist()
    exact = rerank.nearest_exact(q, s_q, gallery.vectors, k=4, side="both", hidden=NOTHING_HIDDEN)
    assert exact.ids[0].tolist() == gallery.ids[:4].tolist()


def test_a_candidate_without_a_vector_is_an_error_that_names_it(tmp_path: Path) -> None:
    x = np.ones((6, 4))
    x[5] = np.nan
    gallery = store(tmp_path, x, np.ones((6, 4)), num_shards=1)
    q, s_q = queries(1, 4)
    with pytest.raises(ManifestError, match="item 5 is in the index and has no re-rank vector, or a damaged"):
        rerank.rerank(q, s_q, gallery.ids[None], gallery.vectors, k=2, side="none")
    with pytest.raises(ManifestError, match="item 5 is in the index and has no re-rank vector, or a damaged"):
        rerank.nearest_exact(q, s_q, gallery.vectors, k=2, side="none", hidden=NOTHING_HIDDEN)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("block_rows", [3, 1000])
def test_one_stage_is_brute_force(
    tmp_path: Path, side: Side, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = make(tmp_path)
    monkeypatch.setattr(vectors, "_BLOCK_ROWS", block_rows)
    q, s_q = queries(7, 8)
    own, hidden = gallery.ids[:7], gallery.ids[[2, 30]]
    found = rerank.nearest_exact(q, s_q, gallery.vectors, k=6, side=side, hidden=hidden, own_ids=own)
    squared = brute(q, s_q, gallery.x, gallery.s, side)
    squared[:, [2, 30]] = np.inf
    squared[np.arange(7), np.arange(7)] = np.inf
    order = np.argsort(squared, axis=1)[:, :6]
    np.testing.assert_array_equal(found.ids, gallery.ids[order])
    np.testing.assert_allclose(found.squared, np.take_along_axis(squared, order, 1), rtol=1e-9)


def test_one_stage_leaves_out_rows_without_vectors_and_fills_up(tmp_path: Path) -> None:
    gallery = store(tmp_path, np.ones((6, 4)), np.ones((6, 4)), num_shards=3, lacking=[0, 4])
    q, s_q = queries(1, 4)
    found = rerank.nearest_exact(q, s_q, gallery.vectors, k=6, side="query", hidden=gallery.ids[[1]])
    assert found.ids[0].tolist() == [*gallery.ids[[2, 3, 5]].tolist(), -1, -1, -1]


@settings(max_examples=50, deadline=None)
@given(
    num=st.integers(1, 12), k=st.integers(1, 8), most_id=st.integers(1, 9), seed=st.integers(0, 10**6)
)  # fmt: skip
def test_two_rankings_are_merged_as_one_over_the_items_of_both(
    num: int, k: int, most_id: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    true = rng.permutation(10).astype(np.float64)
    one, other = (ranking(rng.permutation(most_id)[:num], true) for _ in range(2))
    found = rerank.merged(one, other, k=k)
    ids = np.unique(np.concatenate([one.ids[0], other.ids[0]]))
    order = ids[np.argsort(true[ids])][:k]
    assert found.ids.shape == (1, k)
    assert found.ids[0, : len(order)].tolist() == order.tolist()
    assert found.squared[0, : len(order)].tolist() == true[order].tolist()
    assert (found.ids[0, len(order) :] == -1).all() and np.isinf(found.squared[0, len(order) :]).all()


def ranking(ids: np.ndarray, true: np.ndarray) -> rerank.Ranked:
    ordered = ids[np.argsort(true[ids])][None]
    return rerank.Ranked(ordered, true[ordered], 2 * true[ordered])
