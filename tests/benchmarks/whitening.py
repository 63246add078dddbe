"""Which power should the start be whitened by? Asked on classes that are held out of those to learn from.

    python -m tests.benchmarks.whitening [--data FOLDER] [--weights FILE] [--cache FOLDER] [--splits 5]

Frozen EfficientNet-Lite0 features at 128 px (those of the `method` benchmark), D = 256, nothing trained. A
fifth of the training classes is held out, --splits times anew; the whitening is of the other four fifths.
Recall@1 / MAP@R in per cent on the held-out ones, mean over the splits; no unseen class is looked at. The
last line names the power with the best mean of both by cosine.
"""

from typing import Any

import numpy as np

from namr.measure import validation
from namr.model import whitening
from tests.benchmarks import method
from tests.benchmarks.method import Labelled

WAYS = validation.ways("cosine")[:2]
Scores = np.ndarray
"""(2 ways, Recall@1 and MAP@R), per cent"""


def main() -> None:
    options = parse()
    _, (train,) = method.frozen(options, "train")
    rows = {"untouched": np.zeros((2, 2))} | {f"{power:g}": np.zeros((2, 2)) for power in options.powers}
    for seed in range(options.splits):
        learnt, held_out = method.split(train, seed=seed)
        rows["untouched"] += scores(held_out.x, held_out) / options.splits
        for power in options.powers:
            start = whitening.whitening(learnt.x, dim=options.dim, power=power)
            rows[f"{power:g}"] += scores(whitening.applied(start, held_out.x), held_out) / options.splits
    print(f"{options.data.name}, {options.splits} splits\n\n| power | L2 | cosine |\n| --- | --- | --- |")
    for name, (cosine, l2) in rows.items():
        print(f"| {name} | {l2[0]:.1f} / {l2[1]:.2f} | {cosine[0]:.1f} / {cosine[1]:.2f} |")
    best = max(list(rows)[1:], key=lambda name: rows[name][0].sum())
    print(f"\nbest by cosine: {best}")


def scores(x: np.ndarray, held_out: Labelled) -> Scores:
    found = validation.measure(x, None, held_out.y, ways=WAYS)
    return np.array([[100 * found[way].recall_at_1, 100 * found[way].map_at_r] for way in WAYS])


def parse() -> Any:
    parser = method.frozen_parser(__doc__ or "")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--powers", type=float, nargs="+", default=[0, 0.125, 0.25, 0.375, 0.5])
    return method.parsed(parser)


if __name__ == "__main__":
    main()
