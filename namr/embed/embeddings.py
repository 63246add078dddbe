"""Embeddings: one immutable Parquet file for each pair of model and shard, and the set that a dataset needs.

    <root>/<model digest>/<SHA-256 of the shard's tar>.parquet    every row of the shard: vectors, or why not
    <root>/<model digest>/sets/<dataset digest>.json              which files cover this dataset version

A file is a function of the model and the shard alone: tombstones are not looked at (an index leaves them
out), and a shard that two dataset versions share is embedded once. So what is missing is the set of pairs
that are not there: that is resume and the nightly increment in one.

Labels in a file are those of the day it was made; who needs the labels of today reads the sample index.
Not covered: deleting the embeddings of models that nobody uses any more (`release.old_embeddings`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np

from namr.data import datasets
from namr.data.datasets import Dataset, ShardEntry
from namr.data.shards import make_id, row_of
from namr.errors import ManifestError, ObjectMissing
from namr.store import manifests, read_ahead, storage, tables
from namr.store.manifests import StoredObject
from namr.store.tables import EmbeddingTable, VectorTable

_NUM_READERS = 8
_EARLIER_VERSIONS = 10


@dataclass(frozen=True, kw_only=True)
class EmbeddingFile:
    """The embeddings of one shard, as a set lists them."""

    number: int
    """of the shard"""
    stored: StoredObject
    """named relative to the root"""
    num_embedded: int
    num_refused: int
    embedding_dim: int
    dtype: str
    """float16 or float32, as they are stored"""
    compute_dtype: str = "float32"
    """float32, float16 or bfloat16, as the model was run"""

    @property
    def kind(self) -> tuple[int, str, str]:
        """What all files of a set have alike."""
        return self.embedding_dim, self.dtype, self.compute_dtype


class Stored(NamedTuple):
    """The embeddings of one shard as they lie in the store."""

    file: EmbeddingFile
    table: EmbeddingTable


@dataclass(frozen=True, kw_only=True)
class SetManifest:
    """The embeddings that one model made of one dataset version, as stored."""

    FORMAT: ClassVar[str] = "namr-embeddings"
    FORMAT_VERSION: ClassVar[int] = 1

    model_digest: str
    dataset_id: str
    dataset_version: int
    dataset_digest: str
    embedding_dim: int
    dtype: str
    compute_dtype: str = "float32"
    num_samples: int
    num_embedded: int
    num_refused: int
    files: tuple[EmbeddingFile, ...]
    """one for each shard, by ascending number"""


@dataclass(frozen=True, kw_only=True)
class EmbeddingSet:
    """A set, open for reading."""

    root_uri: str
    manifest: SetManifest

    @property
    def files(self) -> tuple[EmbeddingFile, ...]:
        """One for each shard, by ascending number."""
        return self.manifest.files

    def read(self, file: EmbeddingFile) -> EmbeddingTable:
        """The verified embeddings of one shard, by ascending id; ManifestError if damaged or gone."""
        return read(self.root_uri, file)


def read(root_uri: str, file: EmbeddingFile) -> EmbeddingTable:
    """The verified embeddings of one shard, by ascending id; ManifestError if damaged or gone."""
    return _renumbered(tables.decode_embeddings(_bytes_of(root_uri, file)), file.number)


def read_vectors(root_uri: str, file: EmbeddingFile, *, structures: bool) -> VectorTable:
    """`read` without keys and labels, and without structures unless they are asked for: half the time."""
    table = tables.decode_vectors(_bytes_of(root_uri, file), structures=structures)
    base = make_id(file.number, 0)
    return table._replace(ids=row_of(table.ids) + base, refused_ids=row_of(table.refused_ids) + base)


def _bytes_of(root_uri: str, file: EmbeddingFile) -> bytes:
    try:
        return manifests.read_object(root_uri, file.stored)
    except ObjectMissing as error:
        raise ManifestError(
            f"{storage.join(root_uri, file.stored.name)} is missing, and a set of embeddings lists it; "
            "extract again, under a root of its own"
        ) from error


def embedding_uri(root_uri: str, model_digest: str, shard_sha256: str) -> str:
    """Where the embeddings lie that a model made of a shard (the SHA-256 of its tar)."""
    return storage.join(root_uri, _name(model_digest, shard_sha256))


def write(root_uri: str, model_digest: str, entry: ShardEntry, table: EmbeddingTable) -> Stored:
    """Write the embeddings of one shard, once; where another attempt was first, its file counts.

    Raises ManifestError unless every row of the shard is there once, embedded or refused.
    """
    _check_rows(table, entry, "the embeddings to be written")
    storage.write_if_absent(
        embedding_uri(root_uri, model_digest, entry.tar.sha256), tables.encode_embeddings(table)
    )
    return verify(root_uri, model_digest, entry)


def verify(root_uri: str, model_digest: str, entry: ShardEntry) -> Stored:
    """Read the embeddings of one shard as they are stored, with what a set says of them.

    Raises ObjectMissing where there are none, ManifestError where they are damaged or not of every row.
    """
    name = _name(model_digest, entry.tar.sha256)
    uri = storage.join(root_uri, name)
    data = storage.read(uri)
    try:
        table = _renumbered(tables.decode_embeddings(data), entry.number)
    except ManifestError as error:
        raise ManifestError(f"{uri} is damaged: {error}; delete it and extract again") from error
    _check_rows(table, entry, uri)
    file = EmbeddingFile(
        number=entry.number,
        stored=StoredObject(name, len(data), storage.sha256(data)),
        num_embedded=len(table.ids),
        num_refused=len(table.refused_ids),
        embedding_dim=table.embeddings.shape[1],
        dtype=str(table.embeddings.dtype),
        compute_dtype=table.compute_dtype,
    )
    return Stored(file, table)


def known_files(root_uri: str, model_digest: str, dataset: Dataset) -> dict[int, EmbeddingFile]:
    """By shard number: files that the newest set of this or an earlier version of the dataset lists.

    They were verified when that set was published, so a night only has to look at what is new.
    """
    name_of = {entry.number: _name(model_digest, entry.tar.sha256) for entry in dataset.shards}
    for version in [None, *reversed(dataset.version.earlier[-_EARLIER_VERSIONS:])]:
        try:
            listed = dataset if version is None else datasets.open_earlier(dataset, version)
            as_published = replace(listed, digest=listed.published_digest)
            files = open_set(root_uri, model_digest, as_published).files
        except ManifestError:
            continue
        return {file.number: file for file in files if name_of.get(file.number) == file.stored.name}
    return {}


def publish_set(
    root_uri: str, model_digest: str, dataset: Dataset, files: Iterable[EmbeddingFile]
) -> EmbeddingSet:
    """Reconcile files with the dataset version, and write the manifest that lists them.

    Raises ManifestError where a shard has no file or two, where embedded and refused don't add up to its
    samples, and where dimension or types differ.
    """
    listed = tuple(sorted(files, key=lambda file: file.number))
    what = f"embeddings of version {dataset.version.version} of {dataset.uri}"
    if [file.number for file in listed] != [entry.number for entry in dataset.shards]:
        lacking = sorted({entry.number for entry in dataset.shards} - {file.number for file in listed})
        raise ManifestError(
            f"{what}: {len(listed)} files for {len(dataset.shards)} shards, none for shards {lacking[:5]}; "
            "extract what is missing"
        )
    for file, entry in zip(listed, dataset.shards, strict=True):
        if file.num_embedded + file.num_refused != entry.num_samples:
            raise ManifestError(
                f"{what}: shard {entry.number} has {entry.num_samples} samples, {file.num_embedded} embedded "
                f"and {file.num_refused} refused"
            )
    kinds = {file.kind: file.stored.name for file in listed}
    if len(kinds) != 1:
        raise ManifestError(
            f"{what} are of {len(kinds)} kinds, {kinds}; expected one dimension, one stored type and one "
            "that the model ran in: extract into a root of their own"
        )
    ((dim, dtype, compute_dtype),) = kinds
    manifest = SetManifest(
        model_digest=model_digest,
        dataset_id=dataset.version.dataset_id,
        dataset_version=dataset.version.version,
        dataset_digest=dataset.digest,
        embedding_dim=dim,
        dtype=dtype,
        compute_dtype=compute_dtype,
        num_samples=dataset.version.num_samples,
        num_embedded=sum(file.num_embedded for file in listed),
        num_refused=sum(file.num_refused for file in listed),
        files=listed,
    )
    if manifest.num_embedded + manifest.num_refused != manifest.num_samples:
        raise ManifestError(
            f"{what}: {manifest.num_samples} samples, {manifest.num_embedded} embedded and "
            f"{manifest.num_refused} refused"
        )
    manifests.write_manifest(_set_uri(root_uri, model_digest, dataset), manifest)
    return EmbeddingSet(root_uri=root_uri, manifest=manifest)


def open_set(root_uri: str, model_digest: str, dataset: Dataset) -> EmbeddingSet:
    """The embeddings of a dataset version; ManifestError if this model has not embedded all of it."""
    manifest = manifests.read_manifest(_set_uri(root_uri, model_digest, dataset), SetManifest)
    if manifest.model_digest != model_digest or manifest.dataset_digest != dataset.digest:
        raise ManifestError(
            f"{_set_uri(root_uri, model_digest, dataset)} is of model {manifest.model_digest[:12]} and "
            f"dataset {manifest.dataset_digest[:12]}: a file was moved; extract again"
        )
    return EmbeddingSet(root_uri=root_uri, manifest=manifest)


def iterate(embedding_set: EmbeddingSet) -> Iterator[EmbeddingTable]:
    """The verified tables of all shards, by ascending id, some read ahead."""
    return read_ahead.in_order(embedding_set.read, embedding_set.files, num_threads=_NUM_READERS)


def _name(model_digest: str, shard_sha256: str) -> str:
    return f"{model_digest}/{shard_sha256}.parquet"


def _set_uri(root_uri: str, model_digest: str, dataset: Dataset) -> str:
    return storage.join(root_uri, model_digest, "sets", f"{dataset.digest}.json")


def _check_rows(table: EmbeddingTable, entry: ShardEntry, what: str) -> None:
    rows = np.sort(row_of(np.concatenate([table.ids, table.refused_ids])))
    if not np.array_equal(rows, np.arange(entry.num_samples)) or (np.diff(table.ids) <= 0).any():
        raise ManifestError(
            f"{what}: {len(table.ids)} embedded and {len(table.refused_ids)} refused are not the "
            f"{entry.num_samples} samples of shard {entry.number}, each once and in order"
        )


def _renumbered(table: EmbeddingTable, number: int) -> EmbeddingTable:
    """Ids of this dataset: the same tar may be a shard of another dataset, under another number."""
    base = make_id(number, 0)
    return replace(table, ids=row_of(table.ids) + base, refused_ids=row_of(table.refused_ids) + base)
