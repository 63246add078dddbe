"""The benchmark of growth runs through every stage, and tells growth that is there from growth that isn't."""

from pathlib import Path

import pytest

from tests import scale_stages
from tests.benchmarks import scale
from tests.benchmarks.scale import Stage
from tests.measured import Process
from tests.scale_stages import Gallery

SIZES = [1000, 2000, 4000]
MB = 10**6


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    assert scale.exponent([1, 2, 4], SIZES, 0.1) == pytest.approx(1)
    assert scale.exponent([1, 4, 16], SIZES, 0.1) == pytest.approx(2)
    assert scale.exponent([3, 3, 3], SIZES, 0.1) == pytest.approx(0)
    assert scale.exponent([0.001, 0.01, 0.09], SIZES, 0.1) is None
    assert scale.exponent([5], SIZES[:1], 0.1) is None
    assert scale.slope([100, 1100, 3100], SIZES) == pytest.approx(1)


def test_the_worst_exponent_of_time_or_memory_makes_the_ratio() -> None:
    stages = [
        Stage("build: driver", [1.0, 1.0, 1.0], [50 * MB] * 3, [0] * 3),
        Stage("pack: driver", [1.0, 2.0, 4.0], [50 * MB, 200 * MB, 800 * MB], [0] * 3),
        Stage("open the service", [0.0, 0.0, 0.0], [1 * MB] * 3, [1 * MB + 40 * size for size in SIZES]),
    ]
    told = scale.told(stages, SIZES)
    assert told.splitlines()[-2:] == ["worst: memory of pack: driver, 2.00", "scale ratio 0.55 target 1.0"]
    assert "service: 40.0 bytes" in told
    assert "build: driver: 0.0 bytes a sample" in told


def hold(num_bytes: int, keep: bool) -> int:
    held = b"x" * num_bytes
    if keep:
        scale_stages._service.append(held)  # type: ignore[arg-type]
    sum(held[: 10**7])
    return len(held)


@pytest.mark.slow
def test_memory_of_a_call_is_told_from_what_it_leaves() -> None:
    with Process() as process:
        result, gone = process.call(hold, 200 * MB, False)
        _, kept = process.call(hold, 100 * MB, True)
    assert result == 200 * MB
    assert 190 * MB < gone.peak_bytes < 260 * MB
    assert gone.held_bytes < 20 * MB < 90 * MB < kept.held_bytes < 130 * MB
    assert gone.cpu_s > 0
    with Process() as process, pytest.raises(TypeError):
        process.call(hold, "many", False)


@pytest.mark.slow
def test_every_stage_runs_on_a_small_gallery(tmp_path: Path) -> None:
    gallery = Gallery(
        folder=tmp_path, num_samples=1200, dim=8, rows_per_shard=500, index_key="IVF8,SQ8", num_parts=2
    )
    stages = scale.measure([gallery])
    steps = ("sample", "train", "build_part", "merge", "place", "sort", "join", "store_items")
    steps_told = [stage.name for stage in stages if stage.name.startswith("build: ")]
    assert steps_told[0] == "build: driver"
    assert sorted(name.removeprefix("build: ").removeprefix("store_") for name in steps_told[1:]) == sorted(
        step.removeprefix("store_") for step in steps
    )
    assert all(len(stage.cpu_s) == 1 and stage.cpu_s[0] >= 0 for stage in stages)
    assert scale.told(stages, [1200]).splitlines()[-1].startswith("scale ratio ")


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_no_memory_grows_faster_than_four_million_images(tmp_path: Path) -> None:
    sizes = [1_000_000, 2_000_000, 4_000_000]
    stages = scale.measure(
        [
            Gallery(folder=tmp_path / str(size), num_samples=size, dim=32, rows_per_shard=10_000)
            for size in sizes
        ]
    )
    by_name = {stage.name: stage for stage in stages}
    grown = [scale.exponent(stage.peak_bytes, sizes, 100 * MB) or 0 for stage in stages]
    assert max(grown) <= scale.MOST
    for name in ("build: driver", "pack: driver"):
        assert scale.slope(by_name[name].peak_bytes, sizes) <= 2 * scale.DRIVER_BYTES
    assert scale.slope(by_name["open the service"].held_bytes, sizes) <= scale.SERVICE_BYTES
