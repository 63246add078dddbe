"""The Searcher on real releases: equal to brute force where it says so, and clear in what it refuses."""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from namr.data.shards import make_id
from namr.errors import ConfigError, ImageRefused, ManifestError, ModelMismatch, ShapeError
from namr.model import model
from namr.model.distances import Metric, Side, for_search
from namr.release import releases
from namr.search.items import Items
from namr.search.searcher import Searcher
from namr.store import storage
from namr.store.cache import Cache
from tests import small_release
from tests.search.test_rerank import brute
from tests.small_release import Recipe

SIDES: list[Side] = ["none", "query", "both", "scale"]
DIM = 16


class Truth(NamedTuple):
    """Everything that can be found, as it is compared."""

    ids: np.ndarray
    indexed: np.ndarray
    x: np.ndarray
    s: np.ndarray


def truth(recipe: Recipe) -> Truth:
    numbers = range(recipe.num_shards)
    parts = [small_release.random_vectors(recipe.rows_per_shard, DIM, seed=recipe.seed + n) for n in numbers]
    ids = np.concatenate([make_id(n, 0) + np.arange(recipe.rows_per_shard) for n in numbers])
    kept = ~np.isin(ids, [*recipe.refused, *recipe.tombstoned, *recipe.dead])
    raw = torch.from_numpy(np.concatenate([part.embeddings for part in parts])[kept])
    indexed = for_search(raw, recipe.metric).numpy()
    s = np.concatenate([part.structures for part in parts])[kept].astype(np.float16)
    return Truth(ids[kept], indexed, indexed.astype(np.float16), s)


def open_release(root: Path, recipe: Recipe) -> Searcher:
    small_release.publish(root, recipe)
    return Searcher.open(str(root / "releases"), cache=Cache(root / "cache", 10**9), num_threads=1)


RECIPE = Recipe(
    refused=[make_id(0, 3), make_id(2, 39)],
    tombstoned=[make_id(1, 0)],
    dead=[make_id(1, 7), make_id(1, 8), make_id(0, 0)],
    num_segments=2,
)


@pytest.fixture(scope="module")
def searchers(tmp_path_factory: pytest.TempPathFactory) -> "functools._lru_cache_wrapper[Searcher]":
    """searchers(index_key, metric): a release with refused, tombstoned and dead samples, in two segments."""

    @functools.cache
    def opened(key: str, metric: Metric) -> Searcher:
        recipe = Recipe(**{**vars(RECIPE), "index_key": key, "metric": metric})
        return open_release(tmp_path_factory.mktemp("release"), recipe)

    return opened


QUERIES = small_release.random_vectors(25, DIM, seed=99)


def compared_queries(metric: Metric) -> np.ndarray:
    return for_search(torch.from_numpy(QUERIES.embeddings), metric).numpy()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("key", ["Flat", "IVF4,Flat"])
def test_plain_search_of_all_lists_is_brute_force_and_says_so(searchers, key: str, metric: Metric) -> None:
    found = searchers(key, metric).search_arrays(*QUERIES, k=7, side="none", nprobe=4)
    of = truth(Recipe(**{**vars(RECIPE), "metric": metric}))
    squared = brute(compared_queries(metric), QUERIES.structures, of.indexed, of.s, "none")
    order = np.argsort(squared, axis=1)[:, :7]
    assert found.proved.all()
    np.testing.assert_array_equal(found.ids, of.ids[order])
    np.testing.assert_allclose(found.distances, np.sqrt(np.take_along_axis(squared, order, 1)), rtol=1e-4)
    np.testing.assert_array_equal(found.distances, found.plain_distances)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("how", ["deep", "exact"])
def test_adaptive_search_is_brute_force_and_says_so(searchers, how: str, side: Side, metric: Metric) -> None:
    options = {"exact": True} if how == "exact" else {"depth": 200}
    found = searchers("IVF4,Flat", metric).search_arrays(*QUERIES, k=7, side=side, nprobe=4, **options)
    of = truth(Recipe(**{**vars(RECIPE), "metric": metric}))
    x = of.indexed if (how, side) == ("deep", "none") else of.x  # plain search compares what the index holds
    squared = brute(compared_queries(metric), QUERIES.structures, x, of.s, side)
    plain = brute(compared_queries(metric), QUERIES.structures, x, of.s, "none")
    order = np.argsort(squared, axis=1)[:, :7]
    assert found.proved.all()
    np.testing.assert_array_equal(found.ids, of.ids[order])
    for got, want in ((found.distances, squared), (found.plain_distances, plain)):
        np.testing.assert_allclose(got, np.sqrt(np.take_along_axis(want, order, 1)), rtol=1e-5)


