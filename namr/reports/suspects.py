"""Label suspects: images whose neighbours agree on another label, with that label as a suggestion.

An image is one where at least eight of its ten nearest, in the order of the release, have one label, and not
its own. What two classes have in common can look like this too, so people decide.

Not covered: images without a label, and labels that two names of one class have apart.
Legend: Q images that ask, K neighbours, P suspects.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.measure.report import Fact, Grid, GridRow, Picture, Section
from namr.reports import grids
from namr.reports.grids import Album
from namr.reports.self_search import K, SelfSearch
from namr.search.searcher import Searcher
from namr.store import tables

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TITLE = "Label suspects"
_LEAST_AGREEING = 8
_NUM_SHOWN = 6


class Suspects(NamedTuple):
    """Images whose label is in doubt, the most agreed on first."""

    rows: Ids
    """(P,) of those that asked"""
    suggestions: list[str]
    """(P,)"""
    shares: Floats
    """(P,) of the ten nearest that have the suggested label"""
    distances: Floats
    """(P,) to the nearest image that has it, by the release's side"""
    num_labelled: int
    """of those that asked"""


def among(asked: SelfSearch, searcher: Searcher) -> Suspects:
    """The suspects among the images that asked; none where none has a label."""
    ids, at = np.unique(np.concatenate([asked.ids[:, None], asked.found.ids], axis=1), return_inverse=True)
    names = searcher.items.labels(ids)
    number = {name: place for place, name in enumerate(sorted({name for name in names if name is not None}))}
    codes = np.array([-1 if name is None else number[name] for name in names], np.int64)
    labels = codes[at.reshape(len(asked.ids), 1 + asked.found.ids.shape[1])]
    own, near = labels[:, 0], labels[:, 1:]
    agreeing = (near[:, :, None] == near[:, None, :]).sum(axis=2)
    agreeing[(near < 0) | (near == own[:, None])] = 0
    most = agreeing.argmax(axis=1)  # of equals the nearest
    every = np.arange(len(own))
    num = agreeing[every, most]
    distances = asked.found.distances[every, most].astype(np.float64)
    rows = np.flatnonzero((own >= 0) & (num >= _LEAST_AGREEING))
    rows = rows[np.lexsort((distances[rows], -num[rows]))]
    told = list(number)
    return Suspects(
        rows,
        [told[each] for each in near[rows, most[rows]].tolist()],
        num[rows] / K,
        distances[rows],
        int((own >= 0).sum()),
    )


def table(found: Suspects, asked: SelfSearch, searcher: Searcher) -> bytes:
    """All of them as Parquet."""
    ids, counts = asked.ids[found.rows], searcher.items.label_counts()
    items = [item for each in ids.tolist() if (item := searcher.items.by_id(each))]
    labels = [item.label or "" for item in items]
    return tables.encode_columns(
        {
            "key": [item.key for item in items],
            "label": labels,
            "suggestion": found.suggestions,
            "share": found.shares,
            "distance": found.distances,
            "num_with_label": np.array([counts[label] for label in labels], np.int64),
            "num_with_suggestion": np.array([counts[label] for label in found.suggestions], np.int64),
            "id": ids,
        }
    )


def section(found: Suspects, asked: SelfSearch, searcher: Searcher) -> Section:
    """What the page says of them, with pictures of the first few."""
    if not found.num_labelled:
        return Section(title=TITLE, text=["No image that asked has a label, so none can be in doubt."])
    num, shown = len(found.rows), min(_NUM_SHOWN, len(found.rows))
    return Section(
        title=TITLE,
        text=[
            f"Asked: {asked.whom}, {found.num_labelled:,} of them with a label. A label is in doubt where at "
            f"least {_LEAST_AGREEING} of the {K} nearest images have one other label, which is the "
            "suggestion. All are in the table label-suspects."
        ],
        summary=[
            Fact(
                name="suspects",
                value=f"{num:,}",
                note=f"{100 * num / found.num_labelled:.2g} % of the labelled images that asked",
            )
        ],
        grids=[
            Grid(
                title=f"Labels in doubt: {shown} of {num:,}, the most agreed on first",
                rows=_shown(found, shown, asked, searcher),
                note="Below the image: its label, and what its neighbours suggest.",
            )
        ]
        if shown
        else [],
    )


def _shown(found: Suspects, num: int, asked: SelfSearch, searcher: Searcher) -> list[GridRow]:
    album, shown = Album(searcher), []
    is_plain = searcher.manifest.structure_side == "none"
    for row, suggestion in zip(found.rows[:num].tolist(), found.suggestions, strict=False):
        ids = [int(asked.ids[row]), *asked.found.ids[row, : grids.NUM_NEIGHBOURS_SHOWN].tolist()]
        image, *images = album.images(ids)
        own, *labels = searcher.items.labels(np.array(ids, np.int64))
        pictures = [
            Picture(image=each, label=label, distance=distance, correct=grids.is_right(own, label))
            for each, label, distance in zip(
                images, labels, asked.found.distances[row, : len(images)].tolist(), strict=True
            )
        ]
        query = Picture(image=image, label=f"{own} \N{RIGHTWARDS ARROW} {suggestion}?")
        plain, adaptive = (pictures, []) if is_plain else ([], pictures)
        shown.append(GridRow(query=query, plain=plain, adaptive=adaptive))
    return shown
