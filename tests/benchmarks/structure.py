"""What does the structure embedding say? Spread, neighbours, hubs, and queries mended and spoiled.

    python -m tests.benchmarks.structure [--data FOLDER] [--weights FILE] [--cache FOLDER] [--seeds 3]

Heads of D = 256 on frozen EfficientNet-Lite0 features of Cars-196 crops at 128 px, from the whitened start,
300 steps of 32 x 4 at 3e-4, triplet loss, lambda = 1, trained by "both"; the features are those of the
`method` benchmark, computed in the first run of either and kept in --cache. All numbers are of the 98 unseen
classes, every image against all others. A line for each seed, then for each side that re-ranks the first 100;
no line is a target.
"""

import time
from typing import Any

import numpy as np

from namr.measure import structure
from namr.measure.structure import Hubs
from namr.sides import Side
from tests.benchmarks import method
from tests.benchmarks.method import Choice, Labelled

K = 10
DEPTH = 100
SIDES: tuple[Side, ...] = ("both", "query", "scale")


def main() -> None:
    options = parse()
    config, (train, test) = method.frozen(options, "train", "test")
    trained_by_both = method.settings("triplet", config, options)[-1]
    print(f"{options.data.name}: {len(train.y)} images to train on, {len(test.y)} of unseen classes")
    for seed in range(options.seeds):
        made = method.entry(trained_by_both, train, test, Choice(options.rate, ()), seed)
        assert made.structures is not None
        tell(seed, made.embeddings, made.structures, test, structure_range=config.structure_range)


def parse() -> Any:
    parser = method.frozen_parser(__doc__ or "")
    parser.add_argument("--rate", type=float, default=3e-4)
    return method.parsed(parser)


def tell(seed: int, x: np.ndarray, s: np.ndarray, test: Labelled, *, structure_range: float) -> None:
    """Print what is known of one model."""
    spread = structure.spread(s)
    used = (spread.highest - spread.lowest) / (2 * structure_range)
    low, middle, high = spread.axis_deviations
    print(
        f"seed {seed}: mean |s - 1| {spread.mean_offset:.3f}, {100 * spread.between_images:.1f} % of the "
        f"variance between images and {100 * spread.mean_weights:.1f} % their mean weight, 99 % of s in "
        f"{spread.lowest:.3f} .. {spread.highest:.3f} ({100 * used:.0f} % of the range), deviation of an "
        f"axis {middle:.3f} ({low:.3f} .. {high:.3f}), {100 * spread.moving_axes:.0f} % of the axes move",
        flush=True,
    )
    for side in SIDES:
        began = time.perf_counter()
        ranked = structure.rankings(x, s, k=K, side=side, depth=DEPTH)
        seconds = time.perf_counter() - began
        if side == SIDES[0]:
            agreement = structure.agreement(s, ranked.plain, seed=0)
            print(
                f"    cosine of s of neighbours {agreement.neighbours.mean():.3f} "
                f"({agreement_of_shapes(s, ranked.plain):.3f} without the mean weights), at random "
                f"{agreement.at_random.mean():.3f}; {told_size(x, s, ranked.plain)}"
            )
        before, after = (structure.hubs(structure.occurrences(rows, num=len(x))) for rows in ranked)
        changes = structure.changes(test.y, *(test.y[rows[:, 0]] for rows in ranked))
        print(
            f"    {side}: hubs {told(before)} -> {told(after)}; mended {len(changes.mended)}, spoiled "
            f"{len(changes.spoiled)} of {changes.num_labelled}, right {changes.num_right_before} -> "
            f"{changes.num_right_after}; {seconds:.1f} s",
            flush=True,
        )


def agreement_of_shapes(s: np.ndarray, neighbours: np.ndarray) -> float:
    """The cosine of neighbours where every image has the same mean weight."""
    shapes = s - s.mean(axis=1, keepdims=True) + 1
    return float(structure.agreement(shapes, neighbours, seed=0).neighbours.mean())


def told_size(x: np.ndarray, s: np.ndarray, neighbours: np.ndarray) -> str:
    """How the mean weight of an image goes with its place, and with how often it is found."""
    size, centre_distance = s.mean(axis=1), np.linalg.norm(x - x.mean(axis=0), axis=1)
    found = structure.occurrences(neighbours, num=len(x))
    return (
        f"correlation of the mean weight with the distance from the centre "
        f"{np.corrcoef(size, centre_distance)[0, 1]:.2f}, of its rank with that of N_{K} "
        f"{np.corrcoef(ranks(size), ranks(found))[0, 1]:.2f}"
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Places in ascending order, the mean one for equal values (Spearman)."""
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[numbers]


def told(hubs: Hubs) -> str:
    return f"skewness {hubs.skewness:.2f}, anti-hubs {100 * hubs.anti_hubs:.1f} %, largest {hubs.largest}"


if __name__ == "__main__":
    main()
