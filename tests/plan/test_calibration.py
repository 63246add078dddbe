"""A calibration, of few vectors: every constant is there, and plans with it."""

from datetime import date

import pytest
import torch

from namr.plan import calibration, estimate
from namr.plan.estimate import PlanConfig


def test_a_calibration_is_what_a_plan_needs() -> None:
    threads = torch.get_num_threads()
    known = calibration.calibrate(16, today=date(2026, 11, 27), num_vectors=1000)
    assert torch.get_num_threads() == threads
    assert (known.num_vectors, known.dim, known.measured) == (1000, 16, "2026-11-27")
    assert "core" in known.machine and known.seconds > 0
    assert set(known.codes) == {"Flat", "SQ8", "PQ"} and set(known.by_depth) == {2, 4, 8}
    for name, value in vars(known).items():
        if name.endswith(("_axis", "_image")) or name in ("read_s_per_byte", "store_s_per_byte"):
            assert value > 0, name
    for found in (known.by_lists, *known.by_depth.values()):
        nums, recalls = [each.num for each in found], [each.recall for each in found]
        assert nums == sorted(nums) and recalls == sorted(recalls)
    assert known.by_lists[-1].recall == 1
    assert known.by_depth[2][0].recall > known.by_depth[8][0].recall
    told = estimate.estimate(PlanConfig(num_vectors=1e6, dim=16), known)
    assert told.query_ms > 0 and all(stage.core_s > 0 for stage in told.stages)


def test_a_dimension_without_even_pieces_is_calibrated_by_eight_bits() -> None:
    known = calibration.calibrate(9, today=date(2026, 11, 27), num_vectors=600)
    assert set(known.codes) == {"Flat", "SQ8"} and known.by_depth == {}
    assert estimate.estimate(PlanConfig(num_vectors=1e6, dim=9), known).key == "IVF2048,SQ8"


@pytest.mark.parametrize(("dim", "expected"), [(1, 100_000), (128, 100_000), (256, 50_000), (2048, 20_000)])
def test_larger_vectors_are_fewer(dim: int, expected: int) -> None:
    assert calibration.size_for(dim) == expected
