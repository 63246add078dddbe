"""The recipe: what of a backbone is trained when, and what is refused.

The schedule of the rates and BatchNorm's policy are in test_step.
"""

import re

import pytest

from namr.errors import ConfigError
from namr.train.recipe import BackboneRecipe, TrainingConfig


def test_the_backbone_is_trained_from_the_step_in_which_it_thaws() -> None:
    config = TrainingConfig(num_steps=5, backbone=BackboneRecipe(frozen_steps=2))
    assert [config.trains_backbone(step) for step in range(4)] == [False, False, True, True]
    assert TrainingConfig(num_steps=5).trains_backbone(0)
    assert not TrainingConfig(num_steps=5, backbone_learning_rate=0).trains_backbone(4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone_learning_rate": 0, "backbone": BackboneRecipe(low_rank=4)}, "trains no part of the"),
        ({"backbone": BackboneRecipe(frozen_steps=5)}, "frozen_steps is 5 of 5 steps; expected fewer"),
        ({"average_decay": 1.0}, "training.average_decay is 1.0"),
        ({"patience": 0}, "training.patience is 0"),
    ],
)
def test_what_can_not_be_meant_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        TrainingConfig(num_steps=5, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"), [("layer_decay", 1.5), ("layer_decay", 0.0), ("frozen_layers", 0), ("low_rank", 0)]
)
def test_a_wrong_number_for_the_backbone_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"training.backbone.{field} is {value}"):
        BackboneRecipe(**{field: value})  # type: ignore[arg-type]
