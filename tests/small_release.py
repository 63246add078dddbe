"""A small, real release for tests: a dataset in tars, embeddings, an index in parts, published.

The images are scikit-learn's handwritten digits; the embeddings are either given by a function of the
images' bytes, or clustered random vectors.
"""

import functools
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits

from namr.data import datasets, images, shards
from namr.index import index_files, ivf
from namr.model import distances, model
from namr.release import arrays, places, publication, releases, vector_steps
from namr.release.releases import Counts, ReleaseManifest, Segment, StoredVectors, VectorFile
from namr.search.items import Items
from namr.search.opening import Opened
from namr.search.searcher import Searcher
from namr.store import item_files, manifests, storage, tables
from namr.store.cache import Cache
from namr.store.manifests import StoredObject
from namr.store.tables import EmbeddingTable, SampleTable

Floats = npt.NDArray[np.float32]
NOW = datetime(2026, 11, 1, 2, 0, tzinfo=UTC)


class Vectors(NamedTuple):
    """What a model makes of some images."""

    embeddings: Floats
    structures: Floats


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How large and of what kind the release is to be."""

    num_shards: int = 3
    rows_per_shard: int = 40
    dim: int = 16
    index_key: str = "Flat"
    metric: distances.Metric = "l2"
    structure_side: distances.Side = "both"
    refused: Sequence[int] = ()
    """ids"""
    tombstoned: Sequence[int] = ()
    """ids that the dataset has tombstoned, so that they were never indexed"""
    dead: Sequence[int] = ()
    """ids that the segments still hold and the release hides"""
    num_segments: int = 1
    num_vector_files: int = 1
    model_digest: str = "0" * 64
    model_version: str = "1"
    seed: int = 0
    flat_dtype: type[np.float16] | type[np.float32] = np.float32
    """in which the embeddings are kept before they are indexed"""


@functools.cache
def _digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    bunch = load_digits()
    return bunch.images, bunch.target


@functools.cache
def digit(number: int) -> bytes:
    """One of 1,797 handwritten digits as a 32 x 32 PNG."""
    pixels = (_digits()[0][number] * 15.9).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def ids_of(searcher: Searcher, keys: Iterable[str]) -> npt.NDArray[np.int64]:
    """Of items by their keys; keys of none are left out."""
    items = (searcher.items.by_key(key) for key in keys)
    return np.array([item.id for item in items if item], np.int64)


def random_vectors(num: int, dim: int, *, seed: int) -> Vectors:
    """Points around ten centres, and structure weights in (0.5, 1.5)."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((10, dim))
    x = centres[rng.integers(0, 10, num)] + 0.4 * rng.standard_normal((num, dim))
    return Vectors(
        (x / np.sqrt(dim)).astype(np.float32), rng.uniform(0.5, 1.5, (num, dim)).astype(np.float32)
    )


def make_dataset(root: Path, recipe: Recipe) -> datasets.Dataset:
    """A dataset of digits: key `digit/<n>`, label the digit (every tenth has none), one field."""
    uri, targets = str(root / "dataset"), _digits()[1]
    before = datasets.head(uri)
    entries = []
    for number in range(recipe.num_shards):
        rows = range(number * recipe.rows_per_shard, (number + 1) * recipe.rows_per_shard)
        samples = [
            shards.Sample(
                key=f"digit/{row}",
                image=digit(row),
                extension="png",
                label=None if row % 10 == 9 else str(targets[row]),
                fields={"row": row},
            )
            for row in rows
        ]
        path = root / f"shard-{number:06d}.tar"
        table = shards.write_shard(path, samples, number=number)
        entries.append(
            datasets.ShardEntry(
                number=number,
                tar=manifests.write_object(uri, f"shards/{path.name}", path),
                index=manifests.write_object(
                    uri, f"shards/shard-{number:06d}.parquet", tables.encode_samples(table)
                ),
                num_samples=len(table),
            )
        )
    return datasets.publish_version(before, entries, now=NOW, tombstones=recipe.tombstoned)