@pytest.mark.parametrize(("key", "nprobe"), [("IVF4,Flat", 3), ("IVF4,SQ8", 4), ("IVF4,PQ4x8", 4)])
def test_an_approximate_first_stage_proves_nothing(tmp_path: Path, key: str, nprobe: int) -> None:
    searcher = open_release(tmp_path, Recipe(index_key=key, rows_per_shard=100))
    for side in SIDES:
        found = searcher.search_arrays(*QUERIES, k=3, side=side, depth=300, nprobe=nprobe)
        assert not found.proved.any()
    exact = searcher.search_arrays(*QUERIES, k=3, side="query", exact=True)
    of = truth(Recipe(rows_per_shard=100))
    squared = brute(QUERIES.embeddings, QUERIES.structures, of.x, of.s, "query")
    np.testing.assert_array_equal(exact.ids, of.ids[np.argsort(squared, axis=1)[:, :3]])
    assert exact.proved.all()


def test_re_ranking_leaves_the_candidates_as_they_are(searchers) -> None:
    searcher = searchers("IVF4,Flat", "l2")
    plain = searcher.search_arrays(*QUERIES, k=20, side="none", nprobe=2)
    for side in SIDES[1:]:
        adaptive = searcher.search_arrays(*QUERIES, k=20, side=side, depth=20, nprobe=2)
        np.testing.assert_array_equal(np.sort(adaptive.ids, axis=1), np.sort(plain.ids, axis=1))
        assert (adaptive.ids != plain.ids).any()


def test_depth_below_k_means_k(searchers) -> None:
    searcher = searchers("Flat", "l2")
    one = searcher.search_arrays(*QUERIES, k=9, side="both", depth=1)
    other = searcher.search_arrays(*QUERIES, k=9, side="both", depth=9)
    np.testing.assert_array_equal(one.ids, other.ids)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("exact", [False, True])
def test_more_neighbours_than_items_end_where_the_items_end(searchers, side: Side, exact: bool) -> None:
    searcher = searchers("Flat", "l2")
    found = searcher.search_arrays(*QUERIES, k=500, side=side, exact=exact)
    assert found.ids.shape == (25, 500)
    assert ((found.ids >= 0).sum(axis=1) == len(searcher.items)).all()
    assert np.isinf(found.distances[:, -1]).all()
    assert found.proved.all()
    answer = searcher.search(
        embeddings=QUERIES.embeddings[:1], structures=QUERIES.structures[:1], k=500, side=side
    )
    assert len(answer[0].hits) == len(searcher.items) == 120 - 6


@pytest.mark.parametrize("k", [1, 5, 110])
@pytest.mark.parametrize("exact", [False, True])
def test_dead_refused_and_tombstoned_samples_are_never_found(searchers, k: int, exact: bool) -> None:
    searcher = searchers("IVF4,Flat", "l2")
    near = [small_release.random_vectors(40, DIM, seed=n).embeddings for n in range(3)]
    gone = [*RECIPE.refused, *RECIPE.tombstoned, *RECIPE.dead]
    q = np.stack([near[item >> 32][item & 0xFFFFFFFF] for item in gone])
    for side in ("none", "scale"):
        found = searcher.search_arrays(q, k=k, side=side, nprobe=4, exact=exact)
        assert not np.isin(found.ids, gone).any()
        assert (found.ids >= 0).all()


def test_segments_answer_as_one_index(tmp_path: Path) -> None:
    found = []
    for num_segments in (1, 3):
        recipe = Recipe(index_key="IVF4,Flat", num_segments=num_segments)
        searcher = open_release(tmp_path / str(num_segments), recipe)
        found.append(searcher.search_arrays(*QUERIES, k=10, side="both", nprobe=2))
    np.testing.assert_array_equal(found[0].ids, found[1].ids)
    np.testing.assert_array_equal(found[0].distances, found[1].distances)


