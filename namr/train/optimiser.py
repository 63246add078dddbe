"""AdamW over backbone, heads and loss: which of their parameters learn, and how fast.

Its state is kept by the names of parameters: the groups may be others in a later version.

Not covered: the schedule, which multiplies all peaks alike (`recipe.rate_factor`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from namr.errors import ConfigError
from namr.model import backbones, low_rank
from namr.model.model import NamrModel
from namr.train.recipe import BackboneRecipe, TrainingConfig

Named = Mapping[str, nn.Parameter]


def choose(backbone: nn.Module, recipe: BackboneRecipe, *, seed: int) -> list[nn.Parameter]:
    """Leave with a gradient what the recipe trains of a backbone; that, in the order of its parameters.

    seed: of the matrices of `low_rank`, which are added to the backbone here.
    """
    backbone.requires_grad_(True)
    if recipe.low_rank is not None:
        low_rank.adapt(backbone, rank=recipe.low_rank, seed=seed)
    if recipe.frozen_layers is not None:
        layers = backbones.layers_of(backbone)
        num_layers = max(layers.values()) + 1
        if recipe.frozen_layers >= num_layers:
            raise ConfigError(
                f"training.backbone.frozen_layers is {recipe.frozen_layers}; this backbone has {num_layers}, "
                "of which at least the last has to be trained; freeze all with backbone_learning_rate = 0"
            )
        for name, parameter in backbone.named_parameters():
            if layers[name] < recipe.frozen_layers:
                parameter.requires_grad_(False)
    return [parameter for parameter in backbone.parameters() if parameter.requires_grad]


def make(model: NamrModel, loss: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Of all parameters that have a gradient now; groups have a `peak`, by which `set_rates` goes."""
    decay, rates = config.weight_decay, config
    of_backbone = backbones.parameter_groups(
        model.backbone, weight_decay=decay, layer_decay=config.backbone.layer_decay
    )
    of_heads = backbones.parameter_groups(model.heads, weight_decay=decay)
    of_loss = backbones.parameter_groups(loss, weight_decay=0.0)
    peaks = (rates.backbone_learning_rate, rates.learning_rate, rates.proxy_learning_rate)
    return torch.optim.AdamW(
        [
            {
                "params": group["params"],
                "weight_decay": group["weight_decay"],
                "peak": peak * group["lr_scale"],
                "lr": peak * group["lr_scale"],
            }
            for peak, groups in zip(peaks, (of_backbone, of_heads, of_loss), strict=True)
            for group in groups
        ]
    )


def set_rates(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Every rate its peak times `factor`."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor


def state_of(optimiser: torch.optim.Optimizer, named: Named) -> dict[str, dict[str, Any]]:
    """The optimiser's state by the names of parameters, of those that were trained so far."""
    return {name: optimiser.state[each] for name, each in named.items() if each in optimiser.state}


def load_state(optimiser: torch.optim.Optimizer, state: Mapping[str, Any], named: Named) -> None:
    """Take back what `state_of` gave, or what `optimiser.state_dict()` was before there were names."""
    names = {id(parameter): name for name, parameter in named.items()}
    order = [names[id(each)] for each in _parameters(optimiser)]
    if "param_groups" in state:  # one group each of backbone, heads and loss, so in the order of all
        trained = list(named)
        state = {trained[place]: of_one for place, of_one in state["state"].items()}
    places = {name: place for place, name in enumerate(order)}
    optimiser.load_state_dict(
        {
            "state": {places[name]: of_one for name, of_one in state.items()},
            "param_groups": optimiser.state_dict()["param_groups"],
        }
    )


def _parameters(optimiser: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimiser.param_groups for parameter in group["params"])
