"""From a model and a dataset to a release: extract what is missing, build, measure, gate, publish.

`reindex` is the night: safe to repeat, to kill anywhere and to run twice at once. The pointer is read when
the run begins and swapped last, so of two runs one publishes and the other is told. A release that loses
images or recall against the one that serves is stopped at the gate and stays unpublished, with its report
beside it. `release` is the same for embeddings that are there.

Not covered: when to run (a CronJob says), training (the champion is promoted by people).
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from namr import checks
from namr.data import datasets
from namr.data.datasets import Dataset
from namr.embed import extraction
from namr.embed.extraction import ExtractionConfig, ExtractReport
from namr.errors import NamrError
from namr.measure import report
from namr.model import model
from namr.model.model import NamrModel
from namr.nightly import assessment, release_report
from namr.nightly.assessment import AssessmentConfig
from namr.nightly.release_report import ReleaseReport
from namr.registry import references
from namr.registry.references import FoundModel
from namr.release import build, releases
from namr.release.build import BuildConfig, BuildReport
from namr.release.releases import Release, ReleaseManifest
from namr.search.searcher import Searcher
from namr.store import manifests, scratch, storage
from namr.store.cache import Cache

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a release has to reach before it replaces the one that serves."""

    min_recall_at_10: float = 0.9
    """of the index against exact search"""
    max_lost_share: float = 0.01
    """of the images that the current release has, how many the new one may lack (take-downs don't count)"""
    max_recall_at_1_drop: float = 0.05
    """how far Recall@1 of labelled images may fall below the current release's"""

    def __post_init__(self) -> None:
        checks.in_range(
            self,
            "min_recall_at_10",
            "max_lost_share",
            "max_recall_at_1_drop",
            at_least=0,
            at_most=1,
            place="gate",
        )


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig:
    """From stored embeddings to a published release."""

    dataset_uri: str
    """the dataset: a folder or s3://bucket/name"""
    embeddings_uri: str
    """root of all embeddings"""
    releases_uri: str
    """root of all releases"""
    model: str = "models:/namr@champion"
    """models:/<name>@<alias>, models:/<name>/<version> or the folder of a saved model"""
    dataset_version: int | None = None
    """None: the current one"""
    tracking_uri: str | None = None
    """MLflow; None: MLFLOW_TRACKING_URI, else SQLite in the current folder"""
    build: BuildConfig = field(default_factory=BuildConfig)
    assessment: AssessmentConfig = field(default_factory=AssessmentConfig)
    gate: GateConfig = field(default_factory=GateConfig)


@dataclass(frozen=True, kw_only=True)
class ReindexConfig(ReleaseConfig):
    """The night: embeddings that are missing, then a release."""

    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)


@dataclass(frozen=True, kw_only=True)
class ReindexReport:
    """What a run did."""

    release: Release
    is_new: bool
    """False where the current release is of this model and dataset version already"""
    extracted: ExtractReport | None
    report: ReleaseReport


def now() -> datetime:
    """The time of a release, in UTC."""
    return datetime.now(UTC)


def release(config: ReleaseConfig, *, clock: Callable[[], datetime] = now) -> ReindexReport:
    """Build, measure, gate and publish from embeddings that were extracted."""
    return _run(config, None, clock)


def reindex(config: ReindexConfig, *, clock: Callable[[], datetime] = now) -> ReindexReport:
    """`release`, after the embeddings that are missing were extracted.

    Raises NamrError where the release is not good enough, Conflict where another run published meanwhile.
    What served before serves on then.
    """
    return _run(config, config.extraction, clock)


def _run(
    config: ReleaseConfig, extraction_config: ExtractionConfig | None, clock: Callable[[], datetime]
) -> ReindexReport:
    root = storage.absolute(config.releases_uri)
    storage.check_writable(root)
    expected = releases.read_pointer(root)
    current = releases.open_release(root, expected.target) if expected else None
    with scratch.folder("model-") as folder:
        found = references.fetch(config.model, folder=Path(folder), tracking_uri=config.tracking_uri)
        query_model = model.load(found.path)
        digest = model.digest(query_model)
        dataset = datasets.open_version(storage.absolute(config.dataset_uri), config.dataset_version)
        if current and _is_of(current.manifest, query_model, digest, dataset, config.build):
            return ReindexReport(release=current, is_new=False, extracted=None, report=_report_of(current))
        embeddings_uri = storage.absolute(config.embeddings_uri)
        extracted = None
        if extraction_config:
            extracted = extraction.extract(dataset, embeddings_uri, str(found.path), extraction_config)
    built = build.build(
        dataset,
        embeddings_uri,
        root,
        config.build,
        model_digest=digest,
        metric=query_model.search.metric,
    )
    draft = _draft(found, query_model, built, config.assessment, clock())
    with scratch.folder("assess-") as folder:
        cache = Cache(Path(folder), max_bytes=1 << 40)
        searcher = Searcher.of(Release(root, draft), cache=cache, query_model=None)
        manifest, measured = _measured(searcher, draft, built, config)
    check_gate(config.gate, measured, manifest, current)
    published = releases.publish(root, manifest, expected=expected)
    return ReindexReport(release=published, is_new=True, extracted=extracted, report=measured)


