"""The row of every id, against a dictionary; and tables that can't be."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from namr.errors import ManifestError
from namr.release import arrays, places
from namr.release.places import Places


def ids_of(shards: np.ndarray) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *((n << 32) + np.arange(size) for n, size in shards)])


@given(
    numbers=st.sets(st.integers(0, 40), max_size=6),
    sizes=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_id_is_found_in_its_row_and_no_other(
    numbers: set[int], sizes: list[int], seed: int, share: float
) -> None:
    """Empty shards and numbers that are not there among them."""
    shards = np.array(list(zip(sorted(numbers), sizes, strict=False)), np.int64).reshape(-1, 2)
    rng, ids = np.random.default_rng(seed), ids_of(shards)
    lying = rng.permutation(ids)[: round(share * len(ids))]
    found = Places(shards, places.rows_of(lying, shards))
    row_of = {item: row for row, item in enumerate(lying.tolist())}
    asked = np.array(
        [n << 32 | row for n in (*range(42), 1 << 20) for row in (0, 1, 4, 5, 1 << 31)], np.int64
    )
    assert found.of(asked).tolist() == [row_of.get(item, -1) for item in asked.tolist()]
    assert found.ids(len(lying)).tolist() == lying.tolist()
    assert found.of(lying).dtype == np.int64


def test_an_id_below_zero_has_no_row() -> None:
    shards = np.array([[0, 3]])
    assert Places(shards, np.arange(3)).of(np.array([-1, 2, -(1 << 40)])).tolist() == [-1, 2, -1]


def test_rows_take_four_bytes_while_they_fit() -> None:
    assert places.dtype_of(2**31 - 1) is np.int32
    assert places.dtype_of(2**31) is np.int64
    assert places.rows_of(np.array([1]), np.array([[0, 2]])).dtype == np.int32


def test_an_id_of_no_sample_can_not_be_placed() -> None:
    with pytest.raises(ManifestError, match="id 2 is of none of the 2 samples"):
        places.rows_of(np.array([0, 2]), np.array([[0, 2]]))


def test_places_are_mapped_and_have_to_be_of_all_samples(tmp_path: Path) -> None:
    shards, rows = tmp_path / "shards.npy", tmp_path / "rows.npy"
    shards.write_bytes(arrays.encode_array(np.array([[4, 2], [7, 1]])))
    rows.write_bytes(arrays.encode_array(np.array([1, -1, 0], np.int32)))
    opened = Places.open(shards, rows, num_rows=2)
    assert opened.of(np.array([4 << 32, (4 << 32) + 1, 7 << 32])).tolist() == [1, -1, 0]
    with pytest.raises(ManifestError, match=r"int32; expected \(any\) int64"):
        Places.open(shards, rows, num_rows=1 << 31)
    rows.write_bytes(arrays.encode_array(np.array([1, -1], np.int32)))
    with pytest.raises(ManifestError, match="the shards have 3 samples, and 2 places are known"):
        Places.open(shards, rows, num_rows=2)