def embed(
    dataset: datasets.Dataset, recipe: Recipe, of_images: Callable[[list[bytes]], Vectors] | None = None
):
    """The embedding table of each shard, as extraction would write it."""
    embedded: list[EmbeddingTable] = []
    for entry in dataset.shards:
        table = dataset.samples(entry)
        if of_images:
            tar = storage.read(dataset.shard_uri(entry))
            places = zip(table.offsets.tolist(), table.sizes.tolist(), strict=True)
            vectors = of_images([tar[offset : offset + size] for offset, size in places])
        else:
            vectors = random_vectors(len(table), recipe.dim, seed=recipe.seed + entry.number)
        refused = np.isin(table.ids, recipe.refused)
        kept = np.flatnonzero(~refused & dataset.live(table.ids))
        embedded.append(
            EmbeddingTable(
                ids=table.ids[kept],
                keys=[table.keys[row] for row in kept],
                labels=[table.labels[row] for row in kept],
                embeddings=vectors.embeddings[kept].astype(recipe.flat_dtype),
                structures=vectors.structures[kept].astype(recipe.flat_dtype),
                refused_ids=table.ids[refused],
                refused_keys=[table.keys[row] for row in np.flatnonzero(refused)],
                refused_reasons=["truncated"] * int(refused.sum()),
            )
        )
    return embedded


def items_of(dataset: datasets.Dataset, ids: npt.NDArray[np.int64]) -> SampleTable:
    """The item table of these ids."""
    whole = [dataset.samples(entry) for entry in dataset.shards]
    at = [(table, row) for table in whole for row in np.flatnonzero(np.isin(table.ids, ids))]
    return SampleTable(
        ids=np.array([table.ids[row] for table, row in at], np.int64),
        keys=[table.keys[row] for table, row in at],
        labels=[table.labels[row] for table, row in at],
        fields=[table.fields[row] for table, row in at],
        offsets=np.array([table.offsets[row] for table, row in at], np.int64),
        sizes=np.array([table.sizes[row] for table, row in at], np.int64),
    )


def store_items(releases_uri: str, *parts: SampleTable) -> tuple[StoredObject, ...]:
    """Items as a release lists them, a file of each part."""
    return tuple(releases.store(releases_uri, "items.arrow", item_files.encode([table])) for table in parts)


def as_items(*parts: SampleTable) -> Items:
    """Items of a file of each part."""
    return Items([item_files.decode(item_files.encode([table])) for table in parts])


def table_of(release: releases.Release) -> SampleTable:
    """All items of a release, as it lists them."""
    files = list(release.items())
    rows = [(file, row) for file in files for row in range(len(file))]
    return SampleTable(
        ids=np.concatenate([file.ids for file in files]),
        keys=[file.key(row) for file, row in rows],
        labels=[file.label(row) for file, row in rows],
        fields=[json.dumps(file.fields(row)) for file, row in rows],
        offsets=np.concatenate([file.offsets for file in files]),
        sizes=np.concatenate([file.sizes for file in files]),
    )


def make_manifest(
    root: Path,
    recipe: Recipe,
    *,
    release_id: str = "first",
    releases_uri: str | None = None,
    of_images: Callable[[list[bytes]], Vectors] | None = None,
) -> ReleaseManifest:
    """Everything that a release lists, stored under `<root>/releases`; nothing is published."""
    uri, work = releases_uri or str(root / "releases"), root / f"work-{release_id}"
    work.mkdir(parents=True)
    dataset = (
        datasets.open_version(str(root / "dataset"))
        if (root / "dataset").exists()
        else make_dataset(root, recipe)
    )
    embedded = embed(dataset, recipe, of_images)
    ids = np.concatenate([table.ids for table in embedded])
    x = distances.for_search(
        torch.from_numpy(np.concatenate([table.embeddings for table in embedded])), recipe.metric
    ).numpy()
    template = ivf.train_template(x, recipe.index_key, seed=0, num_threads=1)
    segments = []
    for at, rows in enumerate(np.array_split(np.arange(len(ids)), recipe.num_segments)):
        path = work / f"index-{at}.faiss"
        info = ivf.build_part(template, [(x[rows], ids[rows])], path, num_threads=1)
        segments.append(Segment(file=releases.store(uri, path.name, path), num_entries=info.num_vectors))
    dead = np.array(sorted(recipe.dead), np.int64)
    in_order = np.concatenate([index_files.ids_in(work / f"index-{at}.faiss") for at in range(len(segments))])
    both = [
        vector_steps.side_by_side(table.embeddings, table.structures, metric=recipe.metric, what="a test")
        for table in embedded
    ]
    sizes = np.array([(entry.number, entry.num_samples) for entry in dataset.shards], np.int64)
    blocks = [(table.ids, each) for table, each in zip(embedded, both, strict=True)]
    vectors = store_vectors(uri, work, in_order, sizes, blocks, num_files=recipe.num_vector_files)
    live = ids[~np.isin(ids, dead)]
    return ReleaseManifest(
        release_id=release_id,
        created=NOW.isoformat(),
        model_name="digits",
        model_version=recipe.model_version,
        model_digest=recipe.model_digest,
        dataset_uri=dataset.uri,
        dataset_version=dataset.version.version,
        dataset_digest=dataset.digest,
        index_key=recipe.index_key,
        template=releases.store(uri, "template.faiss", template.data),
        template_hash=template.hash,
        metric=recipe.metric,
        structure_side=recipe.structure_side,
        embedding_dim=x.shape[1],
        counts=Counts(
            num_samples=dataset.version.num_samples,
            num_indexed=len(live),
            num_refused=len(recipe.refused),
            num_tombstoned=len(recipe.tombstoned) + len(dead),
        ),
        segments=tuple(segments),
        tombstones=releases.store(uri, "tombstones.npy", arrays.encode_array(dead)) if len(dead) else None,
        vectors=(vectors,),
        items=store_items(uri, items_of(dataset, ids)),
        report_json=releases.store(uri, "report.json", b"{}"),
        report_html=releases.store(uri, "report.html", b"<p>report</p>"),
        nprobe=4,
        depth=50,
        recall_at_10=1.0,
    )


