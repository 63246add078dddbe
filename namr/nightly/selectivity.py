"""Recall and speed of searches under a filter, by the share of the items that it lets through.

The items of a share are drawn by their ids (`truth.is_in_share`), so no field is needed; searched is as under
any filter that lets these through. Filters that have to do with what images show let neighbours through
together, and are easier.

Not covered: finding the items that a filter lets through, which is not searching.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from namr.measure.report import Table
from namr.nightly import truth
from namr.search.exact import Exact
from namr.search.queries import Queries
from namr.search.searcher import Searcher
from namr.search.stages import Plan


@dataclass(frozen=True, kw_only=True)
class FilteredResult:
    """What plain search answers under a filter."""

    share: float
    """of all items, about as many as the filter lets through"""
    num_items: int
    """that it lets through"""
    recall_at_10: float
    """against exact search under the same filter"""
    queries_per_s: float
    """by items, in batches of 256"""


def measured(
    searcher: Searcher, asked: Queries, true: Sequence[Exact], *, k: int, nprobe: int, depth: int
) -> tuple[FilteredResult, ...]:
    """One result for each of `truth.SHARES`, with the release's nprobe and depth.

    true: what `truth` found of each, the k nearest at least; nothing is measured without. Asked are the
    `truth.thinned` queries. Shares that no item belongs to are left out.
    """
    if not true:
        return ()
    asked = truth.thinned(asked)
    ids = searcher.items.matching({})
    plan = Plan(k=k, side="none", depth=depth, nprobe=nprobe, exact=False, is_widened=True)
    results = []
    for share, of_share in zip(truth.SHARES, true, strict=True):
        allowed = ids[truth.is_in_share(ids, share)]
        if not len(allowed):
            continue
        began = time.perf_counter()
        found = searcher.neighbours(asked, plan, allowed=allowed)
        took_s = time.perf_counter() - began
        results.append(
            FilteredResult(
                share=share,
                num_items=len(allowed),
                recall_at_10=truth.recall(found.ids, of_share.of("none")[:, :k]),
                queries_per_s=len(asked.x) / took_s,
            )
        )
    return tuple(results)


def table(results: Sequence[FilteredResult], *, recall_at_10: float, queries_per_s: float) -> Table:
    """For the report of a release; recall and queries a second of plain search without a filter go first."""
    rows = [["all", "", f"{100 * recall_at_10:.1f}", f"{queries_per_s:,.0f}"]]
    rows += [
        [
            f"{100 * result.share:g} %",
            f"{result.num_items:,}",
            f"{100 * result.recall_at_10:.1f}",
            f"{result.queries_per_s:,.0f}",
        ]
        for result in results
    ]
    return Table(
        title="Plain search under a filter",
        columns=["the filter lets through", "images", "of the exact ten (%)", "queries/s"],
        rows=rows,
        note="The filter lets through images drawn at random; at most 128 queries ask. Few images are "
        "compared one by one; of more, as many lists are searched as hold enough.",
    )
