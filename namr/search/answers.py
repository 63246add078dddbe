"""What a search may be asked and what it answers: one set of types for Searcher, HTTP and client.

Distances in answers are distances, not their squares. Neither numpy nor torch is needed to name an answer, so
that a program which only asks a service over HTTP stays small.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from namr import checks
from namr.errors import ConfigError
from namr.sides import SIDES, Metric, Side

Certainty = Literal["proved", "unproved"]
"""proved: no other item of the release can belong to the answer."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search; what is None is left to the release. ConfigError for what can't be.

    The descriptions are those of the HTTP interface too.
    """

    k: int = field(default=10, metadata={"description": "How many neighbours."})
    side: Side | None = field(
        default=None,
        metadata={
            "description": '"none" orders by plain distance; "query", "both" and "scale" re-rank the first '
            "`depth` by the structure of the query, of both, or by the scale of the items. Default: what the "
            "release recommends."
        },
    )
    depth: int | None = field(
        default=None,
        metadata={
            "description": "How many candidates are compared by their stored vectors: to re-rank them, and "
            'for side "none" where the index is compressed; at least k. Default: the release\'s.'
        },
    )
    nprobe: int | None = field(
        default=None,
        metadata={
            "description": "Lists of the index that are searched. Default: the release's, and more where few "
            "items match the filter."
        },
    )
    exact: bool = field(
        default=False,
        metadata={"description": "Compare with every item, in one stage; for small galleries."},
    )
    filter: dict[str, Any] | None = field(
        default=None,
        metadata={
            "description": "Which items may be found, as conditions by label and field that all hold: "
            '{"label": "cat", "price": {"min": 1, "max": 5}, "brand": {"in": ["x", "y"]}, "note": null}. '
            "In a form: as JSON text. Default: all."
        },
    )

    def __post_init__(self) -> None:
        checks.in_range(self, "k", "depth", "nprobe", at_least=1)
        if self.side is not None and self.side not in SIDES:
            raise ConfigError(f"side is {self.side!r}; expected one of {', '.join(SIDES)}")


@dataclass(frozen=True)
class Item:
    """One image of the gallery."""

    id: int
    key: str
    label: str | None
    fields: dict[str, Any]


@dataclass(frozen=True)
class Hit:
    """One neighbour."""

    id: int
    key: str
    label: str | None
    fields: dict[str, Any]
    distance: float
    """what the answer is ordered by"""
    plain_distance: float
    """Euclidean distance, without structure"""


@dataclass(frozen=True)
class Timings:
    """Milliseconds that the whole batch of queries took, stage by stage."""

    embed_ms: float
    first_stage_ms: float
    rerank_ms: float
    filter_ms: float = 0.0
    """finding the items that the filter lets through"""


@dataclass(frozen=True)
class Answer:
    """What is known of one query's neighbours, nearest first."""

    hits: tuple[Hit, ...]
    certainty: Certainty
    side: Side
    release_id: str
    model_name: str
    model_version: str
    timings: Timings


@dataclass(frozen=True, kw_only=True)
class ReleaseInfo:
    """What is being searched."""

    release_id: str
    created: str
    """ISO 8601, UTC"""
    model_name: str
    model_version: str
    model_digest: str
    dataset_uri: str
    dataset_version: int
    index_key: str
    metric: Metric
    structure_side: Side
    """what a query gets that names no side; so for `nprobe` and `depth`"""
    embedding_dim: int
    num_items: int
    """that can be found"""
    nprobe: int
    depth: int
    recall_at_10: float
    """of the index at `nprobe` against exact search, on held-out queries"""
    takes_images: bool
    """whether queries may be pictures: it has the model that embeds them"""
