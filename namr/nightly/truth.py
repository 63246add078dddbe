"""What a release should answer its held-out items: exact neighbours by every side, of all items and of some.

The stored vectors are read once. Ranges of their files are shared out as Ray tasks, and what they find is
joined here; the number of tasks changes nothing. Small releases are compared in this process.

A task opens a file as a search does, verified: where the releases lie on a local path, or a copy on its
machine. Of a remote release a task takes a whole file, so that none is copied twice.

Not covered: comparing (`search.exact`) and what is measured with it (`assessment`).
Legend: Q queries, K neighbours, S sides.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr import ray_connection
from namr.data import shards
from namr.errors import ConfigError
from namr.release import held_out
from namr.release.releases import Release
from namr.search import exact, queries, vectors
from namr.search.answers import Item
from namr.search.exact import Exact
from namr.search.queries import Queries
from namr.search.searcher import Searcher
from namr.search.stages import Plan
from namr.search.vectors import Block
from namr.sides import SIDES
from namr.store import scratch, storage
from namr.store.cache import Cache

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]

_ROWS_PER_TASK = 1 << 18
_PAIRS = 1 << 21
"""of queries and rows that are compared at once: 8 MB"""
_FEWEST_ROWS = 256
_MOST_ROWS = 1 << 13
"""of more the vectors don't stay in the processor's cache while they are compared"""
_CANDIDATES = 32
"""of the index, that bound how far the neighbours are"""
_PROBED = 1 / 16
_ASKED_OF_SHARES = 128
_SEED = 0
_MOST_BYTES = 1 << 40


K = 20
"""true neighbours of a query"""
K_OF_RECALL = 10
"""of which recall is measured by the first"""
SHARES = (0.5, 0.1, 0.01, 0.001)
"""of the items, drawn at random, that filters let through"""


class Truth(NamedTuple):
    """What is nearest to each query, itself left out."""

    of_all: Exact
    """(S, Q, K)"""
    of_shares: list[Exact]
    """among each share of the items for the `thinned` queries, by plain distance alone"""


class HeldOut(NamedTuple):
    """Items as queries, and what they should find."""

    items: list[Item]
    asked: Queries
    truth: Truth
    """the `K` nearest, of all and of shares of them"""


def of_items(
    searcher: Searcher, ids: Ids, *, shares: Sequence[float] = SHARES, cache: Cache | None = None
) -> HeldOut:
    """The items with these ids; at least one, else ConfigError. shares, cache: see `neighbours`."""
    asked = asked_by(searcher, ids)
    return held_out_of(searcher, asked, neighbours(searcher, asked, k=K, shares=shares, cache=cache))


def asked_by(searcher: Searcher, ids: Ids) -> Queries:
    """The items with these ids as queries; ConfigError for none."""
    if not len(ids):
        raise ConfigError(
            "no held-out items to query with: the dataset has no image that was embedded and not taken out; "
            "bring some, and what serves stays until then"
        )
    return queries.stored(ids, searcher.vectors)


def held_out_of(searcher: Searcher, asked: Queries, truth: Truth) -> HeldOut:
    """Items that are asked by their ids, with what they should find."""
    assert asked.own_ids is not None, "items are asked"
    items = (searcher.items.by_id(each) for each in asked.own_ids.tolist())
    return HeldOut([item for item in items if item], asked, truth)


def neighbours(
    searcher: Searcher, asked: Queries, *, k: int, shares: Sequence[float] = (), cache: Cache | None = None
) -> Truth:
    """The k nearest items of each query, by each side, and among each of these shares of the items.

    cache: where the objects of the release were opened from; with it large releases are compared by Ray
    tasks. ManifestError where a vector is damaged.
    """
    bounds = _bounds(searcher, asked, k)
    ids, hidden = searcher.vectors.ids(), searcher.hidden
    if cache is None or len(ids) <= _ROWS_PER_TASK:
        blocks = searcher.vectors.blocks(num_rows=rows_at_once(asked))
        return _found(blocks, asked, hidden, bounds, shares, k)
    ranges = _ranges(searcher.release)

    def tasks() -> Iterator[Task]:
        first = 0
        for number, start, num_rows in ranges:
            some = ids[first : first + num_rows]
            of_some = np.sort(some[shards.among(some, hidden)])
            yield Task(
                searcher.release, number, start, some, asked, of_some, bounds, tuple(shares), k, cache.folder
            )
            first += num_rows

    ray_connection.connect()
    return _joined(ray_connection.in_order("comparing all vectors", compare, tasks(), num=len(ranges)))


def thinned(asked: Queries) -> Queries:
    """The queries that shares are asked by, at most 128 at even steps: filtered searches take long."""
    return asked.rows(slice(None, None, -(-len(asked.x) // _ASKED_OF_SHARES)))


def is_in_share(ids: Ids, share: float) -> Mask:
    """(n,) which items belong to this share of all; smaller shares are parts of larger ones."""
    return held_out.mask(ids, share=share, seed=_SEED)


def recall(ids: Ids, true: Ids) -> float:
    """Share of the true neighbours (Q, K) that were found, by id: of items at one distance only the true."""
    right = (ids[:, :, None] == true[:, None, :]) & (true >= 0)[:, None, :]
    total = int((true >= 0).sum())
    return float(right.sum()) / total if total else 1.0


class Task(NamedTuple):
    """A range of a file of vectors, and what is asked of it."""

    release: Release
    file: int
    start: int
    ids: Ids
    """(n,) of its rows"""
    asked: Queries
    hidden: Ids
    bounds: Doubles
    shares: tuple[float, ...]
    k: int
    cache_folder: Path
    """of the machine that asks"""


def compare(task: Task) -> Truth:
    """What is nearest in a range."""
    manifest = task.release.manifest
    with _cache(task.cache_folder) as cache:
        path = task.release.path(manifest.vector_files[task.file].file, cache)
        blocks = vectors.blocks_of(
            path,
            task.ids,
            dim=manifest.embedding_dim,
            start=task.start,
            num_rows=rows_at_once(task.asked),
        )
        return _found(blocks, task.asked, task.hidden, task.bounds, task.shares, task.k)


def _found(
    blocks: Iterator[Block],
    asked: Queries,
    hidden: Ids,
    bounds: Doubles,
    shares: Sequence[float],
    k: int,
) -> Truth:
    of_all = exact.Search(asked, k=k, bounds=bounds, hidden=hidden)
    plain_alone = np.where(np.arange(len(SIDES)) == SIDES.index("none"), np.inf, -np.inf)
    few = thinned(asked)
    alone = np.repeat(plain_alone[:, None], len(few.x), axis=1)
    of_shares = [exact.Search(few, k=k, bounds=alone) for _ in shares]
    for block in blocks:
        of_all.add(block)
        live = exact.without(block, hidden) if shares else block
        for share, search in zip(shares, of_shares, strict=True):
            search.add(exact.only(live, is_in_share(live.ids, share)))
    return Truth(of_all.found(), [search.found() for search in of_shares])


def _joined(parts: Sequence[Truth]) -> Truth:
    of_shares = zip(*(part.of_shares for part in parts), strict=True)
    return Truth(exact.joined([part.of_all for part in parts]), [exact.joined(some) for some in of_shares])


def _bounds(searcher: Searcher, asked: Queries, k: int) -> Doubles:
    """(S, Q) what no k-th neighbour is farther than, squared: of what the index finds in few lists."""
    nprobe = max(1, int(_PROBED * searcher.index.num_lists))
    plan = Plan(k=max(k, _CANDIDATES), side="none", depth=4 * k, nprobe=nprobe, exact=False)
    return exact.bounds_of(asked, searcher.neighbours(asked, plan).ids, searcher.vectors, k=k)


def _ranges(release: Release) -> list[tuple[int, int, int]]:
    """Of each task the file, its first row and how many it takes."""
    ranges = []
    for number, file in enumerate(release.manifest.vector_files):
        step = _ROWS_PER_TASK if storage.is_local(release.releases_uri) else max(1, file.num_rows)
        starts = range(0, file.num_rows, step)
        ranges += [(number, start, min(step, file.num_rows - start)) for start in starts]
    return ranges


def rows_at_once(asked: Queries) -> int:
    """As many as are best compared together."""
    return min(_MOST_ROWS, max(_FEWEST_ROWS, _PAIRS // len(asked.x)))


@contextmanager
def _cache(folder: Path) -> Iterator[Cache]:
    """That of the machine that asks, which knows what it has verified; elsewhere one of this task's own."""
    if folder.is_dir():
        yield Cache(folder, _MOST_BYTES)
        return
    with scratch.folder("truth-") as own:
        yield Cache(own, _MOST_BYTES)
