"""Near-duplicates across a gallery: images much nearer to each other than to the rest of their neighbourhood.

Two images are near-duplicates where their plain distance is at most a quarter of the usual distance to a
tenth neighbour (the median over the images that asked). The tenth and not the first, so that a gallery which
holds everything twice doesn't take that for usual. Images that are joined by such pairs, over others too, are
one group.

Not covered: which of a group should go, and copies that the model sees as farther (resized, mirrored).
Legend: P pairs, Q images that ask, K neighbours.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.measure import report
from namr.measure.report import Fact, Grid, GridRow, Picture, Section
from namr.reports import grids
from namr.reports.grids import Album
from namr.reports.self_search import SelfSearch
from namr.search.answers import Item
from namr.search.searcher import Searcher
from namr.store import tables

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TITLE = "Near-duplicates across the gallery"
_SHARE = 0.25
_NUM_GROUPS_SHOWN = 6


class Duplicates(NamedTuple):
    """Pairs of near-duplicates, group by group, the nearest first."""

    limit: float
    """no pair is farther apart; 0 where nobody asked"""
    ones: Ids
    """(P,) ids"""
    others: Ids
    """(P,) larger ids"""
    distances: Floats
    """(P,) plain"""
    groups: Ids
    """(P,) the number of the group, from 0"""

    @property
    def num_groups(self) -> int:
        """How many."""
        return int(self.groups.max(initial=-1)) + 1

    @property
    def num_images(self) -> int:
        """In all groups."""
        return len(np.union1d(self.ones, self.others))

    def group(self, number: int) -> Ids:
        """(n,) the ids of a group, ascending."""
        mine = self.groups == number
        return np.union1d(self.ones[mine], self.others[mine])


def among(asked: SelfSearch) -> Duplicates:
    """The near-duplicates of the images that asked."""
    plain = asked.found.plain_distances.astype(np.float64)
    is_there = asked.found.ids >= 0
    farthest = np.where(is_there, plain, -np.inf).max(axis=1, initial=-np.inf)
    usual = farthest[np.isfinite(farthest)]
    limit = float(_SHARE * np.median(usual)) if len(usual) else 0.0
    rows, columns = np.nonzero(is_there & (plain <= limit))
    pairs = np.sort(np.stack([asked.ids[rows], asked.found.ids[rows, columns]], axis=1), axis=1)
    pairs, first = np.unique(pairs, axis=0, return_index=True)
    distances = plain[rows, columns][first]
    groups = _numbered(_joined(pairs), distances)
    order = np.lexsort((distances, groups))
    ones, others = pairs[order].T
    return Duplicates(limit, ones, others, distances[order], groups[order])


def table(found: Duplicates, searcher: Searcher) -> bytes:
    """All pairs as Parquet."""
    items = searcher.items
    ones, others = ([items.by_id(each) for each in ids.tolist()] for ids in (found.ones, found.others))
    return tables.encode_columns(
        {
            "group": found.groups,
            "distance": found.distances,
            "key": [_known(item).key for item in ones],
            "other_key": [_known(item).key for item in others],
            "label": [_known(item).label for item in ones],
            "other_label": [_known(item).label for item in others],
            "id": found.ones,
            "other_id": found.others,
        }
    )


def section(found: Duplicates, asked: SelfSearch, searcher: Searcher) -> Section:
    """What the page says of them, with pictures of the first groups."""
    if not len(asked.ids):
        return Section(title=TITLE, text=["No image asked, so none is known."])
    labels = [searcher.items.labels(ids) for ids in (found.ones, found.others)]
    num_apart = sum(grids.is_right(one, other) is False for one, other in zip(*labels, strict=True))
    nearest = np.where(asked.found.ids >= 0, asked.found.plain_distances, np.inf).min(axis=1, initial=np.inf)
    shown = min(_NUM_GROUPS_SHOWN, found.num_groups)
    return Section(
        title=TITLE,
        text=[
            f"Asked for their ten nearest among {len(searcher.items):,} images: {asked.whom}. Two within "
            f"{found.limit:.3g} of each other, a quarter of the usual distance to the tenth, are "
            "near-duplicates. All pairs are in the table near-duplicates."
        ],
        summary=[
            Fact(name="pairs", value=f"{len(found.ones):,}", note=f"within {found.limit:.3g}"),
            Fact(name="groups", value=f"{found.num_groups:,}", note=f"of {found.num_images:,} images"),
            Fact(name="under two labels", value=f"{num_apart:,}", note="pairs"),
        ],
        plots=[
            report.histogram(
                "How far the nearest other image is",
                {"images that asked": nearest[np.isfinite(nearest)]},
                x_label="plain distance",
                line_at=found.limit,
                note="Left of the broken line the nearest other image is a near-duplicate.",
            )
        ],
        grids=[
            Grid(
                title=f"Groups of near-duplicates: {shown} of {found.num_groups:,}, the nearest first",
                rows=_rows(found, shown, searcher),
                note="Distances are those to the first image of the group, of which at most seven are shown.",
            )
        ]
        if shown
        else [],
    )


def _rows(found: Duplicates, num: int, searcher: Searcher) -> list[GridRow]:
    album, rows = Album(searcher), []
    for number in range(num):
        ids = found.group(number)[: 1 + grids.NUM_NEIGHBOURS_SHOWN]
        x = searcher.vectors.embeddings(ids).double().numpy()
        distances = np.sqrt(np.square(x - x[0]).sum(axis=1)).tolist()
        items = [_known(searcher.items.by_id(each)) for each in ids.tolist()]
        images = album.images(ids.tolist())
        others = zip(items[1:], images[1:], distances[1:], strict=True)
        rows.append(
            GridRow(
                query=Picture(image=images[0], label=items[0].label),
                plain=[
                    Picture(
                        image=image,
                        label=item.label,
                        distance=distance,
                        correct=grids.is_right(items[0].label, item.label),
                    )
                    for item, image, distance in others
                ],
            )
        )
    return rows


def _joined(pairs: Ids) -> Ids:
    """(P, 2) ids -> (P,) the least id of all that a pair is joined with, over other pairs too."""
    ids, at = np.unique(pairs, return_inverse=True)
    least = np.arange(len(ids))
    ones, others = at.reshape(pairs.shape).T
    while True:
        before = least.copy()
        lower = np.minimum(least[ones], least[others])
        np.minimum.at(least, ones, lower)
        np.minimum.at(least, others, lower)
        least = least[least]
        if (least == before).all():
            return np.asarray(ids[least[ones]])


def _numbered(groups: Ids, distances: Floats) -> Ids:
    """The groups numbered by their nearest pair, ties by their least id."""
    names, at = np.unique(groups, return_inverse=True)
    nearest = np.full(len(names), np.inf)
    np.minimum.at(nearest, at, distances)
    numbers = np.empty(len(names), np.int64)
    numbers[np.argsort(nearest, kind="stable")] = np.arange(len(names))
    return np.asarray(numbers[at])


def _known(item: Item | None) -> Item:
    assert item is not None, "the searcher has just found it"
    return item
