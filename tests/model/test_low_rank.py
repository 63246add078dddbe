"""Low-rank adaptation: what it learns, that it begins as nothing and ends as plain weights."""

import pytest
import torch
from torch import nn

from namr.errors import ConfigError
from namr.model import low_rank


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


def adapted(*, seed: int = 1) -> nn.Sequential:
    made = network()
    low_rank.adapt(made, rank=2, seed=seed)
    return made


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))


def test_an_adapted_network_begins_as_what_it_was_and_learns_the_product_alone() -> None:
    made = adapted()
    assert torch.equal(made(X), network()(X))
    learns = {name: tuple(each.shape) for name, each in made.named_parameters() if each.requires_grad}
    assert learns == {
        "0.parametrizations.weight.0.down": (2, 6),
        "0.parametrizations.weight.0.up": (5, 2),
        "3.parametrizations.weight.0.down": (2, 5),
        "3.parametrizations.weight.0.up": (3, 2),
    }


def test_a_layer_computes_with_its_weight_and_the_product() -> None:
    made = adapted()
    product = made[0].parametrizations["weight"][0]
    with torch.no_grad():
        product.up.normal_()
    before = network()[0]
    expected = X @ (before.weight + product.up @ product.down).T + before.bias
    torch.testing.assert_close(made[0](X), expected)


def test_what_was_learnt_is_published_as_plain_weights() -> None:
    made = adapted()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    state = made.state_dict()
    plain = network()
    plain.load_state_dict(low_rank.plain_state(made, state))
    assert torch.equal(plain(X), made(X))
    assert not torch.equal(plain(X), network()(X))


def test_the_plain_state_of_what_was_never_adapted_is_its_state() -> None:
    state = network().state_dict()
    assert low_rank.plain_state(network(), state) == state


def test_the_seed_alone_decides_where_it_starts_and_the_global_generator_is_spared() -> None:
    one, same, other = (adapted(seed=seed).state_dict() for seed in (1, 1, 2))
    name = "0.parametrizations.weight.0.down"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    made, before = network(), torch.get_rng_state()
    low_rank.adapt(made, rank=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_product_is_made_at_full_precision_under_autocast() -> None:
    product = adapted()[0].parametrizations["weight"][0]
    with torch.no_grad():
        product.up.normal_()
    weight = torch.zeros(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        under = product(weight)
    assert under.dtype == torch.float32 and torch.equal(under, product(weight))


def test_a_network_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="low_rank is 2, and the backbone has no linear layers"):
        low_rank.adapt(nn.Conv2d(3, 4, 1), rank=2, seed=0)
