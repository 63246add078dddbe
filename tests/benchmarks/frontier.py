"""Queries a second at recall@10 >= 0.95 through `Searcher`, against what FAISS itself can do with the codes.

    python -m tests.benchmarks.frontier [--vectors 1000000] [--dim 128] [--lists 2048] [--threads 1]
        [--plot frontier.svg]

Both scan the same 4-bit codes (IVF<lists>,PQ<dim / 2>x4fs) and compare the same number of candidates by
float16 vectors, as many lists and candidates as `Searcher` needs for the recall; FAISS's own vectors lie in
memory, in one array. Beside them FAISS's IVF-Flat and whatever of hnswlib, usearch, SVS and ScaNN is
installed (`tests.peers`), each at the least effort that reaches the recall, with the time to build and the
size in memory. Batches of 256 and single queries, in turns; of each batch the fastest round counts. At last
what a single query takes through `Searcher`, by FAISS, and by our two compiled calls (scan, compare) alone:
what is between these and `Searcher` is Python.

--plot draws all of them at every effort that is worth it: recall@10 against queries a second, batches of 256.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from namr.index import index_files
from namr.search.answers import SearchOptions
from namr.sides import SIDES
from tests import frontier_plot, peers
from tests.benchmarks.search import (
    BATCH,
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
from tests.peers import Effort, Peer, Search

TARGET = 0.85
NUM_SINGLE = 128
LEAST_DRAWN = 0.8
"""recall@10; less is of no use"""
ROUNDS_OF_SINGLE = 20
SLACK = 0.8
"""of the speed of a better answer, below which an effort isn't timed in turns"""


class Reached(NamedTuple):
    """What a peer did at one effort."""

    peer: Peer
    effort: Effort
    recall: float
    queries_per_s: float


def main() -> None:
    options = parse(__doc__ or "", vectors=1_000_000, dim=128, lists=2048, threads=1, plots=True)
    with tempfile.TemporaryDirectory(prefix="namr-frontier-") as folder:
        key = f"IVF{options.lists},PQ{options.dim // 2}x4fs"
        gallery = make(Path(folder), options, key=key)
        x = np.concatenate([block.astype(np.float16).astype(np.float32) for block in drawn(options)])
        queries = gallery.queries.x
        truth = faiss.knn(queries[:BATCH], x, K)[1]
        best = gallery.best.nprobe, gallery.best.depth
        pair = [own(gallery), faiss_refined(gallery, x)]
        ours, theirs = (peer.at(best)(queries) for peer in pair)
        assert (ours == theirs).mean() > 0.999, "other ids than FAISS's own"  # ties may be swapped
        others = list(peers.installed(x, num_lists=options.lists, num_threads=options.threads))
        tried = [reached for peer in (*pair, *others) for reached in once(peer, queries, truth)]
        chosen = [Reached(peer, best, share_found(peer.at(best)(queries[:BATCH]), truth), 0) for peer in pair]
        for peer in others:
            enough = [each for each in tried if each.peer is peer and each.recall >= MIN_RECALL]
            if enough:  # of one number the least, of two the pair that seemed the fastest
                is_one = len(peer.names) == 1
                chosen.append(enough[0] if is_one else max(enough, key=lambda each: each.queries_per_s))
            else:
                print(f"{peer.name} is left out: it doesn't reach recall@10 of {MIN_RECALL}", flush=True)
        compare(chosen, queries, options.rounds)
        tell_single(gallery, pair[1], options.rounds)
        if options.plot:
            curves = in_turns(worth_it(tried), queries, options.rounds)
            frontier_plot.draw(
                options.plot,
                {peer.name: front(curves, peer) for peer in (*pair, *others)},
                title=f"{options.vectors:,} vectors of {options.dim}, batches of {BATCH}, "
                f"{options.threads} thread{'s' * (options.threads > 1)}",
            )


def compare(chosen: Sequence[Reached], queries: np.ndarray, num_rounds: int) -> None:
    """Prints what each does in batches and one by one; the first two are namr and FAISS's own."""
    for batch, rows in ((BATCH, NUM_QUERIES), (1, NUM_SINGLE)):
        sides = [searching(each, queries) for each in chosen]
        seconds = fastest(sides, num_rounds=num_rounds, of=batches(rows, batch))
        for each, of_peer in zip(chosen, seconds, strict=True):
            print(
                f"batch {batch}: {each.peer.name} {rows / of_peer:.0f} queries/s, recall@10 "
                f"{each.recall:.3f}, {each.peer.told(each.effort)}",
                flush=True,
            )
        print(f"frontier ratio, batch {batch}: {seconds[1] / seconds[0]:.2f} target {TARGET}", flush=True)


