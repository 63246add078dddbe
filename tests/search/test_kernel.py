"""The compiled loop against two loops in float64, on files as a release has them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namr.search import kernel
from namr.sides import SIDES, Side


class Asked(NamedTuple):
    q: np.ndarray
    s_q: np.ndarray
    candidates: np.ndarray


class Stored(NamedTuple):
    """Vectors of shard 2 by row, (N, 2, D) float16, and where they lie."""

    vectors: np.ndarray
    files: list[np.ndarray]
    table: kernel.Table


def stored(vectors: np.ndarray, *, num_files: int, rng: np.random.Generator) -> Stored:
    order = rng.permutation(len(vectors))
    files = [vectors[rows] for rows in np.array_split(order, num_files)]
    rows = np.empty(len(vectors), np.int32)
    rows[order] = np.arange(len(vectors))
    table = kernel.Table(
        starts=np.array([0, 0, 0, 0]),
        sizes=np.array([0, 0, len(vectors), 0]),
        rows=rows,
        addresses=np.array([file.ctypes.data for file in files]),
        firsts=np.cumsum([0, *(len(file) for file in files)]),
    )
    return Stored(vectors, files, table)


def nearest(
    asked: Asked, of: Stored, *, side: Side, k: int
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    shape = len(asked.q), k
    found = np.full(shape, -7), np.full(shape, np.nan), np.full(shape, np.nan)
    compiled = kernel.nearest(of.table.rows.dtype)
    return compiled(*asked, *of.table, SIDES.index(side), *found), *found


def one_by_one(q: np.ndarray, s_q: np.ndarray, vectors: np.ndarray, side: Side) -> float:
    """The squared distance, one dimension at a time."""
    x, s = vectors.astype(np.float64).tolist()
    scale, squared = (sum(s) / len(s)) ** 0.5, 0.0
    for d in range(len(x)):
        weight = {"none": 1.0, "query": s_q[d], "both": (float(s_q[d]) + s[d]) / 2, "scale": scale}[side]
        squared += float(weight) * (float(q[d]) - x[d]) ** 2
    return squared


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 70),
    num=st.integers(1, 40),
    k=st.integers(1, 45),
    num_files=st.integers(1, 4),
    side=st.sampled_from(SIDES),
    exponent=st.integers(-24, 3),
    seed=st.integers(0, 10**6),
)
def test_it_finds_what_two_loops_in_float64_find(
    dim: int, num: int, k: int, num_files: int, side: Side, exponent: int, seed: int
) -> None:
    """Of any size: the smallest are float16's subnormal numbers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num, dim)) * 2.0**exponent
    vectors = np.stack([x, rng.uniform(0.5, 1.5, (num, dim))], axis=1).astype(np.float16)
    of = stored(vectors, num_files=num_files, rng=rng)
    rows = np.stack([rng.permutation(num) for _ in range(3)])
    is_left_out = rng.uniform(size=rows.shape) < 0.2
    asked = Asked(
        (rng.standard_normal((3, dim)) * 2.0**exponent).astype(np.float32),
        rng.uniform(0.5, 1.5, (3, dim)).astype(np.float32),
        np.where(is_left_out, -1, (2 << 32) + rows),
    )
    failed, ids, squared, plain_squared = nearest(asked, of, side=side, k=k)
    assert failed == -1
    for query in range(3):
        kept = rows[query][~is_left_out[query]]
        by_side, plainly = (
            np.array([one_by_one(asked.q[query], asked.s_q[query], vectors[row], each) for row in kept])
            for each in (side, "none")
        )
        num_found = min(k, len(kept))
        found = ids[query, :num_found] - (2 << 32)
        assert len(set(found.tolist())) == num_found and set(found.tolist()) <= set(kept.tolist())
        at = [kept.tolist().index(row) for row in found.tolist()]
        np.testing.assert_allclose(squared[query, :num_found], np.sort(by_side)[:num_found], rtol=1e-5)
        np.testing.assert_allclose(squared[query, :num_found], by_side[at], rtol=1e-5)
        np.testing.assert_allclose(plain_squared[query, :num_found], plainly[at], rtol=1e-5)
        assert (ids[query, num_found:] == -1).all()
        assert np.isposinf(squared[query, num_found:]).all()
        assert np.isposinf(plain_squared[query, num_found:]).all()


