"""The report of a release: typed JSON for the next night's gate, and a page with pictures for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from namr.data.reading import Pictures
from namr.embed.throughput import Throughput
from namr.index.planning import Considered
from namr.measure import report
from namr.measure.report import Fact, Grid, GridRow, Picture, ReportPage, Section, Table
from namr.nightly import selectivity
from namr.nightly.assessment import Assessment, ByAge
from namr.nightly.calibration import CertaintyReport
from namr.nightly.comparison import Compared
from namr.release.releases import Counts, Release, ReleaseManifest
from namr.search.answers import Answer, Item, SearchOptions
from namr.search.searcher import Searcher
from namr.sides import Side
from namr.store import manifests, storage

_NUM_QUERIES_SHOWN = 8
NUM_NEIGHBOURS_SHOWN = 6
_SHOWN_SIDES: tuple[Side, Side] = ("none", "both")
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
    built: str = ""
    """what was built, and why no less, in words; empty where an earlier namr built it"""
    aged: str | None = None
    """why the next build trains a new template, in words; None while this one fits"""
    effective_rank: float | None = None
    """of the embeddings, see `measure.structure.effective_rank`; None where an earlier namr measured"""
    against_current: Compared | None = None
    """Recall@1 of the release that served, and of this one; None where none served, or nothing is labelled"""
    assessment: Assessment
    considered: tuple[Considered, ...] = ()
    """what else could have been built, and why it was not; empty where an earlier namr built it"""
    certainty: CertaintyReport | None = None
    """None where an earlier namr made the release"""
    embedded: Throughput | None = None
    """how fast what was new was; None where nothing was, or an earlier namr made the release"""


def read(release: Release) -> ReleaseReport:
    """The report of a published release."""
    stored = release.manifest.report_json
    assert stored is not None, "a published release has a report"
    uri = storage.join(release.releases_uri, stored.name)
    return manifests.decode_manifest(release.read(stored), ReleaseReport, uri)


def page(
    title: str,
    manifest: ReleaseManifest,
    measured: ReleaseReport,
    grids: Sequence[Grid],
    sections: Sequence[Section] = (),
) -> ReportPage:
    """The page of a release; `grids` as `retrieval_grid` makes them, sections as `structure_section` does."""
    assessed, counts, rank = measured.assessment, measured.counts, measured.effective_rank
    took = measured.embedded
    without = f"{counts.num_refused} refused, {counts.num_tombstoned} taken out"
    recalls = {
        _SIDE_NAMES[side.side]: 100 * side.recall_at_1
        for side in assessed.sides
        if side.recall_at_1 is not None
    }
    plots = []
    if assessed.num_lists:
        plots.append(
            report.curves(
                "Recall@10 of the index by lists probed",
                {"recall@10": [(nprobe, recall) for nprobe, recall in assessed.recall_by_nprobe]},
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
                note=f"{assessed.num_labelled} labelled queries against {assessed.num_items} images",
            )
        )
    rows = [
        [
            _SIDE_NAMES[side.side],
            "" if side.recall_at_1 is None else f"{100 * side.recall_at_1:.1f}",
            f"{100 * side.recall_at_10:.1f}",
        ]
        for side in assessed.sides
    ]
    filtered = []
    if assessed.filtered:
        told = selectivity.table(
            assessed.filtered, recall_at_10=assessed.recall_at_10, queries_per_s=assessed.queries_per_s
        )
        filtered.append(told)
    return ReportPage(
        title=title,
        subtitle=_subtitle(manifest, measured),
        summary=[
            Fact(name="images", value=f"{counts.num_indexed:,}", note=without),
            Fact(
                name="model",
                value=f"{manifest.model_name} {manifest.model_version}",
                note=manifest.model_digest[:12],
            ),
            Fact(name="dataset version", value=str(manifest.dataset_version), note=manifest.dataset_uri),
            Fact(
                name="index",
                value=measured.index_key,
                note=f"{len(manifest.segments)} segments, {measured.build_s:.1f} s",
            ),
            Fact(name="recall@10", value=f"{assessed.recall_at_10:.3f}", note=assessed.probed),
            *(
                [Fact(name="effective rank", value=f"{rank:.1f}", note="directions that embeddings use")]
                if rank
                else []
            ),
            *(
                [Fact(name="embedding", value=f"{took.images_per_s:,.1f} images/s", note=took.stages)]
                if took
                else []
            ),
            Fact(name="lists", value=f"{measured.imbalance:.2f}", note="imbalance; 1 is even"),
        ],
        tables=[
            *([_by_age(assessed.by_age)] if assessed.by_age else []),
            Table(
                title=f"Held-out queries: {assessed.num_queries}, re-ranked: the first {assessed.depth}",
                columns=["ordered by", "Recall@1 (%)", "of the exact ten (%)"],
                rows=rows,
            ),
            *filtered,
            *([_certainty_table(measured.certainty, assessed.depth)] if measured.certainty else []),
            *_choice(measured),
        ],
        plots=plots,
        grids=grids,
        sections=sections,
    )


def _subtitle(manifest: ReleaseManifest, measured: ReleaseReport) -> str:
    words = [f"release {manifest.release_id}, made {manifest.created}"]
    if measured.built:
        words.append(measured.built)
    if measured.aged:
        words.append(f"the next build trains a new template, since {measured.aged}")
    return "; ".join(words)


def _by_age(by_age: ByAge) -> Table:
    """Whether what the index was trained for still fits."""
    return Table(
        title="Held-out queries by age",
        columns=["images", "queries", "of the exact ten (%)", "squared distance to a list's centre"],
        rows=[
            [name, str(age.num_queries), f"{100 * age.recall_at_10:.1f}", f"{age.error:.3g}"]
            for name, age in zip(("from before", "new"), by_age, strict=True)
        ],
    )


def _choice(measured: ReleaseReport) -> list[Table]:
    """Which index, and why no other: each with what a query would read of it, probing as large a share."""
    assessed = measured.assessment
    share = assessed.nprobe / assessed.num_lists if assessed.num_lists else 1.0
    rows = []
    for each in measured.considered:
        read = (1.0 if each.key == "Flat" else share) * assessed.num_items * each.scanned_bytes_per_vector
        key = f"{each.key} (chosen)" if each.is_chosen else each.key
        rows.append([key, f"{each.index_bytes / 1e6:,.1f}", f"{read / 1e6:,.2f}", each.why])
    if not rows:
        return []
    title = f"Which index, and why: what a query would read of each ({assessed.probed})"
    return [Table(title=title, columns=["index", "size (MB)", "read by a query (MB)", "why"], rows=rows)]


def _certainty_table(measured: CertaintyReport, depth: int) -> Table:
    """How sure the ten nearest are, side by side, with the release's depth and with an adaptive one."""
    tried = "too few to calibrate"
    if measured.rate is not None and measured.adaptive_rate is not None:
        rates = f"{100 * measured.rate:.2g} % (adaptive: {100 * measured.adaptive_rate:.2g} %)"
        tried = f"claimed: at most {rates} calibrated and wrong"
    return Table(
        title=f"How sure the ten nearest are: {measured.num_queries} held-out queries, {tried}",
        columns=[
            "ordered by",
            "depth",
            "mean depth",
            "proved (%)",
            "calibrated (%)",
            "unproved (%)",
            "calibrated and exact (%)",
        ],
        rows=[
            [
                _SIDE_NAMES[each.side],
                "adaptive" if each.is_adaptive else str(depth),
                f"{each.mean_depth:.0f}",
                f"{100 * each.proved:.1f}",
                f"{100 * each.calibrated:.1f}",
                f"{100 * each.unproved:.1f}",
                "" if each.right is None else f"{100 * each.right:.2f}",
            ]
            for each in measured.shares
        ],
    )


