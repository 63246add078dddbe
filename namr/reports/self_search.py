"""Images that ask their own gallery, as it will be served: what near-duplicates and label suspects come from.

Of what was added to a release only the new images ask, of everything; else all images, or a sample of many.
One search serves both: its order is that of the release, and with each neighbour comes its plain distance.

Legend: Q images that ask, K neighbours.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr import checks
from namr.search import queries
from namr.search.searcher import Searcher
from namr.search.stages import Neighbours, Plan

Ids = npt.NDArray[np.int64]

K = 10
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class SelfSearchConfig:
    """How much of the gallery is looked through for near-duplicates and label suspects."""

    most_asked: int = 4096
    """images that ask the gallery what is near them: the new ones of a night, or of all; a sample where there
    are more. 4096 take a fraction of a second; as many as there are images find all that can be found"""

    def __post_init__(self) -> None:
        checks.in_range(self, "most_asked", at_least=1, place="self_search")


class SelfSearch(NamedTuple):
    """What lies near some images of a gallery."""

    ids: Ids
    """(Q,) ascending"""
    found: Neighbours
    """(Q, K), each without itself"""
    whom: str
    """which images these are, in words"""


def ask(searcher: Searcher, plan: Plan, config: SelfSearchConfig, *, first_new_id: int | None) -> SelfSearch:
    """Let images ask; plan: how the release is searched. first_new_id: of what was added to it, None: all."""
    items = searcher.items
    if first_new_id is None:
        num, what = len(items), "images"
        ids = items.draw_ids(config.most_asked, seed=_SEED) if num > config.most_asked else items.matching({})
    else:
        came = items.since(first_new_id)
        num, what = len(came), "new images"
        ids = np.random.default_rng(_SEED).permutation(came)[: config.most_asked]
    ids = np.sort(ids)
    whom = f"all {num:,} {what}" if len(ids) == num else f"{len(ids):,} of {num:,} {what} (drawn at random)"
    if not len(ids):
        return SelfSearch(ids, _nothing(), whom)
    return SelfSearch(ids, searcher.neighbours(queries.stored(ids, searcher.vectors), plan), whom)


def _nothing() -> Neighbours:
    """What nobody finds."""
    ids, distances, no = np.empty((0, K), np.int64), np.empty((0, K), np.float32), np.empty(0, np.bool_)
    return Neighbours(ids, distances, distances, proved=no, calibrated=no, depths=ids[:, 0])
