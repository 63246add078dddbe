"""Extraction by Ray actors against the bare loop over the same model and images, on the same cores.

    python -m tests.benchmarks.extraction [--images 1600] [--backbone tf_efficientnet_lite0] [--size-px 128]

Synthetic JPEGs of 256 x 256 in shards on local disk; an untrained model. The bare loop is one process: it has
the JPEGs in memory, decodes a batch ahead in as many threads as there are cores, and gives torch all cores.
namr is `extraction.extract`: Ray Data, one actor a core, shards read and verified, files written and
reconciled. Starting actors and loading the model (shown) is not counted, as on a run over millions: the rate
is that of the additional images of a long run over a short one. Rounds alternate; the ratio is the median's.

Before the times count, the embeddings of both sides are compared.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from namr import ray_connection
from namr.data import datasets, images, shards
from namr.data.datasets import Dataset
from namr.embed import embeddings, extraction
from namr.embed.extraction import ExtractionConfig
from namr.model import model
from namr.model.model import ModelConfig, NamrModel
from namr.store import manifests, tables

TARGET = 0.95
BATCH = 64
NUM_PICTURES = 100


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="namr-extraction-") as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    cores, num_shards = options.cores, 2 + 2 * (options.images // (2 * options.shard_images))
    net = model.build(
        ModelConfig(backbone=options.backbone, weights="none", image_size_px=options.size_px), seed=0
    ).eval()
    model.save(net, folder / "model")
    pictures = make_pictures()
    rows = [pictures[row % NUM_PICTURES] for row in range(num_shards * options.shard_images)]
    short = make_dataset(folder / "short", rows[: cores * options.shard_images], options.shard_images)
    whole = make_dataset(folder / "long", rows, options.shard_images)
    additional = len(rows) - cores * options.shard_images
    print(
        f"{options.backbone} at {options.size_px} px, batches of {BATCH}, {additional} images, {cores} cores"
    )
    ray_connection.connect(None, num_cpus=cores)
    ratios = []
    for number in range(options.rounds):
        torch.set_num_threads(cores)
        begun = time.perf_counter()
        x = bare_loop(net, rows[:additional], cores)
        bare = additional / (time.perf_counter() - begun)
        root = folder / f"out-{number}"
        start_up_s = seconds_of(short, root / "short", folder, options)
        ours = additional / (seconds_of(whole, root / "long", folder, options) - start_up_s)
        if number == 0:
            compare(str(root / "long"), whole, model.digest(net), x)
        ratios.append(ours / bare)
        print(
            f"round {number + 1}: bare loop {bare:.1f} images/s, extraction {ours:.1f} images/s "
            f"(start-up and {cores} shards {start_up_s:.1f} s)",
            flush=True,
        )
    ray_connection.disconnect()
    print(f"extraction ratio {statistics.median(ratios):.2f} target {TARGET}")


def seconds_of(dataset: Dataset, root: Path, folder: Path, options: argparse.Namespace) -> float:
    """Wall-clock of a run that has everything to do."""
    config = ExtractionConfig(
        batch_size_per_worker=BATCH,
        num_workers=options.workers or options.cores,
        decode_threads_per_worker=options.decode_threads,
        decode_tasks_per_worker=options.decode_tasks,
    )
    begun = time.perf_counter()
    report = extraction.extract(dataset, str(root), str(folder / "model"), config)
    if report.num_new != dataset.version.num_samples:
        raise SystemExit(f"{report.num_new} of {dataset.version.num_samples} images were embedded")
    print(f"  {report.num_new} {report.throughput.stages}", flush=True)
    return time.perf_counter() - begun


def bare_loop(net: NamrModel, rows: list[bytes], cores: int) -> np.ndarray:
    """Embeddings (n, D) float32; decoding runs one batch ahead of the model."""
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    found = []
    with ThreadPoolExecutor(cores) as pool:
        ahead = [pool.submit(images.prepare, data, net.preprocessing) for data in batches[0]]
        for at in range(len(batches)):
            under_way = ahead
            if at + 1 < len(batches):
                ahead = [pool.submit(images.prepare, data, net.preprocessing) for data in batches[at + 1]]
            pixels = np.stack([future.result() for future in under_way])
            found.append(model.embed(net, pixels, batch_size=BATCH, device="cpu")[0])
    return np.concatenate(found)


def compare(root: str, dataset: Dataset, digest: str, x: np.ndarray) -> None:
    """Both sides must have computed the same embeddings, to float16."""
    tables_found = embeddings.iterate(embeddings.open_set(root, digest, dataset))
    stored = np.concatenate([table.embeddings for table in tables_found])[: len(x)].astype(np.float32)
    worst = float(np.abs(stored - x).max() / np.abs(x).max())
    print(
        f"largest difference {worst:.1e} of the largest value ({len(x)} embeddings, float16 against float32)"
    )
    if not worst < 2e-3:
        raise SystemExit("the two sides computed different embeddings: nothing to time")


def make_pictures() -> list[bytes]:
    """Smooth random JPEGs of 256 x 256."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(NUM_PICTURES):
        small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def make_dataset(folder: Path, rows: list[bytes], rows_per_shard: int) -> Dataset:
    folder.mkdir(parents=True)
    before, entries = datasets.head(str(folder / "dataset")), []
    for number, start in enumerate(range(0, len(rows), rows_per_shard)):
        samples = [
            shards.Sample(key=f"{start + row}", image=data, extension="jpg")
            for row, data in enumerate(rows[start : start + rows_per_shard])
        ]
        path = folder / f"{number:06d}.tar"
        table = shards.write_shard(path, samples, number=number)
        name = f"shards/{number:06d}"
        index = manifests.write_object(before.uri, f"{name}.parquet", tables.encode_samples(table))
        tar = manifests.write_object(before.uri, f"{name}.tar", path)
        entries.append(datasets.ShardEntry(number=number, tar=tar, index=index, num_samples=len(table)))
    return datasets.publish_version(before, entries, now=datetime.now(UTC))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=1600, help="that the rate is taken from")
    parser.add_argument("--shard-images", type=int, default=200)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size-px", type=int, default=128)
    parser.add_argument("--decode-threads", type=int, default=4, help="of each worker")
    parser.add_argument("--decode-tasks", type=int, default=0, help="of each worker, in the threads' place")
    parser.add_argument("--workers", type=int, help="default: one a core")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
