"""Does the method pay where the backbone learns, too? The rows of `method`, fine-tuned.

    python -m tests.benchmarks.fine_tuning [--losses triplet] [--seeds 3] [--rows "lambda 0" both]

EfficientNet-Lite0 and heads of D = 256 on Cars-196 crops of 96 px, from the whitened start: 300 steps of
24 x 4, not augmented, heads at 1e-3, backbone at 3e-4, 50 steps of warm-up, then a half cosine. Each row is
trained on all training classes, once a seed, and measured on the 98 unseen ones; no step and no setting is
chosen by these. How a row is searched is recommended by a model that was trained without a fifth of the
training classes (seed 0), on that fifth. With --four-fifths these models are the ones that are measured, as
jobs/train.py would make them: half as many runs, each a little weaker; and with --between it is, as there,
the best by held-out classes of what was trained and the models on the way to it (`namr.train.interpolation`).

A run takes about seven minutes of one core, and --processes of them run side by side; what they made is kept
in --cache, and the same command goes on from there. The last lines are, for each loss, the ratio of the
Recall@1 of "both" to that of lambda = 0, each searched as recommended, and the gain of the mean of Recall@1
and MAP@R, query by query, with its 95 % interval (a bootstrap over classes).
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from namr.data.sampling import ClassIndex, PKConfig, global_batch
from namr.measure import validation
from namr.measure.evaluation import Entry, compare
from namr.model import model, whitening
from namr.model.losses import JointLoss, search_metric_of
from namr.model.model import ModelConfig, NamrModel, SearchDefaults
from namr.train import interpolation
from namr.train.examination import Examination
from namr.train.recipe import TrainingConfig
from namr.train.step import Trainer
from tests.benchmarks import method
from tests.benchmarks.method import BASES, POWER, Labelled, Setting

BATCH = PKConfig(classes_per_batch=24, samples_per_class=4)
RATES = TrainingConfig(
    num_steps=300,
    learning_rate=1e-3,
    backbone_learning_rate=3e-4,
    warmup_steps=50,
    schedule="cosine",
    augment=False,
)


class Run(NamedTuple):
    """One training."""

    setting: Setting
    seed: int
    training: TrainingConfig
    validates: bool
    """trained without the held-out classes, and measured on them too"""
    cache: Path
    data: Path
    between: bool = False
    """what is measured is the best of the way from the start to what was trained"""

    @property
    def result(self) -> Path:
        """Where its embeddings of the images that it is measured on lie."""
        setting, training = self.setting, self.training
        name = f"{setting.loss.base}-{setting.name}-{training.num_steps}-{self.seed}".replace(" ", "")
        rates = f"{training.learning_rate:g}-{training.backbone_learning_rate:g}"
        classes = "four-fifths" if self.validates else "all"
        between = "-between" if self.between else ""
        return self.cache / f"{name}-{setting.loss.weight:g}-{rates}-{classes}{between}.npz"


def main() -> None:
    options = parse()
    config = config_of(options)
    cache = options.cache / f"{options.data.name}-{options.size_px}"
    for part in ("train", "test"):
        pixels_of(options.data / part, config, cache)
    start_of(config, options.data, cache, validates=False)
    plan = list(runs_of(config, options, cache))
    train_all(plan, train, processes=options.processes)
    test = pixels_of(options.data / "test", config, cache)
    held_out = method.split(pixels_of(options.data / "train", config, cache))[1]
    for base in options.losses:
        tell(base, [run for run in plan if run.setting.loss.base == base], test, held_out, options)


def config_of(options: Any) -> ModelConfig:
    return ModelConfig(
        backbone="tf_efficientnet_lite0",
        weights=str(options.weights),
        embedding_dim=options.dim,
        image_size_px=options.size_px,
    )


def parse() -> Any:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--losses", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--rows", nargs="+", default=["lambda 0", "both"])
    parser.add_argument("--rate", type=float, default=RATES.learning_rate)
    parser.add_argument("--backbone-rate", type=float, default=RATES.backbone_learning_rate)
    parser.add_argument("--four-fifths", action="store_true", help="measure what was trained on four fifths")
    parser.add_argument("--between", action="store_true", help="measure the best between start and end")
    options = method.parsed(parser)
    if options.between and not options.four_fifths:
        parser.error("--between needs held-out classes; add --four-fifths")
    return options


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options of the benchmarks that fine-tune."""
    parser = method.parser_of(description, cache=Path("/tmp/namr-fine-tuning"))
    parser.add_argument("--size-px", type=int, default=96)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser


