"""Exact neighbours of a release's items: by one process, by many tasks, on a disk and in an object store."""

from pathlib import Path

import numpy as np
import pytest

from namr import ray_connection
from namr.data.shards import make_id
from namr.errors import ManifestError
from namr.nightly import truth
from namr.nightly.truth import Truth
from namr.search import queries
from namr.search.queries import Queries
from namr.search.searcher import Searcher
from namr.sides import SIDES
from namr.store.cache import Cache
from tests import small_release
from tests.search.test_exact import K, by_itself
from tests.small_release import Recipe

RECIPE = Recipe(
    index_key="IVF8,Flat",
    refused=[make_id(0, 3)],
    tombstoned=[make_id(1, 0)],
    dead=[make_id(1, 7), make_id(2, 9)],
    num_vector_files=2,
)
SHARES = (0.5, 0.1)


def opened(root: Path, recipe: Recipe = RECIPE, **more: str) -> tuple[Searcher, Cache]:
    release = small_release.publish(root, recipe, **more)
    cache = Cache(root / "cache", 1 << 30)
    return Searcher.of(release, cache=cache, query_model=None), cache


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Searcher, Cache]:
    return opened(tmp_path_factory.mktemp("release"))


def asked_of(searcher: Searcher) -> Queries:
    return queries.stored(np.array([item.id for item in searcher.items][::7], np.int64), searcher.vectors)


def assert_same(one: Truth, other: Truth) -> None:
    for a, b in zip([one.of_all, *one.of_shares], [other.of_all, *other.of_shares], strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.squared, b.squared)


def test_every_side_is_the_exact_search_of_it(release: tuple[Searcher, Cache]) -> None:
    searcher, asked = release[0], asked_of(release[0])
    found = truth.neighbours(searcher, asked, k=K)
    assert found.of_shares == []
    for side in SIDES:
        one = by_itself(asked, side, searcher.vectors, hidden=searcher.hidden)
        np.testing.assert_array_equal(found.of_all.of(side), one)


@pytest.mark.parametrize("share", SHARES)
def test_a_share_is_searched_as_if_nothing_else_were_there(
    release: tuple[Searcher, Cache], share: float
) -> None:
    searcher, asked = release[0], asked_of(release[0])
    (found,) = truth.neighbours(searcher, asked, k=K, shares=[share]).of_shares
    ids = np.array([item.id for item in searcher.items], np.int64)
    allowed = ids[truth.is_in_share(ids, share)]
    assert 0 < len(allowed) < 0.75 * len(ids)
    one = by_itself(asked, "none", searcher.vectors, hidden=searcher.hidden, allowed=allowed)
    np.testing.assert_array_equal(found.of("none"), one)


def test_shares_are_asked_by_few_queries_from_first_to_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "_ASKED_OF_SHARES", 4)
    asked = Queries(np.arange(10.0, dtype=np.float32)[:, None], None, None)
    assert truth.thinned(asked).x[:, 0].tolist() == [0, 3, 6, 9]
    assert truth.thinned(asked.rows(slice(0, 3))).x[:, 0].tolist() == [0, 1, 2]


def test_what_was_taken_down_since_is_not_found(tmp_path: Path) -> None:
    searcher, _ = opened(tmp_path)
    asked = asked_of(searcher)
    gone = np.unique(truth.neighbours(searcher, asked, k=1).of_all.ids)
    searcher.hide(gone[~np.isin(gone, asked.own_ids)])
    found = truth.neighbours(searcher, asked, k=K).of_all.ids
    assert not np.isin(found, searcher.hidden).any()


@pytest.mark.parametrize("rows_per_task", [1, 17, 100])
def test_neither_the_number_of_tasks_nor_of_rows_at_once_changes_anything(
    release: tuple[Searcher, Cache], rows_per_task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher, cache = release
    asked = asked_of(searcher)
    alone = truth.neighbours(searcher, asked, k=K, shares=SHARES, cache=cache)
    ranges: list[tuple[int, int, int]] = []

    def run_here(function, tasks, **_):
        for at, task in enumerate(tasks):
            ranges.append((task.file, task.start, len(task.ids)))
            yield at, function(task)

    monkeypatch.setattr(ray_connection, "connect", lambda: None)
    monkeypatch.setattr(ray_connection, "map_tasks", run_here)
    monkeypatch.setattr(truth, "_ROWS_PER_TASK", rows_per_task)
    monkeypatch.setattr(truth, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(truth, "_PAIRS", 1)
    assert_same(truth.neighbours(searcher, asked, k=K, shares=SHARES, cache=cache), alone)
    assert sum(num for _, _, num in ranges) == len(searcher.vectors.ids())
    assert {file for file, _, _ in ranges} == {0, 1}
    assert max(num for _, _, num in ranges) <= rows_per_task


def test_a_file_that_was_damaged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher, cache = opened(tmp_path)
    asked = asked_of(searcher)
    path = searcher.release.path(searcher.manifest.vector_files[1].file, cache)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(ray_connection, "connect", lambda: None)
    monkeypatch.setattr(ray_connection, "map_tasks", lambda run, tasks, **_: enumerate(map(run, tasks)))
    monkeypatch.setattr(truth, "_ROWS_PER_TASK", 20)
    with pytest.raises(ManifestError, match="is damaged"):
        truth.neighbours(searcher, asked, k=K, cache=cache)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_ray_tasks_find_the_same_on_a_disk(
    release: tuple[Searcher, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher, cache = release
    asked = asked_of(searcher)
    alone = truth.neighbours(searcher, asked, k=K, shares=SHARES)
    monkeypatch.setattr(truth, "_ROWS_PER_TASK", 20)
    assert_same(truth.neighbours(searcher, asked, k=K, shares=SHARES, cache=cache), alone)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.s3
@pytest.mark.parametrize("is_here", [True, False], ids=["with the driver's copies", "on another machine"])
def test_ray_tasks_find_the_same_in_an_object_store(
    tmp_path: Path, s3: str, is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher, cache = opened(tmp_path, releases_uri=f"{s3}/releases")
    asked = asked_of(searcher)
    alone = truth.neighbours(searcher, asked, k=K, shares=SHARES)
    monkeypatch.setattr(truth, "_ROWS_PER_TASK", 20)
    folder = cache if is_here else Cache(tmp_path / "of another machine", 1 << 30)
    assert_same(truth.neighbours(searcher, asked, k=K, shares=SHARES, cache=folder), alone)
