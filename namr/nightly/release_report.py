"""The report of a release: typed JSON for the next night's gate, and a page with pictures for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from namr.data.datasets import Dataset
from namr.data.reading import SampleReader
from namr.measure import report
from namr.measure.report import Fact, Grid, GridRow, Picture, ReportPage, Table
from namr.nightly.assessment import Assessment
from namr.release.releases import Counts, ReleaseManifest
from namr.search.answers import Answer, Item, SearchOptions
from namr.search.searcher import Searcher

_NUM_QUERIES_SHOWN = 8
_NUM_NEIGHBOURS_SHOWN = 6
_SIDE_NAMES = {"none": "plain", "scale": "scale", "query": "query", "both": "both"}


@dataclass(frozen=True, kw_only=True)
class ReleaseReport:
    """What is known of a release's quality, as stored in report.json."""

    FORMAT: ClassVar[str] = "namr-release-report"
    FORMAT_VERSION: ClassVar[int] = 1

    counts: Counts
    index_key: str
    num_parts: int
    imbalance: float
    """1 for lists of equal length"""
    build_s: float
    assessment: Assessment


def page(title: str, manifest: ReleaseManifest, found: ReleaseReport, grids: Sequence[Grid]) -> ReportPage:
    """The page of a release; `grids` as `retrieval_grid` makes them."""
    measured, counts = found.assessment, found.counts
    without = f"{counts.num_refused} refused, {counts.num_tombstoned} taken out"
    recalls = {
        _SIDE_NAMES[side.side]: 100 * side.recall_at_1
        for side in measured.sides
        if side.recall_at_1 is not None
    }
    plots = []
    if measured.num_lists:
        plots.append(
            report.curves(
                "Recall@10 of the index by lists probed",
                {"recall@10": [(nprobe, recall) for nprobe, recall in measured.recall_by_nprobe]},
                x_label="lists probed",
                y_label="share of the true ten that are found",
            )
        )
    if recalls:
        plots.append(
            report.bars(
                "Recall@1 by what orders the candidates",
                {name: {"Recall@1": value} for name, value in recalls.items()},
                x_label="per cent",
                note=f"{measured.num_labelled} labelled queries against {measured.num_items} images",
            )
        )
    rows = [
        [
            _SIDE_NAMES[side.side],
            "" if side.recall_at_1 is None else f"{100 * side.recall_at_1:.1f}",
            f"{100 * side.recall_at_10:.1f}",
            f"{100 * side.proved:.1f}",
        ]
        for side in measured.sides
    ]
    return ReportPage(
        title=title,
        subtitle=f"release {manifest.release_id}, made {manifest.created}",
        summary=[
            Fact(name="images", value=f"{counts.num_indexed:,}", note=without),
            Fact(
                name="model",
                value=f"{manifest.model_name} {manifest.model_version}",
                note=manifest.model_digest[:12],
            ),
            Fact(name="dataset version", value=str(manifest.dataset_version), note=manifest.dataset_uri),
            Fact(name="index", value=found.index_key, note=f"{found.num_parts} parts, {found.build_s:.1f} s"),
            Fact(name="recall@10", value=f"{measured.recall_at_10:.3f}", note=measured.probed),
            Fact(name="lists", value=f"{found.imbalance:.2f}", note="imbalance; 1 is even"),
        ],
        tables=[
            Table(
                title=f"Held-out queries: {measured.num_queries}, re-ranked: the first {measured.depth}",
                columns=["ordered by", "Recall@1 (%)", "of the exact ten (%)", "proved (%)"],
                rows=rows,
            )
        ],
        plots=plots,
        grids=grids,
    )


def retrieval_grid(searcher: Searcher, dataset: Dataset, keys: Sequence[str]) -> Grid:
    """Some queries, their plain neighbours and their adaptive ones, as pictures.

    They are spread evenly over the keys, since items that were packed by class lie side by side.
    """
    num_shown = min(_NUM_QUERIES_SHOWN, len(keys))
    shown = [keys[at * len(keys) // num_shown] for at in range(num_shown)]
    plain = searcher.search(keys=shown, options=SearchOptions(k=_NUM_NEIGHBOURS_SHOWN, side="none"))
    adaptive = searcher.search(keys=shown, options=SearchOptions(k=_NUM_NEIGHBOURS_SHOWN, side="both"))
    pictures = _Pictures(searcher, dataset)
    rows = []
    for key, one, other in zip(shown, plain, adaptive, strict=True):
        item = searcher.items.by_key(key)
        assert item is not None, "the searcher has just answered for it"
        query = Picture(image=pictures.read([item])[0], label=item.label)
        rows.append(GridRow(query=query, plain=pictures.of(one, item), adaptive=pictures.of(other, item)))
    return Grid(
        title="What it finds", rows=rows, note="above the plain neighbours, below those by both structures"
    )


class _Pictures:
    """Reads the pictures of items from the shards."""

    def __init__(self, searcher: Searcher, dataset: Dataset) -> None:
        self._items, self._reader = searcher.items, SampleReader(dataset, cache=None)

    def of(self, answer: Answer, query: Item) -> list[Picture]:
        found = [self._items.by_id(hit.id) for hit in answer.hits]
        items = [item for item in found if item is not None]
        return [
            Picture(
                image=data,
                label=hit.label,
                distance=hit.distance,
                correct=None if query.label is None or hit.label is None else hit.label == query.label,
            )
            for data, hit in zip(self.read(items), answer.hits, strict=True)
        ]

    def read(self, items: Sequence[Item]) -> list[bytes]:
        places = [self._items.place(item.id) for item in items]
        assert all(places), "ids of items have places"
        return self._reader.read(
            np.array([item.id for item in items], np.int64),
            np.array([place.offset for place in places if place], np.int64),
            np.array([place.size for place in places if place], np.int64),
        )
