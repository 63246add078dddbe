"""Time and anonymous memory of every stage, as the number of images grows.

    python -m tests.benchmarks.scale [--sizes 100000 ... 800000] [--dim 32] [--key auto] [--parts 4]
    python -m tests.benchmarks.scale --sizes 250000 500000 1000000 2000000

Made-up samples and embeddings (`tests.scale_stages`), no pictures. Each stage is a call in a process of its
own, and so is each task of a build, one after the other in place of Ray's workers: what the driver holds and
what a task holds are told apart. Time is processor time, of all tasks of a step together; memory is the
highest anonymous memory above that of a process which has only imported namr, of the largest task.

The exponent of a quantity is its slope over the number of images, both as logarithms, by least squares: 1 is
growth in proportion. What stays below what can be measured (_LEAST_S, _LEAST_BYTES) has none, is said so,
and is left out of the ratio. Not covered: reading pictures, the assessment, and what Ray itself takes.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests import scale_stages
from tests.measured import Process, Used
from tests.scale_stages import Gallery

MOST = 1.1
"""the largest exponent that is good"""
SERVICE_BYTES = 60
"""of an item in a service, beside mapped files"""
DRIVER_BYTES = 1
"""of a sample in a driver: less than an id takes"""
_LEAST_S = 0.25
_LEAST_BYTES = 24 << 20


class Stage(NamedTuple):
    """What a stage took at each size."""

    name: str
    cpu_s: list[float]
    peak_bytes: list[int]
    held_bytes: list[int]


def main() -> None:
    options = parse()
    sizes = sorted(options.sizes)
    print(
        f"{sizes[0]} to {sizes[-1]} x {options.dim}, {options.key}, {options.parts} parts, "
        f"{options.rows_per_shard} images a shard"
    )
    with tempfile.TemporaryDirectory(prefix="namr-scale-", dir=options.folder) as folder:
        stages = measure([gallery_of(options, Path(folder), size) for size in sizes])
    print(told(stages, sizes))


def gallery_of(options: argparse.Namespace, folder: Path, size: int) -> Gallery:
    return Gallery(
        folder=folder / str(size),
        num_samples=size,
        dim=options.dim,
        rows_per_shard=options.rows_per_shard,
        index_key=options.key,
        num_parts=options.parts,
    )


def measure(galleries: Sequence[Gallery]) -> list[Stage]:
    """Every stage at every size, in the order of the stages."""
    stages: dict[str, Stage] = {}
    for gallery in galleries:
        for name, used in measured(gallery):
            stage = stages.setdefault(name, Stage(name, [], [], []))
            stage.cpu_s.append(used.cpu_s)
            stage.peak_bytes.append(used.peak_bytes)
            stage.held_bytes.append(used.held_bytes)
            print(
                f"{gallery.num_samples:>9}  {name:26}  {used.cpu_s:8.2f} s  {mb(used.peak_bytes)}", flush=True
            )
    return list(stages.values())


def measured(gallery: Gallery) -> Iterator[tuple[str, Used]]:
    """One gallery from its making to searches in it."""
    with Process() as process:
        process.call(scale_stages.make, gallery)
    yield alone("pack: driver", scale_stages.plan_packing, gallery)
    yield alone("open the dataset", scale_stages.open_dataset, gallery)
    yield alone("index samples (training)", scale_stages.index_samples, gallery)
    with Process() as process:
        tasks, driver = process.call(scale_stages.build_release, gallery)
    yield "build: driver", driver
    for step, used in tasks.items():
        yield f"build: {step}", together(used)
    yield alone("publish", scale_stages.publish, gallery)
    yield alone("gate: lost images", scale_stages.hold_against_current, gallery)
    with Process() as process:
        yield "open the service", process.call(scale_stages.open_service, gallery)[1]
        yield f"{scale_stages.QUERIES} searches", process.call(scale_stages.search, gallery, "all")[1]
        yield "... among a quarter", process.call(scale_stages.search, gallery, "quarter")[1]


def alone(name: str, stage: object, gallery: Gallery) -> tuple[str, Used]:
    assert callable(stage)
    with Process() as process:
        return name, process.call(stage, gallery)[1]


def together(used: Sequence[Used]) -> Used:
    """All tasks of a step: their time added up, the memory of the largest."""
    return Used(
        cpu_s=sum(each.cpu_s for each in used),
        wall_s=sum(each.wall_s for each in used),
        peak_bytes=max(each.peak_bytes for each in used),
        held_bytes=max(each.held_bytes for each in used),
    )


def told(stages: Sequence[Stage], sizes: Sequence[int]) -> str:
    """The table of exponents, what an item takes in service and driver, and the ratio."""
    worst, lines = ("nothing", 0.0), [f"{'':28}{'time, s':>20}  exponent  {'memory, MB':>20}  exponent"]
    for stage in stages:
        time_cell, memory_cell = (
            exponent(stage.cpu_s, sizes, _LEAST_S),
            exponent(stage.peak_bytes, sizes, _LEAST_BYTES),
        )
        for what, found in (("time", time_cell), ("memory", memory_cell)):
            if found is not None and found > worst[1]:
                worst = f"{what} of {stage.name}", found
        times = f"{stage.cpu_s[0]:.2f} to {stage.cpu_s[-1]:.2f}"
        peaks = f"{mb(stage.peak_bytes[0])} to {mb(stage.peak_bytes[-1])}"
        lines.append(f"{stage.name:28}{times:>20}  {shown(time_cell)}  {peaks:>20}  {shown(memory_cell)}")
    lines.append(
        f"small: below {_LEAST_S} s or {mb(_LEAST_BYTES)} MB at the largest size, too little to see growth in"
    )
    by_name = {stage.name: stage for stage in stages}
    of_service = slope(by_name["open the service"].held_bytes, sizes)
    lines.append(
        f"service: {of_service:z.1f} bytes of anonymous memory an item, target at most {SERVICE_BYTES}"
    )
    for name in ("build: driver", "pack: driver"):
        grows = slope(by_name[name].peak_bytes, sizes)
        lines.append(f"{name}: {grows:z.1f} bytes a sample, target at most {DRIVER_BYTES}")
    lines.append(f"worst: {worst[0]}, {worst[1]:.2f}")
    lines.append(f"scale ratio {MOST / worst[1] if worst[1] else float('inf'):.2f} target 1.0")
    return "\n".join(lines)


def exponent(values: Sequence[float], sizes: Sequence[int], least: float) -> float | None:
    """The slope of log(values) over log(sizes); None where the last value is too small to tell."""
    if len(sizes) < 2 or values[-1] < least:
        return None
    floor = least / 100  # a value of 0 has no logarithm
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, floor)), 1)[0])


def slope(values: Sequence[float], sizes: Sequence[int]) -> float:
    """What each image adds, by least squares."""
    return float(np.polyfit(sizes, values, 1)[0]) if len(sizes) > 1 else values[0] / sizes[0]


def shown(found: float | None) -> str:
    return f"{'small' if found is None else format(found, '.2f'):>8}"


def mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 200_000, 400_000, 800_000])
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--key", default="auto")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--rows-per-shard", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=None, help="for about 1 KB an image")
    return parser.parse_args()


if __name__ == "__main__":
    main()
