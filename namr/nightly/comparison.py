"""Recall@1 of the release that serves and of the next, asked with the same labelled images.

Two sets of images differ in Recall@1 by several points although nothing changed, so no number of an earlier
report is compared: both releases answer the same queries, each as it would be searched.

Not covered: what may be lost (`gate`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from namr.release.releases import ReleaseManifest
from namr.search import queries
from namr.search.searcher import Searcher
from namr.search.stages import Plan


class Compared(NamedTuple):
    """Share of the first answers with the label of the query."""

    num_queries: int
    then: float
    """of the release that serves"""
    here: float


def compare(
    serving: Searcher, draft: Searcher, manifest: ReleaseManifest, keys: Sequence[str]
) -> Compared | None:
    """Both releases, asked by the images of these keys that are labelled in both; None where none is.

    manifest: the draft's, with how far it is searched.
    """
    of_serving, of_draft = (
        {key: item.label for key in keys if (item := searcher.items.by_key(key)) and item.label is not None}
        for searcher in (serving, draft)
    )
    shared = [key for key in of_draft if key in of_serving]
    if not shared:
        return None
    return Compared(len(shared), _right(serving, serving.manifest, shared), _right(draft, manifest, shared))


def _right(searcher: Searcher, manifest: ReleaseManifest, keys: Sequence[str]) -> float:
    items = [item for key in keys if (item := searcher.items.by_key(key))]
    plan = Plan(
        k=1,
        side=manifest.structure_side,
        depth=manifest.depth,
        nprobe=manifest.nprobe,
        exact=False,
    )
    asked = queries.stored(np.array([item.id for item in items], np.int64), searcher.vectors)
    first = [searcher.items.by_id(int(row[0])) for row in searcher.neighbours(asked, plan).ids]
    pairs = zip(first, items, strict=True)
    return sum(found is not None and found.label == item.label for found, item in pairs) / len(items)
