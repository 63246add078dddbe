"""Recall@1 and MAP@R of the release that serves and of the next, asked with the same labelled images.

Two sets of images differ in Recall@1 by several points although nothing changed, so no number of an earlier
report is compared: both releases answer the same queries, each as it would be searched.

MAP@R is that of `measure.metrics` over what the search returns, an image never finding itself: the mean over
i <= R of the precision at i where the i-th answer has the query's label, else 0. R is the number of other
images with that label in whichever of the two releases has fewer, so that a class that grew is not harder,
and at most 20. Queries whose label no other image of one of them has are left out of it.

Not covered: what may be lost (`gate`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.release.releases import ReleaseManifest
from namr.search import queries, stages
from namr.search.answers import Item, SearchOptions
from namr.search.searcher import Searcher

Mask = npt.NDArray[np.bool_]

_MOST_R = 20


class Compared(NamedTuple):
    """One number of two releases: a share of what is right, by the labels of the queries."""

    num_queries: int
    then: float
    """of the release that serves"""
    here: float


class Quality(NamedTuple):
    """What both releases answer."""

    recall_at_1: Compared
    map_at_r: Compared | None
    """None where no label is that of another image in both"""


def compare(
    serving: Searcher, draft: Searcher, manifest: ReleaseManifest, items: Sequence[Item]
) -> Quality | None:
    """Both releases, asked by those of these items of the draft that are labelled in both; None for none.

    The serving one knows them by their keys. manifest: the draft's, with how far it is searched.
    """
    of_draft = _labelled(items)
    of_serving = _labelled(item for key in of_draft if (item := serving.items.by_key(key)))
    shared = [key for key in of_draft if key in of_serving]
    if not shared:
        return None
    then = _is_right(serving, serving.manifest, [of_serving[key] for key in shared])
    here = _is_right(draft, manifest, [of_draft[key] for key in shared])
    recall_at_1 = Compared(len(shared), float(then[:, 0].mean()), float(here[:, 0].mean()))
    nums = [
        _nums_of_others(searcher, [labelled[key] for key in shared])
        for searcher, labelled in ((serving, of_serving), (draft, of_draft))
    ]
    r = np.minimum(_MOST_R, np.minimum(*nums))
    asked = r > 0
    if not asked.any():
        return Quality(recall_at_1, None)
    scores = [float(map_at_r(right[asked], r[asked]).mean()) for right in (then, here)]
    return Quality(recall_at_1, Compared(int(asked.sum()), *scores))


def map_at_r(right: Mask, r: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(Q,) of which answers (Q, K), nearest first, are right, and of R (Q,), at least 1 and at most K."""
    ranks = np.arange(1, right.shape[1] + 1)
    counted = right & (ranks <= r[:, None])
    scores: npt.NDArray[np.float64] = (counted * right.cumsum(axis=1) / ranks).sum(axis=1) / r
    return scores


class _Labelled(NamedTuple):
    id: int
    label: str


def _labelled(items: Iterable[Item]) -> Mapping[str, _Labelled]:
    """By key."""
    return {item.key: _Labelled(item.id, item.label) for item in items if item.label is not None}


def _nums_of_others(searcher: Searcher, asked: Sequence[_Labelled]) -> npt.NDArray[np.int64]:
    counts = searcher.items.label_counts()
    return np.array([counts[each.label] - 1 for each in asked], np.int64)


def _is_right(searcher: Searcher, manifest: ReleaseManifest, asked: Sequence[_Labelled]) -> Mask:
    """(Q, K) which of the answers, nearest first, have the label of their query."""
    plan = stages.plan_of(SearchOptions(k=_MOST_R), manifest)
    stored = queries.stored(np.array([each.id for each in asked], np.int64), searcher.vectors)
    ids = searcher.neighbours(stored, plan).ids
    labels = np.array(searcher.items.labels(ids.ravel()), object).reshape(ids.shape)
    right: Mask = labels == np.array([each.label for each in asked], object)[:, None]
    return right
