"""The night: extract what is missing, build, measure, gate, publish, for a model and a dataset.

Safe to repeat, to kill anywhere and to run twice at once. One night at a time has the lease of the releases:
a second is told who has it, a killed one is taken up by the next where it was, and one that lost its lease
meanwhile publishes nothing. What two nights did all the same is decided at the pointer, which is read when
the run begins and swapped last: of two runs one publishes and the other is told. A release that loses images
or recall against the one that serves is stopped at the gate and stays unpublished, with its report beside it.
Where people pinned the current release, as a roll-back does, the night says so and does nothing. Last it
collects what no release needs any more, and, without the lease, makes one segment of many (`compacting`).

A release can be prepared as well, beside nights: by another model, to be switched to later (`prepared`).

Not covered: when to run (a CronJob says), training (the champion is promoted by people).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from namr.data import datasets
from namr.data.datasets import Dataset
from namr.embed import extraction
from namr.embed.extraction import ExtractionConfig, ExtractReport
from namr.errors import ConfigError
from namr.model import model
from namr.model.model import NamrModel
from namr.nightly import building, collection, compacting, gate, measuring, release_report
from namr.nightly.aging import AgingConfig
from namr.nightly.assessment import AssessmentConfig
from namr.nightly.compacting import CompactConfig
from namr.nightly.gate import GateConfig, NotGoodEnough
from namr.nightly.measuring import Settings
from namr.nightly.release_report import ReleaseReport
from namr.registry import references
from namr.registry.references import FoundModel
from namr.release import old_embeddings, prepared, publication, releases, users
from namr.release.build import BuildConfig, BuildReport
from namr.release.garbage import CollectionConfig
from namr.release.releases import Release, ReleaseManifest
from namr.reports.self_search import SelfSearchConfig
from namr.store import scratch, storage
from namr.store.cache import Cache
from namr.store.lease import Lease
from namr.store.manifests import Pin


@dataclass(frozen=True, kw_only=True)
class ReindexConfig:
    """From a dataset and a model to a published release."""

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
    prepare: bool = False
    """make the release and keep it beside the current one, which nights go on with: to look at, to serve
    (jobs/serve.py --release) and to switch to later (`namr releases publish`)"""
    force: str | None = None
    """why to publish what the gate has objections to; kept in the release, with who said so"""
    tracking_uri: str | None = None
    """MLflow; None: MLFLOW_TRACKING_URI, else SQLite in the current folder"""
    notify_url: str | None = None
    """webhook that is told what came of the night; None: NAMR_NOTIFY_URL, which no list of processes shows"""
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    assessment: AssessmentConfig = field(default_factory=AssessmentConfig)
    aging: AgingConfig = field(default_factory=AgingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    self_search: SelfSearchConfig = field(default_factory=SelfSearchConfig)
    collection: CollectionConfig = field(default_factory=CollectionConfig)
    compact: bool = True
    """make all one segment again after a night that left many, or many dead entries; off where
    jobs/compact.py does it at another hour"""

    def __post_init__(self) -> None:
        if self.force is not None:
            publication.forced(self.force, "")
            if self.prepare:
                raise ConfigError(
                    "nothing is forced while it is prepared; force is for `namr releases publish`"
                )
        if self.notify_url is not None and not self.notify_url.startswith(("http://", "https://")):
            raise ConfigError("notify_url is no http:// or https:// URL (it is not shown here, as a secret)")


@dataclass(frozen=True, kw_only=True)
class ReindexReport:
    """What a run did."""

    release: Release
    """the one that is current now, or that is prepared"""
    is_new: bool
    """False where there is what this run would make, and where the current release is held"""
    held: Pin | None = None
    """why nothing may replace the current release; nothing was done then"""
    extracted: ExtractReport | None
    report: ReleaseReport
    collected: str = "nothing was collected"
    """what was freed, or why nothing was"""
    compacted: str = "nothing was compacted"
    """what was made one segment again, or why nothing was"""


def reindex(config: ReindexConfig, *, clock: Callable[[], datetime] = publication.utc_now) -> ReindexReport:
    """Make the next release current, unless nothing is new or the current one is pinned; or prepare it.

    Raises NotGoodEnough where the gate stops the release, Conflict where another night or a collection is
    under way, or another run published meanwhile. What served before serves on then.
    """
    root = storage.absolute(config.releases_uri)
    storage.check_writable(root)
    if config.prepare:
        return _prepared(root, config, clock)
    with users.write_alone(root, what="the night") as lease:
        done = _reindexed(root, config, clock, lease)
        if done.held:
            return done
        collected = collection.collect(
            root,
            config.collection,
            held=lease,
            work_uri=config.build.work_uri,
            embeddings_uri=config.embeddings_uri,
        )
        done = replace(done, collected=collected)
    return _compacted(done, config, clock) if config.compact else done


def _compacted(done: ReindexReport, config: ReindexConfig, clock: Callable[[], datetime]) -> ReindexReport:
    """After the night, and without its lease: the next one may begin meanwhile."""
    of_this = CompactConfig(
        releases_uri=config.releases_uri,
        embeddings_uri=config.embeddings_uri,
        num_parts=config.build.num_parts,
        work_uri=config.build.work_uri,
    )
    compacted = compacting.attempt(of_this, clock=clock)
    return replace(done, release=compacted.release or done.release, compacted=compacted.how)


def _reindexed(
    root: str, config: ReindexConfig, clock: Callable[[], datetime], lease: Lease
) -> ReindexReport:
    expected = releases.read_pointer(root)
    current = releases.open_release(root, expected.target) if expected else None
    if current and expected and expected.pin:
        return _unchanged(current, held=expected.pin)
    made = _made(root, config, clock, current=current, earlier=[current])
    if isinstance(made, Release):
        return _unchanged(made)
    manifest = made.manifest
    if made.refusal:
        if config.force is None:
            publication.keep(root, manifest)
            raise made.refusal
        manifest = replace(manifest, forced=publication.forced(config.force, str(made.refusal)))
    lease.check()
    published = publication.publish(root, manifest, expected=expected)
    return ReindexReport(release=published, is_new=True, extracted=made.extracted, report=made.report)


def _prepared(root: str, config: ReindexConfig, clock: Callable[[], datetime]) -> ReindexReport:
    """Without the lease, so that nights go on; raises what the gate says, when all is kept."""
    current = releases.current(root)
    made = _made(root, config, clock, current=current, earlier=[*prepared.newest_first(root), current])
    if isinstance(made, Release):
        return _unchanged(made)
    objections = str(made.refusal) if made.refusal else None
    manifest = replace(made.manifest, is_prepared=True, objections=objections)
    publication.keep(root, manifest)
    if made.refusal:
        raise made.refusal
    release = Release(root, manifest)
    return ReindexReport(release=release, is_new=True, extracted=made.extracted, report=made.report)


class _Made(NamedTuple):
    """A release that can be published, and what the gate has against it."""

    manifest: ReleaseManifest
    report: ReleaseReport
    extracted: ExtractReport
    refusal: NotGoodEnough | None


def _made(
    root: str,
    config: ReindexConfig,
    clock: Callable[[], datetime],
    *,
    current: Release | None,
    earlier: Sequence[Release | None],
) -> _Made | Release:
    """What `config` asks for, held against the current release.

    earlier: what it may be made of, by adding to the first that is of the same model and settings; that one
    itself where it is what is asked for.
    """
    with scratch.folder("model-") as folder:
        fetched = references.fetch(config.model, folder=Path(folder), tracking_uri=config.tracking_uri)
        query_model = model.load(fetched.path)
        digest = model.digest(query_model)
        dataset = datasets.open_version(storage.absolute(config.dataset_uri), config.dataset_version)
        alike = [each for each in earlier if each and _is_alike(each.manifest, query_model, digest, config)]
        if alike and _is_of(alike[0], dataset):
            return alike[0]
        embeddings_uri = storage.absolute(config.embeddings_uri)
        old_embeddings.use(embeddings_uri, root)
        extracted = extraction.extract(dataset, embeddings_uri, str(fetched.path), config.extraction)
    with scratch.folder("release-") as folder:
        cache = Cache(Path(folder), max_bytes=1 << 40)
        made = building.make(
            dataset,
            embeddings_uri,
            root,
            config.build,
            model_digest=digest,
            metric=query_model.search.metric,
            current=alike[0] if alike else current,
            is_alike=bool(alike),
            cache=cache,
        )
        measured = measuring.measure(
            Release(root, _draft(fetched, query_model, made.built, config, clock())),
            made,
            Settings(config.build, config.assessment, config.aging),
            current=current,
            cache=cache,
        )
        manifest = measuring.with_reports(measured, config.self_search, extracted=extracted)
        draft, refusal = Release(root, manifest), None
        try:
            gate.check(
                config.gate,
                draft,
                measured.report,
                dataset,
                current=current,
                lost_where=measured.lost_where,
            )
        except NotGoodEnough as error:
            refusal = error
    return _Made(manifest, release_report.read(draft), extracted, refusal)


def _unchanged(current: Release, *, held: Pin | None = None) -> ReindexReport:
    measured = release_report.read(current)
    return ReindexReport(release=current, is_new=False, held=held, extracted=None, report=measured)


def _is_of(release: Release, dataset: Dataset) -> bool:
    """Whether a release has these images; not where its template has aged: it is to be made better."""
    return release.manifest.dataset_digest == dataset.digest and release_report.read(release).aged is None


def _is_alike(manifest: ReleaseManifest, query_model: NamrModel, digest: str, config: ReindexConfig) -> bool:
    """Whether a release has this model and these settings, whatever its images."""
    search = query_model.search
    return (
        manifest.model_digest == digest
        and (manifest.metric, manifest.structure_side) == (search.metric, search.structure_side)
        and manifest.config_digest == config_digest(config)
    )


def config_digest(config: ReindexConfig) -> str:
    """SHA-256 of all that decides a release beside its model and its dataset version.

    Left out are what changes no answer of it: the number of parts and where they are kept, how many workers
    extract, when a template is old, the gate, and how far its report looks for duplicates.
    """
    compute_dtype = config.extraction.compute_dtype
    decisive = {
        "embeddings_uri": storage.absolute(config.embeddings_uri),
        "storage_dtype": config.extraction.storage_dtype,
        **(
            {} if compute_dtype == "float32" else {"compute_dtype": compute_dtype}
        ),  # as it was before it was asked
        "build": {
            name: value for name, value in vars(config.build).items() if name not in ("num_parts", "work_uri")
        },
        "assessment": vars(config.assessment),
    }
    return storage.sha256(json.dumps(decisive, sort_keys=True).encode())


def _draft(
    fetched: FoundModel, query_model: NamrModel, built: BuildReport, config: ReindexConfig, at: datetime
) -> ReleaseManifest:
    draft = built.draft(
        publication.new_id(at),
        created=at.isoformat(timespec="seconds"),
        model_name=fetched.name,
        model_version=fetched.version,
        structure_side=query_model.search.structure_side,
    )
    return replace(draft, depth=config.assessment.depth, config_digest=config_digest(config))
