"""The true neighbours of held-out items, kept from night to night: of them only what is new is compared.

    kept-truth.npy   (Q,) records: the id of an item that queries, and by each side the ids and the squared
                     distances of the `truth.K` entries of the release that are nearest to it

What is added to a release comes between these or after them: the nearest of all are among the nearest before
and the nearest of what came. Entries that died keep their place in the list, as they do in the index, and are
passed over where it is read: while ten are left alive, none that is nearer can be missing. A query that has
fewer, or that nothing is kept of, is compared with everything. So the ten nearest are what comparing
everything gives, to the last bit.

Not covered: comparing (`truth`, `search.exact`), and which items query (`assessment`).
Legend: Q queries, K neighbours, S sides.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.data.shards import among
from namr.nightly import truth
from namr.nightly.truth import HeldOut, Truth
from namr.release import arrays, releases
from namr.release.releases import Release
from namr.search import exact, queries
from namr.search.exact import Exact
from namr.search.searcher import Searcher
from namr.sides import SIDES
from namr.store.cache import Cache
from namr.store.manifests import StoredObject

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_RECORD = np.dtype(
    [("query", "<i8"), ("ids", "<i8", (len(SIDES), truth.K)), ("squared", "<f8", (len(SIDES), truth.K))]
)


class Kept(NamedTuple):
    """What is nearest to some items, of all that lived when they were compared and all that came since."""

    query_ids: Ids
    """(Q,) ascending"""
    nearest: Exact
    """(S, Q, K)"""

    def of(self, some: Mask) -> "Kept":
        """Of some of the queries."""
        ids, squared = self.nearest
        return Kept(self.query_ids[some], Exact(ids[:, some], squared[:, some]))


class Followed(NamedTuple):
    """What items should find, and what is to be kept of it."""

    held: HeldOut
    kept: Kept


def follow(searcher: Searcher, ids: Ids, before: Release, *, cache: Cache) -> Followed:
    """What the items with these ids, ascending, should find in a release that follows `before`.

    Of those that `before` kept, only what was added to it is compared. ConfigError for no ids.
    """
    kept = _brought_up_to_date(searcher, before, ids)
    anew = ids[~among(ids, kept.query_ids)]
    asked = truth.asked_by(searcher, ids)
    if len(anew):
        of_anew = truth.neighbours(searcher, truth.asked_by(searcher, anew), k=truth.K, cache=cache).of_all
        order = np.argsort(np.concatenate([kept.query_ids, anew]))
        pairs = zip(kept.nearest, of_anew, strict=True)
        kept = Kept(ids, Exact(*(np.concatenate(pair, axis=1)[:, order] for pair in pairs)))
    return Followed(truth.held_out_of(searcher, asked, Truth(_alive(searcher, kept.nearest), [])), kept)


def store(releases_uri: str, kept: Kept) -> StoredObject:
    """As an object of a release."""
    records = np.empty(len(kept.query_ids), _RECORD)
    records["query"] = kept.query_ids
    records["ids"], records["squared"] = (each.swapaxes(0, 1) for each in kept.nearest)
    return releases.store(releases_uri, "kept-truth.npy", arrays.encode_array(records))


def read(release: Release) -> Kept:
    """What a release keeps; of no query where an earlier namr measured it."""
    stored = release.manifest.kept_truth
    records = arrays.decode_array(release.read(stored), _RECORD) if stored else np.empty(0, _RECORD)
    nearest = Exact(*(np.ascontiguousarray(records[name].swapaxes(0, 1)) for name in ("ids", "squared")))
    return Kept(records["query"], nearest)


def _brought_up_to_date(searcher: Searcher, before: Release, ids: Ids) -> Kept:
    """Of those of these queries that `before` kept enough of, with what was added to it."""
    vectors, kept = before.manifest.vectors, read(before)
    was_added_to = searcher.manifest.vectors[: len(vectors)] == vectors
    kept = kept.of(among(kept.query_ids, ids) & was_added_to)
    if not len(kept.query_ids):
        return kept
    asked = queries.stored(kept.query_ids, searcher.vectors)
    search = exact.Search(asked, k=truth.K, bounds=kept.nearest.squared[:, :, -1])
    first_row = sum(each.num_rows for each in vectors)
    for block in searcher.vectors.blocks(num_rows=truth.rows_at_once(asked), first_row=first_row):
        search.add(block)
    kept = Kept(kept.query_ids, exact.joined([kept.nearest, search.found()]))
    num_alive = searcher.items.are_known(kept.nearest.ids).sum(axis=2)
    is_all_there_is = kept.nearest.ids[:, :, -1] < 0
    return kept.of(((num_alive >= truth.K_OF_RECALL) | is_all_there_is).all(axis=0))


def _alive(searcher: Searcher, nearest: Exact) -> Exact:
    """Without what died, those that follow in its place."""
    is_gone = ~searcher.items.are_known(nearest.ids)
    order = np.argsort(is_gone, axis=2, kind="stable")
    ids, squared = np.where(is_gone, -1, nearest.ids), np.where(is_gone, np.inf, nearest.squared)
    return Exact(np.take_along_axis(ids, order, axis=2), np.take_along_axis(squared, order, axis=2))
