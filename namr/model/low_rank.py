"""Low-rank adaptation (LoRA): linear layers that learn W + U D, of which W stays and U D has a small rank.

    D (r, F_in) starts at random, U (F_out, r) at zero, so that a layer begins as what it was

(Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; without its alpha, for which the
learning rate does.) The optimiser keeps two moments of U and D alone. The sum is made at every pass, through
torch's parametrizations, so it holds for layers whose weight is used without calling them, too; time and
activations of a pass are those of full training. What is published has the sum as its plain weight.

Not covered: convolutions; which parameters are trained besides (`train.optimiser`).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from namr.errors import ConfigError


class LowRank(nn.Module):
    """W -> W + U D."""

    def __init__(self, num_out: int, num_in: int, *, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, num_in))
        self.up = nn.Parameter(torch.zeros(num_out, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """(F_out, F_in) -> the same shape, at the weight's precision under autocast too."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.up @ self.down


def adapt(network: nn.Module, *, rank: int, seed: int) -> None:
    """Freeze a network and give each linear layer a product of that rank to learn; the same outputs so far.

    ConfigError for a network without linear layers (a convolutional one).
    """
    layers = [each for each in network.modules() if isinstance(each, nn.Linear)]
    if not layers:
        raise ConfigError(
            f"training.backbone.low_rank is {rank}, and the backbone has no linear layers to add it to; "
            "leave it out, or take a vision transformer"
        )
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            most = min(layer.in_features, layer.out_features)
            product = LowRank(layer.out_features, layer.in_features, rank=min(rank, most))
            parametrize.register_parametrization(layer, "weight", product.to(layer.weight))


def plain_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, a state_dict of the module, with each sum in the place of its parts: what a module that was
    never adapted loads. Tensors that are no sum are those of `state` themselves."""
    plain = dict(state)
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            parts = f"{name}.parametrizations.weight."
            plain = {key: value for key, value in plain.items() if not key.startswith(parts)}
            weight: Any = layer.weight
            plain[f"{name}.weight"] = weight.detach().to(state[f"{parts}original"].device)
    return plain
