"""Other libraries' indexes for `tests.benchmarks.frontier`: each built over the same vectors, at any effort.

Imported only where installed, in an environment of its own (docs/benchmarks.md says how to make one); what
isn't is named and left out. Sizes are those of what the library would save, or says it holds.

Not covered: SVS's own compression, LVQ and LeanVec, which ends the process on processors that are not
Intel's; its vectors are float16 here, as those that namr and usearch compare.
"""

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

Search = Callable[[np.ndarray], np.ndarray]
"""Queries (Q, D) -> ids (Q, K)."""
Effort = tuple[int, ...]

K = 10
MOST_OF_LISTS = 2
"""one list of so many is searched at most, where lists hold codes"""
DEPTHS = (30, 50, 100, 200, 400)
"""candidates that are compared by their vectors"""


class Peer(NamedTuple):
    """Something that answers, with more effort better."""

    name: str
    at: Callable[[Effort], Search]
    names: tuple[str, ...]
    """of the numbers of an effort"""
    efforts: Sequence[Effort]
    built_s: float
    num_bytes: int

    def told(self, effort: Effort) -> str:
        said = [f"{name} {number}" for name, number in zip(self.names, effort, strict=True)]
        return f"{', '.join(said)}, built in {self.built_s:.0f} s, {self.num_bytes / 1e6:.0f} MB"


def ladder(low: int, high: int, *, steps_per_doubling: int = 2) -> list[int]:
    """Whole numbers from low to high, about evenly spaced on a logarithmic scale."""
    num = round(np.log2(high / low) * steps_per_doubling) + 1
    return np.unique(np.geomspace(low, high, num).round().astype(int)).tolist()


def installed(x: np.ndarray, *, num_lists: int, num_threads: int) -> Iterator[Peer]:
    """FAISS's IVF-Flat, and whatever else is there; x (N, D) float32."""
    yield faiss_flat(x, num_lists, num_threads)
    makers = {
        "hnswlib": ("hnswlib", with_hnswlib),
        "usearch": ("usearch.index", with_usearch),
        "SVS": ("svs", with_svs),
        "ScaNN": ("scann", with_scann),
    }
    for name, (module, make) in makers.items():
        try:
            library = importlib.import_module(module)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        yield make(library, x, num_lists, num_threads)


def faiss_flat(x: np.ndarray, num_lists: int, num_threads: int) -> Peer:
    faiss.omp_set_num_threads(num_threads)
    began = time.perf_counter()
    flat: Any = faiss.index_factory(x.shape[1], f"IVF{num_lists},Flat")
    flat.train(x[: 64 * num_lists])
    flat.add(x)
    built_s = time.perf_counter() - began

    def at(effort: Effort) -> Search:
        how = faiss.SearchParametersIVF(nprobe=effort[0])
        return lambda q: flat.search(q, K, params=how)[1]

    efforts = [(nprobe,) for nprobe in ladder(1, num_lists, steps_per_doubling=3)]
    return Peer("FAISS IVF-Flat", at, ("nprobe",), efforts, built_s, x.nbytes + 8 * len(x))


def with_hnswlib(library: Any, x: np.ndarray, _: int, num_threads: int) -> Peer:
    began = time.perf_counter()
    index = library.Index("l2", x.shape[1])
    index.init_index(len(x), M=16, ef_construction=200, random_seed=0)
    index.set_num_threads(num_threads)
    index.add_items(x)
    built_s = time.perf_counter() - began

    def at(effort: Effort) -> Search:
        def search(q: np.ndarray) -> np.ndarray:
            index.set_ef(effort[0])
            return np.asarray(index.knn_query(q, K)[0]).astype(np.int64)

        return search

    return Peer("hnswlib", at, ("ef",), of_graphs(), built_s, index.index_file_size())


def with_usearch(library: Any, x: np.ndarray, _: int, num_threads: int) -> Peer:
    began = time.perf_counter()
    index = library.Index(ndim=x.shape[1], metric="l2sq", dtype="f16")
    index.add(np.arange(len(x)), x, threads=num_threads)
    built_s = time.perf_counter() - began

    def at(effort: Effort) -> Search:
        def search(q: np.ndarray) -> np.ndarray:
            index.expansion_search = effort[0]
            return np.atleast_2d(index.search(q, K, threads=num_threads).keys).astype(np.int64)

        return search

    return Peer("usearch", at, ("expansion",), of_graphs(), built_s, index.memory_usage)


def with_svs(library: Any, x: np.ndarray, _: int, num_threads: int) -> Peer:
    began = time.perf_counter()
    how = library.VamanaBuildParameters(graph_max_degree=32, window_size=128)
    data = x.astype(np.float16)
    index = library.Vamana.build(how, data, library.DistanceType.L2, num_threads=num_threads)
    built_s = time.perf_counter() - began
    with tempfile.TemporaryDirectory(prefix="namr-svs-") as folder:
        index.save(*(f"{folder}/{part}" for part in ("config", "graph", "data")))
        size = size_of(Path(folder))

    def at(effort: Effort) -> Search:
        def search(q: np.ndarray) -> np.ndarray:
            index.search_window_size = effort[0]
            return index.search(q, K)[0].astype(np.int64)

        return search

    return Peer("SVS Vamana, float16", at, ("window",), of_graphs(), built_s, size)


def with_scann(library: Any, x: np.ndarray, num_lists: int, num_threads: int) -> Peer:
    """As its authors advise: leaves about the root of N, codes for two dimensions each, then re-ordered."""
    began = time.perf_counter()
    builder = library.scann_ops_pybind.builder(x, K, "squared_l2").set_n_training_threads(num_threads)
    sample = min(len(x), 64 * num_lists)
    builder = builder.tree(num_leaves=num_lists, num_leaves_to_search=1, training_sample_size=sample)
    index = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build()
    built_s = time.perf_counter() - began
    with tempfile.TemporaryDirectory(prefix="namr-scann-") as folder:
        index.serialize(folder)
        size = size_of(Path(folder))
    index.set_num_threads(num_threads)
    many = index.search_batched if num_threads == 1 else index.search_batched_parallel

    def at(effort: Effort) -> Search:
        leaves, depth = effort
        more = {"leaves_to_search": leaves, "pre_reorder_num_neighbors": depth}

        def search(q: np.ndarray) -> np.ndarray:
            if len(q) == 1:
                return index.search(q[0], **more)[0].astype(np.int64)[None]
            return many(q, **more)[0].astype(np.int64)

        return search

    return Peer("ScaNN", at, ("leaves", "depth"), of_codes(num_lists), built_s, size)


def of_codes(num_lists: int) -> list[Effort]:
    most = max(1, num_lists // MOST_OF_LISTS)
    return [(num, depth) for num in ladder(1, most) for depth in DEPTHS]


def of_graphs() -> list[Effort]:
    return [(effort,) for effort in ladder(10, 1280)]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