def test_every_float16_is_read_as_what_it_is() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16)
    of = stored(
        np.stack([values, np.ones_like(values)], axis=1)[:, :, None],
        num_files=1,
        rng=np.random.default_rng(0),
    )
    for row in range(0, 1 << 16, 1 << 8):
        some = slice(row, row + (1 << 8))
        ids = (2 << 32) + np.arange(some.start, some.stop)[:, None]
        zeros = np.zeros((len(ids), 1), np.float32)
        failed, _, squared, _ = nearest(Asked(zeros, zeros, ids), of, side="none", k=1)
        usable = np.isfinite(values[some])
        assert failed == (-1 if usable.all() else int(np.argmin(usable)))
        read = values[some][: len(ids) if failed < 0 else failed].astype(np.float32)
        np.testing.assert_array_equal(squared[: len(read), 0], read**2)
    assert nearest(Asked(zeros[:1], zeros[:1], ids[:1]), of, side="none", k=1)[0] == 0  # NaN


@pytest.mark.parametrize("side", SIDES)
def test_what_is_equally_far_comes_by_id(side: Side) -> None:
    of = stored(np.ones((50, 2, 12), np.float16), num_files=3, rng=np.random.default_rng(0))
    zeros = np.zeros((1, 12), np.float32)
    for k in (1, 7, 50):
        rows = np.random.default_rng(k).permutation(50)
        ids = nearest(Asked(zeros, zeros + 1, (2 << 32) + rows[None]), of, side=side, k=k)[1]
        assert (ids[0] - (2 << 32)).tolist() == list(range(k))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_the_first_damaged_vector_is_told(side: Side, damage: float, place: int) -> None:
    vectors = np.ones((9, 2, 40), np.float16)
    vectors[[4, 7], place, 33] = damage
    of = stored(vectors, num_files=2, rng=np.random.default_rng(0))
    zeros = np.zeros((2, 40), np.float32)
    ids = (2 << 32) + np.array([[0, 1, 2, 3], [-1, 7, 4, 8]])
    ids[1, 0] = -1
    is_read = place == 0 or side in ("both", "scale")
    assert nearest(Asked(zeros, zeros + 1, ids), of, side=side, k=2)[0] == (5 if is_read else -1)


@pytest.mark.parametrize("item", [9 + (2 << 32), 1 << 32, 3 << 32, 99 << 32, 2**63 - 1])
def test_an_id_without_vectors_is_told(item: int) -> None:
    of = stored(np.ones((9, 2, 4), np.float16), num_files=2, rng=np.random.default_rng(0))
    zeros = np.zeros((1, 4), np.float32)
    assert nearest(Asked(zeros, zeros, np.array([[2 << 32, item]])), of, side="none", k=2)[0] == 1


@pytest.mark.parametrize("row", [-1, 9])
def test_a_row_that_no_file_has_is_told(row: int) -> None:
    of = stored(np.ones((9, 2, 4), np.float16), num_files=2, rng=np.random.default_rng(0))
    of.table.rows[3] = row
    zeros = np.zeros((1, 4), np.float32)
    assert nearest(Asked(zeros, zeros, np.array([[(2 << 32) + 3]])), of, side="none", k=1)[0] == 0


OLD_PROCESSOR = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
PROGRAM = """
import numpy as np
from namr.search import kernel
file = np.array([[[1, 2, 6e-8], [1, 4, 1]]], np.float16)
one = np.array([1])
address, firsts = one * file.ctypes.data, np.array([0, 1])
table = kernel.Table(np.array([0, 1]), np.array([1, 0]), np.array([0]), address, firsts)
found = np.zeros((1, 1), np.int64), np.zeros((1, 1)), np.zeros((1, 1))
q = np.zeros((1, 3), np.float32)
assert kernel.nearest(np.dtype(np.int64))(q, q + 2, np.zeros((1, 1), np.int64), *table, 2, *found) == -1
print(*found[1][0], *found[2][0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("has_cache", [True, False])
def test_it_runs_on_an_old_processor_and_where_nothing_can_be_kept(tmp_path: Path, has_cache: bool) -> None:
    """No folder can be made below a file. What was kept and is damaged is compiled anew."""
    (tmp_path / "file").touch()
    cache = tmp_path / ("cache" if has_cache else "file/cache")
    places = {"NUMBA_CACHE_DIR": str(cache), "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    for damaged in ("nothing", ".nbi", ".nbc"):
        for kept in cache.rglob(f"kernel*{damaged}") if has_cache else ():
            kept.write_bytes(b"")
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, **OLD_PROCESSOR, **places},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.split() == ["13.5", "5.0"]
        assert bool(list(tmp_path.rglob("kernel*.nbc"))) == has_cache
