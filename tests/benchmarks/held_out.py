"""Among what should held-out images be searched, so that validation says what unseen classes will show?

    python -m tests.benchmarks.held_out [--losses triplet contrastive] [--splits 3] [--data FOLDER]

Heads of D = 256 on the frozen features of the `method` benchmark, 300 steps at 3e-4, lambda = 0 against
"both". A fifth of the training classes is held out, --splits times anew. Their images query a gallery of
themselves, then one that also has 1, 2 and 4 images of trained classes for each of them (as many as there
are). Recall@1 / MAP@R in per cent, means over the splits, and what the ranking loss gains in the mean of
both with its standard error over classes. Last, the same for the unseen classes of the test set: what
validation should have said.
"""

from typing import Any

import numpy as np

from namr.measure import metrics, validation
from namr.measure.metrics import RetrievalMetrics
from namr.measure.protocols import Split
from tests.benchmarks import method
from tests.benchmarks.method import Choice, Labelled, Setting

RATE = 3e-4
TIMES = (0, 1, 2, 4)
WAYS = validation.ways("cosine")[:2]


def main() -> None:
    options = parse()
    config, (train, test) = method.frozen(options, "train", "test")
    everything = Split(queries=np.arange(len(test.y)), gallery=np.arange(len(test.y)))
    for base in options.losses:
        rows = method.settings(base, config, options)
        pair = rows[0], rows[-1]
        found: dict[str, list[list[list[RetrievalMetrics]]]] = {}
        for seed in range(options.splits):
            learnt, held_out = method.split(train, seed=seed)
            both = Labelled(
                np.concatenate([learnt.x, held_out.x]),
                np.concatenate([learnt.y, held_out.y + learnt.y.max() + 1]),
            )
            queries = np.arange(len(learnt.y), len(both.y))
            others = np.random.default_rng(seed).permutation(len(learnt.y))
            splits = {
                f"{times} others each": Split(
                    queries, np.concatenate([others[: times * len(queries)], queries])
                )
                for times in TIMES
            }
            measured = [measure(row, learnt, both, splits, seed) for row in pair]
            measured_test = [measure(row, train, test, {"unseen": everything}, seed) for row in pair]
            for name in [*splits, "unseen"]:
                source = measured_test if name == "unseen" else measured
                found.setdefault(name, []).append([of[name] for of in source])
        for name, of_splits in found.items():
            for number, way in enumerate(WAYS):
                print(
                    f"{base}, {name}, {way.metric}: {told([[r[number] for r in each] for each in of_splits])}"
                )


def measure(
    row: Setting, learnt: Labelled, searched: Labelled, splits: dict[str, Split], seed: int
) -> dict[str, list[RetrievalMetrics]]:
    """By each split, in each way."""
    made = method.entry(row, learnt, searched, Choice(RATE, ()), seed)
    return {
        name: list(validation.measure(made.embeddings, None, searched.y, ways=WAYS, splits=[split]).values())
        for name, split in splits.items()
    }


def told(of_splits: list[list[RetrievalMetrics]]) -> str:
    """Both rows, and the gain of the second."""
    shares = []
    for of_row in zip(*of_splits, strict=True):
        recall, precision = (np.mean([getattr(r, of) for r in of_row]) for of in ("recall_at_1", "map_at_r"))
        shares.append(f"{100 * recall:.1f} / {100 * precision:.2f}")
    gains = [metrics.difference(both, without) for without, both in of_splits]
    mean = 100 * np.mean([gain.mean for gain in gains])
    error = 100 * np.mean([gain.standard_error for gain in gains]) / np.sqrt(len(gains))
    return f"lambda 0 {shares[0]}, both {shares[1]}, gain {mean:+.2f} +- {error:.2f}"


def parse() -> Any:
    parser = method.frozen_parser(__doc__ or "")
    parser.add_argument("--losses", nargs="+", default=["triplet", "contrastive"], choices=method.BASES)
    parser.add_argument("--splits", type=int, default=3)
    return method.parsed(parser)


if __name__ == "__main__":
    main()
