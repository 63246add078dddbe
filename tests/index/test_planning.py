"""What a plan promises is what an index takes."""

from pathlib import Path

import numpy as np
import pytest

from namr.errors import ConfigError
from namr.index import index_files, ivf, planning


@pytest.mark.parametrize("key", ["auto", "IVF64,Flat", "IVF64,SQ8", "IVF64,PQ8x8", "IVF64,PQ8x4fs"])
@pytest.mark.parametrize("num_vectors", [3000, 20_000])
def test_the_index_takes_the_bytes_that_were_planned(key: str, num_vectors: int, tmp_path: Path) -> None:
    plan = planning.plan(num_vectors, 32, key=key)
    x = np.random.default_rng(0).standard_normal((num_vectors, 32), dtype=np.float32)
    template = ivf.train_template(x[: plan.num_training_vectors], plan.key, seed=0, num_threads=1)
    ivf.build_part(template, [(x, np.arange(num_vectors))], tmp_path / "index", num_threads=1)
    assert (tmp_path / "index").stat().st_size == pytest.approx(plan.index_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("num_vectors", "key"),
    [
        (0, "Flat"),
        (1, "Flat"),
        (19_999, "Flat"),
        (20_000, "IVF256,PQ128x4fs"),
        (1_000_000, "IVF2048,PQ128x4fs"),
        (100_000_000, "IVF16384,PQ128x4fs"),
        (300_000_000, "IVF32768,PQ64x4fs"),
        (600_000_000, "IVF65536,PQ32x4fs"),
    ],
)
def test_the_key_follows_the_number_of_vectors(num_vectors: int, key: str) -> None:
    assert planning.plan(num_vectors, 256).key == key


def test_less_memory_takes_smaller_codes_and_then_refuses() -> None:
    sizes = [1 << 30, 30 << 20, 20 << 20]
    keys = [planning.plan(1_000_000, 128, max_index_bytes=size).key for size in sizes]
    assert keys == ["IVF2048,PQ64x4fs", "IVF2048,PQ32x4fs", "IVF2048,PQ16x4fs"]
    for size, key in zip(sizes, keys, strict=True):
        assert planning.plan(1_000_000, 128, key=key).index_bytes <= size
    with pytest.raises(ConfigError, match="smallest, IVF2048,PQ16x4fs, takes"):
        planning.plan(1_000_000, 128, max_index_bytes=10 << 20)


def test_a_dimension_that_has_no_even_pieces_gets_eight_bits_an_axis() -> None:
    assert planning.plan(20_000, 33).key == "IVF256,SQ8"


@pytest.mark.parametrize("dim", [1, 33, 96, 250, 256, 2048])
def test_auto_never_takes_eight_bit_pieces(dim: int) -> None:
    """PQ<bytes>x8 is scanned slower than Flat codes at the same number of lists."""
    for num_vectors in (20_000, 1_000_000, 100_000_000):
        assert "x8" not in planning.plan(num_vectors, dim, max_index_bytes=1 << 50).key


def test_the_sample_trains_every_list_and_is_never_more_than_there_is() -> None:
    assert planning.plan(1_000_000, 128).num_training_vectors == 2048 * 64
    assert planning.plan(1000, 32, key="IVF64,Flat").num_training_vectors == 1000
    assert planning.plan(10_000, 32, key="IVF2,PQ8x8").num_training_vectors == 512
    for num_vectors in np.geomspace(20_000, 1e9, 30).astype(int).tolist():
        plan = planning.plan(num_vectors, 128, max_index_bytes=1 << 50)
        lists = index_files.parse_key(plan.key, dim=128).num_lists
        assert 39 * lists <= plan.num_training_vectors <= num_vectors


def test_parts_are_as_many_as_asked_for_and_never_too_large() -> None:
    assert planning.plan(100, 32, num_parts=4).num_parts == 4
    large = planning.plan(10_000_000, 256, key="IVF8192,Flat", num_parts=4)
    assert large.num_parts == 10
    assert large.index_bytes / large.num_parts <= planning.PART_BYTES


@pytest.mark.parametrize(("name", "value"), [("dim", 0), ("num_parts", 0), ("max_index_bytes", 0)])
def test_wrong_numbers_are_named(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        planning.plan(10, **{"dim": 8, name: value})


def test_a_key_that_is_not_offered_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of Flat"):
        planning.plan(10, 32, key="LSH")


def test_what_was_considered_says_why_it_was_not_taken() -> None:
    plan = planning.plan(1_000_000, 128, max_index_bytes=30 << 20)
    rows = planning.considered(1_000_000, 128, chosen=plan.key, max_index_bytes=30 << 20)
    assert [row.key.partition(",")[2] or row.key for row in rows] == [
        *("Flat", "Flat", "SQ8", "PQ64x4fs", "PQ32x4fs", "PQ16x4fs")
    ]
    (chosen,) = [row for row in rows if row.is_chosen]
    assert (chosen.key, chosen.index_bytes) == (plan.key, plan.index_bytes) == ("IVF2048,PQ32x4fs", chosen[1])
    assert all("more than max_index_bytes 31457280" in row.why for row in rows[:4])
    assert rows[5].why.startswith("smaller codes")
    assert [row.scanned_bytes_per_vector for row in rows] == [512, 512, 128, 32, 16, 8]


@pytest.mark.parametrize(("num_vectors", "dim"), [(1000, 32), (1_000_000, 33), (1_000_000, 96)])
def test_the_chosen_is_among_the_considered_and_the_others_have_reasons(num_vectors: int, dim: int) -> None:
    plan = planning.plan(num_vectors, dim)
    rows = planning.considered(num_vectors, dim, chosen=plan.key, max_index_bytes=1 << 50)
    assert [row.key for row in rows if row.is_chosen] == [plan.key]
    assert len({row.key for row in rows}) == len(rows)
    assert all("max_index_bytes" not in row.why and len(row.why) > 20 for row in rows)


def test_a_key_that_was_named_is_its_own_reason() -> None:
    rows = planning.considered(50_000, 32, chosen="IVF64,PQ8x8", key="IVF64,PQ8x8", max_index_bytes=1 << 40)
    (chosen,) = [row for row in rows if row.is_chosen]
    assert (chosen.key, chosen.why) == ("IVF64,PQ8x8", "named by build.index_key")
    assert all(row.key.startswith("IVF64,") for row in rows[1:])
