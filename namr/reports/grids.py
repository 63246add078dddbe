"""Items of a release with their pictures, and queries with what is found for them: best, worst and drawn.

Not covered: drawing them (`measure.report`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.data.reading import Pictures
from namr.measure.report import Grid, GridRow, Picture
from namr.search import queries
from namr.search.answers import Answer, Item, SearchOptions
from namr.search.searcher import Searcher
from namr.search.stages import Plan
from namr.sides import Side

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NUM_NEIGHBOURS_SHOWN = 6
_NUM_EACH = 3
_SHOWN_SIDES: tuple[Side, Side] = ("none", "both")
_SEED = 0


class Album:
    """The pictures of a release's items, as they were packed."""

    def __init__(self, searcher: Searcher) -> None:
        manifest = searcher.manifest
        self._items = searcher.items
        self._pictures = Pictures(manifest.dataset_uri, manifest.dataset_version)

    def images(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each, read with few requests."""
        places = [self._items.place(each) for each in ids]
        assert all(places), "ids of items have places"
        known = [place for place in places if place]
        return self._pictures.read_many(
            ids, [place.offset for place in known], [place.size for place in known]
        )


class Ranked(NamedTuple):
    """Queries, the best answered first."""

    keys: list[str]
    how: str
    """what makes one better than another, in words"""


def grid_rows(
    searcher: Searcher, keys: Sequence[str], plain: Sequence[Answer], adaptive: Sequence[Answer]
) -> list[GridRow]:
    """The queries of these keys with their answers, as pictures."""
    album = Album(searcher)
    rows = []
    for key, one, other in zip(keys, plain, adaptive, strict=True):
        query = searcher.items.by_key(key)
        assert query is not None, "the searcher has just answered for it"
        (image,) = album.images([query.id])
        rows.append(
            GridRow(
                query=Picture(image=image, label=query.label),
                plain=_shown(album, one, query),
                adaptive=_shown(album, other, query),
            )
        )
    return rows


def retrieval_grids(searcher: Searcher, keys: Sequence[str], plan: Plan) -> list[Grid]:
    """The queries of these keys that are answered best, worst, and some that are drawn; none without keys.

    plan: how the release is searched. No query is shown twice.
    """
    if not keys:
        return []
    ranked = best_first(searcher, keys, plan)
    few = min(_NUM_EACH, len(ranked.keys) // 2)
    best, worst = ranked.keys[:few], ranked.keys[len(ranked.keys) - few :][::-1]
    others = [key for key in keys if key not in {*best, *worst}]
    drawn = np.random.default_rng(_SEED).choice(len(others), min(_NUM_EACH, len(others)), False)
    shown = {
        f"Best answered: {len(best)} of {len(ranked.keys):,} queries": (best, ranked.how),
        f"Worst answered: {len(worst)} of {len(ranked.keys):,} queries": (worst, ranked.how),
        f"Drawn at random: {len(drawn)} of {len(keys):,} queries": ([others[at] for at in drawn], ""),
    }
    return [_grid(searcher, title, some, how, plan) for title, (some, how) in shown.items() if some]


def best_first(searcher: Searcher, keys: Sequence[str], plan: Plan) -> Ranked:
    """Queries by how well they are answered.

    Where some have a label that another item has too, these alone, by their margin: how much farther the
    nearest answer of another label is than the nearest of their own. Who finds none of a kind among the
    answers counts with the distance of the last. Else all, by how near their first answer is.
    """
    items = [item for key in keys if (item := searcher.items.by_key(key))]
    num = searcher.items.label_counts()
    judged = [item for item in items if item.label is not None and num[item.label] > 1]
    asked = judged or items
    stored = queries.stored(np.array([item.id for item in asked], np.int64), searcher.vectors)
    found = searcher.neighbours(stored, plan)
    distances = found.distances.astype(np.float64)
    if judged:
        labels = np.array(searcher.items.labels(found.ids.ravel()), object).reshape(found.ids.shape)
        goodness = margins(distances, labels == np.array([item.label for item in asked], object)[:, None])
        how = "by how much farther the nearest image of another label is than the nearest of the query's own"
    else:
        goodness, how = -distances[:, 0], "no query has a label of others, so by how near the first answer is"
    order = np.argsort(-goodness, kind="stable").tolist()
    return Ranked([asked[at].key for at in order], how)


def margins(distances: Floats, is_own: npt.NDArray[np.bool_]) -> Floats:
    """(Q,) of distances (Q, K) to answers, nearest first, and which have the query's label (Q, K).

    0 where there is no answer.
    """
    last = np.where(np.isfinite(distances), distances, 0).max(axis=1)
    own, other = (
        np.minimum(np.where(some, distances, np.inf).min(axis=1), last) for some in (is_own, ~is_own)
    )
    return np.asarray(other - own)


def _grid(searcher: Searcher, title: str, keys: Sequence[str], how: str, plan: Plan) -> Grid:
    plain, adaptive = (
        searcher.search(
            keys=keys,
            options=SearchOptions(k=NUM_NEIGHBOURS_SHOWN, side=side, nprobe=plan.nprobe, depth=plan.depth),
        )
        for side in _SHOWN_SIDES
    )
    note = "Above the plain neighbours, below those by both structures."
    return Grid(
        title=title,
        rows=grid_rows(searcher, keys, plain, adaptive),
        note=f"{note} Ordered {how}." if how else note,
    )


def _shown(album: Album, answer: Answer, query: Item) -> list[Picture]:
    return [
        Picture(
            image=image,
            label=hit.label,
            distance=hit.distance,
            correct=is_right(query.label, hit.label),
        )
        for image, hit in zip(album.images([hit.id for hit in answer.hits]), answer.hits, strict=True)
    ]


def is_right(label: str | None, other: str | None) -> bool | None:
    """Whether two images have one label; None where that of one isn't known."""
    return None if label is None or other is None else label == other
