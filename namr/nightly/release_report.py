"""The report of a release: typed JSON for the next night's gate, and a page with pictures for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from namr.embed.throughput import Throughput
from namr.index.planning import Considered
from namr.measure import report
from namr.measure.report import Fact, Grid, ReportPage, Section, Table
from namr.nightly import selectivity
from namr.nightly.assessment import Assessment, ByAge
from namr.nightly.calibration import CertaintyReport
from namr.nightly.comparison import Compared
from namr.nightly.drift import Drift
from namr.nightly.latency import Latencies
from namr.release.releases import Counts, Release, ReleaseManifest
from namr.reports.beside import SelfSearched
from namr.reports.costs import StageSeconds
from namr.store import manifests, storage

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
    map_at_r: Compared | None = None
    """of both, see `comparison`; None also where an earlier namr measured, as of the next two"""
    drift: Drift | None = None
    latency: Latencies | None = None
    assessment: Assessment
    considered: tuple[Considered, ...] = ()
    """what else could have been built, and why it was not; empty where an earlier namr built it"""
    certainty: CertaintyReport | None = None
    """None where an earlier namr made the release; so for the next two"""
    stages: StageSeconds | None = None
    searched: SelfSearched | None = None
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
    """The page of a release; grids and sections as `reports.beside` makes them."""
    assessed, counts, rank = measured.assessment, measured.counts, measured.effective_rank
    took = measured.embedded
    without = f"{counts.num_refused} refused, {counts.num_tombstoned} taken out"
    recalls = {
        _SIDE_NAMES[side.side]: 100 * side.recall_at_1
        for side in assessed.sides
        if side.recall_at_1 is not None
    }
    plots = []
    if assessed.num_lists and len(assessed.recall_by_nprobe) > 1:
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
                note=f"segments: {len(manifest.segments)}; built in {measured.build_s:.1f} s",
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
            *([against] if (against := against_current(measured)) else []),
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


def against_current(measured: ReleaseReport) -> Table | None:
    """What the gate holds against the release that serves; None where none does."""
    right, scores, drift, latency = (
        measured.against_current, measured.map_at_r, measured.drift, measured.latency,
    )  # fmt: skip
    rows = []
    for what, compared in (("Recall@1 (%)", right), ("MAP@R (%)", scores)):
        if compared:
            of = f"of {compared.num_queries} labelled queries, the same of both"
            rows.append([what, f"{100 * compared.then:.1f}", f"{100 * compared.here:.1f}", of])
    if drift and drift.then:
        then, here = drift.then, drift.here
        of = f"of {here.num_images} embeddings"
        rows += [
            ["effective rank", f"{then.effective_rank:.1f}", f"{here.effective_rank:.1f}", of],
            ["flat axes", str(then.num_flat_axes), str(here.num_flat_axes), f"of {drift.dim}"],
            ["mean norm", f"{then.mean_norm:.4g}", f"{here.mean_norm:.4g}", ""],
        ]
        if drift.shift is not None:
            rows.append(["shift", "", f"{drift.shift:.4f}", "1 is as far as images lie from their mean"])
    if latency and latency.then:
        of = f"of {latency.num_queries} single queries, in turns"
        rows += [
            ["median (ms)", f"{latency.then.p50_ms:.2f}", f"{latency.here.p50_ms:.2f}", of],
            ["95 % within (ms)", f"{latency.then.p95_ms:.2f}", f"{latency.here.p95_ms:.2f}", of],
        ]
    title = "Against the release that served"
    return Table(title=title, columns=["", "then", "now", ""], rows=rows) if rows else None


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
