"""An index built in parts by Ray tasks and merged, and the whole chain, against FAISS in one go.

    python -m tests.benchmarks.build [--vectors 1000000] [--dim 128] [--key IVF1024,Flat] [--parts 8]

All get the same vectors and number of threads, and end with an index file on disk: FAISS with `train`,
`add_with_ids`, `write_index` of a memory-mapped .npy file; namr's parts with the same training sample, one
Ray task of one thread for each part, and `merge_parts`. The chain is `templates.train` and `segments.build`,
what a release is made by: it reads its embeddings from Parquet files, which hold structures, keys and labels
too, verifies and writes digests, and has parts and segment stored and synced, which FAISS's file is not. Ray
and its workers are up before the clock runs, as on a cluster, and the files of the round before are gone:
ext4 flushes a file to the disk that replaces another. Rounds alternate; a ratio is that of the medians. On
the last line stands the one that is worst against its target.

Before the times count, the files are compared: the same bytes, or how many vectors lie in another list; the
chain's, which has another sample, by how many vectors find themselves.
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
from namr.data.shards import make_id
from namr.embed.embeddings import EmbeddingFile
from namr.index import ivf, planning
from namr.index.ivf import Floats, IndexInfo, Template
from namr.release import held_out, segments, templates
from namr.release.build_steps import HeldOut, VectorSource
from namr.store import manifests, tables
from namr.store.tables import EmbeddingTable

TARGETS = {"parts": 0.9, "chain": 0.7}
SEED = 0
ROWS_PER_SHARD = 1 << 13
QUERIES, NEIGHBOURS, NPROBE = 200, 10, 16


class PartTask(NamedTuple):
    """Rows start (included) to stop (excluded) of the file."""

    vectors: Path
    template: Template
    start: int
    stop: int
    path: Path


class Times(NamedTuple):
    """Seconds of each step, and its name."""

    train: float
    add: float
    write: float
    steps: str = "train, add, write"

    @property
    def total(self) -> float:
        return self.train + self.add + self.write


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="namr-build-", dir=options.folder) as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    threads, path = options.threads, folder / "vectors.npy"
    make_vectors(path, options.vectors, options.dim)
    files = embed(path, folder / "embeddings")
    print(
        f"{options.vectors} x {options.dim}, {options.key}, {options.parts} parts, {threads} threads, "
        f"FAISS {faiss.__version__}"
    )
    ray_connection.connect(None, num_cpus=threads)
    warm_up(path, files, folder, threads)
    times: dict[str, list[Times]] = {"faiss": [], "parts": [], "chain": []}
    for number in range(options.rounds):
        made = folder / str(number)
        made.mkdir()
        times["faiss"].append(monolithic(path, options, made / "faiss.index"))
        times["parts"].append(in_parts(path, options, made))
        if number == 0:
            compare(made / "faiss.index", made / "namr.index", np.load(path, mmap_mode="r"))
        for name in ("faiss.index", "namr.index"):
            (made / name).unlink()
        times["chain"].append(chain(files, options, made))
        if number == 0:
            check_finds_itself(made, np.load(path, mmap_mode="r"))
        shutil.rmtree(made)
        for side, found in times.items():
            last = found[-1]
            print(
                f"round {number + 1}  {side:5}  {last.total:6.2f} s; {last.steps}: {last.train:.2f}, "
                f"{last.add:.2f}, {last.write:.2f}",
                flush=True,
            )
    ray_connection.disconnect()
    medians = {side: statistics.median(found.total for found in times[side]) for side in times}
    ratios = {side: medians["faiss"] / medians[side] for side in TARGETS}
    for side, ratio in ratios.items():
        print(f"{side} ratio {ratio:.2f} target {TARGETS[side]}")
    worst = min(TARGETS, key=lambda side: ratios[side] / TARGETS[side])
    print(f"build ratio {ratios[worst]:.2f} target {TARGETS[worst]}")


def make_vectors(path: Path, num: int, dim: int) -> None:
    """Points around 1,000 centres, as float16 holds them, written in blocks."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((1000, dim), dtype=np.float32)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num, dim))
    for start in range(0, num, 1 << 16):
        stop = min(num, start + (1 << 16))
        noise = rng.standard_normal((stop - start, dim), dtype=np.float32)
        out[start:stop] = (centres[rng.integers(0, 1000, stop - start)] + 0.5 * noise).astype(np.float16)
    out.flush()


