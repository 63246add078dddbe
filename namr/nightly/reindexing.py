"""The night: extract what is missing, build, measure, gate, publish, for a model and a dataset.

Safe to repeat, to kill anywhere and to run twice at once. One night at a time has the lease of the releases:
a second is told who has it, a killed one is taken up by the next where it was, and one that lost its lease
meanwhile publishes nothing. What two nights did all the same is decided at the pointer, which is read when
the run begins and swapped last: of two runs one publishes and the other is told. A release that loses images
or recall against the one that serves is stopped at the gate and stays unpublished, with its report beside it.
Where people pinned the current release, as a roll-back does, the night says so and does nothing. Last it
collects what no release needs any more, and, without the lease, makes one segment of many (`compacting`).

Not covered: when to run (a CronJob says), training (the champion is promoted by people).
"""

import getpass
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

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
from namr.nightly.measuring import Measured, Settings
from namr.nightly.release_report import ReleaseReport
from namr.registry import references
from namr.registry.references import FoundModel
from namr.release import old_embeddings, publication, releases, users
from namr.release.build import BuildConfig, BuildReport
from namr.release.garbage import CollectionConfig
from namr.release.releases import Forced, Release, ReleaseManifest
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
        if self.force is not None and not self.force.strip():
            raise ConfigError("force is empty; say why the gate is overruled, for those who find the release")
        if self.notify_url is not None and not self.notify_url.startswith(("http://", "https://")):
            raise ConfigError("notify_url is no http:// or https:// URL (it is not shown here, as a secret)")


@dataclass(frozen=True, kw_only=True)
class ReindexReport:
    """What a run did."""

    release: Release
    """the one that is current now"""
    is_new: bool
    """False where the current release is what this run would make, and where it is held"""
    held: Pin | None = None
    """why nothing may replace the current release; nothing was done then"""
    extracted: ExtractReport | None
    report: ReleaseReport
    collected: str = "nothing was collected"
    """what was freed, or why nothing was"""
    compacted: str = "nothing was compacted"
    """what was made one segment again, or why nothing was"""


def reindex(config: ReindexConfig, *, clock: Callable[[], datetime] = publication.utc_now) -> ReindexReport:
    """Make the next release current, unless nothing is new or the current one is pinned.

    Raises NotGoodEnough where the gate stops the release, Conflict where another night or a collection is
    under way, or another run published meanwhile. What served before serves on then.
    """
    root = storage.absolute(config.releases_uri)
    storage.check_writable(root)
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
    with scratch.folder("model-") as folder:
        fetched = references.fetch(config.model, folder=Path(folder), tracking_uri=config.tracking_uri)
        query_model = model.load(fetched.path)
        digest = model.digest(query_model)
        dataset = datasets.open_version(storage.absolute(config.dataset_uri), config.dataset_version)
        if current and _is_of(current, query_model, digest, dataset, config):
            return _unchanged(current)
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
            current=current,
            is_alike=bool(current and _is_alike(current.manifest, query_model, digest, config)),
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
        manifest = _judged(root, manifest, measured, dataset, config, current)
    lease.check()
    published = publication.publish(root, manifest, expected=expected)
    told = release_report.read(published)
    return ReindexReport(release=published, is_new=True, extracted=extracted, report=told)


def _judged(
    root: str,
    manifest: ReleaseManifest,
    measured: Measured,
    dataset: Dataset,
    config: ReindexConfig,
    current: Release | None,
) -> ReleaseManifest:
    """The release, if the gate lets it pass or is overruled; else it is kept for a look: NotGoodEnough."""
    try:
        gate.check(
            config.gate,
            Release(root, manifest),
            measured.report,
            dataset,
            current=current,
            lost_where=measured.lost_where,
        )
    except NotGoodEnough as error:
        if config.force is None:
            publication.keep(root, manifest)
            raise
        who = f"{getpass.getuser()} on {socket.gethostname()}"
        return replace(manifest, forced=Forced(by=who, reason=config.force, objections=str(error)))
    return manifest


def _unchanged(current: Release, *, held: Pin | None = None) -> ReindexReport:
    measured = release_report.read(current)
    return ReindexReport(release=current, is_new=False, held=held, extracted=None, report=measured)


def _is_of(
    release: Release, query_model: NamrModel, digest: str, dataset: Dataset, config: ReindexConfig
) -> bool:
    """Whether a release is what this run would make; not where its template has aged."""
    is_fit = release_report.read(release).aged is None
    is_alike = _is_alike(release.manifest, query_model, digest, config)
    return is_alike and is_fit and release.manifest.dataset_digest == dataset.digest


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