def test_answers_name_what_they_found(searchers) -> None:
    searcher = searchers("Flat", "l2")
    found = searcher.search_arrays(*QUERIES, k=4)
    answers = searcher.search(embeddings=QUERIES.embeddings, structures=QUERIES.structures, k=4)
    assert [[hit.id for hit in answer.hits] for answer in answers] == found.ids.tolist()
    answer, hit = answers[0], answers[0].hits[0]
    row = (hit.id >> 32) * 40 + (hit.id & 0xFFFFFFFF)
    assert (hit.key, hit.fields) == (f"digit/{row}", {"row": row})
    assert (hit.distance, hit.plain_distance) == (found.distances[0, 0], found.plain_distances[0, 0])
    assert (answer.side, answer.release_id, answer.model_name, answer.model_version) == (
        "both",
        "first",
        "digits",
        "1",
    )
    assert [answer.certainty == "proved" for answer in answers] == found.proved.tolist()
    assert answer.timings.first_stage_ms > 0 < answer.timings.rerank_ms
    assert {item.label for item in searcher.items.draw(500, seed=0)} >= {None, "0", "9"}


def test_a_search_by_key_leaves_the_item_itself_out(searchers) -> None:
    searcher = searchers("Flat", "l2")
    of = truth(RECIPE)
    for row, key in ((1, "digit/1"), (119 - 2 - 4, "digit/117")):
        item = searcher.items.by_key(key)
        assert item is not None
        at = int(np.flatnonzero(of.ids == item.id)[0])
        squared = brute(of.x[[at]], of.s[[at]], of.x, of.s, "both")[0]
        squared[at] = np.inf
        for options in ({"depth": 500}, {"exact": True}):
            hits = searcher.search(keys=[key], k=5, side="both", **options)[0].hits
            assert [hit.id for hit in hits] == of.ids[np.argsort(squared)[:5]].tolist(), row
    several = searcher.search(keys=["digit/1", "digit/2"], k=3)
    assert [len(answer.hits) for answer in several] == [3, 3]


def test_items_are_found_by_id_and_key(searchers) -> None:
    items = searchers("Flat", "l2").items
    item = items.by_id(make_id(2, 1))
    assert item is not None
    assert item == items.by_key("digit/81")
    assert items.by_id(make_id(2, 39)) is None  # refused
    assert items.by_id(make_id(1, 7)) is None  # dead
    assert items.by_id(make_id(77, 0)) is None
    assert items.by_key("digit/79999") is None
    assert items.place(make_id(77, 0)) is None
    drawn = items.draw(20, seed=1)
    assert len({one.id for one in drawn}) == 20
    assert drawn == items.draw(20, seed=1) != items.draw(20, seed=2)


def test_threads_get_what_one_gets(searchers) -> None:
    searcher = searchers("IVF4,Flat", "l2")
    plans = [
        {"side": side, "k": k, "nprobe": nprobe} for side in SIDES for k in (1, 9) for nprobe in (1, 4)
    ] * 4
    alone = [searcher.search_arrays(*QUERIES, **plan) for plan in plans]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda plan: searcher.search_arrays(*QUERIES, **plan), plans))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.distances, other.distances)


