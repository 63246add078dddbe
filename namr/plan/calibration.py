"""What this machine takes for each unit of work, measured by a rehearsal of about a minute on one core.

All is time of the processor, not of the clock, so that a busy machine gives nearly the same; what a disk or
an object store adds is not in it. The vectors are made up: how many lists and candidates a recall takes
depends on real ones, and the release measures that for itself.
Legend: n vectors, D dimension, L lists.
"""

import itertools
import os
import platform
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from namr.index import ivf, nearest, planning
from namr.index.ivf import Index
from namr.plan import rehearsal
from namr.plan.constants import CodeCosts, Constants, Found
from namr.plan.rehearsal import Floats, Rehearsal, timed
from namr.search import exact, rerank
from namr.search.exact import Exact
from namr.search.queries import Queries
from namr.search.vectors import GalleryVectors
from namr.store import scratch

_VALUES = 12_800_000
_FEWEST, _MOST = 20_000, 100_000
_QUERIES, _K, _DEPTH = 256, 10, 100
_DEEPEST = 1600
"""as deep as the measuring of a release looks"""
_ASSIGNED = 16_384
_TRUE, _ROWS = 20, 8192
"""neighbours that the measuring of a release finds, and rows that it compares at once with so many queries"""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """An index over the made-up vectors, and queries with their true neighbours."""

    built: Rehearsal
    index: Index
    queries: Floats
    truth: Ids

    def recall(self, nprobe: int, depth: int = _K) -> list[float]:
        """Of the first _K, 2 _K ... candidates, up to depth."""
        ids = self.index.search(self.queries, depth, nprobe)[1]
        return [self._share(ids[:, :num]) for num in _depths(depth)]

    def _share(self, ids: Ids) -> float:
        pairs = zip(ids, self.truth, strict=True)
        return float(np.mean([np.isin(true, found).mean() for found, true in pairs]))


