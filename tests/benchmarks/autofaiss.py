"""The same index by namr and by autofaiss: time, and peak memory.

    pip install --no-deps --target /tmp/autofaiss autofaiss embedding-reader fire termcolor
    python -m tests.benchmarks.autofaiss --autofaiss /tmp/autofaiss [--vectors 1000000] [--key IVF1024,SQ8]

(autofaiss asks for faiss-cpu and an old numpy, which would replace the ones that are here: so it is installed
beside, without its dependencies, and runs with ours; json gets told how to write numpy 2's floats for it.)

Each side is a fresh process that reads the same eight .npy files, has the same number of threads, and leaves
one index file: autofaiss with its key and search parameter given, so that it has nothing to choose; namr
with a part for each file, one after the other, and a merge. Peak memory is the largest sum of anonymous and
shared pages (/proc/<pid>/status, every 10 ms), so mapped files don't count on either side. The ratio is the
worse of time and memory.

The training samples differ, so the indexes do: before anything counts, both must hold every vector, and find
nearly the same share of the true neighbours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np

from namr.index import ivf, planning
from namr.index.ivf import Floats

TARGET = 1.0
SEED, NUM_FILES = 0, 8
QUERIES, NEIGHBOURS, NPROBE = 200, 10, 32
AUTOFAISS = """
import functools, json, sys
from autofaiss import build_index
json.dump = functools.partial(json.dump, default=float)
folder, key, threads, nprobe = sys.argv[1:]
index, _ = build_index(
    folder + "/vectors", index_path=folder + "/autofaiss.index", index_infos_path=folder + "/infos.json",
    index_key=key, index_param="nprobe=" + nprobe, metric_type="l2", nb_cores=int(threads),
    max_index_memory_usage="16G", current_memory_available="32G", verbose=40)
sys.exit(index is None)
"""


class Cost(NamedTuple):
    """Of one build."""

    seconds: float
    peak_bytes: int


def main() -> None:
    options = parse()
    if options.part_of:
        build_here(options)
        return
    with tempfile.TemporaryDirectory(prefix="namr-autofaiss-") as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    make_vectors(folder / "vectors", options.vectors, options.dim)
    print(
        f"{options.vectors} x {options.dim}, {options.key}, {options.threads} threads, "
        f"FAISS {faiss.__version__}"
    )
    mine = [
        sys.executable,
        "-m",
        "tests.benchmarks.autofaiss",
        "--part-of",
        str(folder),
        "--key",
        options.key,
    ]
    mine += ["--threads", str(options.threads)]
    given = [str(folder), options.key, str(options.threads), str(NPROBE)]
    theirs = [sys.executable, "-c", AUTOFAISS, *given]
    costs: dict[str, list[Cost]] = {"autofaiss": [], "namr": []}
    for number in range(options.rounds):
        costs["autofaiss"].append(measured(theirs, {"PYTHONPATH": str(options.autofaiss)}, options.threads))
        costs["namr"].append(measured(mine, {}, options.threads))
        for side, found in costs.items():
            seconds, peak_bytes = found[-1]
            print(f"round {number + 1}  {side:9}  {seconds:6.2f} s, {peak_bytes / 1e6:.0f} MB", flush=True)
        if number == 0:
            compare(folder)
    ratios = [
        statistics.median(cost[at] for cost in costs["autofaiss"])
        / statistics.median(cost[at] for cost in costs["namr"])
        for at in (0, 1)
    ]
    print(f"time ratio {ratios[0]:.2f}, memory ratio {ratios[1]:.2f}")
    print(f"autofaiss ratio {min(ratios):.2f} target {TARGET}")


def make_vectors(folder: Path, num: int, dim: int) -> None:
    """Points around 1,000 centres, in equal files."""
    folder.mkdir()
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((1000, dim), dtype=np.float32)
    for number, rows in enumerate(np.array_split(np.arange(num), NUM_FILES)):
        noise = rng.standard_normal((len(rows), dim), dtype=np.float32)
        np.save(folder / f"{number:03d}.npy", centres[rng.integers(0, 1000, len(rows))] + 0.5 * noise)


def vectors_of(folder: Path) -> list[Floats]:
    return [np.load(path, mmap_mode="r") for path in sorted((folder / "vectors").glob("*.npy"))]


def build_here(options: argparse.Namespace) -> None:
    """namr's side, in a process of its own."""
    files, folder = vectors_of(options.part_of), options.part_of
    num, dim = sum(len(x) for x in files), files[0].shape[1]
    plan = planning.plan(num, dim, key=options.key)
    chosen = np.sort(np.random.default_rng(SEED).choice(num, plan.num_training_vectors, replace=False))
    starts = np.cumsum([0, *(len(x) for x in files)])
    cuts = np.searchsorted(chosen, starts)
    sample = np.concatenate([x[chosen[cuts[at] : cuts[at + 1]] - starts[at]] for at, x in enumerate(files)])
    template = ivf.train_template(sample, plan.key, seed=SEED, num_threads=options.threads)
    del sample
    parts = []
    for at, x in enumerate(files):
        parts.append(folder / f"{at}.part")
        ids = np.arange(starts[at], starts[at + 1])
        blocks = ((np.asarray(x[i : i + 65536]), ids[i : i + 65536]) for i in range(0, len(x), 65536))
        ivf.build_part(template, blocks, parts[-1], num_threads=options.threads)
    ivf.merge_parts(template, parts, folder / "namr.index")


def measured(command: list[str], environment: dict[str, str], threads: int) -> Cost:
    """Run a command to its end and say what it took; what it prints is shown only if it fails."""
    whole = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    with tempfile.TemporaryFile() as said:
        begun, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=said, stderr=said, env=whole)
        while process.poll() is None:
            peak = max(peak, unshared_bytes(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - begun
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read().decode(errors="replace")[-3000:])
    return Cost(seconds, peak)


def unshared_bytes(pid: int) -> int:
    """Anonymous and shared memory, without pages of mapped files; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def compare(folder: Path) -> None:
    """Both indexes hold every vector and find nearly the same share of the true neighbours."""
    x = np.concatenate(vectors_of(folder))
    rng = np.random.default_rng(1)
    queries = x[rng.integers(0, len(x), QUERIES)] + 0.3 * rng.standard_normal(
        (QUERIES, x.shape[1]), dtype=np.float32
    )
    truth = np.asarray(faiss.knn(queries, x, NEIGHBOURS)[1])
    recalls = {}
    for side in ("autofaiss", "namr"):
        index = faiss.read_index(str(folder / f"{side}.index"))
        if index.ntotal != len(x):
            raise SystemExit(f"{side}: {index.ntotal} of {len(x)} vectors are in the index")
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", NPROBE)
        _, found = index.search(queries, NEIGHBOURS)
        shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
        recalls[side] = sum(shared) / truth.size
    print(f"recall@{NEIGHBOURS} at nprobe {NPROBE}: {json.dumps(recalls)}")
    if abs(recalls["autofaiss"] - recalls["namr"]) > 0.03:
        raise SystemExit("the two sides built indexes of different quality: nothing to compare")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--autofaiss", type=Path, default=None, help="where autofaiss was installed to")
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--key", default="IVF1024,SQ8")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--part-of", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.part_of and not (options.autofaiss and (options.autofaiss / "autofaiss").is_dir()):
        parser.error("--autofaiss names no folder with autofaiss in it; how to get one is told above")
    return options


if __name__ == "__main__":
    main()
