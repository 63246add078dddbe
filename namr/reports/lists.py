"""How long the lists of an index are: long ones take a search time, empty ones none.

Not covered: where the centres of lists lie, and whether they still fit (`nightly.aging`).
"""

import numpy as np

from namr.measure import report
from namr.measure.report import Fact, Section
from namr.search.searcher import Searcher

TITLE = "The lists of the index"


def section(searcher: Searcher) -> Section:
    """Of the index as it is searched, dead entries included."""
    index = searcher.index
    if not index.num_lists:
        return Section(title=TITLE, text=["There are none: every image is compared with every query."])
    sizes = index.list_sizes
    mean, largest = float(sizes.mean()), int(sizes.max())
    low, middle, high = np.quantile(sizes, (0.1, 0.5, 0.9)).tolist()
    return Section(
        title=TITLE,
        text=[
            f"A search reads whole lists, and long ones take their time. Of {index.num_vectors:,} entries "
            f"eight of ten lists hold {low:,.0f} to {high:,.0f} each, the middle one {middle:,.0f}."
        ],
        summary=[
            Fact(name="lists", value=f"{len(sizes):,}", note=f"{mean:,.1f} entries each on average"),
            Fact(name="imbalance", value=f"{index.imbalance:.2f}", note="times the work of even lists"),
            Fact(name="empty", value=f"{int((sizes == 0).sum()):,}", note="lists"),
            Fact(
                name="largest",
                value=f"{largest:,}",
                note=f"entries, {largest / mean:.1f} times the mean" if mean else "entries",
            ),
        ],
        plots=[
            report.histogram(
                "Entries in a list",
                {"lists": sizes.astype(np.float64)},
                x_label="entries",
                line_at=mean,
                note="The broken line is the mean.",
            )
        ],
    )
