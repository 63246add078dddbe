"""The Searcher on real releases: equal to brute force where it says so, and clear in what it refuses."""

import functools
from collections.abc import Callable
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
from namr.model.distances import for_search
from namr.release import takedowns
from namr.search import vectors
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.sides import SIDES, Metric, Side
from namr.store import storage
from namr.store.cache import Cache
from tests import small_release
from tests.search.test_rerank import brute
from tests.small_release import Recipe

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
    found = searchers(key, metric).search_arrays(*QUERIES, options=SearchOptions(k=7, side="none", nprobe=4))
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
    found = searchers("IVF4,Flat", metric).search_arrays(
        *QUERIES, options=SearchOptions(k=7, side=side, nprobe=4, **options)
    )
    of = truth(Recipe(**{**vars(RECIPE), "metric": metric}))
    x = of.indexed if (how, side) == ("deep", "none") else of.x  # plain search compares what the index holds
    squared = brute(compared_queries(metric), QUERIES.structures, x, of.s, side)
    plain = brute(compared_queries(metric), QUERIES.structures, x, of.s, "none")
    order = np.argsort(squared, axis=1)[:, :7]
    assert found.proved.all()
    np.testing.assert_array_equal(found.ids, of.ids[order])
    for got, want in ((found.distances, squared), (found.plain_distances, plain)):
        np.testing.assert_allclose(got, np.sqrt(np.take_along_axis(want, order, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "nprobe"), [("IVF4,Flat", 3), ("IVF4,SQ8", 4), ("IVF4,PQ4x8", 4), ("IVF4,PQ8x4fs", 4)]
)
def test_an_approximate_first_stage_proves_nothing(tmp_path: Path, key: str, nprobe: int) -> None:
    searcher = open_release(tmp_path, Recipe(index_key=key, rows_per_shard=100))
    for side in SIDES:
        found = searcher.search_arrays(
            *QUERIES, options=SearchOptions(k=3, side=side, depth=300, nprobe=nprobe)
        )
        assert not found.proved.any()
    exact = searcher.search_arrays(*QUERIES, options=SearchOptions(k=3, side="query", exact=True))
    of = truth(Recipe(rows_per_shard=100))
    squared = brute(QUERIES.embeddings, QUERIES.structures, of.x, of.s, "query")
    np.testing.assert_array_equal(exact.ids, of.ids[np.argsort(squared, axis=1)[:, :3]])
    assert exact.proved.all()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("key", ["IVF4,SQ8", "IVF4,PQ8x4fs"])
def test_candidates_of_a_compressed_index_are_ordered_by_the_stored_vectors(
    searchers, key: str, metric: Metric
) -> None:
    """With as many candidates as there are items plain search is brute force over what is stored."""
    searcher = searchers(key, metric)
    found = searcher.search_arrays(*QUERIES, options=SearchOptions(k=7, side="none", depth=120, nprobe=4))
    of = truth(Recipe(**{**vars(RECIPE), "metric": metric}))
    squared = brute(compared_queries(metric), QUERIES.structures, of.x, of.s, "none")
    order = np.argsort(squared, axis=1)[:, :7]
    np.testing.assert_array_equal(found.ids, of.ids[order])
    np.testing.assert_allclose(found.distances, np.sqrt(np.take_along_axis(squared, order, 1)), rtol=1e-5)
    np.testing.assert_array_equal(found.distances, found.plain_distances)
    assert not found.proved.any()


def test_re_ranking_leaves_the_candidates_as_they_are(searchers) -> None:
    searcher = searchers("IVF4,Flat", "l2")
    plain = searcher.search_arrays(*QUERIES, options=SearchOptions(k=20, side="none", nprobe=2))
    for side in SIDES[1:]:
        adaptive = searcher.search_arrays(
            *QUERIES, options=SearchOptions(k=20, side=side, depth=20, nprobe=2)
        )
        np.testing.assert_array_equal(np.sort(adaptive.ids, axis=1), np.sort(plain.ids, axis=1))
        assert (adaptive.ids != plain.ids).any()


def test_depth_below_k_means_k(searchers) -> None:
    searcher = searchers("Flat", "l2")
    one = searcher.search_arrays(*QUERIES, options=SearchOptions(k=9, side="both", depth=1))
    other = searcher.search_arrays(*QUERIES, options=SearchOptions(k=9, side="both", depth=9))
    np.testing.assert_array_equal(one.ids, other.ids)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("exact", [False, True])
def test_more_neighbours_than_items_end_where_the_items_end(searchers, side: Side, exact: bool) -> None:
    searcher = searchers("Flat", "l2")
    found = searcher.search_arrays(*QUERIES, options=SearchOptions(k=500, side=side, exact=exact))
    assert found.ids.shape == (25, 500)
    assert ((found.ids >= 0).sum(axis=1) == len(searcher.items)).all()
    assert np.isinf(found.distances[:, -1]).all()
    assert found.proved.all()
    answer = searcher.search(
        embeddings=QUERIES.embeddings[:1],
        structures=QUERIES.structures[:1],
        options=SearchOptions(k=500, side=side),
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
        found = searcher.search_arrays(q, options=SearchOptions(k=k, side=side, nprobe=4, exact=exact))
        assert not np.isin(found.ids, gone).any()
        assert (found.ids >= 0).all()


def test_segments_answer_as_one_index(tmp_path: Path) -> None:
    found = []
    for num_segments in (1, 3):
        recipe = Recipe(index_key="IVF4,Flat", num_segments=num_segments)
        searcher = open_release(tmp_path / str(num_segments), recipe)
        found.append(searcher.search_arrays(*QUERIES, options=SearchOptions(k=10, side="both", nprobe=2)))
    np.testing.assert_array_equal(found[0].ids, found[1].ids)
    np.testing.assert_array_equal(found[0].distances, found[1].distances)


def test_answers_name_what_they_found(searchers) -> None:
    searcher = searchers("Flat", "l2")
    found = searcher.search_arrays(*QUERIES, options=SearchOptions(k=4))
    answers = searcher.search(
        embeddings=QUERIES.embeddings, structures=QUERIES.structures, options=SearchOptions(k=4)
    )
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
    assert answer.timings.filter_ms == 0
    (filtered,) = searcher.search(keys=["digit/1"], options=SearchOptions(k=4, filter={"label": "1"}))
    assert filtered.timings.filter_ms > 0
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
            hits = searcher.search(keys=[key], options=SearchOptions(k=5, side="both", **options))[0].hits
            assert [hit.id for hit in hits] == of.ids[np.argsort(squared)[:5]].tolist(), row
    several = searcher.search(keys=["digit/1", "digit/2"], options=SearchOptions(k=3))
    assert [len(answer.hits) for answer in several] == [3, 3]


def test_threads_get_what_one_gets(searchers) -> None:
    searcher = searchers("IVF4,Flat", "l2")
    plans = [
        {"side": side, "k": k, "nprobe": nprobe} for side in SIDES for k in (1, 9) for nprobe in (1, 4)
    ] * 4
    alone = [searcher.search_arrays(*QUERIES, options=SearchOptions(**plan)) for plan in plans]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda plan: searcher.search_arrays(*QUERIES, options=SearchOptions(**plan)), plans)
        )
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.distances, other.distances)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ({"embeddings": np.ones((2, 3))}, ShapeError, r"embeddings are \(2, 3\)"),
        ({"embeddings": np.ones((2, 16))}, ShapeError, "side 'both' needs structures"),
        ({"keys": []}, ShapeError, "no keys"),
        ({"keys": ["nosuch"]}, ConfigError, "key 'nosuch' is not in release first"),
        ({"keys": ["digit/3"]}, ConfigError, "key 'digit/3' is not in release first"),
        ({}, ConfigError, "takes one of images, embeddings, keys; got none"),
        ({"keys": ["digit/1"], "images": [b""]}, ConfigError, "got images and keys"),
        ({"images": [b"abc"]}, ConfigError, "has no model"),
    ],
)
def test_what_a_search_refuses(searchers, query: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        searchers("Flat", "l2").search(**query)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("exact", [False, True])
def test_the_largest_queries_get_all_their_neighbours_and_finite_distances(
    searchers, metric: Metric, exact: bool
) -> None:
    x, s = np.full((25, DIM), 1e14, np.float32), np.full((25, DIM), 65504, np.float32)
    for side in SIDES:
        answers = searchers("IVF4,Flat", metric).search(
            embeddings=x, structures=s, options=SearchOptions(k=5, side=side, nprobe=4, exact=exact)
        )
        assert {len(answer.hits) for answer in answers} == {5}
        assert np.isfinite([[hit.distance, hit.plain_distance] for hit in answers[0].hits]).all()
    for larger in (1.1e14, 1e19, 3e38):
        with pytest.raises(ShapeError, match=r"row 0 holds .*; the largest that can be compared is 1e\+14"):
            searchers("Flat", metric).search_arrays(np.full((2, DIM), larger), s[:2])


def flip(searcher: Searcher, item_id: int, what: str, value: float) -> None:
    """Damage the stored vector of an item where it lies, as a disk might."""
    (stored,) = searcher.manifest.vector_files
    written = np.load(Path(searcher.release.releases_uri, stored.file.name), mmap_mode="r+")
    (row,) = small_release.places_of(searcher.release).of(np.array([item_id]))
    written[row, ["embedding", "structure"].index(what), 3] = value
    written.flush()


@pytest.mark.parametrize(
    ("what", "value"), [("embedding", np.nan), ("embedding", np.inf), ("structure", -np.inf)]
)
def test_damaged_vectors_are_the_releases_fault_whoever_asks(tmp_path: Path, what: str, value: float) -> None:
    searcher = open_release(tmp_path, Recipe(num_shards=1))
    flip(searcher, 7, what, value)
    with pytest.raises(ManifestError, match="the re-rank vectors of item 7 are damaged; restore them"):
        searcher.search(keys=["digit/7"])
    for options in (SearchOptions(k=3, side="both"), SearchOptions(k=3, side="both", exact=True)):
        with pytest.raises(ManifestError, match="item 7 is in the index and has no re-rank vector, or a dam"):
            searcher.search(keys=["digit/8"], options=options)


def test_what_is_hidden_is_found_by_nobody_from_then_on(tmp_path: Path) -> None:
    """By vector, by another's key, by its own key, in draws and counts; and back when nothing is hidden."""
    searcher = open_release(tmp_path, RECIPE)
    near = small_release.random_vectors(40, DIM, seed=2)
    q, s = near.embeddings[[5]], near.structures[[5]]
    gone = make_id(2, 5)
    for side in SIDES:
        for exact in (False, True):
            options = SearchOptions(k=3, side=side, exact=exact)
            searcher.hide(np.empty(0, np.int64))
            before = searcher.search_arrays(q, s, options=options)
            assert before.ids[0, 0] == gone
            searcher.hide(np.array([gone, make_id(77, 1)]))
            after = searcher.search_arrays(q, s, options=options)
            assert after.ids[0, :2].tolist() == before.ids[0, 1:].tolist()
            assert after.proved[0] == before.proved[0]
    hits = searcher.search(keys=["digit/84"], options=SearchOptions(k=500))[0].hits
    assert len(hits) == len(searcher.items) - 1 == 120 - 6 - 1 - 1
    assert gone not in [hit.id for hit in hits]
    with pytest.raises(ConfigError, match="'digit/85' is not in release first"):
        searcher.search(keys=["digit/85"])
    assert searcher.info().num_items == 113
    searcher.hide(np.empty(0, np.int64))
    assert len(searcher.items) == 114


def test_what_was_taken_down_is_hidden_when_a_release_is_opened(tmp_path: Path) -> None:
    release = small_release.publish(tmp_path, Recipe())
    uri, dataset_uri = release.releases_uri, release.manifest.dataset_uri
    takedowns.take_down(uri, dataset_uri, [make_id(1, 1)])
    searcher = Searcher.open(uri, cache=Cache(tmp_path / "cache", 10**9))
    assert searcher.items.by_id(make_id(1, 1)) is None
    takedowns.take_down(uri, str(tmp_path / "another"), [make_id(1, 2)])
    again = Searcher.open(uri, cache=Cache(tmp_path / "cache", 10**9))
    assert again.items.by_id(make_id(1, 2)) is not None


class Stopped(Exception):
    pass


@pytest.mark.parametrize("options", [SearchOptions(), SearchOptions(side="none"), SearchOptions(exact=True)])
def test_a_search_that_is_stopped_ends_with_what_stop_raises(
    searchers, options: SearchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_BLOCK_ROWS", 50)
    num_asked = 0

    def stop_at(number: int) -> Callable[[], None]:
        def stop() -> None:
            nonlocal num_asked
            num_asked += 1
            if num_asked == number:
                raise Stopped

        return stop

    searcher = searchers("Flat", "l2")
    searcher.search_arrays(*QUERIES, options=options, stop=stop_at(10**6))
    num_stages, num_asked = num_asked, 0
    for number in range(1, num_stages + 1):
        num_asked = 0
        with pytest.raises(Stopped):
            searcher.search_arrays(*QUERIES, options=options, stop=stop_at(number))
    assert num_stages >= (1 if options.side == "none" else 2)


def test_an_item_without_a_place_in_the_table_is_damage(tmp_path: Path) -> None:
    whole = open_release(tmp_path, Recipe(num_shards=1))
    table = replace(small_release.table_of(whole.release), ids=np.arange(1, 41))
    searcher = small_release.with_items(whole, small_release.as_items(table))
    with pytest.raises(ManifestError, match="id 0 is in the index and no item"):
        searcher.search(keys=["digit/4"], options=SearchOptions(k=39))


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
        answers = searcher.search(images=pictures, options=SearchOptions(k=3, side=side))
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
    found = first.search_arrays(*QUERIES, options=SearchOptions(k=5, nprobe=4))
    local = open_release(tmp_path / "local", recipe).search_arrays(
        *QUERIES, options=SearchOptions(k=5, nprobe=4)
    )
    np.testing.assert_array_equal(found.ids, local.ids)
    for stored in (release.manifest.segments[0].file, release.manifest.vector_files[0].file):
        storage.delete(storage.join(f"{s3}/releases", stored.name))  # the cache is enough from now on
    again = Searcher.open(f"{s3}/releases", cache=cache).search_arrays(
        *QUERIES, options=SearchOptions(k=5, nprobe=4)
    )
    np.testing.assert_array_equal(found.ids, again.ids)
