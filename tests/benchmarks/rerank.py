"""Queries a second with a re-rank of 100 candidates, and of the same first stage alone.

    python -m tests.benchmarks.rerank [--vectors 1000000] [--dim 256] [--lists 1024] [--threads 2]

The release, the queries and the way of timing are those of the `search` benchmark. The first stage alone is
the 100 nearest from the index; re-ranked by each side, the ten nearest of these come back with both
distances. The worst side counts. Before anything is timed, some queries are re-ranked one at a time in
float64 and must give the same.
"""

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np

from namr.index import ivf
from namr.search.answers import SearchOptions
from namr.search.searcher import Neighbours
from tests.benchmarks.search import NUM_QUERIES, Gallery, K, batches, fastest, make, parse

TARGET = 0.83
DEPTH = 100
NUM_CHECKED = 64
SIDES: tuple[Literal["query", "both", "scale"], ...] = ("query", "both", "scale")


def main() -> None:
    options = parse(__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="namr-rerank-") as folder:
        gallery = make(Path(folder), options, key=f"IVF{options.lists},Flat")
        index = ivf.open_index(gallery.index_path, num_threads=options.threads)

        def first_stage(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            return index.search(gallery.queries.x[rows], DEPTH, gallery.nprobe)

        def reranked(rows: slice, side: Literal["query", "both", "scale"]) -> Neighbours:
            options = SearchOptions(k=K, side=side, depth=DEPTH, nprobe=gallery.nprobe)
            return gallery.searcher.search_arrays(
                gallery.queries.x[rows], gallery.queries.s[rows], options=options
            )

        for side in SIDES:
            check(gallery, side, first_stage(slice(NUM_CHECKED))[1], reranked(slice(NUM_CHECKED), side))
        for rows in batches():
            reranked(rows, "both")
        worst = float("inf")
        for side in SIDES:
            alone_s, reranked_s = fastest(
                [first_stage, lambda rows, side=side: reranked(rows, side)], num_rounds=options.rounds
            )
            worst = min(worst, alone_s / reranked_s)
            print(
                f"first stage alone {NUM_QUERIES / alone_s:.0f} queries/s, re-ranked by {side!r} "
                f"{NUM_QUERIES / reranked_s:.0f} queries/s, ratio {alone_s / reranked_s:.2f}"
            )
        print(f"rerank ratio {worst:.2f} target {TARGET}")


def check(gallery: Gallery, side: str, candidates: np.ndarray, answered: Neighbours) -> None:
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
