"""What a search may be asked and what it answers: one set of types for Searcher, HTTP and client.

Distances in answers are distances, not their squares. Neither numpy nor torch is needed to name an answer, so
that a program which only asks a service over HTTP stays small.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from namr import checks
from namr.errors import ConfigError
from namr.sides import SIDES, Metric, Side

Certainty = Literal["proved", "calibrated", "unproved"]
"""proved: no other item of the release can belong to the answer.
calibrated: that is what held-out queries say, with the error that the release's report tells.
"""
Depth = int | Literal["adaptive"]


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
    depth: Depth | None = field(
        default=None,
        metadata={
            "description": "How many candidates are compared by their stored vectors: to re-rank them, and "
            'for side "none" where the index is compressed; at least k. "adaptive": the release\'s, and '
            "twice as many again (and twice the lists, unless nprobe is given), up to 16 times, for each "
            "query whose answer is not yet proved or calibrated. Default: the release's."
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
        checks.in_range(self, "k", "nprobe", at_least=1)
        if isinstance(self.depth, bool | str) and self.depth != "adaptive":
            raise ConfigError(f'depth is {self.depth!r}; expected 1 or more, or "adaptive"')
        if self.depth != "adaptive":
            checks.in_range(self, "depth", at_least=1)
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
class FieldValue:
    """A value that a field takes."""

    value: str | int | float | bool
    num_items: int
    """of those looked at"""


@dataclass(frozen=True)
class FieldInfo:
    """The label, or a field of the items, that a filter can name."""

    name: str
    kind: Literal["text", "number", "boolean", "mixed"]
    """mixed: of several kinds, which can be shown and not filtered by"""
    values: tuple[FieldValue, ...]
    """the most frequent first; empty where there are too many to choose from"""
    num_without: int
    """of the items looked at that have no value"""
    min: int | float | None
    """least number of the items looked at; None for other kinds, and where there is none"""
    max: int | float | None


@dataclass(frozen=True)
class FieldList:
    """What a filter can name."""

    fields: tuple[FieldInfo, ...]
    num_items: int
    """that were looked at for values: all, or some of a large gallery"""


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
    """Milliseconds that the whole batch of queries took, stage by stage, over all depths."""

    embed_ms: float
    first_stage_ms: float
    rerank_ms: float
    filter_ms: float = 0.0
    """finding the items that the filter lets through"""

    def plus(self, other: "Timings") -> "Timings":
        """Both, one after the other."""
        return Timings(
            self.embed_ms + other.embed_ms,
            self.first_stage_ms + other.first_stage_ms,
            self.rerank_ms + other.rerank_ms,
        )


@dataclass(frozen=True)
class Answer:
    """What is known of one query's neighbours, nearest first."""

    hits: tuple[Hit, ...]
    certainty: Certainty
    depth: int
    """candidates that the hits are the nearest of; all items with `exact`, or where a filter allows few"""
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
    calibrated_rate: float | None = None
    """share of queries that may get an answer that is called calibrated and is wrong; None: no answer is"""
