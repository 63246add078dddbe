"""Queries a second at recall@10 >= 0.95 through `Searcher`, against what FAISS itself can do with the codes.

    python -m tests.benchmarks.frontier [--vectors 1000000] [--dim 128] [--lists 2048] [--threads 1]

Both scan the same 4-bit codes (IVF<lists>,PQ<dim / 2>x4fs) and compare the same number of candidates by
float16 vectors, as many lists and candidates as `Searcher` needs for the recall; FAISS's own vectors lie in
memory, in one array. Beside them FAISS's IVF-Flat at the same recall, and whatever of hnswlib and usearch is
installed, with the time to build and the size in memory. Batches of 256 and single queries, in turns; of each
batch the fastest round counts.
"""

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from namr.nightly import tuning
from namr.search.answers import SearchOptions
from tests.benchmarks.search import (
    BATCH,
    DEPTH,
    MIN_RECALL,
    NUM_QUERIES,
    ROWS_PER_SHARD,
    Gallery,
    K,
    batches,
    draw,
    fastest,
    make,
    parse,
    share_found,
)

TARGET = 0.85
NUM_SINGLE = 128

Search = Callable[[np.ndarray], np.ndarray]
"""Queries (Q, D) -> ids (Q, k)."""


class Peer(NamedTuple):
    """Something that answers."""

    name: str
    search: Search
    told: str


def main() -> None:
    options = parse(__doc__ or "", vectors=1_000_000, dim=128, lists=2048, threads=1)
    with tempfile.TemporaryDirectory(prefix="namr-frontier-") as folder:
        key = f"IVF{options.lists},PQ{options.dim // 2}x4fs"
        gallery = make(Path(folder), options, key=key)
        x = np.concatenate([block.astype(np.float16).astype(np.float32) for block in drawn(options)])
        queries = gallery.queries.x
        truth = faiss.knn(queries[:BATCH], x, K)[1]
        peers = [own(gallery), faiss_refined(gallery, x), *others(x, queries, truth, options)]
        ours, theirs = (peer.search(queries) for peer in peers[:2])
        assert (ours == theirs).mean() > 0.999, "other ids than FAISS's own"  # ties may be swapped
        for batch, rows in ((BATCH, NUM_QUERIES), (1, NUM_SINGLE)):
            sides = [lambda some, peer=peer: peer.search(queries[some]) for peer in peers]
            seconds = fastest(sides, num_rounds=options.rounds, of=batches(rows, batch))
            for peer, of_peer in zip(peers, seconds, strict=True):
                recall = share_found(peer.search(queries[:BATCH]), truth)
                print(
                    f"batch {batch}: {peer.name} {rows / of_peer:.0f} queries/s, recall@10 {recall:.3f}, "
                    f"{peer.told}",
                    flush=True,
                )
            print(f"frontier ratio, batch {batch}: {seconds[1] / seconds[0]:.2f} target {TARGET}", flush=True)


def drawn(options: Any) -> Iterator[np.ndarray]:
    """The vectors of the gallery again, in the order of their ids."""
    for number, start in enumerate(range(0, options.vectors, ROWS_PER_SHARD)):
        yield draw(min(ROWS_PER_SHARD, options.vectors - start), options.dim, seed=number + 1).x


def own(gallery: Gallery) -> Peer:
    how = SearchOptions(k=K, side="none", nprobe=gallery.best.nprobe, depth=gallery.best.depth)

    def search(q: np.ndarray) -> np.ndarray:
        ids = gallery.searcher.search_arrays(q, options=how).ids
        return (ids >> 32) * ROWS_PER_SHARD + (ids & 0xFFFFFFFF)

    return Peer("namr", search, f"nprobe {gallery.best.nprobe}, depth {gallery.best.depth}")


