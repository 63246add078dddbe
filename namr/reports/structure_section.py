"""The part of a release's page that says what the structure embedding does: words, plots and pictures.

Spread, agreement and hubs are those of up to 2,048 images (fewer where a night has little time) among
themselves, drawn at random and the same ones each time; the queries that re-ranking mends and spoils are
held-out ones, answered by the release itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.measure import report, structure
from namr.measure.report import Grid, Plot, Section, Table
from namr.measure.structure import Agreement, Changes, Hubs, Rankings, Spread
from namr.release import held_out
from namr.reports import grids
from namr.search import queries, stages
from namr.search.answers import SearchOptions
from namr.search.queries import Queries
from namr.search.searcher import Searcher
from namr.sides import Side

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

TITLE = "What the structure embedding says"
MANY_IMAGES, FEW_IMAGES = 2048, 512
_FEWEST_IMAGES = 3
_K = 10
_SEED = 0
_NUM_CHANGED_SHOWN = 4
_NUM_PLANES = 32
_SAME_COSINE = 0.05
_SAME_SKEWNESS = 0.05
_ALSO: dict[Side, str] = {
    "both": " (side 'both' takes the mean of these weights and the neighbour's own)",
    "scale": " (side 'scale' takes the neighbour's mean weight alone, so its own are circles)",
}
"""What a side does with weights that the ellipse of the query's own does not show."""


def section(
    searcher: Searcher,
    keys: Sequence[str],
    *,
    nprobe: int | None = None,
    most_images: int = MANY_IMAGES,
) -> Section:
    """`keys` are the queries that re-ranking may mend or spoil; most_images: that the other numbers are of.

    Re-ranked is by the side of the release, by "both" where it has none. nprobe: lists that these queries
    probe; None: the release's.
    """
    manifest = searcher.manifest
    ids = np.sort(searcher.items.draw_ids(most_images, seed=_SEED))
    if len(ids) < _FEWEST_IMAGES:
        return Section(title=TITLE, text=[f"Of {len(ids)} images there is nothing to say."])
    x = searcher.vectors.embeddings(ids).float().numpy()
    s = searcher.vectors.structures(ids).float().numpy()
    if (s == 1).all():
        return Section(
            title=TITLE,
            text=["There is none: every weight is 1, so the adaptive distance is the plain one."],
        )
    side: Side = "both" if manifest.structure_side == "none" else manifest.structure_side
    whom = (
        f"all {len(ids):,} images"
        if len(ids) == len(searcher.items)
        else (f"{len(ids):,} of {len(searcher.items):,} images, drawn at random")
    )
    how = f"Re-ranked is by side {side!r}" + (
        "."
        if side == manifest.structure_side
        else "; the release itself orders by plain distance unless asked."
    )
    ranked = structure.rankings(x, s, k=_K, side=side, depth=manifest.depth)
    spread, agreement = structure.spread(s), structure.agreement(s, ranked.plain, seed=_SEED)
    before, after = (structure.hubs(structure.occurrences(rows, num=len(ids))) for rows in ranked)
    answered = _answered(searcher, keys, side, nprobe)
    return Section(
        title=TITLE,
        text=[
            f"It is a weight s for each axis of each image. Measured on {whom}. {how}",
            told_spread(spread),
            told_agreement(agreement),
            told_hubs(before, after),
            told_changes(answered.changes)
            if answered
            else "No query has a label, so whether re-ranking answers better can't be told here.",
        ],
        tables=[_hub_table(before, after, k=ranked.plain.shape[1], num=len(ids))],
        plots=_plots(x, s, ranked, agreement, side),
        grids=answered.shown if answered else [],
    )


