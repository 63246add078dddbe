"""Who queries whom: the ways in which the field measures retrieval on a labelled set.

    leave one out         every image queries all others: CUB-200-2011, Cars-196, Stanford Online Products
    query and gallery     one list of images queries another: In-Shop Clothes Retrieval
    one image a class     one image of each class, drawn at random, is the gallery, and all others query it,
                          ten times over: VehicleID as vehicle re-identification reports it

Of VehicleID there are two kinds of published numbers, far apart. Papers on metric learning leave one out on
each of the three test lists and give Recall@1 and 5: so does the evaluation code published with "Divide and
Conquer the Embedding Space for Metric Learning" (Sanakoyeu et al., CVPR 2019) and "Smooth-AP" (Brown et al.,
ECCV 2020). Its authors ("Deep Relative Distance Learning", Liu et al., CVPR 2016) and papers on
re-identification draw one image of each vehicle, which is harder: a query then has one match and not several.

Not covered: measuring (`validation`), junk images and cameras, as other re-identification sets have them.
Legend: N images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Split(NamedTuple):
    """Rows of one array of embeddings: who asks, and who is searched. A row in both never finds itself."""

    queries: Ints
    gallery: Ints


def leave_one_out(num_images: int) -> tuple[Split, ...]:
    """Each of them queries all others."""
    rows = np.arange(num_images)
    return (Split(rows, rows),)


def query_and_gallery(*, num_gallery: int, num_queries: int) -> tuple[Split, ...]:
    """The gallery's rows come first, then those of the queries."""
    rows = np.arange(num_gallery + num_queries)
    return (Split(rows[num_gallery:], rows[:num_gallery]),)


def one_a_class(labels: Ints, *, num_draws: int, seed: int) -> tuple[Split, ...]:
    """For each draw, one image of each class as the gallery and all others as queries. labels (N,)

    A class with one image is in every gallery and has no query. Every draw has the same number of queries, so
    what is summed over all of them and divided is the mean over draws.
    """
    splits = []
    for draw in range(num_draws):
        order = np.random.default_rng((seed, draw)).permutation(len(labels))
        gallery = np.sort(order[np.unique(labels[order], return_index=True)[1]])
        splits.append(Split(np.setdiff1d(np.arange(len(labels)), gallery), gallery))
    return tuple(splits)


def has_a_match(splits: Sequence[Split], labels: Ints) -> bool:
    """Whether any query has an image of its class to find other than itself."""
    for queries, gallery in splits:
        num_of_class = np.bincount(labels[gallery], minlength=int(labels.max(initial=0)) + 1)
        if (num_of_class[labels[queries]] > np.isin(queries, gallery)).any():
            return True
    return False
