"""What a checkpoint is worth: how well its model finds images of classes that it was not trained on.

It stays an object from the worker that measures to the driver that chooses; only Ray Train, which keeps
numbers beside its checkpoints and compares them, is given a flat dict.

Not covered: measuring (`training_data`, `measure.validation`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from namr.measure import validation
from namr.measure.metrics import RetrievalMetrics
from namr.model.model import SearchDefaults

SCORE = "score"
"""The number of the flat dict by which checkpoints are compared."""

_NOT_MEASURED = -1.0
_RECALL, _MAP = "validation/recall_at_1/", "validation/map_at_r/"


class Worth(NamedTuple):
    """Two shares, 0 to 1."""

    recall_at_1: float
    map_at_r: float


@dataclass(frozen=True, kw_only=True)
class Examination:
    """One checkpoint's numbers; without `recall_at_1` and with a score of -1 where nothing was measured."""

    step: int
    """Steps that were done."""
    mean_distance: float
    """Of the unseen images' embeddings (of the last batch's where nothing was measured): what
    `model.fold_scale` folds in."""
    share: float = 1.0
    """Of the way from the start to what was trained by then (`interpolation`); 1 is that itself."""
    score: float = _NOT_MEASURED
    """The mean of Recall@1 and MAP@R, searched in the way that `search` recommends: of two checkpoints with
    one Recall@1 the one whose neighbourhoods are purer is better."""
    search: SearchDefaults = field(default_factory=SearchDefaults)
    """The way that the checkpoint would be served in (`validation.choose`)."""
    recall_at_1: Mapping[str, float] = field(default_factory=dict)
    """By way of searching."""
    map_at_r: Mapping[str, float] = field(default_factory=dict)
    """By way of searching."""
    measured: RetrievalMetrics | None = field(default=None, compare=False, repr=False)
    """Query by query, for the way that `search` recommends; not kept with a checkpoint."""

    @classmethod
    def of(
        cls,
        results: validation.Results,
        ways: Sequence[SearchDefaults],
        *,
        step: int,
        mean_distance: float,
    ) -> "Examination":
        """What was measured for these ways of searching, simplest first."""
        best = validation.choose(results, ways)
        return cls(
            step=step,
            mean_distance=mean_distance,
            score=(results[best].recall_at_1 + results[best].map_at_r) / 2,
            search=best,
            recall_at_1={validation.name_of(way): results[way].recall_at_1 for way in ways},
            map_at_r={validation.name_of(way): results[way].map_at_r for way in ways},
            measured=results[best],
        )

    @property
    def recommended(self) -> "Worth":
        """What was measured for the way of searching that is recommended."""
        way = validation.name_of(self.search)
        return Worth(self.recall_at_1[way], self.map_at_r[way])

    @property
    def named(self) -> dict[str, float]:
        """Every measured number under its name in MLflow and in a run's result."""
        recalls = {f"{_RECALL}{way}": value for way, value in self.recall_at_1.items()}
        return recalls | {f"{_MAP}{way}": value for way, value in self.map_at_r.items()}

    def to_flat(self) -> dict[str, Any]:
        """The dict that Ray Train keeps with the checkpoint; `from_flat` takes it back."""
        told = {
            "step": self.step,
            "mean_distance": self.mean_distance,
            "share": self.share,
            SCORE: self.score,
        }
        if not self.recall_at_1:
            return told
        way = {"metric": self.search.metric, "structure_side": self.search.structure_side}
        return told | way | self.named

    @classmethod
    def from_flat(cls, told: Mapping[str, Any]) -> "Examination":
        """What `to_flat` wrote, now or in a run that was begun before."""
        way = {name: told[name] for name in ("metric", "structure_side") if name in told}
        return cls(
            step=int(told["step"]),
            mean_distance=float(told["mean_distance"]),
            share=float(told.get("share", 1.0)),
            score=float(told[SCORE]),
            search=SearchDefaults(**way),
            recall_at_1=_below(_RECALL, told),
            map_at_r=_below(_MAP, told),
        )


def _below(prefix: str, told: Mapping[str, Any]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in told.items() if name.startswith(prefix)}