def store_vectors(
    releases_uri: str,
    folder: Path,
    ids_in_order: npt.NDArray[np.int64],
    shard_sizes: npt.NDArray[np.int64],
    blocks: Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]],
    *,
    num_files: int = 1,
) -> StoredVectors:
    """The re-rank vectors as a build stores them, at once: ids (n,) and pairs of vectors (n, 2, D)."""
    rows = places.rows_of(ids_in_order, shard_sizes)
    of_ids = places.Places(shard_sizes, rows)
    written: np.memmap | None = None
    least, path = 1.0, folder / "vectors.npy"
    for ids, both in blocks:
        if written is None:
            shape = (len(ids_in_order), *both.shape[1:])
            written = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            least = float("inf")
        written[of_ids.of(ids)] = both
        least = min(least, float(both[:, 1].min(initial=np.inf)))
    assert written is not None
    files = []
    for number, part in enumerate(np.array_split(written, num_files)):
        np.save(folder / f"vectors-{number:05d}.npy", part)
        stored = releases.store(
            releases_uri, f"vectors-{number:05d}.npy", folder / f"vectors-{number:05d}.npy"
        )
        files.append(VectorFile(file=stored, num_rows=len(part)))
    return StoredVectors(
        files=tuple(files),
        shards=releases.store(releases_uri, "vector-shards.npy", arrays.encode_array(shard_sizes)),
        rows=releases.store(releases_uri, "vector-rows.npy", arrays.encode_array(rows)),
        min_structure=least,
    )


def publish(root: Path, recipe: Recipe, *, release_id: str = "first", **more) -> releases.Release:
    """A published release."""
    manifest = make_manifest(root, recipe, release_id=release_id, **more)
    uri = more.get("releases_uri") or str(root / "releases")
    return publication.publish(uri, manifest, expected=releases.read_pointer(uri))


def renamed(manifest: ReleaseManifest, release_id: str, *, created: str | None = None) -> ReleaseManifest:
    """The same release under another id."""
    return replace(manifest, release_id=release_id, created=created or manifest.created)


def publish_with_model(root: Path, *, release_id: str = "first", seed: int = 0, num_shards: int = 2) -> Path:
    """A release whose embeddings an untrained model made; returns the folder of the model."""
    config = model.ModelConfig(
        backbone="test_efficientnet",
        weights="none",
        embedding_dim=16,
        structure_hidden_dim=16,
        image_size_px=32,
    )
    net, folder = model.build(config, seed=seed).eval(), root / f"model-{seed}"
    pixels = np.stack([images.prepare(digit(row), net.preprocessing) for row in range(40)])
    x, _ = model.embed(net, pixels, batch_size=40, device="cpu")
    model.fold_scale(net, float(distances.mean_pairwise(torch.from_numpy(x))))
    model.save(net, folder)

    def of_images(pictures: list[bytes]) -> Vectors:
        pixels = np.stack([images.prepare(data, net.preprocessing) for data in pictures])
        return Vectors(*model.embed(net, pixels, batch_size=32, device="cpu"))

    recipe = Recipe(num_shards=num_shards, model_digest=model.digest(net), model_version=str(seed + 1))
    publish(root, recipe, release_id=release_id, of_images=of_images)
    return folder


def with_items(searcher: Searcher, items: Items) -> Searcher:
    """The same release with other items than it lists."""
    return Searcher(
        searcher.release,
        Opened(searcher.index, searcher.vectors, items),
        dead=searcher._dead,
        query_model=searcher.model,
        device="cpu",
    )


def places_of(release: releases.Release) -> places.Places:
    """Where the vectors of a release on a disk lie."""
    return release.places(Cache(Path(release.releases_uri).with_name("cache-of-places"), 1 << 30))
