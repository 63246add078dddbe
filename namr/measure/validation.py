"""How good is a model on classes it has not seen: which they are, and each way of searching told apart.

Every query counts once: a rank measures its slice of the queries against the whole gallery, sums are added
up over ranks and divided after that. The ways are plain L2, plain cosine, and re-ranking by structure; the
model takes the best of them along as its recommendation, if it is clearly better than the simpler ones.

Not covered: reading images; tables for people (`evaluation`).
Legend: N images, D dimension.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from namr import collectives
from namr.data.sampling import ClassIndex, slice_of_rank
from namr.measure import metrics, protocols
from namr.measure.metrics import RetrievalMetrics
from namr.measure.protocols import Split
from namr.model.distances import Metric
from namr.model.model import SearchDefaults

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Results = Mapping[SearchDefaults, RetrievalMetrics]

_CLEARLY = 1.28
"""standard errors: the upper tenth of a normal distribution lies beyond"""
TRAINED_FOR = "trained_for"
"""Name under which a saved model's `extra` keeps the distance that its base loss worked on."""


def classes_to_hold_out(index: ClassIndex, names: Sequence[str], *, share: float, seed: int) -> Labels:
    """The class numbers to keep away from training, ascending: about `share` of those with 2 images or more.

    At least 2 of them, so that there is something to confuse. A class is chosen by the hash of its name and
    the seed, so that new classes don't move the old ones from one side to the other.
    """
    drawn = index.drawn_classes
    num = min(max(2, round(share * len(drawn))), len(drawn))
    order = sorted(drawn.tolist(), key=lambda c: hashlib.sha256(f"{seed} {names[c]}".encode()).digest())
    return np.array(sorted(order[:num]), np.int64)


def only(index: ClassIndex, classes: Labels) -> ClassIndex:
    """The index of these classes alone, numbered anew in the order given."""
    parts = [index.ids[index.starts[c] : index.starts[c + 1]] for c in classes]
    sizes = [len(part) for part in parts]
    return ClassIndex(
        ids=np.concatenate([np.empty(0, np.int64), *parts]), starts=np.cumsum([0, *sizes], dtype=np.int64)
    )


def ways(metric: Metric) -> tuple[SearchDefaults, ...]:
    """The ways of searching, simplest first; `metric` is the distance that the base loss works on.

    Plain by that metric, plain by the other, then re-ranked by scale, query and both, by that metric.
    """
    other: Metric = "cosine" if metric == "l2" else "l2"
    return (
        SearchDefaults(metric=metric, structure_side="none"),
        SearchDefaults(metric=other, structure_side="none"),
        SearchDefaults(metric=metric, structure_side="scale"),
        SearchDefaults(metric=metric, structure_side="query"),
        SearchDefaults(metric=metric, structure_side="both"),
    )


def name_of(way: SearchDefaults) -> str:
    """`l2`, `cosine`, or the side of the structure and the metric, as in `both-l2`."""
    return way.metric if way.structure_side == "none" else f"{way.structure_side}-{way.metric}"


def measure(
    embeddings: Vectors,
    structures: Vectors | None,
    labels: Labels,
    *,
    ways: Sequence[SearchDefaults],
    depth: int = 100,
    device: torch.device | str = "cpu",
    splits: Sequence[Split] | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
) -> dict[SearchDefaults, RetrievalMetrics]:
    """Retrieval for each way, over all queries of `splits` (None = every image all others) together.

    The same (N, D) float32 arrays, (N,) labels and splits on every rank.
    """
    x = torch.as_tensor(embeddings, device=device)
    s = None if structures is None else torch.as_tensor(structures, device=device)
    splits = protocols.leave_one_out(len(labels)) if splits is None else splits
    results = {}
    for way in ways:
        sums = [
            metrics.retrieval_sums(
                x,
                labels,
                structures=None if way.structure_side == "none" else s,
                side=way.structure_side,
                metric=way.metric,
                depth=depth,
                ks=ks,
                query_rows=split.queries[_mine(split)],
                gallery_rows=None if len(split.gallery) == len(labels) else split.gallery,
            )
            for split in splits
        ]
        results[way] = metrics.combine([metrics.sum_over_ranks(each) for each in sums])
    return results


def _mine(split: Split) -> slice:
    return slice_of_rank(len(split.queries), rank=collectives.rank(), world_size=collectives.world_size())


def choose(results: Results, ways: Sequence[SearchDefaults]) -> SearchDefaults:
    """The way to recommend: a later one only if it is clearly better than the best of those before it.

    Clearly: the mean of Recall@1 and MAP@R is higher, query by query, by more than 1.28 standard errors of
    that difference (`metrics.difference`), nine chances in ten, so a tie or noise leaves the simpler one. The
    same queries are wrong together however they are searched, so their difference is seen where two averages
    would overlap.
    """
    best = ways[0]
    for way in ways[1:]:
        gain = metrics.difference(results[way], results[best])
        if gain.mean > _CLEARLY * gain.standard_error:
            best = way
    return best
