"""All sides in one pass against brute force in float64, whatever the blocks, the bounds and the way there."""

from pathlib import Path

import numpy as np
import pytest
import torch

from namr.errors import ManifestError, ShapeError
from namr.search import exact, rerank
from namr.search.exact import Exact, Ids
from namr.search.queries import Queries
from namr.search.vectors import GalleryVectors
from namr.sides import SIDES, Side
from tests.search.test_rerank import Gallery, brute, store

NOTHING = np.empty(0, np.int64)
NUM, DIM, K = 300, 16, 5
ASKED = np.arange(0, NUM, 10)
HIDDEN = [1, 2, 57, 299]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Clusters, 3 away from the origin on each axis, with copies and with near-duplicates."""
    rng = np.random.default_rng(0)
    x = 3 + rng.standard_normal((8, DIM))[rng.integers(0, 8, NUM)] + 0.3 * rng.standard_normal((NUM, DIM))
    x[40:80] = x[:40]
    x[80:120] = x[:40] + 0.002 * rng.standard_normal((40, DIM))
    s = rng.uniform(0.5, 1.5, (NUM, DIM))
    s[40:60] = s[:20]
    return store(tmp_path_factory.mktemp("gallery"), x, s, num_shards=4, num_files=3)


def asked_of(gallery: Gallery) -> Queries:
    x, s = (of[ASKED].astype(np.float32) for of in (gallery.x, gallery.s))
    return Queries(x, s, gallery.ids[ASKED])


def search(
    gallery: Gallery, *, k: int = K, hidden=NOTHING, num_rows: int | None = None, bounds=None
) -> Exact:
    one = exact.Search(asked_of(gallery), k=k, bounds=bounds, hidden=hidden)
    for block in gallery.vectors.blocks(num_rows=num_rows):
        one.add(block)
    return one.found()


def by_itself(asked: Queries, side: Side, vectors: GalleryVectors, *, hidden: Ids, allowed=None) -> Ids:
    """(Q, K) what an exact search by this side alone finds, in float64."""
    x, s, own_ids = asked
    return rerank.nearest_exact(
        x, s, vectors, k=K, side=side, hidden=hidden, own_ids=own_ids, allowed=allowed
    ).ids


def truth(gallery: Gallery, *, k: int = K, hidden=()) -> Exact:
    """By loops; ties of float32 by id."""
    ids, squared = [], []
    for side in SIDES:
        of_side = brute(gallery.x[ASKED], gallery.s[ASKED], gallery.x, gallery.s, side)
        of_side[np.arange(len(ASKED)), ASKED] = np.inf
        of_side[:, list(hidden)] = np.inf
        of_all = np.broadcast_to(gallery.ids, of_side.shape)
        order = np.lexsort((of_all, of_side.astype(np.float32)), axis=-1)[:, :k]
        squared.append(np.take_along_axis(of_side, order, axis=1))
        ids.append(np.where(np.isinf(squared[-1]), -1, gallery.ids[order]))
    return Exact(np.array(ids), np.array(squared))


@pytest.mark.parametrize("few_of", [1, 1 << 40], ids=["by plain products", "by the query's too"])
@pytest.mark.parametrize("num_rows", [3, 64, None])
def test_every_side_is_brute_force(
    gallery: Gallery, num_rows: int | None, few_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "_FEW_OF", few_of)
    monkeypatch.setattr(exact, "_PAIRS_AT_ONCE", 50)
    monkeypatch.setattr(exact, "_PENDING", 200)
    found = search(gallery, hidden=gallery.ids[HIDDEN], num_rows=num_rows)
    expected = truth(gallery, hidden=HIDDEN)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.squared, expected.squared, rtol=1e-12)


def test_it_finds_what_one_side_after_the_other_finds_in_float64(gallery: Gallery) -> None:
    asked, found = asked_of(gallery), search(gallery, hidden=gallery.ids[HIDDEN])
    for side in SIDES:
        one = by_itself(asked, side, gallery.vectors, hidden=gallery.ids[HIDDEN])
        np.testing.assert_array_equal(np.sort(found.of(side)), np.sort(one))  # copies are 0 away, or 1e-16


def test_bounds_change_nothing_but_the_work(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    num_compared = []
    compare = exact.distances.rerank_squared

    def counted(q, *rest, side):
        num_compared.append(len(q))
        return compare(q, *rest, side=side)

    monkeypatch.setattr(exact.distances, "rerank_squared", counted)
    free = search(gallery, num_rows=20)
    num_free = sum(num_compared)
    nobody = np.full((len(ASKED), 1), -1)
    candidates = np.concatenate([nobody, free.of("none")], axis=1)
    bounds = exact.bounds_of(asked_of(gallery), candidates, gallery.vectors, k=K)
    assert (bounds >= free.squared[:, :, -1]).all() and np.isfinite(bounds).all()
    num_compared.clear()
    bound = search(gallery, num_rows=20, bounds=bounds)
    np.testing.assert_array_equal(bound.ids, free.ids)
    assert sum(num_compared) < num_free / 2


def test_fewer_candidates_than_neighbours_bound_nothing(gallery: Gallery) -> None:
    few = gallery.ids[np.tile([1, 2, 3], (len(ASKED), 1))]
    assert np.isinf(exact.bounds_of(asked_of(gallery), few, gallery.vectors, k=K)).all()


def test_a_side_that_nothing_is_within_is_not_searched_by(gallery: Gallery) -> None:
    bounds = np.full((len(SIDES), len(ASKED)), -np.inf)
    bounds[SIDES.index("none")] = np.inf
    found = search(gallery, bounds=bounds)
    np.testing.assert_array_equal(found.of("none"), truth(gallery).of("none"))
    assert all((found.of(side) == -1).all() for side in SIDES if side != "none")


@pytest.mark.parametrize("cuts", [[150], [1, 2, 3], [100, 101, 290]])
def test_parts_that_are_joined_are_the_whole(gallery: Gallery, cuts: list[int]) -> None:
    ids, x, s = (np.concatenate(of) for of in zip(*gallery.vectors.blocks(), strict=True))
    parts = []
    for rows in np.split(np.arange(NUM), cuts):
        one = exact.Search(asked_of(gallery), k=K)
        one.add(exact.Block(ids[rows], torch.from_numpy(x[rows]), torch.from_numpy(s[rows])))
        parts.append(one.found())
    joined, whole = exact.joined(parts), search(gallery)
    np.testing.assert_array_equal(joined.ids, whole.ids)
    np.testing.assert_array_equal(joined.squared, whole.squared)


def test_where_there_are_fewer_the_rest_is_nothing(gallery: Gallery) -> None:
    found, expected = search(gallery, k=NUM + 3, num_rows=100), truth(gallery, k=NUM)
    np.testing.assert_array_equal(found.ids[:, :, :NUM], expected.ids)
    assert (found.ids[:, :, NUM - 1 :] == -1).all() and np.isinf(found.squared[:, :, NUM - 1 :]).all()


def test_without_structure_all_sides_find_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((NUM, DIM))
    found = search(store(tmp_path, x, np.ones((NUM, DIM)), num_shards=2))
    assert all((found.of(side) == found.of("none")).all() for side in SIDES)


@pytest.mark.parametrize(
    ("of", "value"), [("x", np.nan), ("x", np.inf), ("s", np.nan), ("s", 0.0), ("s", -1)]
)
def test_a_damaged_vector_is_an_error_that_names_it(tmp_path: Path, of: str, value: float) -> None:
    rng = np.random.default_rng(1)
    vectors = {"x": rng.standard_normal((NUM, DIM)), "s": rng.uniform(0.5, 1.5, (NUM, DIM))}
    vectors[of][77, 3] = value
    damaged = store(tmp_path, **vectors, num_shards=1)
    with pytest.raises(
        ManifestError, match="item 77 is in the index and has no re-rank vector, or a damaged"
    ):
        search(damaged)
    assert (search(damaged, hidden=np.array([77])).ids >= 0).all()


def test_queries_without_structure_are_refused(gallery: Gallery) -> None:
    asked = asked_of(gallery)._replace(s=None)
    with pytest.raises(ShapeError, match="every side needs structures"):
        exact.Search(asked, k=K)
    with pytest.raises(ShapeError, match="every side needs structures"):
        exact.bounds_of(asked, NOTHING[None], gallery.vectors, k=K)


@pytest.mark.parametrize("size", [1e-2, 1.0, 100.0])
def test_products_are_off_by_no_more_than_is_said(size: float) -> None:
    rng = np.random.default_rng(2)
    q = torch.from_numpy((size * rng.standard_normal((20, 200))).astype(np.float32))
    x = torch.from_numpy((size * (rng.standard_normal((50, 200)) + 1)).astype(np.float16))
    x[:20] = q
    s_q, ids, centre = torch.rand(20, 200) + 0.5, np.arange(50), q.mean(0)
    block = exact._Centred.of(exact.Block(ids, x, torch.ones_like(x)), centre, torch.ones(50, 202))
    products = exact._Products(q - centre, s_q)
    norms = (q - centre).double().norm(dim=1)[:, None] + (x.double() - centre).norm(dim=1)
    error = products._g * norms.square().numpy()
    apart = (q.double()[:, None] - x.double()).square()
    assert (np.abs(products.plain(block) - apart.sum(2).numpy()) <= error).all()
    by_query = (s_q.double()[:, None] * apart).sum(2).numpy()
    assert (np.abs(products._products_by_query(block) - by_query) <= 1.5 * error).all()