def told_spread(spread: Spread) -> str:
    """How far s is from 1, and whether it tells images apart."""
    low, middle, high = spread.axis_deviations
    return (
        f"s differs from 1 by {100 * spread.mean_offset:.1f} % on average, and 99 of 100 weights lie between "
        f"{spread.lowest:.2f} and {spread.highest:.2f}. {100 * spread.between_images:.0f} % of its variance "
        "is between images and not a weighting that all have in common; "
        f"{100 * spread.mean_weights:.0f} % is one number an image, its mean weight, which makes all "
        "distances to it longer or shorter, and the rest is the shape of its neighbourhood. Over images an "
        f"axis has a standard deviation of {middle:.3f} (eight of ten axes: {low:.3f} to {high:.3f})."
    )


def told_agreement(agreement: Agreement) -> str:
    """Whether neighbours have the same s."""
    near, far = agreement.neighbours.mean(), agreement.at_random.mean()
    if near - far > _SAME_COSINE:
        meaning = "so s describes a neighbourhood and not one image alone"
    else:
        meaning = "so an image's s says nothing of its neighbours'"
    return (
        f"The s of an image and of its nearest neighbours, each less the mean s, have a cosine of {near:.2f} "
        f"on average, those of two images at random {_signless(far)}: {meaning}."
    )


def told_hubs(before: Hubs, after: Hubs) -> str:
    """Whether re-ranking makes some images answers to everything."""
    if abs(after.skewness - before.skewness) <= _SAME_SKEWNESS:
        change = "leaves that as it was"
    else:
        change = "evens that out" if after.skewness < before.skewness else "makes that worse"
    return (
        "Hubs are images that are among the neighbours of very many others, anti-hubs are among nobody's. "
        f"Re-ranking {change}: the skewness goes from {before.skewness:.2f} to {after.skewness:.2f} "
        "(0 is even)."
    )


def told_changes(changes: Changes) -> str:
    """Whether first hits got better."""
    mended, spoiled = len(changes.mended), len(changes.spoiled)
    told = (
        f"Of {changes.num_labelled:,} queries with a label, re-ranking mended {mended} (the first hit was of "
        f"another class and is now of the same) and spoiled {spoiled}; {changes.num_right_before:,} were "
        f"right before and {changes.num_right_after:,} are now. "
    )
    if mended == spoiled:
        return told + ("No first hit changed sides." if not mended else "That is a draw.")
    if mended > spoiled:
        return told + ("That is a gain." if changes.is_clear else "So few may be chance.")
    if changes.is_clear:
        return told + "That is a loss: search this gallery by plain distance."
    return told + "More were spoiled than mended, though so few may be chance."


class _Answered(NamedTuple):
    changes: Changes
    shown: list[Grid]


def _answered(searcher: Searcher, keys: Sequence[str], side: Side, nprobe: int | None) -> _Answered | None:
    """What the release answers these queries; None where none has a label."""
    items = [item for key in keys if (item := searcher.items.by_key(key))]
    if not any(item.label is not None for item in items):
        return None
    asked = queries.stored(np.array([item.id for item in items], np.int64), searcher.vectors)
    how = [SearchOptions(k=grids.NUM_NEIGHBOURS_SHOWN, side=each, nprobe=nprobe) for each in ("none", side)]
    plain, adaptive = (_first_labels(searcher, asked, options) for options in how)
    labels = [item.label for item in items]
    number = {label: at for at, label in enumerate(sorted({label for label in labels if label is not None}))}

    def numbers(of: Sequence[str | None]) -> Ids:
        return np.array([-1 if label is None else number.get(label, -1) for label in of], np.int64)

    changes = structure.changes(numbers(labels), numbers(plain), numbers(adaptive))
    shown_queries = []
    for name, rows in (("mended", changes.mended), ("spoiled", changes.spoiled)):
        shown = rows[held_out.spread_evenly(len(rows), _NUM_CHANGED_SHOWN)].tolist()
        if shown:
            of_shown = [items[row].key for row in shown]
            shown_queries.append(
                Grid(
                    title=f"Queries that re-ranking {name}, {len(shown)} of {len(rows)}",
                    rows=grids.grid_rows(
                        searcher,
                        of_shown,
                        *(searcher.search(keys=of_shown, options=options) for options in how),
                    ),
                    note=f"above the first hits before re-ranking, below those after it, by side {side!r}",
                )
            )
    return _Answered(changes, shown_queries)


