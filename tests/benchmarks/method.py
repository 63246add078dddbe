"""Does the method pay? Recall@1 on unseen classes with the ranking loss over that without it.

    python -m tests.benchmarks.method [--data FOLDER] [--weights FILE] [--cache FOLDER] [--seeds 3]

Heads of D = 256 on frozen EfficientNet-Lite0 features of Cars-196 crops at 128 px, from the whitened start,
300 steps of 32 x 4, five base losses, each with its own lambda. Rows: the features untouched, whitened and
untrained, lambda = 0, lambda > 0 with s = 1, trained by "query", trained by "both"; columns: each way of
searching, Recall@1 / MAP@R in per cent on the 98 unseen classes, mean over the seeds. No step and no setting
is chosen by these classes.

A loss that spreads x bears a higher learning rate than one that doesn't, so each row is trained at the one of
--rates that is best for it on a fifth of the training classes, held out for that choice (mean of the seeds);
these recommend its way of searching, too. Then it is trained on all of them.

The first run computes the features (about three minutes on 2 cores) and keeps them in --cache. The last line
is the worst ratio over the base losses of the Recall@1 of "both" to that of lambda = 0, each searched as
recommended; before it stands, for each loss, the gain of the mean of Recall@1 and MAP@R, query by query,
with its 95 % interval (a bootstrap over classes; first seed).
"""

import argparse
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from namr.data import images
from namr.data.images import Preprocessing
from namr.data.sampling import ClassIndex, PKConfig, global_batch
from namr.measure import metrics, validation
from namr.measure.evaluation import Comparison, Entry, Row, compare
from namr.measure.metrics import RetrievalMetrics
from namr.model import model, whitening
from namr.model.losses import JointLoss, LossConfig, search_metric_of
from namr.model.model import ModelConfig, NamrModel, SearchDefaults
from namr.train.recipe import TrainingConfig
from namr.train.step import Trainer

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("NAMR_TEST_DATA", ROOT.parent / "shared" / "data"))
BASES = ("triplet", "contrastive", "margin", "multi_similarity", "proxy_anchor")
POWER = 0.25
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Setting:
    """What a row is trained with, but for its rate and seed."""

    name: str
    loss: LossConfig
    model: ModelConfig
    num_steps: int

    @property
    def has_structure(self) -> bool:
        return self.model.structure_range > 0 and self.loss.weight > 0


class Choice(NamedTuple):
    """What validation picked for a row."""

    rate: float
    ways: tuple[SearchDefaults, ...]
    """the one way of searching; none before it was picked"""

    @property
    def column(self) -> str:
        """Where the table has that way."""
        (way,) = self.ways
        return way.metric if way.structure_side == "none" else way.structure_side


@dataclass(frozen=True)
class Labelled:
    """(N, F) float32 features and their (N,) int64 classes."""

    x: np.ndarray
    y: np.ndarray


def main() -> None:
    options = parse()
    config, (train, test) = frozen(options, "train", "test")
    learnt, held_out = split(train)
    set_name = f"{options.data.name} test"
    print(f"{options.data.name}: {len(train.y)} images to train on, {len(test.y)} of unseen classes")
    whitened = entry(settings("triplet", config, options)[0], train, test, Choice(0.0, ()), 0, num_steps=0)
    untrained = compare(
        [
            Entry("features untouched", test.x, None, "cosine"),
            whitened._replace(name="whitened, untrained", structures=None, metric="cosine"),
        ],
        test.y,
        set_name=set_name,
    )
    seeds, ratios = range(options.seeds), []
    for base in options.losses:
        start = time.monotonic()
        rows = settings(base, config, options)
        choices = [chosen(row, learnt, held_out, options.rates, seeds) for row in rows]
        runs = [
            compare(
                [entry(row, train, test, choice, seed) for row, choice in zip(rows, choices, strict=True)],
                test.y,
                set_name=set_name,
            )
            for seed in seeds
        ]
        table = mean_of(runs)
        print(
            f"\n{base}, lambda {rows[-1].loss.weight:g}, {options.seeds} seeds, "
            f"{time.monotonic() - start:.0f} s"
        )
        print(replace(table, rows=untrained.rows + table.rows).to_markdown(), flush=True)
        way = {row.name: choice.column for row, choice in zip(rows, choices, strict=True)}
        recall = {row.name: row.by_column[way[row.name]].recall_at_1 for row in table.rows}
        gain = gain_of(*(runs[0].row(name).by_column[way[name]] for name in ("both", "lambda 0")))
        print(
            f"{base}: both by {way['both']} {100 * recall['both']:.2f}, lambda 0 by {way['lambda 0']} "
            f"{100 * recall['lambda 0']:.2f}; gain {gain}",
            flush=True,
        )
        ratios.append((recall["both"] / recall["lambda 0"], base))
    for ratio, base in ratios:
        print(f"{base}: {ratio:.3f}")
    print(f"method ratio {min(ratios)[0]:.3f} target 1.0")


