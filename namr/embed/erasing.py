"""Erasing images from embeddings: the file of an emptied shard is written anew without them, then deleted.

A file is found by the digest of its shard's tar, which is another since the shard was emptied: what was made
of the tars before is taken over under the digest of today, for every model, as extraction would make it.
What erased rows are is read from the sample index, so that any attempt may be killed and repeated.

Not covered: which shards were emptied (`data.erasing`), and sets that list files which are gone: they are
deleted with what no release needs (`release.old_embeddings`).
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from namr.data.datasets import Dataset
from namr.data.records import Emptied
from namr.data.shards import make_id, row_of
from namr.embed import embeddings
from namr.embed.shard_table import ERASED
from namr.errors import ManifestError
from namr.store import storage, tables
from namr.store.tables import EmbeddingTable, SampleTable


def erase(root_uri: str, dataset: Dataset, emptied: Iterable[Emptied]) -> None:
    """Leave nothing of erased images in the embeddings of these shards, whatever models made them.

    What was made of the shards before is deleted when it is taken over; where it is damaged, it is only
    deleted, and extracted again.
    """
    root = storage.absolute(root_uri)
    old = defaultdict(set)
    for each in emptied:
        old[each.number].add(each.tar.sha256)
    if not old:
        return
    names = storage.list_names(root)
    for entry in dataset.shards:
        stale = old.get(entry.number, set()) - {entry.tar.sha256}
        found = [name for name in names if _shard_of(name) in stale]
        samples = dataset.samples(entry) if found else None
        for name in found:
            assert samples is not None
            with suppress(ManifestError):  # of a damaged one nothing is taken over
                table = tables.decode_embeddings(storage.read(storage.join(root, name)))
                embeddings.write(root, name.partition("/")[0], entry, without_erased(table, samples))
            storage.delete(storage.join(root, name))


def of_shards(root_uri: str, sha256s: Iterable[str]) -> list[str]:
    """Names of all files that models made of the shards with these tars."""
    wanted = set(sha256s)
    return [name for name in storage.list_names(storage.absolute(root_uri)) if _shard_of(name) in wanted]


def without_erased(table: EmbeddingTable, samples: SampleTable) -> EmbeddingTable:
    """The embeddings of a shard, in which rows that the sample index says are erased tell nothing."""
    rows = np.flatnonzero(samples.sizes == 0)
    kept = np.flatnonzero(~np.isin(row_of(table.ids), rows))
    refused = np.flatnonzero(~np.isin(row_of(table.refused_ids), rows))
    base = make_id(int(table.ids[0] if len(table.ids) else table.refused_ids[0]) >> 32, 0)
    return replace(
        table,
        ids=table.ids[kept],
        keys=[table.keys[at] for at in kept],
        labels=[table.labels[at] for at in kept],
        embeddings=table.embeddings[kept],
        structures=table.structures[kept],
        refused_ids=np.concatenate([rows + base, table.refused_ids[refused]]),
        refused_keys=[samples.keys[row] for row in rows] + [table.refused_keys[at] for at in refused],
        refused_reasons=[ERASED] * len(rows) + [table.refused_reasons[at] for at in refused],
    )


def _shard_of(name: str) -> str | None:
    """The digest of the shard that a file is of; None for sets and others."""
    _, _, rest = name.partition("/")
    return rest.removesuffix(".parquet") if rest.endswith(".parquet") and "/" not in rest else None