BAD = np.full((2, DIM), np.nan, np.float32)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (
            {"embeddings": np.ones((2, 3))},
            ShapeError,
            r"embeddings are \(2, 3\); the release wants \(Q, 16\)",
        ),
        ({"embeddings": np.ones(16)}, ShapeError, r"embeddings are \(16,\)"),
        ({"embeddings": np.ones((0, 16))}, ShapeError, "an empty batch"),
        ({"embeddings": BAD}, ShapeError, "embeddings: row 0 holds NaN"),
        ({"embeddings": np.full((2, 16), 1e39)}, ShapeError, "row 0 holds NaN or infinity"),
        ({"embeddings": np.ones((2, 16)), "structures": BAD}, ShapeError, "structures: row 0 holds NaN"),
        ({"embeddings": np.ones((2, 16)), "structures": np.zeros((2, 16))}, ShapeError, "above 0"),
        ({"embeddings": np.ones((2, 16)), "structures": np.ones((1, 16))}, ShapeError, "1 structures for 2"),
        ({"embeddings": np.ones((2, 16))}, ShapeError, "side 'both' needs structures"),
        ({"keys": ["digit/0"], "k": 0}, ConfigError, "k is 0; expected 1 or more"),
        ({"keys": ["digit/1"], "depth": 0}, ConfigError, "depth is 0"),
        ({"keys": ["digit/1"], "nprobe": -1}, ConfigError, "nprobe is -1"),
        ({"keys": ["digit/1"], "side": "left"}, ConfigError, "side is 'left'; expected one of none, query"),
        ({"keys": []}, ShapeError, "no keys"),
        ({"keys": ["nosuch"]}, ConfigError, "key 'nosuch' is not in release first"),
        ({"keys": ["digit/3"]}, ConfigError, "key 'digit/3' is not in release first"),
        ({}, ConfigError, "takes one of images, embeddings, keys; got none"),
        ({"keys": ["digit/1"], "images": [b""]}, ConfigError, "got images and keys"),
        ({"images": [b"abc"]}, ConfigError, "has no model"),
    ],
)
def test_what_a_search_refuses(searchers, query: dict, error: type[Exception], message: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(error, match=message):
        searchers("Flat", "l2").search(**query)


def test_an_item_without_a_place_in_the_table_is_damage(tmp_path: Path) -> None:
    searcher = open_release(tmp_path, Recipe(num_shards=1))
    searcher.items = Items(replace(searcher.release.items(), ids=np.arange(1, 41)))
    with pytest.raises(ManifestError, match="id 0 is in the index and no item"):
        searcher.search(keys=["digit/4"], k=39)


def test_an_index_of_another_release_is_damage(tmp_path: Path) -> None:
    small_release.publish(tmp_path, Recipe())
    release = releases.open_release(str(tmp_path / "releases"))
    wrong = replace(release, manifest=replace(release.manifest, template_hash="f" * 64))
    with pytest.raises(ManifestError, match="template ffffffffffff; its segments hold 120 in Flat"):
        Searcher.of(wrong, cache=Cache(tmp_path / "cache", 10**9), query_model=None)


@pytest.fixture(scope="module")
def with_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A release whose embeddings a real (untrained) model made, and the folder of that model."""
    root = tmp_path_factory.mktemp("with-model")
    return root, small_release.publish_with_model(root)


def test_an_image_of_the_gallery_finds_itself_first(with_model: tuple[Path, Path]) -> None:
    root, folder = with_model
    cache = Cache(root / "cache", 10**9)
    searcher = Searcher.open(str(root / "releases"), cache=cache, model_folder=folder)
    pictures = [small_release.digit(number) for number in (0, 17, 79)]
    for side in SIDES:
        answers = searcher.search(images=pictures, k=3, side=side)
        assert [answer.hits[0].key for answer in answers] == ["digit/0", "digit/17", "digit/79"]
        assert all(answer.hits[0].distance < 0.02 * answer.hits[2].distance for answer in answers)
    assert answers[0].timings.embed_ms > 0


def test_bytes_that_are_no_image_are_refused_by_number(with_model: tuple[Path, Path]) -> None:
    root, folder = with_model
    cache = Cache(root / "cache", 10**9)
    searcher = Searcher.open(str(root / "releases"), cache=cache, model_folder=folder)
    with pytest.raises(ImageRefused, match="number 1 of 2: not an image"):
        searcher.search(images=[small_release.digit(0), b"not a picture"])
    with pytest.raises(ImageRefused, match="empty"):
        searcher.search(images=[b""])
    with pytest.raises(ImageRefused, match="damaged"):
        searcher.search(images=[small_release.digit(0)[:100]])
    with pytest.raises(ShapeError, match="no images"):
        searcher.search(images=[])


def test_a_model_that_did_not_make_the_release_is_refused_by_name(
    with_model: tuple[Path, Path], tmp_path: Path
) -> None:
    root, folder = with_model
    other = model.load(folder)
    model.fold_scale(other, 2.0)
    model.save(other, tmp_path / "other")
    cache = Cache(root / "cache", 10**9)
    with pytest.raises(ModelMismatch, match="version 1 with digest") as refused:
        Searcher.open(str(root / "releases"), cache=cache, model_folder=tmp_path / "other")
    assert model.digest(other) in str(refused.value)
    assert model.digest(model.load(folder)) in str(refused.value)


@pytest.mark.s3
def test_a_remote_release_is_searched_from_the_cache(s3: str, tmp_path: Path) -> None:
    recipe = Recipe(index_key="IVF4,Flat", num_segments=2)
    release = small_release.publish(tmp_path, recipe, releases_uri=f"{s3}/releases")
    cache = Cache(tmp_path / "cache", 10**9)
    first = Searcher.open(f"{s3}/releases", cache=cache)
    found = first.search_arrays(*QUERIES, k=5, nprobe=4)
    local = open_release(tmp_path / "local", recipe).search_arrays(*QUERIES, k=5, nprobe=4)
    np.testing.assert_array_equal(found.ids, local.ids)
    for stored in (release.manifest.segments[0].file, release.manifest.vectors[0].embedding):
        storage.delete(storage.join(f"{s3}/releases", stored.name))  # the cache is enough from now on
    again = Searcher.open(f"{s3}/releases", cache=cache).search_arrays(*QUERIES, k=5, nprobe=4)
    np.testing.assert_array_equal(found.ids, again.ids)
