"""Estimates scale measured constants, refuse what can't be, and say what would do."""

from dataclasses import replace

import pytest

from namr.errors import ConfigError
from namr.index import planning
from namr.plan import constants, estimate
from namr.plan.constants import Constants, Found
from namr.plan.estimate import Estimate, PlanConfig

SHIPPED: Constants = constants.find(constants.SHIPPED_PATH).constants


def planned(num_vectors: float, dim: int = 256, **more: float) -> Estimate:
    return estimate.estimate(PlanConfig(num_vectors=num_vectors, dim=dim, **more), SHIPPED)


def test_a_plan_is_of_the_index_that_a_build_with_its_bytes_would_choose() -> None:
    told = planned(1e9, memory_gb_per_node=64)
    built = planning.plan(10**9, 256, max_index_bytes=told.max_index_bytes)
    assert (told.key, told.index_bytes) == (built.key, built.index_bytes)
    assert told.key == "IVF65536,PQ32x4fs"
    assert told.memory_bytes <= 64 << 30
    assert told.memory_bytes > 2 * told.index_bytes
    assert (told.num_segments, told.num_parts) == (1, built.num_parts)


def test_more_memory_takes_more_exact_codes_and_fewer_candidates() -> None:
    tight, wide = planned(1e9, memory_gb_per_node=64), planned(1e9, memory_gb_per_node=256)
    assert wide.index_bytes > tight.index_bytes
    assert wide.depth < tight.depth


def test_stages_grow_with_the_vectors_and_shrink_with_the_cores() -> None:
    one, ten = planned(1e6), planned(1e7)
    for small, large in zip(one.stages, ten.stages, strict=True):
        assert large.core_s > 5 * small.core_s or small.name == "train"
    spread = planned(1e7, num_cores=16)
    for alone, shared in zip(ten.stages, spread.stages, strict=True):
        assert shared.core_s == pytest.approx(alone.core_s)
        expected = {"merge": 1, "measure": 1, "train": 8}.get(shared.name, 16)
        assert alone.wall_s / shared.wall_s == pytest.approx(expected)


def test_stages_are_units_of_work_times_what_one_takes() -> None:
    told = {stage.name: stage.core_s for stage in planned(1e6, 128).stages}
    assert told["sample"] == pytest.approx(1e6 * 4 * 128 * SHIPPED.read_s_per_byte)
    assert told["items"] == pytest.approx(1e6 * SHIPPED.items_s_per_image)
    assert told["vectors"] == pytest.approx(1e6 * 4 * 128 * SHIPPED.store_s_per_byte)


def test_a_higher_recall_probes_more() -> None:
    efforts = [planned(1e6, 128, recall_at_10=recall) for recall in (0.5, 0.9, 0.95, 0.99)]
    probed = [told.nprobe for told in efforts]
    assert probed == sorted(probed) and len(set(probed)) == 4
    assert [told.query_ms for told in efforts] == sorted(told.query_ms for told in efforts)


def test_lists_make_up_for_what_the_codes_lose() -> None:
    known = replace(
        SHIPPED,
        by_lists=(Found(num=1, recall=0.5), Found(num=4, recall=0.96), Found(num=16, recall=1.0)),
        by_depth={2: (Found(num=100, recall=0.9), Found(num=200, recall=0.96), Found(num=1600, recall=1.0))},
    )
    config = PlanConfig(num_vectors=1e6, dim=128, recall_at_10=0.96 * 0.96)
    told = estimate.estimate(config, known)
    assert (told.depth, told.nprobe) == (200, 4)


def test_few_vectors_are_compared_one_by_one() -> None:
    told = planned(1000)
    assert (told.key, told.num_lists, told.nprobe, told.num_training_vectors) == ("Flat", 0, 0, 0)
    assert told.scanned_bytes == 1000 * 4 * 256


def test_a_dimension_without_even_pieces_is_planned_too() -> None:
    assert planned(1e6, 33).key == "IVF2048,SQ8"


def test_where_nothing_fits_it_is_said_what_would() -> None:
    with pytest.raises(ConfigError, match=r"memory_gb_per_node 16: the smallest needs 49.1 GB") as caught:
        planned(1e9, memory_gb_per_node=16)
    assert "take --memory-gb-per-node 49.1, or 4 nodes, each with a slice of 250,000,000" in str(caught.value)
    assert planned(1e9, memory_gb_per_node=49.2).key == "IVF65536,PQ32x4fs"
    assert planned(2.5e8, memory_gb_per_node=16).num_lists > 0
    with pytest.raises(ConfigError, match=r"memory_gb_per_node 2: .*or --dim 512, or 2 nodes"):
        planned(1.2e7, 1024, memory_gb_per_node=2)
    assert planned(1.2e7, 512, memory_gb_per_node=2).memory_bytes <= 2 << 30


def test_a_recall_that_the_codes_that_fit_do_not_reach_is_refused() -> None:
    known = replace(SHIPPED, by_depth={8: (Found(num=100, recall=0.5), Found(num=1600, recall=0.9))})
    config = PlanConfig(num_vectors=1e9, dim=256, memory_gb_per_node=64)
    with pytest.raises(ConfigError, match=r"recall_at_10 0.95 is not expected of IVF65536,PQ32x4fs.* 0.900"):
        estimate.estimate(config, known)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_vectors", 0, "expected 1 to"),
        ("num_vectors", -1, "expected 1 to"),
        ("num_vectors", float("nan"), "is nan"),
        ("num_vectors", float("inf"), "is inf"),
        ("num_vectors", 10.5, "expected a whole number"),
        ("dim", 0, "expected 1 to"),
        ("num_cores", 0, "expected 1 to"),
        ("num_held_out", 0, "expected 1 to"),
        ("memory_gb_per_node", 0, "expected more than 0"),
        ("memory_gb_per_node", float("nan"), "expected more than 0"),
        ("recall_at_10", 0, "expected more than 0 and at most 1"),
        ("recall_at_10", 1.5, "expected more than 0 and at most 1"),
    ],
)
def test_a_wrong_number_is_named(name: str, value: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*{expected}|{name} {expected}"):
        PlanConfig(**{"num_vectors": 1e6, "dim": 128, name: value})


def test_a_node_that_does_not_hold_the_process_is_too_small() -> None:
    with pytest.raises(ConfigError, match=r"the smallest needs 0\.5 GB"):
        planned(1e6, 128, memory_gb_per_node=0.1)
