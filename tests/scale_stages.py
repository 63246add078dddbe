"""Galleries of any size without pictures, and each stage of namr as a call on one: for the benchmark `scale`.

Sample indexes and embeddings are Parquet files of the real formats: vectors around a thousand centres,
twenty images a class, one field, one image in 500 refused and one in 1,000 tombstoned. Tars are listed and
don't exist; nothing measured here reads a picture.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from namr import ray_connection
from namr.data import datasets, packing, sample_index
from namr.data.datasets import Dataset, ShardEntry
from namr.data.packing import PackingConfig
from namr.data.shards import make_id
from namr.embed import embeddings
from namr.embed.embeddings import EmbeddingFile
from namr.nightly import losses
from namr.release import build, publication, releases
from namr.release.build import BuildConfig, BuildReport
from namr.release.releases import ReleaseManifest
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.store import manifests, storage, tables
from namr.store.cache import Cache
from namr.store.manifests import StoredObject
from namr.store.tables import EmbeddingTable, SampleTable
from tests.measured import Tasks, Used

MODEL = "0" * 64
NOW = datetime(2026, 11, 1, 2, 0, tzinfo=UTC)
CENTRES, PER_CLASS = 1000, 20
REFUSED_EVERY, DEAD_EVERY = 500, 1000
PRICES = 4
"""values of the field; a filter on one lets a quarter of the items through"""
QUERIES = 64


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What to make up, and where."""

    folder: Path
    num_samples: int
    dim: int
    rows_per_shard: int
    index_key: str = "auto"
    num_parts: int = 4

    @property
    def dataset_uri(self) -> str:
        return str(self.folder / "dataset")

    @property
    def embeddings_uri(self) -> str:
        return str(self.folder / "embeddings")

    @property
    def releases_uri(self) -> str:
        return str(self.folder / "releases")

    def dataset(self) -> Dataset:
        return datasets.open_version(self.dataset_uri)


def make(gallery: Gallery) -> None:
    """The dataset and its embeddings."""
    rows = range(0, gallery.num_samples, gallery.rows_per_shard)
    nums = [min(gallery.rows_per_shard, gallery.num_samples - start) for start in rows]
    before, entries, files = datasets.head(gallery.dataset_uri), *_make_shards(gallery, 0, nums)
    dead = [make_id(e.number, row) for e in entries for row in range(1, e.num_samples, DEAD_EVERY)]
    dataset = datasets.publish_version(before, entries, now=NOW, tombstones=dead)
    embeddings.publish_set(gallery.embeddings_uri, MODEL, dataset, files)


def grow(gallery: Gallery, num: int, *, num_dead: int) -> None:
    """The next version: a shard of num more images, and num_dead of those before taken out."""
    before = datasets.head(gallery.dataset_uri)
    assert before.dataset is not None
    entries, files = _make_shards(gallery, before.next_shard_number, [num])
    known = embeddings.open_set(gallery.embeddings_uri, MODEL, before.dataset).files
    first = before.dataset.shards[0]
    dead = [make_id(first.number, 2 + row) for row in range(num_dead)]
    dataset = datasets.publish_version(before, entries, now=NOW, tombstones=dead)
    embeddings.publish_set(gallery.embeddings_uri, MODEL, dataset, [*known, *files])


def _make_shards(
    gallery: Gallery, first: int, nums: Sequence[int]
) -> tuple[list[ShardEntry], list[EmbeddingFile]]:
    centres = np.random.default_rng(0).standard_normal((CENTRES, gallery.dim), dtype=np.float32)
    made = [_make_shard(gallery, number, num, centres) for number, num in enumerate(nums, start=first)]
    return [entry for entry, _ in made], [file for _, file in made]