def _first_labels(searcher: Searcher, asked: Queries, options: SearchOptions) -> list[str | None]:
    """Of the first hit of each query; the other hits are looked up for the few that are shown."""
    found = searcher.neighbours(asked, stages.plan_of(options, searcher.manifest))
    hits = [searcher.items.by_id(each) for each in found.ids[:, 0].tolist()]
    return [hit.label if hit else None for hit in hits]


def _hub_table(before: Hubs, after: Hubs, *, k: int, num: int) -> Table:
    rows = [
        [name, f"{hubs.skewness:.2f}", f"{100 * hubs.anti_hubs:.1f}", f"{hubs.largest:,}"]
        for name, hubs in (("plain", before), ("re-ranked", after))
    ]
    return Table(
        title=f"Hubs: how often an image is among the {k} nearest of another",
        columns=["ordered by", "skewness", "among nobody's (%)", "most often"],
        rows=rows,
        note=f"{num:,} images, each of them a query; on average an image is found {k} times",
    )


def _plots(x: Floats, s: Floats, ranked: Rankings, agreement: Agreement, side: Side) -> list[Plot]:
    plots = [
        report.histogram(
            "The weights",
            {"weight": s.ravel()},
            x_label="s of one axis of one image",
            line_at=1,
            note="Where all weights are 1 (broken line), the adaptive distance is the plain one: the wider "
            "this is, the more re-ranking can change.",
        ),
        report.histogram(
            "Do neighbours have the same s?",
            {"nearest neighbours": agreement.neighbours, "two at random": agreement.at_random},
            x_label="cosine of s less its mean, of two images",
            note="The farther the two are apart, the more of s belongs to a neighbourhood. s and x are made "
            "from the same features, so some agreement is to be expected.",
        ),
    ]
    if x.shape[1] > 1:
        plots.append(_neighbourhood(x, s, ranked, side))
    return plots


def _neighbourhood(x: Floats, s: Floats, ranked: Rankings, side: Side) -> Plot:
    """Of some images the one whose two weights differ as they do in the middle."""
    seen = []
    for row in sorted(set(np.linspace(0, len(x) - 1, _NUM_PLANES, dtype=int).tolist())):
        near = np.union1d(ranked.plain[row], ranked.adaptive[row])
        seen.append((structure.plane(x[row], s[row], x[near]), row, near))
    plane, row, near = sorted(seen, key=lambda of: of[0].weights[0] / of[0].weights[1])[len(seen) // 2]
    was, became = np.isin(near, ranked.plain[row]), np.isin(near, ranked.adaptive[row])
    k = ranked.plain.shape[1]
    groups = {f"stays among the {k}": was & became, "comes in": became & ~was, "goes out": was & ~became}
    (one, other), (farther, nearer) = plane.axes, plane.weights
    own = _ALSO.get(side, "")
    return report.ellipse(
        "A neighbourhood on two axes",
        {
            name: [(u, v) for u, v in plane.points[rows].tolist()]
            for name, rows in groups.items()
            if rows.any()
        },
        circle=("same plain distance", plane.radius),
        semi_axes=("same adaptive distance", plane.semi_axes),
        x_label=f"axis {one}, weight {farther:.2f}",
        y_label=f"axis {other}, weight {nearer:.2f}",
        note=f"An image and its nearest neighbours, on the axis where its s adds most to their distances and "
        "on the one where it takes away most or adds least. Plain search holds all points of the circle to "
        f"be equally near, the image's own s all points of the ellipse{own}. The other {x.shape[1] - 2} axes "
        f"are not seen here, and count too. Of {len(seen)} images it is the one whose two weights differ by "
        "the middle ratio.",
    )


def _signless(value: float) -> str:
    """Two decimals, and no minus before a zero."""
    return f"{value + 0.0 if abs(value) >= 0.005 else 0.0:.2f}"
