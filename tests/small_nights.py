"""A gallery that grows night by night, embedded without pictures, and a release of each of its versions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from namr.data import datasets
from namr.data.datasets import Dataset
from namr.data.shards import make_id
from namr.embed import embeddings
from namr.release import publication, releases
from namr.release.build import BuildReport
from namr.release.releases import Release
from namr.store import manifests, tables
from namr.store.tables import EmbeddingTable, SampleTable
from tests import small_release
from tests.small_release import NOW

MODEL = "b" * 64
DIM = 16


def a_night(
    root: Path,
    num_rows: Sequence[int],
    *,
    refused: Sequence[int] = (),
    dead: Sequence[int] = (),
    keys: Mapping[int, str] | None = None,
) -> Dataset:
    """The next version of the dataset: new shards of so many images, embedded; nobody reads their tars.

    keys: of ids that have another than their own, because they are what an image is now.
    """
    before, entries = datasets.head(str(root / "dataset")), []
    for number, num in enumerate(num_rows, start=before.next_shard_number):
        ids = make_id(number, 0) + np.arange(num)
        vectors = small_release.random_vectors(num, DIM, seed=number)
        samples = SampleTable(
            ids=ids,
            keys=[(keys or {}).get(each, f"image/{each}") for each in ids.tolist()],
            labels=[str(row % 3) for row in range(num)],
            fields=["{}"] * num,
            offsets=np.arange(num),
            sizes=np.ones(num, np.int64),
        )
        is_refused = np.isin(ids, refused)
        kept, out = np.flatnonzero(~is_refused), np.flatnonzero(is_refused)
        table = EmbeddingTable(
            ids=ids[kept],
            keys=[samples.keys[row] for row in kept],
            labels=[samples.labels[row] for row in kept],
            embeddings=vectors.embeddings[kept].astype(np.float16),
            structures=vectors.structures[kept].astype(np.float16),
            refused_ids=ids[out],
            refused_keys=[samples.keys[row] for row in out],
            refused_reasons=["truncated"] * len(out),
        )
        tar = manifests.write_object(before.uri, f"{number}.tar", f"images of {number}".encode())
        index = manifests.write_object(before.uri, f"{number}.parquet", tables.encode_samples(samples))
        entries.append(datasets.ShardEntry(number=number, tar=tar, index=index, num_samples=num))
        embeddings.write(embeddings_of(root), MODEL, entries[-1], table)
    dataset = datasets.publish_version(before, entries, now=NOW, tombstones=dead)
    files = [embeddings.verify(embeddings_of(root), MODEL, entry).file for entry in dataset.shards]
    embeddings.publish_set(embeddings_of(root), MODEL, dataset, files)
    return dataset


def embeddings_of(root: Path) -> str:
    return str(root / "embeddings")


def as_release(uri: str, built: BuildReport) -> Release:
    """What the night would publish, verified as it is then."""
    draft = built.draft(
        f"of-version-{built.dataset.version.version}",
        created=NOW.isoformat(),
        model_name="made-up",
        model_version="1",
        structure_side="both",
    )
    report = releases.store(uri, "report.json", b"{}")
    manifest = replace(draft, nprobe=3, depth=30, recall_at_10=1.0, report_json=report, report_html=report)
    publication.verify(uri, manifest)
    return Release(uri, manifest)
