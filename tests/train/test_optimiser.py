"""Groups of parameters: which learn, at what rate, with what decay; the optimiser's state by names."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from namr.errors import ConfigError
from namr.model import model
from namr.model.losses import JointLoss, LossConfig
from namr.model.model import ModelConfig, NamrModel
from namr.train import optimiser
from namr.train.recipe import BackboneRecipe, TrainingConfig

VIT = ModelConfig(
    backbone="test_vit", weights="none", embedding_dim=8, structure_hidden_dim=8, image_size_px=32
)
CONFIG = TrainingConfig(
    num_steps=9,
    learning_rate=1e-3,
    backbone_learning_rate=1e-4,
    proxy_learning_rate=1e-2,
    weight_decay=0.05,
)


def grouped(recipe: BackboneRecipe, *, network: ModelConfig = VIT) -> dict[str, dict[str, Any]]:
    """The group of each parameter, by its name; those that are not trained are not in it."""
    built, loss, made = trained(recipe, network=network)
    names = {id(each): name for name, each in nn.ModuleList([built, loss]).named_parameters()}
    return {names[id(each)]: group for group in made.param_groups for each in group["params"]}


def trained(
    recipe: BackboneRecipe, *, network: ModelConfig = VIT
) -> tuple[NamrModel, JointLoss, torch.optim.AdamW]:
    built = model.build(network, seed=0)
    loss = JointLoss(LossConfig(base="proxy_anchor"), num_classes=3, embedding_dim=8)
    optimiser.choose(built.backbone, recipe, seed=0)
    return built, loss, optimiser.make(built, loss, replace(CONFIG, backbone=recipe))


def test_norms_biases_positions_and_proxies_have_no_decay_and_all_else_has() -> None:
    groups = grouped(BackboneRecipe())
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.05}
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.05}
    assert "0.backbone.blocks.0.attn.qkv.weight" in decayed and "0.heads.sample.weight" in decayed
    assert decayed == {
        name
        for name in groups
        if name.endswith(".weight") and "norm" not in name and name not in
        ("0.heads.structure.1.weight", "0.heads.structure.3.weight")
    }  # fmt: skip


def test_backbone_heads_and_proxies_have_rates_of_their_own() -> None:
    groups = grouped(BackboneRecipe())
    assert groups["0.backbone.patch_embed.proj.weight"]["peak"] == 1e-4
    assert groups["0.heads.sample.bias"]["peak"] == groups["0.heads.sample.weight"]["peak"] == 1e-3
    assert groups["1.base.proxies"]["peak"] == 1e-2


def test_each_layer_is_as_much_slower_than_the_next_as_the_recipe_says() -> None:
    groups = grouped(BackboneRecipe(layer_decay=0.5))
    peaks = [groups[f"0.backbone.blocks.{block}.mlp.fc1.weight"]["peak"] for block in range(6)]
    assert peaks == pytest.approx([1e-4 * 0.5**after for after in (5, 4, 3, 2, 1, 0)])
    assert groups["0.backbone.pos_embed"]["peak"] == pytest.approx(1e-4 * 0.5**6)
    assert groups["0.backbone.norm.weight"]["peak"] == 1e-4
    assert groups["0.heads.sample.weight"]["peak"] == 1e-3
    convolutions = grouped(BackboneRecipe(layer_decay=0.5), network=replace(VIT, backbone="test_resnet"))
    assert convolutions["0.backbone.conv1.0.weight"]["peak"] < 1e-4


def test_first_layers_stay_and_low_ranks_are_learnt_in_the_others() -> None:
    names = grouped(BackboneRecipe(frozen_layers=6)).keys()
    of_backbone = [name for name in names if "backbone" in name]
    assert all(name.startswith(("0.backbone.blocks.5.", "0.backbone.norm.")) for name in of_backbone)
    assert len(of_backbone) == 14
    names = grouped(BackboneRecipe(frozen_layers=6, low_rank=2)).keys()
    of_backbone = [name for name in names if "backbone" in name]
    assert len(of_backbone) == 8 and all("blocks.5" in name for name in of_backbone)
    assert all(name.endswith(("weight.0.up", "weight.0.down")) for name in of_backbone)


def test_all_layers_frozen_is_refused_with_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match="frozen_layers is 7; this backbone has 7"):
        trained(BackboneRecipe(frozen_layers=7))


def test_rates_are_peaks_times_a_factor() -> None:
    _, _, made = trained(BackboneRecipe(layer_decay=0.5))
    optimiser.set_rates(made, 0.25)
    assert all(group["lr"] == 0.25 * group["peak"] for group in made.param_groups)
    assert len({group["lr"] for group in made.param_groups}) > 3


def stepped() -> tuple[nn.Module, torch.optim.AdamW, dict[str, nn.Parameter]]:
    built, loss, made = trained(BackboneRecipe())
    whole = nn.ModuleList([built, loss])
    torch.manual_seed(1)
    for parameter in whole.parameters():
        parameter.grad = torch.randn_like(parameter)
    return whole, made, dict(whole.named_parameters())


def test_the_state_is_kept_by_names_whatever_the_groups() -> None:
    _, before, named = stepped()
    before.step()
    state = optimiser.state_of(before, named)
    assert state.keys() == named.keys()
    built, loss, after = trained(BackboneRecipe(layer_decay=0.5))
    again = dict(nn.ModuleList([built, loss]).named_parameters())
    optimiser.load_state(after, state, again)
    for name, parameter in again.items():
        assert torch.equal(after.state[parameter]["exp_avg"], before.state[named[name]]["exp_avg"]), name


def test_a_state_of_before_there_were_names_is_taken() -> None:
    whole, _, named = stepped()
    old = torch.optim.AdamW([{"name": "all", "params": list(whole.parameters())}])
    old.step()
    _, new, again = stepped()
    optimiser.load_state(new, old.state_dict(), again)
    for name, parameter in again.items():
        assert torch.equal(new.state[parameter]["exp_avg_sq"], old.state[named[name]]["exp_avg_sq"]), name
