"""All that a release lists of an index, from the embeddings of a dataset version: built whole by Ray tasks.

    embeddings -> template (`templates`) -> one segment with its vectors and items (`segments`)

Tombstoned rows are left out everywhere. What comes out is what a release lists: objects under their digests,
written once.

Every step is a function of the one before, and what it made is found again under the digest of all that
decides it (`<work>/<build>/`): a run that was killed goes on from there, and gives the same release.

Not covered: adding what is new to an earlier release (`increment`), measuring recall (the release does, on
held-out queries), and deleting work that is done with.
"""

import json
import time
from dataclasses import dataclass

from namr import checks, ray_connection
from namr.data.datasets import Dataset
from namr.embed import embeddings
from namr.errors import ConfigError, ManifestError
from namr.index import planning
from namr.index.planning import Considered
from namr.model.distances import Metric, Side
from namr.release import held_out, segments, templates
from namr.release.build_steps import HeldOut, VectorSource
from namr.release.releases import Counts, ReleaseManifest, Segment, StoredVectors
from namr.release.templates import StoredTemplate
from namr.store import storage
from namr.store.manifests import StoredObject

_LARGEST_SEED = (1 << 31) - 1
"""FAISS takes no larger one"""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How to build an index."""

    index_key: str = "auto"
    """auto: Flat for few images, else IVF<lists>,PQ<pieces>x4fs with the most exact codes that fit
    max_index_bytes (SQ8 where the dimension has no even pieces). Or by name Flat, IVF<lists>,Flat,
    IVF<lists>,SQ8, IVF<lists>,PQ<pieces>x4fs; or IVF<lists>,PQ<bytes>x8, which is slower than all of them"""
    num_parts: int = 4
    """parts to build side by side; large indexes take more"""
    max_index_bytes: int = 16 << 30
    """what the index may take in the memory of a serving node; decides the codes of "auto\""""
    seed: int = 0
    """of the sample, of the template's training, and of what is held out"""
    num_held_out: int = 500
    """images that the template is not trained on, to measure the index with; never more than a fifth"""
    use_gpu: bool = False
    """train the centroids on a GPU of the cluster; what they are then depends on it in their last bits.
    Written after FAISS's documentation, and never run on one"""
    work_uri: str | None = None
    """where parts are kept until they are merged; <releases_uri>/building where none is named"""

    def __post_init__(self) -> None:
        checks.in_range(self, "num_parts", "max_index_bytes", "num_held_out", at_least=1)
        checks.in_range(self, "seed", at_least=0, at_most=_LARGEST_SEED)


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a release lists of an index, and how it came about."""

    model_digest: str
    dataset: Dataset
    index_key: str
    template: StoredObject
    template_hash: str
    metric: Metric
    embedding_dim: int
    counts: Counts
    segments: tuple[Segment, ...]
    tombstones: StoredObject | None
    vectors: tuple[StoredVectors, ...]
    items: tuple[StoredObject, ...]
    num_parts: int
    imbalance: float
    """1 for lists of equal length; a search takes about that many times as long"""
    considered: tuple[Considered, ...]
    """what else could have been built, and why it was not"""
    seconds: float

    def draft(
        self, release_id: str, *, created: str, model_name: str, model_version: str, structure_side: Side
    ) -> ReleaseManifest:
        """The manifest of a release of it, as far as it is known before anything was measured."""
        return ReleaseManifest(
            release_id=release_id,
            created=created,
            model_name=model_name,
            model_version=model_version,
            model_digest=self.model_digest,
            dataset_uri=self.dataset.uri,
            dataset_version=self.dataset.version.version,
            dataset_digest=self.dataset.digest,
            index_key=self.index_key,
            template=self.template,
            template_hash=self.template_hash,
            metric=self.metric,
            structure_side=structure_side,
            embedding_dim=self.embedding_dim,
            counts=self.counts,
            segments=self.segments,
            tombstones=self.tombstones,
            vectors=self.vectors,
            items=self.items,
            report_json=None,
            report_html=None,
            nprobe=1,
            depth=1,
            recall_at_10=0.0,
        )


def build(
    dataset: Dataset,
    embeddings_uri: str,
    releases_uri: str,
    config: BuildConfig,
    *,
    model_digest: str,
    metric: Metric,
    template: StoredTemplate | None = None,
) -> BuildReport:
    """Build the index of a dataset version from the embeddings of one model.

    template: of an earlier release, whose key the config has to name; None: a new one is trained.

    The samples that `held_out` chooses by their ids are kept out of the template's training; they are in the
    index. Raises ManifestError if the dataset version is not embedded, if anything stored is
    damaged, or if the ids in the segment are not those of the live embeddings; ConfigError for a key that is
    not offered, or for use_gpu where there is none; ShapeError where there are too few vectors for the key.
    """
    started = time.monotonic()
    root = storage.absolute(releases_uri)
    storage.check_writable(root)
    embedding_set = embeddings.open_set(storage.absolute(embeddings_uri), model_digest, dataset)
    described = embedding_set.manifest
    plan = planning.plan(
        described.num_embedded,
        described.embedding_dim,
        key=config.index_key,
        num_parts=config.num_parts,
        max_index_bytes=config.max_index_bytes,
    )
    held = HeldOut(held_out.share(config.num_held_out, dataset.version.num_samples), config.seed)
    decisive = [dataset.digest, model_digest, described.files, metric, config.seed, plan, held]
    also = [*([template.stored.sha256] if template else []), *(["gpu"] if config.use_gpu else [])]
    work = work_uri(config, root, *decisive, *also)
    ray_connection.connect()
    if config.use_gpu and ray_connection.total_gpus() < 1:
        raise ConfigError("use_gpu is set, and this Ray has no GPU; leave it out, or connect to one that has")
    source = VectorSource(embeddings_uri=embedding_set.root_uri, dead=dataset.tombstones, metric=metric)
    template = template or templates.train(
        source,
        described.files,
        plan,
        held,
        seed=config.seed,
        use_gpu=config.use_gpu,
        work_uri=work,
        releases_uri=root,
    )
    of_all = segments.add(
        template.template,
        source,
        dataset.uri,
        dataset.shards,
        described.files,
        num_parts=plan.num_parts,
        work_uri=work,
        releases_uri=root,
    )
    return BuildReport(
        model_digest=model_digest,
        dataset=dataset,
        index_key=plan.key,
        template=template.stored,
        template_hash=template.template.hash,
        metric=metric,
        embedding_dim=described.embedding_dim,
        counts=checked(
            Counts(
                num_samples=dataset.version.num_samples,
                num_indexed=of_all.segment.num_entries,
                num_refused=of_all.num_refused,
                num_tombstoned=len(dataset.tombstones),
            )
        ),
        segments=(of_all.segment,),
        tombstones=None,
        vectors=(of_all.vectors,),
        items=of_all.items,
        num_parts=plan.num_parts,
        imbalance=of_all.imbalance,
        considered=tuple(
            planning.considered(
                described.num_embedded,
                described.embedding_dim,
                chosen=plan.key,
                key=config.index_key,
                max_index_bytes=config.max_index_bytes,
            )
        ),
        seconds=time.monotonic() - started,
    )


def work_uri(config: BuildConfig, releases_uri: str, *decisive: object) -> str:
    """The work folder of what all this decides."""
    root = storage.absolute(config.work_uri or storage.join(releases_uri, "building"))
    return storage.join(root, storage.sha256(json.dumps(decisive, default=vars).encode())[:32])


def checked(counts: Counts) -> Counts:
    """The same, where every sample went somewhere; else ManifestError."""
    if counts.num_samples != counts.num_indexed + counts.num_refused + counts.num_tombstoned:
        raise ManifestError(f"the counts of the index don't add up: {counts}")
    return counts
