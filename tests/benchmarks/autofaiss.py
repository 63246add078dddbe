"""The same index by namr, by autofaiss and by lance: time, peak memory, recall at equal bytes.

    pip install --no-deps --target /tmp/autofaiss autofaiss embedding-reader fire termcolor
    pip install --no-deps --target /tmp/lance pylance
    python -m tests.benchmarks.autofaiss --autofaiss /tmp/autofaiss --lance /tmp/lance [--vectors 1000000]

(autofaiss asks for faiss-cpu and an old numpy, which would replace the ones that are here: so it is installed
beside, without its dependencies, and runs with ours; json gets told how to write numpy 2's floats for it.)

Each side is a fresh process that reads the same eight .npy files, has the same number of threads, and leaves
an index of IVF<lists>,SQ8: autofaiss with its key and search parameter given, so that it has nothing to
choose; namr with a part for each file, one after the other, and a merge; lance, which indexes its own format
alone, with a data set of the vectors that is written first and told apart. Peak memory is the largest sum of
anonymous and shared pages (/proc/<pid>/status, every 10 ms), so mapped files don't count on any side. The
ratio is the worst of time and memory against each.

The training samples differ, so the indexes do: before anything counts, all must hold every vector, and find
nearly the same share of the true neighbours in as many lists.
"""

import argparse
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
LANCE = """
import sys, time
from pathlib import Path
import lance, numpy as np, pyarrow as pa
folder, num_lists = sys.argv[1:]
paths = sorted(Path(folder, "vectors").glob("*.npy"))
files = [np.load(path, mmap_mode="r") for path in paths]
dim = files[0].shape[1]
schema = pa.schema([("row", pa.int64()), ("vector", pa.list_(pa.float32(), dim))])
def batches():
    first = 0
    for x in files:
        for at in range(0, len(x), 8192):
            block = np.ascontiguousarray(x[at : at + 8192])
            rows = pa.array(np.arange(first + at, first + at + len(block)))
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dim)
            yield pa.record_batch([rows, vectors], schema=schema)
        first += len(x)
began = time.perf_counter()
written = lance.write_dataset(
    pa.RecordBatchReader.from_batches(schema, batches()), folder + "/lance", mode="overwrite")
print(f"written in {time.perf_counter() - began:.2f} s")
written.create_index("vector", "IVF_SQ", num_partitions=int(num_lists), metric="L2")
"""
LANCE_SEARCH = """
import sys
import lance, numpy as np
folder, k, nprobe = sys.argv[1:]
whole = lance.dataset(folder + "/lance")
def found(q):
    asked = {"column": "vector", "q": q, "k": int(k), "nprobes": int(nprobe)}
    return whole.to_table(columns=["row", "_distance"], nearest=asked)["row"].to_numpy()
ids = np.stack([found(q) for q in np.load(folder + "/queries.npy")])
np.save(folder + "/lance-found.npy", ids)
print(whole.count_rows())
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
    sides = {
        "autofaiss": ([sys.executable, "-c", AUTOFAISS, *given], {"PYTHONPATH": str(options.autofaiss)}),
        "lance": ([sys.executable, "-c", LANCE, str(folder), num_lists(options.key)], of_lance(options)),
        "namr": (mine, {}),
    }
    if options.lance is None:
        del sides["lance"]
    costs: dict[str, list[Cost]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side, (command, environment) in sides.items():
            costs[side].append(measured(command, environment, options.threads))
            seconds, peak_bytes = costs[side][-1]
            print(f"round {number + 1}  {side:9}  {seconds:6.2f} s, {peak_bytes / 1e6:.0f} MB", flush=True)
        if number == 0:
            compare(folder, options)
    middle = {
        side: [statistics.median(cost[at] for cost in of_side) for at in (0, 1)]
        for side, of_side in costs.items()
    }
    ours = middle.pop("namr")
    ratios = []
    for side, theirs in middle.items():
        ratios += [theirs[0] / ours[0], theirs[1] / ours[1]]
        print(f"against {side}: time ratio {ratios[-2]:.2f}, memory ratio {ratios[-1]:.2f}")
    print(f"autofaiss ratio {min(ratios):.2f} target {TARGET}")


def num_lists(key: str) -> str:
    return key.removeprefix("IVF").split(",")[0]


def of_lance(options: argparse.Namespace) -> dict[str, str]:
    threads = str(options.threads)
    return {"PYTHONPATH": str(options.lance), "LANCE_CPU_THREADS": threads, "LANCE_LOG": "error"}


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


def compare(folder: Path, options: argparse.Namespace) -> None:
    """All hold every vector and find nearly the same share of the true neighbours."""
    x = np.concatenate(vectors_of(folder))
    rng = np.random.default_rng(1)
    queries = x[rng.integers(0, len(x), QUERIES)] + 0.3 * rng.standard_normal(
        (QUERIES, x.shape[1]), dtype=np.float32
    )
    truth = np.asarray(faiss.knn(queries, x, NEIGHBOURS)[1])
    found: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for side in ("autofaiss", "namr"):
        path = folder / f"{side}.index"
        index = faiss.read_index(str(path))
        sizes[side], held = path.stat().st_size, index.ntotal
        if held != len(x):
            raise SystemExit(f"{side}: {held} of {len(x)} vectors are in the index")
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", NPROBE)
        found[side] = index.search(queries, NEIGHBOURS)[1]
    if options.lance:
        np.save(folder / "queries.npy", queries)
        words = [sys.executable, "-c", LANCE_SEARCH, str(folder), str(NEIGHBOURS), str(NPROBE)]
        subprocess.run(words, env={**os.environ, **of_lance(options)}, check=True, stdout=subprocess.DEVNULL)
        found["lance"] = np.load(folder / "lance-found.npy")
        sizes["lance"] = bytes_below(folder / "lance" / "_indices")
        print(f"lance: beside its index {bytes_below(folder / 'lance' / 'data') / 1e6:.0f} MB of vectors")
    recalls = {side: share_found(ids, truth) for side, ids in found.items()}
    for side, recall in recalls.items():
        print(f"{side}: recall@{NEIGHBOURS} {recall:.3f} at nprobe {NPROBE}, {sizes[side] / 1e6:.0f} MB")
    if max(recalls.values()) - min(recalls.values()) > 0.03:
        raise SystemExit("the sides built indexes of different quality: nothing to compare")


def share_found(ids: np.ndarray, truth: np.ndarray) -> float:
    """Recall@10. (That of `search` would have this side's process, too, import torch.)"""
    return sum(len(set(a) & set(b)) for a, b in zip(ids.tolist(), truth.tolist(), strict=True)) / truth.size


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--autofaiss", type=Path, default=None, help="where autofaiss was installed to")
    parser.add_argument("--lance", type=Path, default=None, help="where pylance was; none: without it")
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
