"""Candidates from a real index: all that is not hidden, in pieces as at once, and an end when asked for."""

from pathlib import Path

import numpy as np
import pytest

from namr.index import ivf
from namr.search import first_stage

NONE = np.empty(0, np.int64)
NUM, DIM = 400, 8


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((NUM, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def index(x: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> ivf.Index:
    path = tmp_path_factory.mktemp("index") / "index.faiss"
    template = ivf.train_template(x, "IVF4,Flat", seed=0, num_threads=1)
    ivf.build_part(template, [(x, np.arange(NUM))], path, num_threads=1)
    return ivf.open_index(path)


def order(x: np.ndarray, q: np.ndarray, hidden: np.ndarray, num: int) -> np.ndarray:
    squared = ((q[:, None].astype(np.float64) - x) ** 2).sum(2)
    squared[:, hidden] = np.inf
    return np.argsort(squared, axis=1)[:, :num]


@pytest.mark.parametrize("num_hidden", [0, 1, 100, 395])
def test_hidden_neighbours_are_passed_over_however_many_lie_in_front(
    index: ivf.Index, x: np.ndarray, num_hidden: int
) -> None:
    """The hidden ones are those nearest to the first query, which is then searched deeper than the others."""
    q = x[:30]
    hidden = np.sort(order(x, q, NONE, NUM)[0, :num_hidden])
    found = first_stage.candidates(index, q, 5, nprobe=4, hidden=hidden)
    np.testing.assert_array_equal(found.ids, order(x, q, hidden, 5))
    assert (np.diff(found.squared, axis=1) >= 0).all()


def test_where_fewer_are_left_than_asked_for_the_rest_is_nothing(index: ivf.Index, x: np.ndarray) -> None:
    found = first_stage.candidates(index, x[:3], 10, nprobe=4, hidden=np.arange(3, NUM), own_ids=np.arange(3))
    assert np.sort(found.ids[:, :2], axis=1).tolist() == [[1, 2], [0, 2], [0, 1]]
    assert (found.ids[:, 2:] == -1).all()
    assert np.isinf(found.squared[:, 2:]).all()
    more = first_stage.candidates(index, x[:3], NUM + 7, nprobe=4, hidden=NONE)
    assert (more.ids[:, NUM:] == -1).all()
    assert (np.sort(more.ids[:, :NUM], axis=1) == np.arange(NUM)).all()


def test_a_query_of_the_gallery_does_not_find_itself(index: ivf.Index, x: np.ndarray) -> None:
    found = first_stage.candidates(index, x[:50], 4, nprobe=4, hidden=NONE, own_ids=np.arange(50))
    np.testing.assert_array_equal(found.ids, order(x, x[:50], NONE, 5)[:, 1:])


@pytest.mark.parametrize(("limit", "value"), [("_CELLS", 60), ("_PRODUCTS", 3 * NUM * DIM)])
def test_pieces_are_the_whole_and_stop_is_asked_before_each(
    index: ivf.Index, x: np.ndarray, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = first_stage.candidates(index, x[:40], 20, nprobe=4, hidden=NONE)
    monkeypatch.setattr(first_stage, limit, value)
    asked: list[int] = []
    in_pieces = first_stage.candidates(index, x[:40], 20, nprobe=4, hidden=NONE, stop=lambda: asked.append(1))
    np.testing.assert_array_equal(at_once.ids, in_pieces.ids)
    assert len(asked) == -(-40 // 3)


@pytest.mark.parametrize(
    ("key", "nprobe", "exact"),
    [("IVF4,Flat", 4, True), ("IVF4,Flat", 3, False), ("Flat", 1, True), ("IVF4,SQ8", 4, False)],
)
def test_only_a_full_scan_of_plain_vectors_is_exact(
    x: np.ndarray, tmp_path: Path, key: str, nprobe: int, exact: bool
) -> None:
    path = tmp_path / "index.faiss"
    template = ivf.train_template(x, key, seed=0, num_threads=1)
    ivf.build_part(template, [(x, np.arange(NUM))], path, num_threads=1)
    assert first_stage.is_exact(ivf.open_index(path), nprobe) == exact


@pytest.mark.parametrize("step", [1, 50])
def test_what_is_hidden_far_from_every_query_changes_nothing(
    x: np.ndarray, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are not ordered anew then, and no candidate more than was asked for comes out."""
    path, own = tmp_path / "index.faiss", np.arange(1000, 1030)
    template = ivf.train_template(x, "IVF4,SQ8", seed=0, num_threads=1)
    ivf.build_part(template, [(x, np.arange(NUM))], path, num_threads=1)
    index, q = ivf.open_index(path), x[:30]
    far = np.sort(order(x, q[:1], NONE, NUM)[0, -1:])
    monkeypatch.setattr(first_stage, "_CELLS", step * 7)
    whole = first_stage.candidates(index, q[:1], 5, nprobe=4, hidden=NONE)
    for more in ({"hidden": far}, {"hidden": NONE, "own_ids": own[:1]}, {"hidden": far, "own_ids": own[:1]}):
        found = first_stage.candidates(index, q[:1], 5, nprobe=4, **more)
        np.testing.assert_array_equal(found.ids, whole.ids)
        np.testing.assert_array_equal(found.squared, whole.squared)
    assert first_stage.candidates(index, q, 5, nprobe=4, hidden=NONE, own_ids=own).ids.shape == (30, 5)
