"""From what was built to a release that can be judged: measured on held-out images, with its reports stored.

A release that was built whole is tuned, calibrated and measured with all that were held out. One that keeps
the template of the release before keeps how far a search looks, what is calibrated and what filters cost, and
is measured with few: images that were held out from that template's training, whose true neighbours are kept
from night to night, and images that came since.

Not covered: whether the numbers are good enough (`gate`).
"""

import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from namr.data.shards import among
from namr.embed.extraction import ExtractReport
from namr.measure import report
from namr.nightly import (
    aging,
    assessment,
    calibration,
    comparison,
    drift,
    kept_truth,
    latency,
    recall_loss,
    release_report,
    truth,
)
from namr.nightly.aging import AgingConfig
from namr.nightly.assessment import Assessment, AssessmentConfig, Effort
from namr.nightly.building import Made
from namr.nightly.calibration import CertaintyReport
from namr.nightly.kept_truth import Kept
from namr.nightly.recall_loss import RecallLoss
from namr.nightly.release_report import ReleaseReport
from namr.nightly.truth import HeldOut, Ids
from namr.release import releases
from namr.release.build import BuildConfig
from namr.release.calibrated import Calibration
from namr.release.releases import Release, ReleaseManifest, TemplateBirth
from namr.reports import beside
from namr.reports.beside import Known
from namr.reports.costs import StageSeconds
from namr.reports.self_search import SelfSearchConfig
from namr.search.searcher import Searcher
from namr.store import manifests
from namr.store.cache import Cache

_FEW = 100
"""held-out items that are asked every night: recall@10 is then known to about a point"""


class Settings(NamedTuple):
    """What decides how a release is measured."""

    build: BuildConfig
    assessment: AssessmentConfig
    aging: AgingConfig


class Measured(NamedTuple):
    """A draft that says what was measured, and what of it there is to show."""

    manifest: ReleaseManifest
    report: ReleaseReport
    searcher: Searcher
    keys: list[str]
    """of the items that queried"""
    first_new_id: int | None = None
    """of what was added to the release before; None where all was built at once, or nothing came"""
    held: HeldOut | None = None
    """the items that queried; None where nothing was measured anew"""

    def lost_where(self, what: str) -> RecallLoss:
        """Where one of `Assessment.recalls` was lost."""
        assert self.held is not None, "what was lost was measured"
        items, asked, true = self.held
        rows = np.arange(len(items))
        if self.first_new_id is not None and what != assessment.OF_ALL:
            is_new = np.array([item.id >= self.first_new_id for item in items])
            rows = np.flatnonzero(is_new if what == assessment.OF_NEW else ~is_new)
        effort = Effort(self.manifest.nprobe, self.manifest.depth)
        nearest = true.of_all.of("none")[rows, : truth.K_OF_RECALL]
        return recall_loss.told_apart(self.searcher, asked.rows(rows), nearest, effort)


class _Numbers(NamedTuple):
    held: HeldOut
    kept: Kept
    """what the next night need not compare again"""
    assessed: Assessment
    calibration: Calibration | None
    certainty: CertaintyReport | None
    birth: TemplateBirth
    aged: str | None


def measure(
    draft: Release, made: Made, settings: Settings, *, current: Release | None, cache: Cache
) -> Measured:
    """Measure a draft, and hold it against the current release.

    cache: where objects of a remote release are opened from.
    """
    began = time.perf_counter()
    searcher = Searcher.of(draft, cache=cache, query_model=None)
    opened = time.perf_counter()
    numbers = (
        _of_kept(searcher, made.kept, made.first_new_id, settings, cache)
        if made.kept
        else _of_new(searcher, settings, cache)
    )
    assessed = numbers.assessed
    manifest = replace(
        draft.manifest,
        nprobe=assessed.nprobe,
        depth=assessed.depth,
        recall_at_10=assessed.recall_at_10,
        calibration=numbers.calibration,
        template_birth=numbers.birth,
        kept_truth=kept_truth.store(draft.releases_uri, numbers.kept),
    )
    serving = Searcher.of(current, cache=cache, query_model=None) if current else None
    if serving and not len(serving.items):
        serving = None
    items = numbers.held.items
    quality = comparison.compare(serving, searcher, manifest, items) if serving else None
    lie = drift.measured(searcher, serving)
    measured = ReleaseReport(
        counts=manifest.counts,
        index_key=manifest.index_key,
        num_parts=made.built.num_parts,
        imbalance=searcher.index.imbalance,
        build_s=made.built.seconds,
        built=made.how,
        aged=numbers.aged,
        effective_rank=lie.here.effective_rank if lie else None,
        against_current=quality.recall_at_1 if quality else None,
        map_at_r=quality.map_at_r if quality else None,
        drift=lie,
        latency=latency.measured(searcher, manifest, serving),
        assessment=assessed,
        considered=made.built.considered,
        certainty=numbers.certainty,
        stages=StageSeconds(open_s=opened - began, measure_s=time.perf_counter() - opened),
    )
    keys = [item.key for item in items]
    return Measured(manifest, measured, searcher, keys, made.first_new_id, numbers.held)


