"""What `namr plan` says a build and its queries take, against what they take: seconds of one core.

    python -m tests.benchmarks.planning [--vectors 200000] [--dim 128] [--constants namr-plan.json]

The constants are those of a file or, without one, measured first. The build is that of `namr.plan.rehearsal`,
by the very steps of a real one, in one process, with the index that the plan chose; queries find the nprobe
and the depth that reach recall@10 of 0.95 against exact search, and are timed as planned, in a batch of 256.
The ratio is that of the worst stage, the smaller number by the larger; what takes less than half a second is
shown and doesn't count. Where none takes longer there is no ratio, and the size that it takes is said.
"""

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from namr.index import ivf, planning
from namr.nightly import tuning
from namr.plan import calibration, constants, estimate, rehearsal
from namr.plan.estimate import PlanConfig
from namr.plan.rehearsal import timed
from namr.search import rerank
from namr.search.queries import Queries
from tests.benchmarks.search import share_found

TARGET = 0.5
QUERIES, K = 256, 10
LEAST_S = 0.5


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.constants:
        known = constants.find(options.constants).constants
    else:
        known = calibration.calibrate(options.dim, today=datetime.now(UTC).date())
    config = PlanConfig(num_vectors=options.vectors, dim=options.dim)
    told = estimate.estimate(config, known)
    print(f"{options.vectors} x {options.dim}, {told.key}; constants of {known.num_vectors} x {known.dim}")
    with tempfile.TemporaryDirectory(prefix="namr-planning-") as folder:
        made = rehearsal.prepare(Path(folder), num_vectors=options.vectors, dim=options.dim)
        built = rehearsal.build_index(made, told.key, num_parts=told.num_parts)
        sides = rehearsal.store_sides(made, built.segment)
        measured = {
            "sample": built.seconds["sample"],
            "train": built.seconds["train"],
            "build parts": built.seconds["parts"],
            "merge": built.seconds["merge"],
            "vectors": sides.vectors_s,
            "items": sides.items_s,
        }
        ratios = {}
        for stage in told.stages:
            if stage.name in measured:
                ratios[stage.name] = show(stage.name, stage.core_s, measured[stage.name], "s")
        show("index", told.index_bytes / 1e6, built.index_bytes / 1e6, "MB")
        exact_s = QUERIES * options.vectors * options.dim * known.exact_s_per_axis
        queries(made, built, sides, told, planned_exact_s=exact_s)
        ratio = worst(ratios, measured, num_vectors=options.vectors)
        print(f"planning ratio {ratio:.2f} target {TARGET}")


def worst(ratios: Mapping[str, float], measured: Mapping[str, float], *, num_vectors: int) -> float:
    """The least ratio of the stages that took long enough; SystemExit with a size that is where none did."""
    counted = [ratio for name, ratio in ratios.items() if measured[name] >= LEAST_S]
    if counted:
        return min(counted)
    longest = max(ratios, key=lambda name: measured[name])
    needed = num_vectors * LEAST_S / measured[longest]
    step = 10 ** int(math.log10(needed))
    raise SystemExit(
        f"no ratio: with {num_vectors} vectors every stage took less than {LEAST_S:g} s (the longest, "
        f"{longest}, {measured[longest]:.2g} s), and such times say little; expected --vectors "
        f"{math.ceil(needed / step) * step} or more"
    )


def show(name: str, planned: float, measured: float, unit: str) -> float:
    print(
        f"{name:12} planned {planned:8.3g} {unit}, measured {measured:8.3g} {unit}: "
        f"{100 * (planned / measured - 1):+.0f} %",
        flush=True,
    )
    return min(planned / measured, measured / planned)


def queries(
    made: rehearsal.Materials,
    built: rehearsal.Rehearsal,
    sides: rehearsal.StoredSides,
    told: estimate.Estimate,
    *,
    planned_exact_s: float,
) -> None:
    index = ivf.open_index(built.index_path)
    x = rehearsal.draw(QUERIES, made.dim, seed=10**6 + 1)
    s_q = np.random.default_rng(2).uniform(0.5, 1.5, x.shape).astype(np.float32)
    candidates = index.search(x, 100, index.num_lists)[1]
    exact, exact_s = timed(lambda: calibration.find_exactly(Queries(x, s_q, None), candidates, sides.vectors))
    show("exact", planned_exact_s, exact_s, "s")
    true = exact.of("none")[:, :K]

    def search(nprobe: int, depth: int, side: str) -> np.ndarray:
        ids = index.search(x, depth, nprobe)[1]
        return rerank.rerank(x, s_q, ids, sides.vectors, k=K, side=side).ids  # type: ignore[arg-type]

    best = tuning.tuned(
        lambda nprobe, depth: share_found(search(nprobe, depth, "none"), true),
        num_lists=index.num_lists,
        target=0.95,
        depth=100,
        max_depth=1600,
    )[-1]
    show("nprobe", told.nprobe, best.nprobe, "")
    show("depth", told.depth, best.depth, "")
    planned = share_found(search(told.nprobe, told.depth, "none"), true)
    print(
        f"recall@10 at the planned nprobe and depth {planned:.3f}, at those that were found {best.recall:.3f}"
    )
    took = min(timed(lambda: search(told.nprobe, told.depth, "both"))[1] for _ in range(5))
    show("a query", told.query_ms, 1e3 * took / QUERIES, "ms")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--constants", type=Path, default=None)
    options = parser.parse_args(words)
    if options.vectors < planning.FLAT_BELOW:
        parser.error(
            f"--vectors is {options.vectors}; expected at least {planning.FLAT_BELOW}: the index that is "
            "planned for fewer is Flat, which nothing is trained for"
        )
    return options


if __name__ == "__main__":
    main()
