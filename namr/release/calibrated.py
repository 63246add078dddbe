"""What was measured of a release to say how sure an answer is where nothing can be proved.

A search leaves items out: by its depth, by its lists, by what codes hide. For one way of searching (so many
candidates of so many lists) the **ratio** of a query is the adaptive squared distance of its nearest true
neighbour that was left out, over the plain squared distance of the last candidate that was not. A **weight**
is a low quantile of the ratios of held-out queries. An answer is calibrated when its k-th is nearer, by
adaptive squared distance, than the weight times its own last candidate. What such an answer leaves out
wrongly is no farther than its k-th, so the query's ratio is below the weight: of all queries that are like
those held out, at most the share `rate` get an answer that is called calibrated and is wrong. This asks
nothing of the index or of how ratios are distributed, and holds for every k up to that of the neighbours.

Not covered: measuring it (`nightly.calibration`), and comparing answers with it (`search.certainty`).
"""

from dataclasses import dataclass

from namr.sides import Side


@dataclass(frozen=True, kw_only=True)
class Weight:
    """What one way of searching leaves out."""

    side: Side
    k: int
    """of answers with at most so many neighbours"""
    depth: int
    """candidates"""
    nprobe: int
    """lists, 0 where the index has none"""
    weight: float
    """the quantile, at most 1"""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The weights of a release, for the index and the items it was measured with."""

    num_queries: int
    """that each weight was measured on"""
    rate: float
    """share of all queries that may get an answer that is called calibrated and is wrong, with one depth"""
    adaptive_rate: float
    """the same with an adaptive depth, which has as many occasions to be wrong as there are depths"""
    weights: tuple[Weight, ...]

    def weight(self, *, side: Side, k: int, depth: int, nprobe: int) -> Weight | None:
        """That of the deepest way within `depth` and of as many lists; None where nothing is known."""
        fitting = [
            each
            for each in self.weights
            if each.side == side and each.k >= k and each.depth <= depth and each.nprobe == nprobe
        ]
        return max(fitting, key=lambda each: (each.depth, -each.k), default=None)
