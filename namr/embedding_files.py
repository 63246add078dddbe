"""The embeddings of one shard: a file as a set lists it, and reading it verified.

Not covered: which files a dataset version needs, and writing them (`embeddings`).
"""

from dataclasses import dataclass, replace

from namr import manifests, storage, tables
from namr.errors import ManifestError, ObjectMissing
from namr.manifests import StoredObject
from namr.shards import make_id, row_of
from namr.tables import EmbeddingTable


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
    """float16 or float32"""


def read(root_uri: str, file: EmbeddingFile) -> EmbeddingTable:
    """The verified embeddings of one shard, by ascending id; ManifestError if damaged or gone."""
    try:
        data = manifests.read_object(root_uri, file.stored)
    except ObjectMissing as error:
        raise ManifestError(
            f"{storage.join(root_uri, file.stored.name)} is missing, and a set of embeddings lists it; "
            "extract again, under a root of its own"
        ) from error
    return renumbered(tables.decode_embeddings(data), file.number)


def renumbered(table: EmbeddingTable, number: int) -> EmbeddingTable:
    """Ids of this dataset: the same tar may be a shard of another dataset, under another number."""
    base = make_id(number, 0)
    return replace(table, ids=row_of(table.ids) + base, refused_ids=row_of(table.refused_ids) + base)
