"""What is written of a shard, what is missing of a dataset version, and what doesn't add up."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.data import datasets
from namr.data.datasets import Dataset, ShardEntry
from namr.embed import embeddings
from namr.errors import ManifestError, ObjectMissing
from namr.store import tables
from namr.store.tables import EmbeddingTable
from tests import small_release
from tests.small_release import NOW, Recipe

MODEL = "a" * 64
RECIPE = Recipe(num_shards=3, rows_per_shard=6, dim=4)


def table_of(dataset: Dataset, entry: ShardEntry, *, refused: int = 0, dim: int = 4) -> EmbeddingTable:
    """Random vectors of all rows, the last ones refused."""
    samples = dataset.samples(entry)
    kept = len(samples) - refused
    rng = np.random.default_rng(entry.number)
    return EmbeddingTable(
        ids=samples.ids[:kept],
        keys=samples.keys[:kept],
        labels=samples.labels[:kept],
        embeddings=rng.standard_normal((kept, dim)).astype(np.float16),
        structures=rng.uniform(0.5, 1.5, (kept, dim)).astype(np.float16),
        refused_ids=samples.ids[kept:],
        refused_keys=samples.keys[kept:],
        refused_reasons=["truncated"] * refused,
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_release.make_dataset(tmp_path, RECIPE)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "embeddings")


def write_all(root: str, dataset: Dataset) -> list[embeddings.EmbeddingFile]:
    return [
        embeddings.write(root, MODEL, entry, table_of(dataset, entry, refused=entry.number)).file
        for entry in dataset.shards
    ]


def test_what_was_written_is_what_is_read(root: str, dataset: Dataset) -> None:
    files = write_all(root, dataset)
    published = embeddings.publish_set(root, MODEL, dataset, files)
    found = embeddings.open_set(root, MODEL, dataset)
    assert found == published
    described = found.manifest
    assert (described.num_samples, described.num_embedded, described.num_refused) == (18, 15, 3)
    assert (described.embedding_dim, described.dtype) == (4, "float16")
    for table, entry in zip(embeddings.iterate(found), dataset.shards, strict=True):
        expected = table_of(dataset, entry, refused=entry.number)
        np.testing.assert_array_equal(table.embeddings, expected.embeddings)
        np.testing.assert_array_equal(table.structures, expected.structures)
        assert table.ids.tolist() == expected.ids.tolist()
        assert (table.keys, table.refused_keys) == (expected.keys, expected.refused_keys)


def test_the_first_of_two_attempts_counts(root: str, dataset: Dataset) -> None:
    entry = dataset.shards[0]
    first, _ = embeddings.write(root, MODEL, entry, table_of(dataset, entry))
    again, table = embeddings.write(root, MODEL, entry, table_of(dataset, entry, refused=2))
    assert again == first
    assert len(table.ids) == 6


def test_a_table_that_lacks_a_row_is_not_written(root: str, dataset: Dataset) -> None:
    entry = dataset.shards[0]
    whole = table_of(dataset, entry, refused=1)
    nothing = np.empty(0, np.int64)
    lacking = replace(whole, refused_ids=nothing, refused_keys=[], refused_reasons=[])
    twice = replace(whole, refused_ids=whole.ids[:1])
    for table in (lacking, twice):
        with pytest.raises(ManifestError, match="not the 6 samples of shard 0, each once"):
            embeddings.write(root, MODEL, entry, table)
    with pytest.raises(ObjectMissing):
        embeddings.verify(root, MODEL, entry)


def test_a_set_lists_every_shard_once(root: str, dataset: Dataset) -> None:
    files = write_all(root, dataset)
    with pytest.raises(ManifestError, match=r"2 files for 3 shards, none for shards \[1\]"):
        embeddings.publish_set(root, MODEL, dataset, [files[0], files[2]])
    with pytest.raises(ManifestError, match="4 files for 3 shards"):
        embeddings.publish_set(root, MODEL, dataset, [*files, files[0]])
    with pytest.raises(ManifestError, match="shard 1 has 6 samples, 4 embedded and 1 refused"):
        embeddings.publish_set(root, MODEL, dataset, [files[0], replace(files[1], num_embedded=4), files[2]])
    with pytest.raises(ManifestError, match="of 2 kinds"):
        embeddings.publish_set(root, MODEL, dataset, [files[0], files[1], replace(files[2], dtype="float32")])
    with pytest.raises(ManifestError, match="is missing"):
        embeddings.open_set(root, MODEL, dataset)


def test_a_damaged_or_missing_file_is_named(root: str, dataset: Dataset) -> None:
    found = embeddings.publish_set(root, MODEL, dataset, write_all(root, dataset))
    path = Path(root, found.files[1].stored.name)
    data = path.read_bytes()
    path.write_bytes(data[:-9] + b"x" + data[-8:])
    with pytest.raises(ManifestError, match="is damaged"):
        list(embeddings.iterate(found))
    path.write_bytes(data[:40])
    with pytest.raises(ManifestError, match="delete it and extract again"):
        embeddings.verify(root, MODEL, dataset.shards[1])
    path.unlink()
    with pytest.raises(ManifestError, match="a set of embeddings lists it"):
        found.read(found.files[1])


def test_the_same_tar_under_another_number_gives_the_ids_of_that_number(root: str, dataset: Dataset) -> None:
    entry = dataset.shards[0]
    embeddings.write(root, MODEL, entry, table_of(dataset, entry, refused=1))
    _, table = embeddings.verify(root, MODEL, replace(entry, number=9))
    assert table.ids.tolist() == [(9 << 32) + row for row in range(5)]
    assert table.refused_ids.tolist() == [(9 << 32) + 5]


def test_a_night_knows_the_files_of_earlier_versions(root: str, dataset: Dataset) -> None:
    assert embeddings.known_files(root, MODEL, dataset) == {}
    files = write_all(root, dataset)
    embeddings.publish_set(root, MODEL, dataset, files)
    dead = datasets.tombstone(dataset.uri, [dataset.samples(dataset.shards[0]).keys[0]], now=NOW)
    assert embeddings.known_files(root, MODEL, dead) == {file.number: file for file in files}
    assert embeddings.known_files(root, "b" * 64, dead) == {}
    last = dead.version.shards[2]
    changed = replace(last, tar=replace(last.tar, sha256="c" * 64))
    rewritten = replace(dead, version=replace(dead.version, shards=(*dead.version.shards[:2], changed)))
    assert sorted(embeddings.known_files(root, MODEL, rewritten)) == [0, 1]


def test_a_set_that_was_moved_is_refused(root: str, dataset: Dataset) -> None:
    embeddings.publish_set(root, MODEL, dataset, write_all(root, dataset))
    source = Path(root, MODEL, "sets", f"{dataset.digest}.json")
    target = Path(root, "b" * 64, "sets", source.name)
    target.parent.mkdir(parents=True)
    target.write_bytes(source.read_bytes())
    with pytest.raises(ManifestError, match="a file was moved"):
        embeddings.open_set(root, "b" * 64, dataset)


def test_a_file_is_plain_parquet(root: str, dataset: Dataset) -> None:
    entry = dataset.shards[2]
    file, _ = embeddings.write(root, MODEL, entry, table_of(dataset, entry, refused=2))
    _, columns = tables.read_rows(Path(root, file.stored.name))
    assert columns["refused"] == [None] * 4 + ["truncated"] * 2
    assert columns["id"] == dataset.samples(entry).ids.tolist()