def _make_shard(
    gallery: Gallery, number: int, num: int, centres: np.ndarray
) -> tuple[ShardEntry, EmbeddingFile]:
    rng = np.random.default_rng([1, number])
    ids = make_id(number, 0) + np.arange(num)
    classes = rng.integers(0, max(1, gallery.num_samples // PER_CLASS), num)
    samples = SampleTable(
        ids=ids,
        keys=[f"shop-{number % 7}/{number:06d}/{row:08d}" for row in range(num)],
        labels=[f"class-{each}" for each in classes.tolist()],
        fields=[f'{{"price": {row % PRICES}}}' for row in range(num)],
        offsets=1536 + 20_480 * np.arange(num),
        sizes=np.full(num, 18_000),
    )
    noise = rng.standard_normal((num, gallery.dim), dtype=np.float32)
    x = (centres[rng.integers(0, CENTRES, num)] + 0.5 * noise).astype(np.float16)
    s = rng.uniform(0.5, 1.5, (num, gallery.dim)).astype(np.float16)
    is_refused = np.arange(num) % REFUSED_EVERY == 0
    kept, refused = np.flatnonzero(~is_refused), np.flatnonzero(is_refused)
    table = EmbeddingTable(
        ids=ids[kept],
        keys=[samples.keys[row] for row in kept.tolist()],
        labels=[samples.labels[row] for row in kept.tolist()],
        embeddings=x[kept],
        structures=s[kept],
        refused_ids=ids[refused],
        refused_keys=[samples.keys[row] for row in refused.tolist()],
        refused_reasons=["truncated"] * len(refused),
    )
    index = manifests.write_object(
        gallery.dataset_uri, f"shards/{number:06d}.parquet", tables.encode_samples(samples)
    )
    tar = StoredObject(f"shards/{number:06d}.tar", 20_480 * num, storage.sha256(str(number).encode()))
    stored = manifests.write_object(
        gallery.embeddings_uri, f"{MODEL}/{tar.sha256}.parquet", tables.encode_embeddings(table)
    )
    file = EmbeddingFile(
        number=number,
        stored=stored,
        num_embedded=len(kept),
        num_refused=len(refused),
        embedding_dim=gallery.dim,
        dtype="float16",
    )
    return ShardEntry(number=number, tar=tar, index=index, num_samples=num), file


def plan_packing(gallery: Gallery) -> None:
    """What the driver of a packing run does before any task: a table of images is listed and cut into shards.

    The table names one file over and over, so that nothing has to be there but a table.
    """
    picture = gallery.folder / "picture.jpg"
    picture.write_bytes(bytes(18_000))
    with (gallery.folder / "images.csv").open("w") as table:
        table.write("path,key,label\n")
        for row in range(gallery.num_samples):
            table.write(f"{picture},new/{row:09d},class-{row // PER_CLASS}\n")
    ray_connection.connect, ray_connection.total_cpus = lambda: None, lambda: 2
    config = PackingConfig(source=str(table.name), dataset_uri=gallery.dataset_uri)
    work = packing._own_work(config, datasets.head(gallery.dataset_uri))
    assert sum(len(plan.images) for plan in work.plans) == gallery.num_samples


def open_dataset(gallery: Gallery) -> None:
    """The version's manifest, and that of its embeddings."""
    embeddings.open_set(gallery.embeddings_uri, MODEL, gallery.dataset())


def index_samples(gallery: Gallery) -> None:
    """The columns that training draws from."""
    sample_index.build(gallery.dataset(), gallery.folder / "columns")


def build_release(gallery: Gallery) -> dict[str, list[Used]]:
    """All steps of a build; what its tasks took, by the name of the step."""
    tasks = Tasks()
    ray_connection.map_tasks, ray_connection.connect = tasks.map_tasks, lambda: None
    config = BuildConfig(index_key=gallery.index_key, num_parts=gallery.num_parts)
    built = build.build(
        gallery.dataset(),
        gallery.embeddings_uri,
        gallery.releases_uri,
        config,
        model_digest=MODEL,
        metric="l2",
    )
    (gallery.folder / "built.pickle").write_bytes(pickle.dumps(manifest_of(gallery, built)))
    return tasks.used


def publish(gallery: Gallery) -> None:
    """Everything that is looked at before the pointer moves."""
    manifest: ReleaseManifest = pickle.loads((gallery.folder / "built.pickle").read_bytes())
    publication.publish(gallery.releases_uri, manifest, expected=releases.read_pointer(gallery.releases_uri))


def hold_against_current(gallery: Gallery) -> None:
    """The gate's look for images that were lost: here the release is held against itself."""
    current = releases.open_release(gallery.releases_uri)
    assert losses.lost_images(current, gallery.dataset(), current=current).num == 0


_service: list[Searcher] = []


def open_service(gallery: Gallery) -> None:
    """The current release as a service holds it."""
    cache = Cache(gallery.folder / "cache", max_bytes=1 << 40)
    _service.append(Searcher.open(gallery.releases_uri, cache=cache, num_threads=1))


def search(gallery: Gallery, share: str) -> None:
    """One batch in the open service: of "all" items, or of the "quarter" that a filter lets through."""
    (searcher,) = _service
    rng = np.random.default_rng(2)
    queries = rng.standard_normal((2, QUERIES, gallery.dim), dtype=np.float32)
    wanted = None if share == "all" else {"price": 1}
    found = searcher.search_arrays(
        queries[0], 1 + 0.1 * queries[1], options=SearchOptions(nprobe=8, depth=100, filter=wanted)
    )
    assert (found.ids >= 0).all()


def manifest_of(gallery: Gallery, built: BuildReport, *, release_id: str = "first") -> ReleaseManifest:
    """What would be published of a build."""
    draft = built.draft(
        release_id,
        created=NOW.isoformat(),
        model_name="made-up",
        model_version="1",
        structure_side="both",
    )
    report = releases.store(gallery.releases_uri, "report.json", b"{}")
    return replace(draft, nprobe=8, depth=100, recall_at_10=1.0, report_json=report, report_html=report)