def _is_of(
    manifest: ReleaseManifest, query_model: NamrModel, digest: str, dataset: Dataset, config: BuildConfig
) -> bool:
    """Whether a release is what this run would make."""
    search = query_model.search
    return (
        (manifest.model_digest, manifest.dataset_digest) == (digest, dataset.digest)
        and (manifest.metric, manifest.structure_side) == (search.metric, search.structure_side)
        and config.index_key in ("auto", manifest.index_key)
    )


def _draft(
    found: FoundModel, query_model: NamrModel, built: BuildReport, config: AssessmentConfig, at: datetime
) -> ReleaseManifest:
    """The manifest as far as it is known before anything was measured."""
    return ReleaseManifest(
        release_id=f"{at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}",
        created=at.isoformat(timespec="seconds"),
        model_name=found.name,
        model_version=found.version,
        model_digest=built.model_digest,
        dataset_uri=built.dataset.uri,
        dataset_version=built.dataset.version.version,
        dataset_digest=built.dataset.digest,
        index_key=built.index_key,
        template=built.template,
        template_hash=built.template_hash,
        metric=built.metric,
        structure_side=query_model.search.structure_side,
        embedding_dim=built.embedding_dim,
        counts=built.counts,
        segments=built.segments,
        tombstones=None,
        vectors=built.vectors,
        items=built.items,
        report_json=None,
        report_html=None,
        nprobe=1,
        depth=config.depth,
        recall_at_10=0.0,
    )


def _measured(
    searcher: Searcher, draft: ReleaseManifest, built: BuildReport, config: ReleaseConfig
) -> tuple[ReleaseManifest, ReleaseReport]:
    """The manifest with what was measured, its reports stored."""
    keys = assessment.held_out_keys(searcher, config.build.num_held_out, seed=config.build.seed)
    assessed = assessment.assess(searcher, keys, config.assessment)
    found = ReleaseReport(
        counts=built.counts,
        index_key=built.index_key,
        num_parts=built.num_parts,
        imbalance=built.imbalance,
        build_s=built.seconds,
        assessment=assessed,
    )
    manifest = replace(draft, nprobe=assessed.nprobe, recall_at_10=assessed.recall_at_10)
    grid = release_report.retrieval_grid(searcher, built.dataset, keys)
    html = report.render(release_report.page(f"{draft.model_name}: a release", manifest, found, [grid]))
    root = searcher.release.releases_uri
    return replace(
        manifest,
        report_json=releases.store(root, "report.json", manifests.encode_manifest(found)),
        report_html=releases.store(root, "report.html", html.encode()),
    ), found


def check_gate(
    config: GateConfig, found: ReleaseReport, manifest: ReleaseManifest, current: Release | None
) -> None:
    """NamrError, with every reason, unless the release may replace the current one."""
    assessed = found.assessment
    reasons = []
    if assessed.recall_at_10 < config.min_recall_at_10:
        reasons.append(
            f"recall@10 is {assessed.recall_at_10:.3f} with {assessed.probed}, the gate wants "
            f"{config.min_recall_at_10:.3f}: take another build.index_key"
        )
    if current:
        reasons += _worse(config, found, manifest, current)
    if reasons:
        raise NamrError(
            f"release {manifest.release_id} is not published: {'; '.join(reasons)}. What serves stays; "
            "change the gate's limits if this is meant"
        )


def _worse(
    config: GateConfig, found: ReleaseReport, manifest: ReleaseManifest, current: Release
) -> list[str]:
    reasons = []
    before, counts = current.manifest.counts, found.counts
    taken_out = max(0, counts.num_tombstoned - before.num_tombstoned)
    lost = before.num_indexed - taken_out - counts.num_indexed
    if (
        current.manifest.dataset_uri == manifest.dataset_uri
        and lost > config.max_lost_share * before.num_indexed
    ):
        reasons.append(
            f"{lost} images of release {current.manifest.release_id} are gone ({before.num_indexed} then, "
            f"{counts.num_indexed} now, {taken_out} taken out): look at the refused ones"
        )
    side = manifest.structure_side
    then = _report_of(current).assessment.result(current.manifest.structure_side).recall_at_1
    here = found.assessment.result(side).recall_at_1
    if then is not None and here is not None and then - here > config.max_recall_at_1_drop:
        reasons.append(
            f"Recall@1 fell from {then:.3f} to {here:.3f}: compare the models before promoting this one"
        )
    return reasons


def _report_of(current: Release) -> ReleaseReport:
    stored = current.manifest.report_json
    assert stored is not None, "a published release has a report"
    uri = storage.join(current.releases_uri, stored.name)
    return manifests.decode_manifest(current.read(stored), ReleaseReport, uri)