def retrieval_grid(searcher: Searcher, keys: Sequence[str], *, nprobe: int | None = None) -> Grid:
    """Some queries, their plain neighbours and their adaptive ones, as pictures; nprobe None: the release's.

    They are spread evenly over the keys, since items that were packed by class lie side by side.
    """
    shown = [keys[at] for at in spread_evenly(len(keys), _NUM_QUERIES_SHOWN)]
    plain, adaptive = (
        searcher.search(keys=shown, options=SearchOptions(k=NUM_NEIGHBOURS_SHOWN, side=side, nprobe=nprobe))
        for side in _SHOWN_SIDES
    )
    return Grid(
        title="What it finds",
        rows=grid_rows(searcher, shown, plain, adaptive),
        note="above the plain neighbours, below those by both structures",
    )


def grid_rows(
    searcher: Searcher, keys: Sequence[str], plain: Sequence[Answer], adaptive: Sequence[Answer]
) -> list[GridRow]:
    """The queries of these keys with their answers, as pictures."""
    pictures = Pictures(searcher.manifest.dataset_uri, searcher.manifest.dataset_version)
    rows = []
    for key, one, other in zip(keys, plain, adaptive, strict=True):
        query = searcher.items.by_key(key)
        assert query is not None, "the searcher has just answered for it"
        (image,) = _images(searcher, pictures, [query.id])
        rows.append(
            GridRow(
                query=Picture(image=image, label=query.label),
                plain=_shown(searcher, pictures, one, query),
                adaptive=_shown(searcher, pictures, other, query),
            )
        )
    return rows


def spread_evenly(num: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `num`, at even steps from 0."""
    most = min(num, most)
    return [at * num // most for at in range(most)]


def _shown(searcher: Searcher, pictures: Pictures, answer: Answer, query: Item) -> list[Picture]:
    images = _images(searcher, pictures, [hit.id for hit in answer.hits])
    return [
        Picture(
            image=image,
            label=hit.label,
            distance=hit.distance,
            correct=None if query.label is None or hit.label is None else hit.label == query.label,
        )
        for image, hit in zip(images, answer.hits, strict=True)
    ]


def _images(searcher: Searcher, pictures: Pictures, ids: Sequence[int]) -> list[bytes]:
    places = [searcher.items.place(each) for each in ids]
    assert all(places), "ids of items have places"
    known = [place for place in places if place]
    return pictures.read_many(ids, [place.offset for place in known], [place.size for place in known])
