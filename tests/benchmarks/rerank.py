"""Queries a second ordered by the adaptive distance, and ordered plainly, through the same `Searcher`.

    python -m tests.benchmarks.rerank [--vectors 1000000] [--dim 256] [--lists 1024] [--threads 2]

The release, the queries and the way of timing are those of the `search` benchmark, with codes that are
scanned fast (IVF<lists>,PQ<dim / 2>x4fs), so that the plain order compares the same candidates by their
stored vectors. Batches of 256 and single queries, in turns; for each the worst side counts. Before anything
is timed, some queries are re-ranked one at a time in float64 and must give the same.
"""

import tempfile
from pathlib import Path

import numpy as np

from namr.index import ivf
from namr.search.answers import SearchOptions
from namr.search.searcher import Neighbours
from namr.sides import Side
from tests.benchmarks.search import BATCH, NUM_QUERIES, Gallery, K, batches, fastest, make, parse

TARGETS = {BATCH: 0.9, 1: 0.8}
NUM_CHECKED, NUM_SINGLE = 64, 128
SIDES: tuple[Side, ...] = ("query", "both", "scale")


def main() -> None:
    options = parse(__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="namr-rerank-") as folder:
        gallery = make(Path(folder), options, key=f"IVF{options.lists},PQ{options.dim // 2}x4fs")
        index = ivf.open_index(gallery.index_path, num_threads=options.threads)

        def ordered_by(side: Side, rows: slice) -> Neighbours:
            how = SearchOptions(k=K, side=side, depth=gallery.best.depth, nprobe=gallery.nprobe)
            return gallery.searcher.search_arrays(
                gallery.queries.x[rows], gallery.queries.s[rows], options=how
            )

        first = slice(NUM_CHECKED)
        candidates = index.search(gallery.queries.x[first], gallery.best.depth, gallery.nprobe)[1]
        for side in SIDES:
            check(gallery, side, candidates, ordered_by(side, first))
        ratios = {}
        for batch, rows in ((BATCH, NUM_QUERIES), (1, NUM_SINGLE)):
            sides = [lambda some, side=side: ordered_by(side, some) for side in ("none", *SIDES)]
            plain_s, *seconds = fastest(sides, num_rounds=options.rounds, of=batches(rows, batch))
            told = [f"{side!r} {rows / took_s:.0f}" for side, took_s in zip(SIDES, seconds, strict=True)]
            print(f"batch {batch}: plain {rows / plain_s:.0f} queries/s, {', '.join(told)}")
            ratios[batch] = plain_s / max(seconds)
            print(f"rerank ratio, batch {batch}: {ratios[batch]:.2f} target {TARGETS[batch]}")
        worst = min(ratios, key=lambda batch: ratios[batch] / TARGETS[batch])
        print(f"rerank ratio {ratios[worst]:.2f} target {TARGETS[worst]}")


def check(gallery: Gallery, side: Side, candidates: np.ndarray, answered: Neighbours) -> None:
    """The definition, one query at a time, on the stored vectors."""
    vectors = gallery.searcher.vectors
    for row, ids in enumerate(candidates):
        q, s_q = (of[row].astype(np.float64) for of in gallery.queries)
        x, s = (of(ids).double().numpy() for of in (vectors.embeddings, vectors.structures))
        weights = {"query": s_q, "both": (s_q + s) / 2, "scale": np.sqrt(s.mean(1))[:, None]}[side]
        squared = (weights * (q - x) ** 2).sum(1)
        order = np.argsort(squared)[:K]
        np.testing.assert_allclose(answered.distances[row], np.sqrt(squared[order]), rtol=1e-5)
        assert (answered.ids[row] == ids[order]).all(), f"query {row}: others than by the definition"


if __name__ == "__main__":
    main()
