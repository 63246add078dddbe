"""From what was built to a release that can be judged: measured on held-out images, with its reports stored.

A release that was built whole is tuned, calibrated and measured with all that were held out. One that keeps
the template of the release before keeps how far a search looks, what is calibrated and what filters cost, and
is measured with few: images that were held out from that template's training, and images that came since.

Not covered: whether the numbers are good enough (`gate`).
"""

import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from namr.embed.extraction import ExtractReport
from namr.measure import report, structure
from namr.nightly import (
    aging,
    assessment,
    calibration,
    comparison,
    release_report,
    truth,
)
from namr.nightly.aging import AgingConfig
from namr.nightly.assessment import Assessment, AssessmentConfig, Effort
from namr.nightly.building import Made
from namr.nightly.calibration import CertaintyReport
from namr.nightly.release_report import ReleaseReport
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
"""queries from before, and as many of what is new: recall@10 is then known to about a point"""
_SAMPLED = 2000
"""embeddings whose effective rank is looked at"""


class Measured(NamedTuple):
    """A draft that says what was measured, and what of it there is to show."""

    manifest: ReleaseManifest
    report: ReleaseReport
    searcher: Searcher
    keys: list[str]
    """of the items that queried"""
    first_new_id: int | None = None
    """of what was added to the release before; None where all was built at once, or nothing came"""


class _Numbers(NamedTuple):
    keys: list[str]
    assessed: Assessment
    calibration: Calibration | None
    certainty: CertaintyReport | None
    birth: TemplateBirth
    aged: str | None


def measure(
    draft: ReleaseManifest,
    made: Made,
    *,
    releases_uri: str,
    current: Release | None,
    build: BuildConfig,
    assess: AssessmentConfig,
    aging: AgingConfig,
    cache: Cache,
) -> Measured:
    """Measure a draft, and hold it against the current release.

    cache: where objects of a remote release are opened from.
    """
    began = time.perf_counter()
    searcher = Searcher.of(Release(releases_uri, draft), cache=cache, query_model=None)
    opened = time.perf_counter()
    keys = assessment.held_out_keys(searcher, build.num_held_out, seed=build.seed)
    imbalance = searcher.index.imbalance
    if made.kept:
        numbers = _of_kept(searcher, keys, made.kept, made.first_new_id, imbalance, assess, aging, cache)
    else:
        numbers = _of_new(searcher, keys, imbalance, assess, cache)
    assessed = numbers.assessed
    manifest = replace(
        draft,
        nprobe=assessed.nprobe,
        depth=assessed.depth,
        recall_at_10=assessed.recall_at_10,
        calibration=numbers.calibration,
        template_birth=numbers.birth,
    )
    serving = Searcher.of(current, cache=cache, query_model=None) if current else None
    measured = ReleaseReport(
        counts=draft.counts,
        index_key=draft.index_key,
        num_parts=made.built.num_parts,
        imbalance=imbalance,
        build_s=made.built.seconds,
        built=made.how,
        aged=numbers.aged,
        effective_rank=_effective_rank(searcher),
        against_current=comparison.compare(serving, searcher, manifest, numbers.keys) if serving else None,
        assessment=assessed,
        considered=made.built.considered,
        certainty=numbers.certainty,
        stages=StageSeconds(open_s=opened - began, measure_s=time.perf_counter() - opened),
    )
    return Measured(manifest, measured, searcher, numbers.keys, made.first_new_id)


def with_reports(
    measured: Measured,
    self_search: SelfSearchConfig | None = None,
    *,
    extracted: ExtractReport | None = None,
) -> ReleaseManifest:
    """The release as it can be published: its report is stored, a page with pictures, and tables."""
    manifest, numbers, searcher, keys, first_new_id = measured
    if numbers.stages and extracted:
        stages = replace(numbers.stages, extract_s=extracted.seconds, num_extracted=extracted.num_new)
        numbers = replace(numbers, stages=stages)
    told = beside.make(
        searcher,
        manifest,
        Known(numbers.build_s, numbers.stages, numbers.assessment.frontier),
        keys,
        self_search or SelfSearchConfig(),
        first_new_id=first_new_id,
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


def _effective_rank(searcher: Searcher) -> float | None:
    ids = np.sort(searcher.items.draw_ids(_SAMPLED, seed=0))
    return (
        structure.effective_rank(searcher.vectors.embeddings(ids).float().numpy()) if len(ids) > 1 else None
    )


def _of_new(
    searcher: Searcher, keys: list[str], imbalance: float, config: AssessmentConfig, cache: Cache
) -> _Numbers:
    held = truth.of_items(searcher, keys, cache=cache)
    assessed = assessment.assess(searcher, held, config)
    sure = calibration.calibrate(searcher, held, depth=assessed.depth, nprobe=assessed.nprobe)
    birth = TemplateBirth(
        num_entries=searcher.manifest.num_entries, recall_at_10=assessed.recall_at_10, imbalance=imbalance
    )
    return _Numbers(keys, assessed, sure.calibration, sure.report, birth, None)


def _of_kept(
    searcher: Searcher,
    keys: list[str],
    kept: Release,
    first_new_id: int | None,
    imbalance: float,
    config: AssessmentConfig,
    limits: AgingConfig,
    cache: Cache,
) -> _Numbers:
    then, before = kept.manifest, release_report.read(kept)
    asked = assessment.some_of_both(searcher, keys, first_new_id, num=_FEW)
    held = truth.of_items(searcher, asked, shares=(), cache=cache)
    effort = Effort(then.nprobe, then.depth)
    assessed = assessment.assess(searcher, held, config, effort=effort, first_new_id=first_new_id)
    assessed = replace(assessed, filtered=before.assessment.filtered, frontier=before.assessment.frontier)
    birth = then.template_birth or TemplateBirth(
        num_entries=then.num_entries, recall_at_10=then.recall_at_10, imbalance=before.imbalance
    )
    num_entries = searcher.manifest.num_entries
    aged = aging.aged(limits, birth, assessed, num_entries=num_entries, imbalance=imbalance)
    return _Numbers(asked, assessed, then.calibration, before.certainty, birth, aged)