def with_reports(
    measured: Measured,
    self_search: SelfSearchConfig | None = None,
    *,
    extracted: ExtractReport | None = None,
) -> ReleaseManifest:
    """The release as it can be published: its report is stored, a page with pictures, and tables."""
    manifest, numbers, searcher = measured.manifest, measured.report, measured.searcher
    if extracted and extracted.num_new:
        numbers = replace(numbers, embedded=extracted.throughput)
    if numbers.stages and extracted:
        stages = replace(
            numbers.stages, extract_s=extracted.throughput.seconds, num_extracted=extracted.num_new
        )
        numbers = replace(numbers, stages=stages)
    told = beside.make(
        searcher,
        manifest,
        Known(numbers.build_s, numbers.stages, numbers.assessment.frontier),
        measured.keys,
        self_search or SelfSearchConfig(),
        first_new_id=measured.first_new_id,
    )
    numbers = replace(numbers, stages=told.stages, searched=told.searched)
    title, root = f"{manifest.model_name}: a release", searcher.release.releases_uri
    html = report.render(release_report.page(title, manifest, numbers, told.grids, told.sections))
    return replace(
        manifest,
        tables={name: releases.store(root, f"{name}.parquet", data) for name, data in told.tables.items()},
        report_json=releases.store(root, "report.json", manifests.encode_manifest(numbers)),
        report_html=releases.store(root, "report.html", html.encode()),
    )


def _of_new(searcher: Searcher, settings: Settings, cache: Cache) -> _Numbers:
    ids = assessment.held_out_ids(searcher, settings.build.num_held_out, seed=settings.build.seed)
    held = truth.of_items(searcher, ids, cache=cache)
    assessed = assessment.assess(searcher, held, settings.assessment)
    sure = calibration.calibrate(searcher, held, depth=assessed.depth, nprobe=assessed.nprobe)
    birth = TemplateBirth(
        num_entries=searcher.manifest.num_entries,
        recall_at_10=assessed.recall_at_10,
        imbalance=searcher.index.imbalance,
    )
    kept = _asked_again(Kept(ids, held.truth.of_all), _few(searcher, settings.build))
    return _Numbers(held, kept, assessed, sure.calibration, sure.report, birth, None)


def _of_kept(
    searcher: Searcher, before: Release, first_new_id: int | None, settings: Settings, cache: Cache
) -> _Numbers:
    then, then_measured = before.manifest, release_report.read(before)
    few = _few(searcher, settings.build)
    ids = few
    if first_new_id is not None:
        ids = np.concatenate([few[few < first_new_id], assessment.some_since(searcher, first_new_id)])
    held, kept = kept_truth.follow(searcher, ids, before, cache=cache)
    effort = Effort(then.nprobe, then.depth)
    assessed = assessment.assess(
        searcher, held, settings.assessment, effort=effort, first_new_id=first_new_id
    )
    kept_of_then = then_measured.assessment
    assessed = replace(assessed, filtered=kept_of_then.filtered, frontier=kept_of_then.frontier)
    birth = then.template_birth or TemplateBirth(
        num_entries=then.num_entries, recall_at_10=then.recall_at_10, imbalance=then_measured.imbalance
    )
    aged = aging.aged(
        settings.aging,
        birth,
        assessed,
        num_entries=searcher.manifest.num_entries,
        imbalance=searcher.index.imbalance,
    )
    kept = _asked_again(kept, few)
    return _Numbers(held, kept, assessed, then.calibration, then_measured.certainty, birth, aged)


def _few(searcher: Searcher, build: BuildConfig) -> Ids:
    """Of the items that the template was not trained on those that are asked night after night."""
    return assessment.held_out_ids(searcher, min(build.num_held_out, _FEW), seed=build.seed)


def _asked_again(kept: Kept, few: Ids) -> Kept:
    """Of those that are asked night after night."""
    return kept.of(among(kept.query_ids, few))
