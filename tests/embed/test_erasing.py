"""Erased from embeddings: as if the model had never seen the image, for every model, at any attempt."""

from pathlib import Path

import numpy as np
import pytest

from namr.data import datasets
from namr.data.datasets import Dataset
from namr.embed import embeddings, erasing, extraction
from namr.embed.extraction import ExtractionConfig
from namr.model import model
from namr.model.model import ModelConfig
from namr.store import storage, tables
from tests import searched
from tests.data.test_erasing import dataset, empty, made  # noqa: F401  (fixtures)
from tests.small_dataset import id_of

CONFIG = ExtractionConfig(batch_size_per_worker=4, decode_threads_per_worker=1)


@pytest.mark.slow
def test_every_models_embeddings_are_what_extraction_makes_of_what_is_left(
    dataset: Dataset,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = ModelConfig(
        backbone="test_resnet", weights="none", embedding_dim=6, structure_hidden_dim=8, image_size_px=32
    )
    nets = {f"{seed}" * 64: model.build(config, seed=seed).eval() for seed in (1, 2)}
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    vectors = {}
    for digest, net in nets.items():
        files = []
        for entry in dataset.shards:
            file, table = embeddings.write(
                old, digest, entry, extraction.embed_shard(net, dataset, entry, CONFIG).table
            )
            files.append(file)
            vectors |= {
                f"{each} by {digest[0]}": table.embeddings[row].tobytes()
                for row, each in enumerate(table.ids.tolist())
            }
        embeddings.publish_set(old, digest, dataset, files)
    now = empty(empty(dataset, "k3", "k12"), "k4", "k6", erasure_id="e2")
    for digest, net in nets.items():
        for entry in now.shards:
            embeddings.write(new, digest, entry, extraction.embed_shard(net, now, entry, CONFIG).table)
    for _ in range(2):
        erasing.erase(old, now, now.version.emptied)
        names = [name for name in storage.list_names(old) if name.endswith(".parquet")]
        assert names == storage.list_names(new)
        assert all(storage.read(f"{old}/{name}") == storage.read(f"{new}/{name}") for name in names)
    gone = {f"{id_of(number)} by {model}" for number in (3, 4, 6, 12) for model in (1, 2)}
    assert set(searched.traces(tmp_path / "old", vectors)) == set(vectors) - gone
    assert {*embeddings.known_files(old, digest, now)} == {5}, "only what was emptied is looked at again"
    sha256 = now.shards[0].tar.sha256
    assert sorted(erasing.of_shards(old, [sha256])) == [f"{digest}/{sha256}.parquet" for digest in nets]


def test_a_damaged_file_goes_and_what_is_of_other_shards_stays(
    dataset: Dataset,  # noqa: F811
    tmp_path: Path,
) -> None:
    root = str(tmp_path / "embeddings")
    first, second = (f"{'a' * 64}/{entry.tar.sha256}.parquet" for entry in dataset.shards[:2])
    of_set = f"{'a' * 64}/sets/{dataset.digest}.json"
    for name in (first, second, of_set):
        storage.write(storage.join(root, name), b"cut")
    now = empty(dataset, "k3")
    assert now.version.emptied[0].ids == (id_of(3),)
    erasing.erase(root, now, [])
    assert len(storage.list_names(root)) == 3
    erasing.erase(root, datasets.open_version(now.uri), now.version.emptied)
    assert storage.list_names(root) == sorted([second, of_set])


def test_a_shard_of_which_all_is_erased_has_rows_without_vectors(
    dataset: Dataset,  # noqa: F811
    tmp_path: Path,
) -> None:
    root, entry = str(tmp_path / "embeddings"), dataset.shards[2]
    samples, vectors = dataset.samples(entry), np.ones((4, 2), np.float16)
    table = tables.EmbeddingTable(
        ids=samples.ids,
        keys=samples.keys,
        labels=samples.labels,
        embeddings=vectors,
        structures=vectors,
        refused_ids=samples.ids[:0],
        refused_keys=[],
        refused_reasons=[],
    )
    embeddings.write(root, "m", entry, table)
    now = empty(dataset, *samples.keys)
    erasing.erase(root, now, now.version.emptied)
    left = embeddings.verify(root, "m", now.shards[2])
    assert (left.file.num_embedded, left.file.num_refused, left.file.embedding_dim) == (0, 4, 2)
    assert set(left.table.refused_reasons) == {"erased"}
