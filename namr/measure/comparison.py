"""The table of a comparison: how well each entry finds its own class, by each way of searching.

Rows are what is compared, columns the ways of searching: plain L2, plain cosine, re-ranked by scale, query
and both. Recall@K depends on the size of the gallery, so the table says which set it is and how large.

Not covered: measuring (`evaluation`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from namr.errors import ConfigError
from namr.measure.metrics import RetrievalMetrics
from namr.model.distances import Metric

COLUMNS = ("l2", "cosine", "scale", "query", "both")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The metrics of one entry, by column; columns that it can't fill are absent."""

    name: str
    metric: Metric
    by_column: dict[str, RetrievalMetrics]
    nmi: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows on one set."""

    set_name: str
    num_images: int
    """Of the gallery."""
    num_classes: int
    depth: int
    """How many candidates are re-ranked."""
    rows: tuple[Row, ...]
    protocol: str = "each queries all others"

    def row(self, name: str) -> Row:
        """The row of that name; ConfigError if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise ConfigError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    @property
    def title(self) -> str:
        """Which set, how large, and who queries whom."""
        plain = self.rows[0].by_column["l2"] if self.rows else None
        skipped = f" ({plain.num_skipped:,} without a match left out)" if plain and plain.num_skipped else ""
        return (
            f"{self.set_name}: {self.num_images:,} images of {self.num_classes:,} classes; {self.protocol}"
            f"{skipped}; re-ranked: the first {self.depth}, by the distance trained for"
        )

    def ways_table(self) -> list[list[str]]:
        """Recall@1 / MAP@R in per cent by way of searching, the header first."""
        table = [["Recall@1 / MAP@R (%)", "trained for", *COLUMNS]]
        cells = ([_cell(row.by_column.get(name)) for name in COLUMNS] for row in self.rows)
        return table + [[row.name, row.metric, *of_row] for row, of_row in zip(self.rows, cells, strict=True)]

    def details_table(self) -> list[list[str]]:
        """All metrics in per cent for each way of searching, the header first: the field's table.

        NMI is of the embeddings and so of the row's own distance.
        """
        ks = sorted(self.rows[0].by_column["l2"].recall_at_k) if self.rows else []
        table = [["(%)", "searched by", *(f"Recall@{k}" for k in ks), "MAP@R", "R-precision", "NMI"]]
        for row in self.rows:
            for name in COLUMNS:
                if (found := row.by_column.get(name)) is None:
                    continue
                numbers = [*(found.recall_at_k[k] for k in ks), found.map_at_r, found.r_precision]
                nmi = "" if row.nmi is None or name != row.metric else f"{100 * row.nmi:.1f}"
                table.append([row.name, name, *(f"{100 * number:.1f}" for number in numbers), nmi])
        return table

    def to_markdown(self) -> str:
        """Both tables, under the title."""
        tables = (_markdown(table) for table in (self.ways_table(), self.details_table()))
        return "\n\n".join([self.title, *tables]) + "\n"

    def to_json(self) -> str:
        """Everything but the scores of single queries, as JSON text."""
        return json.dumps(asdict(self, dict_factory=_averages), indent=1)


def _averages(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if not isinstance(value, np.ndarray)}


def _cell(cell: RetrievalMetrics | None) -> str:
    return "" if cell is None else f"{100 * cell.recall_at_1:.1f} / {100 * cell.map_at_r:.2f}"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    header, *rows = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
