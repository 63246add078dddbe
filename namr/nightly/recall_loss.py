"""Where an index loses its recall: in lists that are not probed, in depth, or in its codes.

Three ways of looking are compared with exact search, each with less left out: as the release is searched; in
all lists; in all lists with 16 times as many candidates. What the second finds more than the first lay in
lists that are not probed, what the third finds more lay behind the last candidate, and what is missing then
the codes hide. The three sum to all that is lost.

Not covered: measuring the recall (`assessment`), and how much may be lost (`gate`).
"""

from typing import NamedTuple

from namr.nightly import truth
from namr.nightly.assessment import MOST_DEEPER, Effort
from namr.nightly.truth import Ids
from namr.search.queries import Queries
from namr.search.searcher import Searcher
from namr.search.stages import Plan


class RecallLoss(NamedTuple):
    """Shares of the true neighbours, which sum to 1 - recall; one may be a little below 0."""

    lists: float
    """missed with the lists that are probed, found with all"""
    depth: float
    """missed with all lists, found among more candidates"""
    codes: float
    """missed all the same"""

    @property
    def in_words(self) -> str:
        """All three in points, and what to do about the largest."""
        points = {
            "lists that are not probed": (self.lists, "raise assessment.target_recall"),
            "depth": (self.depth, "compare more candidates (assessment.depth)"),
            "codes": (self.codes, "take another build.index_key, or a larger build.max_index_bytes"),
        }
        told = ", ".join(f"{100 * lost:.1f} in {name}" for name, (lost, _) in points.items())
        return f"of points lost {told}: {max(points.values())[1]}"


def told_apart(searcher: Searcher, asked: Queries, true: Ids, effort: Effort) -> RecallLoss:
    """Of plain search by these queries. true (Q, K): their exact neighbours."""

    def recall_of(nprobe: int, depth: int) -> float:
        plan = Plan(k=true.shape[1], side="none", depth=depth, nprobe=nprobe, exact=False)
        return truth.recall(searcher.neighbours(asked, plan).ids, true)

    every = max(1, searcher.index.num_lists)
    as_searched, in_all = recall_of(*effort), recall_of(every, effort.depth)
    deeper = max(in_all, recall_of(every, MOST_DEEPER * effort.depth))
    return RecallLoss(in_all - as_searched, deeper - in_all, 1 - deeper)