def parse() -> Any:
    parser = frozen_parser(__doc__ or "")
    parser.add_argument("--losses", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    return parsed(parser)


def frozen_parser(description: str) -> argparse.ArgumentParser:
    """The options of the benchmarks on frozen features."""
    parser = parser_of(description, cache=Path("/tmp/namr-method-features"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser


def frozen(options: Any, *parts: str) -> tuple[ModelConfig, list[Labelled]]:
    """The network of these benchmarks, on so many threads, and its features of these parts of the data."""
    torch.set_num_threads(options.threads)
    config = ModelConfig(
        backbone="tf_efficientnet_lite0",
        weights=str(options.weights),
        embedding_dim=options.dim,
        image_size_px=128,
    )
    return config, [cached_features(options.data / part, config, options.cache) for part in parts]


def parser_of(description: str, *, cache: Path) -> argparse.ArgumentParser:
    """The options of all benchmarks that train on these images."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "cars196")
    parser.add_argument(
        "--weights", type=Path, default=SHARED.parent / "weights" / "tf_efficientnet_lite0.safetensors"
    )
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--dim", type=int, default=256)
    return parser


def parsed(parser: argparse.ArgumentParser) -> Any:
    """What was asked for, where the images and weights are there."""
    options = parser.parse_args()
    for path in (options.data, options.weights):
        if not path.exists():
            parser.error(f"{path} is not there; name it, or set NAMR_TEST_DATA")
    if (strokes := options.data / "omniglot.npz").exists():
        options.data = unpacked(strokes, options.cache / "omniglot")
    return options


def unpacked(strokes: Path, folder: Path) -> Path:
    """Omniglot's arrays as a folder of class folders: black strokes on white, its own split."""
    for split, name in (("train", "background"), ("test", "evaluation")):
        if (folder / split).is_dir():
            continue
        partial = folder / f"{split}.partial"
        with np.load(strokes) as arrays:
            drawn, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
        for number, (image, label) in enumerate(zip(drawn, labels, strict=True)):
            of_class = partial / f"{label:04d}"
            of_class.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.where(image > 0, 0, 255).astype(np.uint8)).save(of_class / f"{number:05d}.png")
        partial.rename(folder / split)
    return folder


def settings(base: Any, config: ModelConfig, options: Any) -> list[Setting]:
    """The trained rows."""
    without = replace(config, structure_range=0.0)
    joint = LossConfig(base=base, num_clusters=options.clusters)
    return [
        Setting("lambda 0", replace(joint, ranking_weight=0), config, options.steps),
        Setting("s = 1", joint, without, options.steps),
        Setting("query", replace(joint, structure_side="query"), config, options.steps),
        Setting("both", joint, config, options.steps),
    ]


def split(train: Labelled, *, seed: int = 0) -> tuple[Labelled, Labelled]:
    """What a rate is tried on: the images of most classes to learn from, and those of the held-out ones."""
    index = ClassIndex.from_labels(train.y)
    names = [str(number) for number in range(index.num_classes)]
    held_out = validation.classes_to_hold_out(index, names, share=HELD_OUT_SHARE, seed=seed)
    is_held_out = np.isin(train.y, held_out)

    def of(chosen: np.ndarray) -> Labelled:
        return Labelled(train.x[chosen], np.unique(train.y[chosen], return_inverse=True)[1])

    return of(~is_held_out), of(is_held_out)


def chosen(
    setting: Setting, learnt: Labelled, held_out: Labelled, rates: Sequence[float], seeds: Sequence[int]
) -> Choice:
    """What is best on training classes that are held out for this; says what it found."""
    ways = validation.ways(search_metric_of(setting.loss))
    if not setting.has_structure:
        ways = ways[:2]
    scores, results = [], {}
    for rate in rates:
        of_seeds = []
        for seed in seeds:
            made = entry(setting, learnt, held_out, Choice(rate, ()), seed)
            results[rate, seed] = validation.measure(made.embeddings, made.structures, held_out.y, ways=ways)
            of_seeds.append(float(results[rate, seed][ways[0]].scores.mean()))
        scores.append(float(np.mean(of_seeds)))
    best = rates[int(np.argmax(scores))]
    way = validation.choose(results[best, seeds[0]], ways)
    told = ", ".join(f"{rate:g} {100 * score:.2f}" for rate, score in zip(rates, scores, strict=True))
    print(
        f"{setting.loss.base}, {setting.name}: rate {best:g}, searched by {validation.name_of(way)}; "
        f"held-out mean of Recall@1 and MAP@R by rate: {told}",
        flush=True,
    )
    return Choice(best, (way,))


def entry(
    setting: Setting,
    train: Labelled,
    test: Labelled,
    choice: Choice,
    seed: int,
    *,
    num_steps: int | None = None,
) -> Entry:
    """Heads trained on the one from the whitened start, and what they make of the other."""
    built = model.build(setting.model, seed=seed)
    start = whitening.whitening(train.x, dim=setting.model.embedding_dim, power=POWER)
    whitening.start_from(built.heads.sample, start)
    steps = setting.num_steps if num_steps is None else num_steps
    if steps:
        train_heads(setting, built, train, choice.rate, seed)
    built.eval()
    with torch.inference_mode():
        x, s = built.heads(torch.from_numpy(test.x))
    structures = s.numpy() if setting.has_structure else None
    return Entry(setting.name, x.numpy(), structures, search_metric_of(setting.loss))


def train_heads(setting: Setting, built: NamrModel, train: Labelled, rate: float, seed: int) -> None:
    joint = JointLoss(
        setting.loss,
        num_classes=int(train.y.max()) + 1,
        embedding_dim=setting.model.embedding_dim,
        seed=seed,
    )
    training = TrainingConfig(
        num_steps=setting.num_steps, learning_rate=rate, backbone_learning_rate=0, augment=False
    )
    trainer = Trainer(built, joint, training, seed=seed, device=torch.device("cpu"))
    index = ClassIndex.from_labels(train.y)
    batches = PKConfig(classes_per_batch=32, samples_per_class=4)
    rows = (global_batch(index, batches, seed=seed, step=step) for step in range(setting.num_steps))
    for _ in trainer.run((torch.from_numpy(train.x[r]), torch.from_numpy(train.y[r])) for r in rows):
        pass


def gain_of(one: RetrievalMetrics, other: RetrievalMetrics) -> str:
    """In points, with its 95 % interval over classes."""
    low, high = metrics.interval(one, other) or (np.nan, np.nan)
    return f"{100 * metrics.difference(one, other).mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def mean_of(runs: list[Comparison]) -> Comparison:
    """The same table with every number averaged over the runs."""
    rows = []
    for same in zip(*(run.rows for run in runs), strict=True):
        cells = {name: mean_metrics([row.by_column[name] for row in same]) for name in same[0].by_column}
        of_all = [row.nmi for row in same if row.nmi is not None]
        nmi = float(np.mean(of_all)) if of_all else None
        rows.append(Row(name=same[0].name, metric=same[0].metric, by_column=cells, nmi=nmi))
    return replace(runs[0], rows=tuple(rows))


def mean_metrics(found: list[RetrievalMetrics]) -> RetrievalMetrics:
    return RetrievalMetrics(
        recall_at_k={k: float(np.mean([m.recall_at_k[k] for m in found])) for k in found[0].recall_at_k},
        map_at_r=float(np.mean([m.map_at_r for m in found])),
        r_precision=float(np.mean([m.r_precision for m in found])),
        num_queries=found[0].num_queries,
        num_skipped=found[0].num_skipped,
    )


def labelled(folder: Path) -> tuple[list[Path], np.ndarray]:
    """The images of a folder of class folders, and their (N,) int64 classes."""
    paths = sorted(folder.glob("*/*"))
    names = sorted({path.parent.name for path in paths})
    return paths, np.array([names.index(path.parent.name) for path in paths], np.int64)


def cached_features(folder: Path, config: ModelConfig, cache: Path) -> Labelled:
    """What the untouched backbone makes of them."""
    paths, labels = labelled(folder)
    backbone = model.build(config, seed=0).eval()
    stored = cache / f"{folder.parent.name}-{folder.name}-{model.backbone_digest(backbone)[:16]}.npy"
    if not stored.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with stored.with_suffix(".partial").open("wb") as file:
            np.save(file, computed_features(backbone, paths))
        stored.with_suffix(".partial").replace(stored)
    return Labelled(np.load(stored), labels)


def computed_features(backbone: NamrModel, paths: list[Path]) -> np.ndarray:
    blocks = (paths[start : start + 64] for start in range(0, len(paths), 64))
    return features_of(backbone, (prepared(block, backbone.preprocessing) for block in blocks))


def features_of(backbone: NamrModel, blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Of blocks of uint8 pixels."""
    with torch.inference_mode():
        return np.concatenate([backbone.features(torch.from_numpy(block)).numpy() for block in blocks])


def prepared(paths: list[Path], prep: Preprocessing) -> np.ndarray:
    """uint8 (N, 3, H, W)"""
    with ThreadPoolExecutor(2) as readers:
        return np.stack(list(readers.map(lambda path: images.prepare(path.read_bytes(), prep), paths)))


if __name__ == "__main__":
    main()
