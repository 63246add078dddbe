"""An index built in parts by Ray tasks and merged, against one that FAISS builds in one go.

    python -m tests.benchmarks.build [--vectors 1000000] [--dim 128] [--key IVF1024,Flat] [--parts 8]

Both sides get the same vectors (a .npy file, memory-mapped), the same training sample, the same number of
threads, and end with an index file on disk: FAISS with `train`, `add_with_ids`, `write_index`; namr with
`train_template`, one Ray task of one thread for each part, `merge_parts`. Ray and its workers are up before
the clock runs, as on a cluster, and the files of the round before are gone: ext4 flushes a file to the disk
that replaces another. Rounds alternate; the ratio is that of the medians.

Before the times count, both files are compared: the same bytes, or how many vectors lie in another list.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np

from namr import ray_connection
from namr.index import ivf, planning
from namr.index.ivf import Floats, IndexInfo, Template

TARGET = 0.87
SEED = 0
QUERIES, NEIGHBOURS, NPROBE = 200, 10, 16


class PartTask(NamedTuple):
    """Rows start (included) to stop (excluded) of the file."""

    vectors: Path
    template: Template
    start: int
    stop: int
    path: Path


class Times(NamedTuple):
    """Seconds."""

    train: float
    add: float
    write: float

    @property
    def total(self) -> float:
        return sum(self)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="namr-build-", dir=options.folder) as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    threads, path = options.threads, folder / "vectors.npy"
    make_vectors(path, options.vectors, options.dim)
    print(
        f"{options.vectors} x {options.dim}, {options.key}, {options.parts} parts, {threads} threads, "
        f"FAISS {faiss.__version__}"
    )
    ray_connection.connect(None, num_cpus=threads)
    warm_up(path, folder, threads)
    times: dict[str, list[Times]] = {"faiss": [], "namr": []}
    for number in range(options.rounds):
        made = folder / str(number)
        made.mkdir()
        times["faiss"].append(monolithic(path, options, made / "faiss.index"))
        times["namr"].append(in_parts(path, options, made))
        if number == 0:
            compare(made / "faiss.index", made / "namr.index", np.load(path, mmap_mode="r"))
        shutil.rmtree(made)
        for side, found in times.items():
            last = found[-1]
            print(
                f"round {number + 1}  {side:5}  {last.total:6.2f} s: train {last.train:.2f}, "
                f"add {last.add:.2f}, {'write' if side == 'faiss' else 'merge'} {last.write:.2f}",
                flush=True,
            )
    ray_connection.disconnect()
    medians = {side: statistics.median(found.total for found in times[side]) for side in times}
    print(f"build ratio {medians['faiss'] / medians['namr']:.2f} target {TARGET}")


def make_vectors(path: Path, num: int, dim: int) -> None:
    """Points around 1,000 centres, written in blocks."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((1000, dim), dtype=np.float32)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num, dim))
    for start in range(0, num, 1 << 16):
        stop = min(num, start + (1 << 16))
        noise = rng.standard_normal((stop - start, dim), dtype=np.float32)
        out[start:stop] = centres[rng.integers(0, 1000, stop - start)] + 0.5 * noise
    out.flush()


def sample_of(x: Floats, key: str) -> Floats:
    plan = planning.plan(len(x), x.shape[1], key=key)
    chosen = np.random.default_rng(SEED).choice(len(x), plan.num_training_vectors, replace=False)
    return np.ascontiguousarray(x[np.sort(chosen)])


def monolithic(path: Path, options: argparse.Namespace, out_path: Path) -> Times:
    x = np.load(path, mmap_mode="r")
    begun = time.perf_counter()
    template = ivf.train_template(
        sample_of(x, options.key), options.key, seed=SEED, num_threads=options.threads
    )
    trained = time.perf_counter()
    index = faiss.deserialize_index(np.frombuffer(template.data, np.uint8))
    index.add_with_ids(np.asarray(x), np.arange(len(x)))
    added = time.perf_counter()
    faiss.write_index(index, str(out_path))
    return Times(trained - begun, added - trained, time.perf_counter() - added)


def in_parts(path: Path, options: argparse.Namespace, folder: Path) -> Times:
    x = np.load(path, mmap_mode="r")
    begun = time.perf_counter()
    template = ivf.train_template(
        sample_of(x, options.key), options.key, seed=SEED, num_threads=options.threads
    )
    trained = time.perf_counter()
    bounds = [len(x) * number // options.parts for number in range(options.parts + 1)]
    tasks = [
        PartTask(path, template, bounds[number], bounds[number + 1], folder / f"{number:03d}.part")
        for number in range(options.parts)
    ]
    built = [info for _, info in ray_connection.map_tasks(build_part, tasks)]
    added = time.perf_counter()
    merged = ivf.merge_parts(template, [task.path for task in tasks], folder / "namr.index")
    if merged.num_vectors != sum(info.num_vectors for info in built) or merged.num_vectors != len(x):
        raise SystemExit(f"{len(x)} vectors went in, {merged.num_vectors} came out")
    return Times(trained - begun, added - trained, time.perf_counter() - added)


def build_part(task: PartTask) -> IndexInfo:
    x = np.load(task.vectors, mmap_mode="r")
    block = (np.asarray(x[task.start : task.stop]), np.arange(task.start, task.stop))
    return ivf.build_part(task.template, [block], task.path, num_threads=1)


def warm_up(path: Path, folder: Path, num_workers: int) -> None:
    """Start the workers and let them import what they need."""
    x = np.load(path, mmap_mode="r")
    template = ivf.train_template(np.asarray(x[:1000]), "IVF4,Flat", seed=SEED, num_threads=num_workers)
    tasks = [
        PartTask(path, template, 0, 1000, folder / f"warm-{number}") for number in range(4 * num_workers)
    ]
    list(ray_connection.map_tasks(build_part, tasks))


def compare(one: Path, other: Path, x: Floats) -> None:
    """Both files must give the same answers, but for vectors that FAISS alone puts into another list."""
    rng = np.random.default_rng(1)
    queries = np.ascontiguousarray(x[rng.integers(0, len(x), QUERIES)]) + np.float32(0.01)
    answers = [ivf.open_index(path).search(queries, NEIGHBOURS, NPROBE) for path in (one, other)]
    same_bytes = one.read_bytes() == other.read_bytes()
    share = float((answers[0][1] == answers[1][1]).mean())
    print(f"same bytes: {same_bytes}; {share:.2%} of {QUERIES} x {NEIGHBOURS} neighbours at the same place")
    if not same_bytes and share < 0.999:
        raise SystemExit("the two sides built different indexes: nothing to time")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--key", default="IVF1024,Flat")
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="for about twice the vectors' bytes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