def faiss_refined(gallery: Gallery, x: np.ndarray) -> Peer:
    """FAISS's own scan over the file of the gallery, refined by its own float16 vectors."""
    plain: Any = faiss.read_index(str(gallery.index_path))
    scan = faiss.IndexIVFPQFastScan(plain)
    vectors = faiss.IndexScalarQuantizer(x.shape[1], faiss.ScalarQuantizer.QT_fp16)
    vectors.train(x[:1])
    vectors.add(x)
    # Its ids are places in `vectors`.
    for number in range(plain.nlist):
        size = scan.invlists.list_size(number)
        if size:
            ids = faiss.rev_swig_ptr(scan.invlists.get_ids(number), size)
            ids[:] = (ids >> 32) * ROWS_PER_SHARD + (ids & 0xFFFFFFFF)
    index = faiss.IndexRefine(scan, vectors)
    how = faiss.IndexRefineSearchParameters(
        k_factor=gallery.best.depth / K,
        base_index_params=faiss.SearchParametersIVF(nprobe=gallery.best.nprobe),
    )
    search = lambda q: index.search(q, K, params=how)[1]  # noqa: E731
    search.kept = plain, scan, vectors  # type: ignore[attr-defined]
    return Peer("FAISS PQ fast-scan, refined", search, "the same nprobe and depth")


def others(x: np.ndarray, queries: np.ndarray, truth: np.ndarray, options: Any) -> Iterator[Peer]:
    """What else there is, each at the least effort that reaches the recall."""
    began = time.perf_counter()
    flat: Any = faiss.index_factory(options.dim, f"IVF{options.lists},Flat")
    flat.train(x[: 64 * options.lists])
    flat.add(x)
    took_s = time.perf_counter() - began

    def probing(nprobe: int) -> Search:
        how = faiss.SearchParametersIVF(nprobe=nprobe)
        return lambda q: flat.search(q, K, params=how)[1]

    best = tuning.tuned(
        lambda nprobe, _: share_found(probing(nprobe)(queries[:BATCH]), truth),
        num_lists=options.lists,
        target=MIN_RECALL,
        depth=DEPTH,
        max_depth=DEPTH,
    )[-1]
    yield Peer(
        "FAISS IVF-Flat",
        probing(best.nprobe),
        f"nprobe {best.nprobe}, built in {took_s:.0f} s, {_mb(x.nbytes)}",
    )
    for name, build in (("hnswlib", with_hnswlib), ("usearch", with_usearch)):
        try:
            importlib.import_module(name if name == "hnswlib" else "usearch.index")
        except ImportError:
            print(f"{name} is not installed: left out", flush=True)
            continue
        began = time.perf_counter()
        index, search_at, size = build(x, options.threads)
        took_s = time.perf_counter() - began
        for effort in (16, 32, 64, 128, 256, 512, 1024):
            search = search_at(effort)
            if share_found(search(queries[:BATCH]), truth) >= MIN_RECALL:
                break
        search.kept = index  # type: ignore[attr-defined]
        yield Peer(name, search, f"effort {effort}, built in {took_s:.0f} s, {_mb(size)}")


def with_hnswlib(x: np.ndarray, num_threads: int) -> tuple[Any, Callable[[int], Search], int]:
    hnswlib = importlib.import_module("hnswlib")
    index = hnswlib.Index("l2", x.shape[1])
    index.init_index(len(x), M=16, ef_construction=200, random_seed=0)
    index.set_num_threads(num_threads)
    index.add_items(x)

    def at(effort: int) -> Search:
        def search(q: np.ndarray) -> np.ndarray:
            index.set_ef(effort)
            return np.asarray(index.knn_query(q, K)[0]).astype(np.int64)

        return search

    return index, at, index.index_file_size()


def with_usearch(x: np.ndarray, num_threads: int) -> tuple[Any, Callable[[int], Search], int]:
    usearch = importlib.import_module("usearch.index")
    index = usearch.Index(ndim=x.shape[1], metric="l2sq", dtype="f16")
    index.add(np.arange(len(x)), x, threads=num_threads)

    def at(effort: int) -> Search:
        def search(q: np.ndarray) -> np.ndarray:
            index.expansion_search = effort
            return np.atleast_2d(index.search(q, K, threads=num_threads).keys).astype(np.int64)

        return search

    return index, at, index.memory_usage


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