def tell_single(gallery: Gallery, refined: Peer, num_rounds: int) -> None:
    """Prints what a query alone takes; the least of many rounds, for each is over in an instant."""
    queries, best = gallery.queries.x, (gallery.best.nprobe, gallery.best.depth)
    sides = {
        "FAISS": refined.at(best),
        "compiled calls": compiled_calls(gallery, best),
        "Searcher": own(gallery).at(best),
    }
    of = batches(NUM_SINGLE, 1)
    calls = [lambda rows, search=search: search(queries[rows]) for search in sides.values()]
    seconds = fastest(calls, num_rounds=ROUNDS_OF_SINGLE * num_rounds, of=of)
    told = [f"{name} {1e6 * each / NUM_SINGLE:.0f}" for name, each in zip(sides, seconds, strict=True)]
    print(f"a single query, us: {', '.join(told)}", flush=True)


def compiled_calls(gallery: Gallery, effort: Effort) -> Search:
    """The two calls that a search can't do without, into memory that is there already."""
    (nprobe, depth), vectors = effort, gallery.searcher.vectors
    index = faiss.read_index(str(gallery.index_path))
    packed, how = index_files.packed(index), index_files.how_to_search(nprobe)
    kept = index, packed  # memory which FAISS only points to
    squared, candidates = np.empty((1, depth), np.float32), np.empty((1, depth), np.int64)
    found = np.empty((1, K), np.int64), np.empty((1, K)), np.empty((1, K))
    outputs = faiss.swig_ptr(squared), faiss.swig_ptr(candidates)

    def search(q: np.ndarray, scan: Any = packed[1], _: Any = kept) -> np.ndarray:
        scan.search_c(1, faiss.swig_ptr(q), depth, *outputs, how)
        vectors.nearest(q, q, candidates, *vectors.table, SIDES.index("none"), *found)
        return found[0]

    return search


def once(peer: Peer, queries: np.ndarray, truth: np.ndarray) -> Iterator[Reached]:
    """Recall at each effort, and a first idea of the speed; ends where nothing more is to be had."""
    for effort in peer.efforts:
        search = peer.at(effort)
        recall = share_found(search(queries[:BATCH]), truth)
        began = time.perf_counter()
        search(queries[:BATCH])
        yield Reached(peer, effort, recall, BATCH / (time.perf_counter() - began))
        if recall > 0.9995 and len(effort) == 1:
            return


def worth_it(tried: Sequence[Reached]) -> list[Reached]:
    """Those of some recall that no other effort of the same peer clearly beats."""
    return [
        each
        for each in tried
        if each.recall >= LEAST_DRAWN
        and not any(
            other.peer is each.peer
            and other.recall >= each.recall
            and SLACK * other.queries_per_s > each.queries_per_s
            for other in tried
        )
    ]


def in_turns(tried: Sequence[Reached], queries: np.ndarray, num_rounds: int) -> list[Reached]:
    seconds = fastest([searching(each, queries) for each in tried], num_rounds=num_rounds)
    return [
        each._replace(queries_per_s=NUM_QUERIES / of_all) for each, of_all in zip(tried, seconds, strict=True)
    ]


def front(curves: Sequence[Reached], peer: Peer) -> list[tuple[float, float]]:
    """(recall, queries/s) of the efforts of a peer than which none is faster and as good, by recall."""
    best: list[tuple[float, float]] = []
    points = [(each.recall, each.queries_per_s) for each in curves if each.peer is peer]
    for recall, queries_per_s in sorted(points, reverse=True):
        if not best or queries_per_s > best[-1][1]:
            best.append((recall, queries_per_s))
    return best[::-1]


def searching(reached: Reached, queries: np.ndarray) -> Any:
    search: Search = reached.peer.at(reached.effort)
    return lambda rows: search(queries[rows])


def drawn(options: Any) -> Iterator[np.ndarray]:
    """The vectors of the gallery again, in the order of their ids."""
    for number, start in enumerate(range(0, options.vectors, ROWS_PER_SHARD)):
        yield draw(min(ROWS_PER_SHARD, options.vectors - start), options.dim, seed=number + 1).x


def own(gallery: Gallery) -> Peer:
    def at(effort: Effort) -> Search:
        how = SearchOptions(k=K, side="none", nprobe=effort[0], depth=effort[1])

        def search(q: np.ndarray) -> np.ndarray:
            ids = gallery.searcher.search_arrays(q, options=how).ids
            return (ids >> 32) * ROWS_PER_SHARD + (ids & 0xFFFFFFFF)

        return search

    index = gallery.searcher.index
    size = gallery.index_path.stat().st_size + 2 * index.dim * index.num_vectors
    return Peer("namr", at, ("nprobe", "depth"), peers.of_codes(index.num_lists), gallery.built_s, size)


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
    kept = plain, scan, vectors  # memory which FAISS only points to

    def at(effort: Effort) -> Search:
        how = faiss.IndexRefineSearchParameters(
            k_factor=effort[1] / K, base_index_params=faiss.SearchParametersIVF(nprobe=effort[0])
        )
        return lambda q, _=kept: index.search(q, K, params=how)[1]

    size = gallery.index_path.stat().st_size + 2 * x.size
    name, names = "FAISS fast-scan, refined", ("nprobe", "depth")
    return Peer(name, at, names, peers.of_codes(plain.nlist), gallery.built_s, size)


if __name__ == "__main__":
    main()
