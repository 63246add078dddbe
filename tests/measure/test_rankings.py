"""Rankings: exact and in one order whatever the rounding, with each query's own place last."""

import numpy as np
import pytest
import torch

from namr.errors import ShapeError
from namr.measure import rankings
from namr.measure.rankings import Gallery, Queries

LINE = torch.tensor([[0.0], [1.0], [3.0], [7.0]])


def ask(x: torch.Tensor, gallery: Gallery, rows: list[int]) -> Queries:
    return Queries(x[rows], None, gallery.places_of(torch.tensor(rows)))


def test_a_gallery_of_some_rows_is_ranked_by_place_and_a_query_comes_last_in_its_own() -> None:
    gallery = rankings.make_gallery(LINE, None, torch.tensor([3, 0, 1, 3]))
    assert gallery.rows.tolist() == [0, 1, 3]
    assert gallery.places_of(torch.tensor([3, 2, 0])).tolist() == [2, -1, 0]
    found = rankings.plain(ask(LINE, gallery, [1, 2]), gallery, length=3)
    assert found.tolist() == [[0, 2, 1], [1, 0, 2]]  # 1 sees 0, 7, itself; 3 sees 1, 0, 7


def test_a_gallery_without_rows_is_refused() -> None:
    with pytest.raises(ShapeError, match="the gallery has no rows"):
        rankings.make_gallery(LINE, None, torch.empty(0, dtype=torch.int64))


def test_equal_distances_come_by_place_even_beyond_the_candidates() -> None:
    x = torch.zeros(400, 2)
    gallery = rankings.make_gallery(x, None, torch.arange(10, 400))
    found = rankings.plain(ask(x, gallery, [0, 12]), gallery, length=5)
    assert found.tolist() == [[0, 1, 2, 3, 4], [0, 1, 3, 4, 5]]


def test_any_two_blocks_of_queries_get_the_same_ranking() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)) + 50
    gallery = rankings.make_gallery(x, None, torch.arange(100, 300))
    whole = rankings.plain(ask(x, gallery, list(range(100))), gallery, length=20)
    one_by_one = [rankings.plain(ask(x, gallery, [row]), gallery, length=20) for row in range(100)]
    assert torch.equal(whole, torch.cat(one_by_one))
    exact = torch.cdist(x[:100].double(), x[100:].double())
    assert torch.equal(whole, exact.argsort(dim=1, stable=True)[:, :20])


def test_re_ranking_orders_the_first_by_the_adaptive_distance_and_leaves_the_rest() -> None:
    # By the scale of the gallery's s, 1 (s = 100) is 10 times as far from 0 as 3 (s = 1) is in squares.
    s = torch.tensor([[1.0], [100.0], [1.0], [1.0]])
    gallery = rankings.make_gallery(LINE, s, None)
    asked = Queries(LINE[:1], s[:1], torch.tensor([0]))
    plain = rankings.plain(asked, gallery, length=4)
    assert plain.tolist() == [[1, 2, 3, 0]]
    assert rankings.reranked(asked, gallery, plain, side="scale", depth=2).tolist() == [[2, 1, 3, 0]]
    assert rankings.reranked(asked, gallery, plain, side="scale", depth=1).tolist() == plain.tolist()
    assert (
        rankings.reranked(asked, gallery, plain, side="query", depth=4)[0, -1] == 0
    )  # itself, at distance 0