def embed(path: Path, root: Path) -> list[EmbeddingFile]:
    """The same vectors in files as extraction writes them, with structures."""
    x, rng, files = np.load(path, mmap_mode="r"), np.random.default_rng(1), []
    for number, start in enumerate(range(0, len(x), ROWS_PER_SHARD)):
        block = x[start : start + ROWS_PER_SHARD].astype(np.float16)
        table = EmbeddingTable(
            ids=make_id(number, 0) + np.arange(len(block)),
            keys=[f"image/{start + row}.jpg" for row in range(len(block))],
            labels=[str(row % 1000) for row in range(len(block))],
            embeddings=block,
            structures=rng.uniform(0.5, 1.5, block.shape).astype(np.float16),
            refused_ids=np.empty(0, np.int64),
            refused_keys=[],
            refused_reasons=[],
        )
        stored = manifests.write_object(str(root), f"{number}.parquet", tables.encode_embeddings(table))
        files.append(
            EmbeddingFile(
                number=number,
                stored=stored,
                num_embedded=len(block),
                num_refused=0,
                embedding_dim=block.shape[1],
                dtype="float16",
            )
        )
    return files


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
    paths = [task.path for task in tasks]
    merged = ivf.merge_parts(template, paths, folder / "namr.index", num_threads=options.threads)
    if merged.num_vectors != sum(info.num_vectors for info in built) or merged.num_vectors != len(x):
        raise SystemExit(f"{len(x)} vectors went in, {merged.num_vectors} came out")
    times = Times(trained - begun, added - trained, time.perf_counter() - added, "train, parts, merge")
    for path in paths:
        path.unlink()
    return times


def chain(files: list[EmbeddingFile], options: argparse.Namespace, folder: Path) -> Times:
    plan = planning.plan(options.vectors, options.dim, key=options.key, num_parts=options.parts)
    source = VectorSource(
        embeddings_uri=str(folder.parent / "embeddings"), dead=np.empty(0, np.int64), metric="l2"
    )
    work, begun = folder / "work", time.time()
    where = {"work_uri": str(work), "releases_uri": str(folder / "releases")}
    held = HeldOut(held_out.share(500, options.vectors), SEED)
    template, _ = templates.train(source, files, plan, held, seed=SEED, use_gpu=False, **where)
    segments.build(template, source, files, num_parts=plan.num_parts, **where)
    ended = time.time()
    trained = (work / "template.faiss").stat().st_mtime
    built = max(path.stat().st_mtime for path in work.glob("part-*.json"))
    return Times(trained - begun, built - trained, ended - built, "sample and train, parts, merge and store")


def check_finds_itself(folder: Path, x: Floats) -> None:
    """What the chain stored holds every vector, where a search finds it."""
    (path,) = (folder / "releases").glob("objects/*/index.faiss")
    index = ivf.open_index(path)
    rows = np.random.default_rng(1).integers(0, len(x), QUERIES)
    found = index.search(np.ascontiguousarray(x[rows]), 1, NPROBE)[1][:, 0]
    share = float((found == make_id(0, 0) + (rows // ROWS_PER_SHARD << 32) + rows % ROWS_PER_SHARD).mean())
    print(f"chain: {index.num_vectors} vectors, {share:.2%} of {QUERIES} found themselves")
    if index.num_vectors != len(x) or share < 0.999:
        raise SystemExit("the chain built another index: nothing to time")


def build_part(task: PartTask) -> IndexInfo:
    x = np.load(task.vectors, mmap_mode="r")
    block = (np.asarray(x[task.start : task.stop]), np.arange(task.start, task.stop))
    return ivf.build_part(task.template, [block], task.path, num_threads=1)


def warm_up(path: Path, files: list[EmbeddingFile], folder: Path, num_workers: int) -> None:
    """Start the workers and let them import what they need."""
    x = np.load(path, mmap_mode="r")
    template = ivf.train_template(np.asarray(x[:1000]), "IVF4,Flat", seed=SEED, num_threads=num_workers)
    tasks = [
        PartTask(path, template, 0, 1000, folder / f"warm-{number}") for number in range(4 * num_workers)
    ]
    list(ray_connection.map_tasks(build_part, tasks))
    made = folder / "warm"
    chain(
        files[:1],
        argparse.Namespace(
            vectors=files[0].num_embedded, dim=x.shape[1], key="IVF4,Flat", parts=4 * num_workers
        ),
        made,
    )
    shutil.rmtree(made)


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
    parser.add_argument("--folder", type=Path, default=None, help="for about five times the vectors' bytes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