def size_for(dim: int) -> int:
    """How many vectors the rehearsal is made of."""
    return max(_FEWEST, min(_MOST, _VALUES // dim))


def calibrate(dim: int, *, today: date, num_vectors: int | None = None) -> Constants:
    """Measure this machine with vectors of dimension dim."""
    num = num_vectors or size_for(dim)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with scratch.folder("plan-") as folder:
            constants, seconds = timed(lambda: _measure(folder, num, dim, today))
    finally:
        torch.set_num_threads(threads)
    return Constants(**{**vars(constants), "seconds": seconds})


def _measure(folder: Path, num: int, dim: int, today: date) -> Constants:
    made = rehearsal.prepare(folder, num_vectors=num, dim=dim)
    num_lists = planning.lists_of(num)
    axes = [each for each in planning.AXES_PER_PIECE if dim % (2 * each) == 0]
    keys = {"Flat": f"IVF{num_lists},Flat", "SQ8": f"IVF{num_lists},SQ8"}
    keys |= {f"PQ{each}": f"IVF{num_lists},PQ{dim // each}x4fs" for each in axes}
    built = {name: rehearsal.build_index(made, key) for name, key in keys.items()}
    flat = built["Flat"]

    queries = rehearsal.draw(_QUERIES, dim, seed=10**6)
    opened = {name: ivf.open_index(each.index_path) for name, each in built.items()}
    truth = opened["Flat"].search(queries, _K, num_lists)[1]
    searched = {
        name: _Searched(built=built[name], index=index, queries=queries, truth=truth)
        for name, index in opened.items()
    }
    by_lists = []
    for nprobe in itertools.takewhile(lambda each: each <= num_lists, (2**n for n in range(32))):
        by_lists.append(Found(num=nprobe, recall=searched["Flat"].recall(nprobe)[0]))
        if by_lists[-1].recall >= 1:
            break
    by_depth = {
        each: tuple(
            Found(num=depth, recall=recall)
            for depth, recall in zip(
                _depths(_DEEPEST), searched[f"PQ{each}"].recall(num_lists, _DEEPEST), strict=True
            )
        )
        for each in axes
    }

    centroids, x = (rehearsal.draw(each, dim, seed=7) for each in (num_lists, _ASSIGNED))
    assign = _least(lambda: nearest.nearest(x, centroids)) / (len(x) * num_lists * dim)
    read = min(each.seconds["sample"] for each in built.values()) / (num * 4 * dim)
    train = flat.seconds["train"] / (flat.plan.num_training_vectors * num_lists * dim)
    small = built[f"PQ{axes[0]}" if axes else "SQ8"]
    per_byte = (flat.seconds["merge"] - small.seconds["merge"]) / (flat.index_bytes - small.index_bytes)
    per_byte = max(per_byte, 0.0)
    per_vector = max(small.seconds["merge"] - per_byte * small.index_bytes, 0.0) / num
    sides = rehearsal.store_sides(made, small.segment)

    s_q = np.random.default_rng(1).uniform(0.5, 1.5, queries.shape).astype(np.float32)
    candidates = opened["SQ8"].search(queries, _DEPTH, num_lists)[1]
    compare = _least(lambda: rerank.rerank(queries, s_q, candidates, sides.vectors, k=_K, side="both"))
    asked = Queries(queries, s_q, None)
    exact_s = timed(lambda: find_exactly(asked, candidates, sides.vectors))[1] / (_QUERIES * num * dim)
    fast = opened[f"PQ{axes[0]}" if axes else "SQ8"]
    of_one_list = _least(lambda: fast.search(queries, _DEPTH, 1)) / _QUERIES
    of_codecs = {"Flat": "Flat", "SQ8": "SQ8"} | ({"PQ": f"PQ{axes[0]}"} if axes else {})
    return Constants(
        machine=_machine(),
        measured=today.isoformat(),
        num_vectors=num,
        dim=dim,
        seconds=0.0,
        read_s_per_byte=read,
        train_s_per_distance_axis=train,
        assign_s_per_distance_axis=assign,
        codes={
            codec: _costs(searched[name], train, read + assign * num_lists / 4)
            for codec, name in of_codecs.items()
        },
        merge_s_per_vector=per_vector,
        merge_s_per_byte=per_byte,
        store_s_per_byte=sides.vectors_s / (num * 4 * dim),
        items_s_per_image=sides.items_s / num,
        items_bytes_per_image=sides.items_bytes / num,
        exact_s_per_axis=exact_s,
        compare_s_per_byte=compare / (_QUERIES * _DEPTH * 4 * dim),
        query_s=max(of_one_list - num_lists * dim * assign, 0.0),
        imbalance=flat.imbalance,
        by_lists=tuple(by_lists),
        by_depth=by_depth,
    )


def find_exactly(asked: Queries, candidates: Ids, vectors: GalleryVectors) -> Exact:
    """What the measuring of a release does first: the neighbours by every side."""
    bounds = exact.bounds_of(asked, candidates, vectors, k=_TRUE)
    search = exact.Search(asked, k=_TRUE, bounds=bounds)
    for block in vectors.blocks(num_rows=_ROWS):
        search.add(block)
    return search.found()


def _costs(searched: _Searched, train_s_per_axis: float, part_s_per_byte: float) -> CodeCosts:
    """Of one kind of codes: what is left of its stages without centroids, reading and finding lists."""
    built, index = searched.built, searched.index
    num, dim, lists = index.num_vectors, index.dim, index.num_lists
    train = built.seconds["train"] - train_s_per_axis * built.plan.num_training_vectors * lists * dim
    few, many = max(1, lists // 16), max(2, lists // 4)
    fewer, more = (
        _least(lambda nprobe=nprobe: index.search(searched.queries, _DEPTH, nprobe)) for nprobe in (few, many)
    )
    code_bytes = built.index_bytes / num - 8
    read = (many - few) / lists * num * built.imbalance * code_bytes * len(searched.queries)
    return CodeCosts(
        train_s_per_axis=max(train, 0.0) / dim,
        encode_s_per_axis=max(built.seconds["parts"] / (num * dim) - 4 * part_s_per_byte, 0.0),
        scan_s_per_byte=max(more - fewer, 0.0) / read,
    )


def _depths(most: int) -> list[int]:
    depths = [_K]
    while 2 * depths[-1] <= most:
        depths.append(2 * depths[-1])
    return depths


def _least(act: object, *, num_times: int = 3) -> float:
    assert callable(act)
    return min(timed(act)[1] for _ in range(num_times))


def _machine() -> str:
    """The processor and how many cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
