"""Does the method pay? Recall@1 on unseen classes with the ranking loss over that without it.

    python -m tests.benchmarks.method [--data FOLDER] [--weights FILE] [--cache FOLDER] [--seeds 3]

Heads of D = 256 on frozen EfficientNet-Lite0 features of Cars-196 crops at 128 px, 600 steps of 32 x 4, four
base losses, lambda = 2. Rows: the features untrained, lambda = 0, lambda > 0 with s = 1, trained by "query",
trained by "both"; columns: each way of searching, Recall@1 / MAP@R in per cent on the 98 unseen classes,
mean over the seeds. No step and no setting is chosen by these classes. The first run computes the features
(about three minutes on 2 cores) and keeps them in --cache.

The last line is the worst ratio over the base losses of "both" to lambda = 0, each searched plainly by the
distance that its base loss works on.
"""

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from namr import features, images, model
from namr.evaluation import Comparison, Entry, Row, compare
from namr.learning import Learning, TrainingConfig
from namr.losses import JointLoss, LossConfig, search_metric_of
from namr.metrics import RetrievalMetrics
from namr.model import ModelConfig, NamrModel
from namr.sampling import ClassIndex, PKConfig, global_batch

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("NAMR_TEST_DATA", ROOT.parent / "shared" / "data"))
BASES = ("triplet", "contrastive", "multi_similarity", "proxy_anchor")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    config = ModelConfig(
        backbone="tf_efficientnet_lite0",
        weights=str(options.weights),
        embedding_dim=options.dim,
        image_size_px=128,
    )
    train_x, train_y = cached_features(options.data / "train", config, options.cache)
    test_x, test_y = cached_features(options.data / "test", config, options.cache)
    set_name = f"{options.data.name} test"
    print(f"{options.data.name}: {len(train_y)} images to train on, {len(test_y)} of unseen classes")
    untrained = compare([Entry("untrained features", test_x, None, "cosine")], test_y, set_name=set_name)
    ratios = []
    for base in options.losses:
        start = time.monotonic()
        runs = []
        for seed in range(options.seeds):
            entries = [
                trained(name, loss, r, train_x, train_y, test_x, config, options, seed)
                for name, loss, r in settings(base, options.clusters)
            ]
            runs.append(compare(entries, test_y, set_name=set_name))
        table = mean_of(runs)
        print(f"\n{base}, {options.seeds} seeds, {time.monotonic() - start:.0f} s")
        print(replace(table, rows=untrained.rows + table.rows).to_markdown(), flush=True)
        plain = {row.name: row.by_column[row.metric].recall_at_1 for row in table.rows}
        ratios.append((plain["both"] / plain["lambda 0"], base))
    for ratio, base in ratios:
        print(f"{base}: {ratio:.3f}")
    print(f"method ratio {min(ratios)[0]:.3f} target 1.0")


def parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "cars196")
    parser.add_argument(
        "--weights", type=Path, default=SHARED.parent / "weights" / "tf_efficientnet_lite0.safetensors"
    )
    parser.add_argument("--cache", type=Path, default=Path("/tmp/namr-method-features"))
    parser.add_argument("--losses", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--clusters", type=int, default=2)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=TrainingConfig(num_steps=1).learning_rate)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    for path in (options.data, options.weights):
        if not path.exists():
            parser.error(f"{path} is not there; name it, or set NAMR_TEST_DATA")
    return options


def settings(base: Any, clusters: int) -> Iterator[tuple[str, LossConfig, float]]:
    """Name, loss and structure range of each trained row."""
    yield "lambda 0", LossConfig(base=base, ranking_weight=0), 0.5
    yield "s = 1", LossConfig(base=base, num_clusters=clusters), 0.0
    yield "query", LossConfig(base=base, num_clusters=clusters, structure_side="query"), 0.5
    yield "both", LossConfig(base=base, num_clusters=clusters, structure_side="both"), 0.5


def trained(
    name: str,
    loss: LossConfig,
    structure_range: float,
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    config: ModelConfig,
    options: Any,
    seed: int,
) -> Entry:
    """Heads trained on the cached features, and what they make of the unseen classes."""
    built = model.build(replace(config, structure_range=structure_range), seed=seed)
    joint = JointLoss(loss, num_classes=int(train_y.max()) + 1, embedding_dim=options.dim, seed=seed)
    training = TrainingConfig(
        num_steps=options.steps,
        learning_rate=options.learning_rate,
        backbone_learning_rate=0,
        augment=False,
        seed=seed,
    )
    learning = Learning(built, joint, training, device=torch.device("cpu"))
    index = ClassIndex.from_labels(train_y)
    batches = PKConfig(classes_per_batch=32, samples_per_class=4, seed=seed)
    rows = (global_batch(index, batches, step=step) for step in range(options.steps))
    for _ in learning.run((torch.from_numpy(train_x[r]), torch.from_numpy(train_y[r])) for r in rows):
        pass
    built.eval()
    with torch.inference_mode():
        x, s = built.heads(torch.from_numpy(test_x))
    structures = s.numpy() if structure_range and loss.ranking_weight else None
    return Entry(name, x.numpy(), structures, search_metric_of(loss))


def mean_of(runs: list[Comparison]) -> Comparison:
    """The same table with every number averaged over the runs."""
    rows = []
    for same in zip(*(run.rows for run in runs), strict=True):
        cells = {name: mean_metrics([row.by_column[name] for row in same]) for name in same[0].by_column}
        rows.append(Row(name=same[0].name, metric=same[0].metric, by_column=cells))
    return replace(runs[0], rows=tuple(rows))


def mean_metrics(found: list[RetrievalMetrics]) -> RetrievalMetrics:
    return RetrievalMetrics(
        recall_at_k={k: float(np.mean([m.recall_at_k[k] for m in found])) for k in found[0].recall_at_k},
        map_at_r=float(np.mean([m.map_at_r for m in found])),
        r_precision=float(np.mean([m.r_precision for m in found])),
        num_queries=found[0].num_queries,
        num_skipped=found[0].num_skipped,
    )


def cached_features(folder: Path, config: ModelConfig, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N, 1280) float32 features and (N,) int64 classes of a folder of class folders."""
    paths = sorted(folder.glob("*/*"))
    names = sorted({path.parent.name for path in paths})
    labels = np.array([names.index(path.parent.name) for path in paths], np.int64)
    backbone = model.build(config, seed=0).eval()
    stored = cache / f"{folder.parent.name}-{folder.name}-{features.backbone_digest(backbone)[:16]}.npy"
    if not stored.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with stored.with_suffix(".partial").open("wb") as file:
            np.save(file, computed_features(backbone, paths))
        stored.with_suffix(".partial").replace(stored)
    return np.load(stored), labels


def computed_features(backbone: NamrModel, paths: list[Path]) -> np.ndarray:
    found = []
    with ThreadPoolExecutor(2) as readers, torch.inference_mode():
        for start in range(0, len(paths), 64):
            block = paths[start : start + 64]
            pixels = readers.map(
                lambda path: images.prepare(path.read_bytes(), backbone.preprocessing), block
            )
            found.append(backbone.features(torch.from_numpy(np.stack(list(pixels)))).numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    main()