def runs_of(config: ModelConfig, options: Any, cache: Path) -> Iterator[Run]:
    training = replace(
        RATES,
        num_steps=options.steps,
        learning_rate=options.rate,
        backbone_learning_rate=options.backbone_rate,
    )
    for base in options.losses:
        rows = [row for row in method.settings(base, config, options) if row.name in options.rows]
        for seed in range(options.seeds):
            yield from (
                Run(row, seed, training, options.four_fifths, cache, options.data, options.between)
                for row in rows
            )
        if not options.four_fifths:
            yield from (Run(row, 0, training, True, cache, options.data) for row in rows)


def train_all(plan: Sequence[Run], train: Callable[[Run], str], *, processes: int) -> None:
    """Those whose result is not there yet, so many at a time."""
    to_do = [run for run in plan if not run.result.exists()]
    print(f"{len(plan)} runs, {len(to_do)} to do", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for words in pool.map(train, to_do):
            print(words, flush=True)


def train(run: Run) -> str:
    """Train, embed what is measured, keep it; in a process of its own."""
    config = run.setting.model
    learnt = pixels_of(run.data / "train", config, run.cache)
    measured = {"test": pixels_of(run.data / "test", config, run.cache)}
    if run.validates:
        learnt, measured["held_out"] = method.split(learnt)
    return train_on(learnt, run, measured)


def train_on(learnt: Labelled, run: Run, measured: dict[str, Labelled]) -> str:
    """Train on the pixels that are learnt from, embed those that are measured, keep that."""
    torch.set_num_threads(1)
    setting, config = run.setting, run.setting.model
    built = model.build(config, seed=run.seed)
    start = start_of(config, run.data, run.cache, validates=run.validates)
    whitening.start_from(built.heads.sample, start)
    started = {name: value.clone() for name, value in built.state_dict().items()}
    joint = JointLoss(
        setting.loss, num_classes=int(learnt.y.max()) + 1, embedding_dim=config.embedding_dim, seed=run.seed
    )
    trainer = Trainer(built, joint, run.training, seed=run.seed, device=torch.device("cpu"))
    index = ClassIndex.from_labels(learnt.y)
    rows = (global_batch(index, BATCH, seed=run.seed, step=step) for step in range(setting.num_steps))
    loss = 0.0
    for result in trainer.run((torch.from_numpy(learnt.x[r]), torch.from_numpy(learnt.y[r])) for r in rows):
        loss = result.total
    if run.between:
        built.load_state_dict(best_between(started, built, measured["held_out"], joint))
    made = {}
    for name, images in measured.items():
        made[f"{name}_x"], made[f"{name}_s"] = model.embed(built, images.x, batch_size=64, device="cpu")
    with run.result.with_suffix(".partial").open("wb") as file:
        np.savez(file, **made)
    run.result.with_suffix(".partial").replace(run.result)
    return f"{run.result.stem}: loss {loss:.4f}"


def best_between(
    start: dict[str, torch.Tensor], trained: NamrModel, held_out: Labelled, loss: JointLoss
) -> dict[str, torch.Tensor]:
    """The weights on the way that find the held-out classes best, as `interpolation.look` chooses."""
    end = {name: value.clone() for name, value in trained.state_dict().items()}
    ways = validation.ways(search_metric_of(loss.config))
    scores, told = {}, []
    for share in (1.0, *interpolation.SHARES, 0.0):  # the start is a checkpoint as well
        trained.load_state_dict(interpolation.between(start, end, share))
        x, s = model.embed(trained, held_out.x, batch_size=64, device="cpu")
        results = validation.measure(x, s, held_out.y, ways=ways)
        found = Examination.of(results, ways, step=0, mean_distance=1)
        scores[share] = found.score
        recall, precision = found.recall_at_1["cosine"], found.map_at_r["cosine"]
        told.append(f"{share:g}: {100 * recall:.1f} / {100 * precision:.2f} ({100 * found.score:.2f})")
    best = max(scores, key=scores.__getitem__)
    print(f"by share of the way, by cosine (score): {', '.join(told)}; chosen {best:g}", flush=True)
    return interpolation.between(start, end, best)


def tell(base: str, runs: list[Run], test: Labelled, held_out: Labelled, options: Any) -> None:
    """The table, the mean of the seeds, and what NAMR gains."""
    set_name = f"{options.data.name} test, fine-tuned, {base}, {options.seeds} seeds"
    tables = []
    for seed in range(options.seeds):
        measured = [run for run in runs if run.seed == seed and run.validates == options.four_fifths]
        entries = [entry_of(run, "test") for run in measured]
        tables.append(compare(entries, test.y, set_name=set_name, with_nmi=seed == 0))
    way = {run.setting.name: recommended(run, held_out) for run in runs if run.validates and run.seed == 0}
    print(f"\n{method.mean_of(tables).to_markdown()}")
    for name, column in way.items():
        recalls = [100 * table.row(name).by_column[column].recall_at_1 for table in tables]
        print(f"{base}, {name}, by {column}: {', '.join(f'{recall:.1f}' for recall in recalls)}")
    if not {"both", "lambda 0"} <= way.keys():
        return
    pairs = [[table.row(name).by_column[way[name]] for name in ("both", "lambda 0")] for table in tables]
    ratio = np.mean([both.recall_at_1 for both, _ in pairs]) / np.mean([no.recall_at_1 for _, no in pairs])
    told = ", ".join(method.gain_of(both, without) for both, without in pairs)
    print(f"{base}: fine-tuned ratio {ratio:.3f}, gain of the score by seed {told}", flush=True)


def entry_of(run: Run, of: str) -> Entry:
    """of: test or held_out"""
    with np.load(run.result) as stored:
        s = stored[f"{of}_s"] if run.setting.has_structure else None
        return Entry(run.setting.name, stored[f"{of}_x"], s, search_metric_of(run.setting.loss))


def recommended(run: Run, held_out: Labelled) -> str:
    """The column that the table has for the way of searching that the held-out classes recommend."""
    ways = validation.ways(search_metric_of(run.setting.loss))
    ways = ways if run.setting.has_structure else ways[:2]
    entry = entry_of(run, "held_out")
    results = validation.measure(entry.embeddings, entry.structures, held_out.y, ways=ways)
    best: SearchDefaults = validation.choose(results, ways)
    told = ", ".join(
        f"{validation.name_of(way)} {100 * result.recall_at_1:.1f} / {100 * result.map_at_r:.2f}"
        for way, result in results.items()
    )
    print(f"{run.result.stem}: {told}; recommended {validation.name_of(best)}", flush=True)
    return best.metric if best.structure_side == "none" else best.structure_side


def pixels_of(folder: Path, config: ModelConfig, cache: Path) -> Labelled:
    """All images of a folder of class folders, uint8 (N, 3, H, W), mapped from a file."""
    paths, labels = method.labelled(folder)
    stored = cache / f"{folder.name}.npy"
    if not stored.exists():
        cache.mkdir(parents=True, exist_ok=True)
        prep = model.build(replace(config, weights="none"), seed=0).preprocessing
        with stored.with_suffix(".partial").open("wb") as file:
            np.save(file, method.prepared(paths, prep))
        stored.with_suffix(".partial").replace(stored)
    return Labelled(np.load(stored, mmap_mode="r"), labels)


def start_of(config: ModelConfig, data: Path, cache: Path, *, validates: bool) -> whitening.Whitening:
    """The whitening of the untouched features of what is learnt from."""
    train = pixels_of(data / "train", config, cache)
    stored = cache / "train-features.npy"
    if not stored.exists():
        blocks = (train.x[start : start + 64].copy() for start in range(0, len(train.x), 64))
        np.save(stored, method.features_of(model.build(config, seed=0).eval(), blocks))
    features = Labelled(np.load(stored), train.y)
    learnt = method.split(features)[0] if validates else features
    return whitening.whitening(learnt.x, dim=config.embedding_dim, power=POWER)


if __name__ == "__main__":
    main()
