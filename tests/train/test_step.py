"""Steps of training: resuming over 1, 2 and 3 processes, the schedule, and what is refused.

That processes agree in loss and gradients is shown in test_ddp_law.
"""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from namr import collectives
from namr.data.sampling import slice_of_rank
from namr.errors import ConfigError, NamrError
from namr.model import model
from namr.model.losses import JointLoss, LossConfig
from namr.model.model import ModelConfig
from namr.train.recipe import BackboneRecipe, TrainingConfig, batchnorm_policy, rate_factor
from namr.train.step import Trainer
from tests.ranks import Results, on_ranks

NUM_CLASSES, NUM_STEPS, BATCH = 5, 4, 13  # 13 images are ragged over 2 and over 3 ranks
TINY = ModelConfig(
    backbone="test_efficientnet", weights="none", embedding_dim=8, structure_hidden_dim=16, image_size_px=32
)
TRAINING = TrainingConfig(
    num_steps=NUM_STEPS, learning_rate=1e-3, backbone_learning_rate=1e-3, batchnorm="frozen", warmup_steps=2
)

VIT = replace(TINY, backbone="test_vit")
STAGED = replace(
    TRAINING,
    average_decay=0.6,
    backbone=BackboneRecipe(layer_decay=0.7, frozen_layers=2, frozen_steps=1, low_rank=2),
)
"""All that is off by default, on; with a thaw between two steps before the interruption."""


def make_trainer(
    config: TrainingConfig = TRAINING,
    *,
    base: Any = "proxy_anchor",
    weight: float = 2.0,
    r: float = 0.5,
    network: ModelConfig = TINY,
    memory_size: int | None = None,
) -> Trainer:
    built = model.build(replace(network, structure_range=r), seed=1)
    loss = JointLoss(
        LossConfig(base=base, ranking_weight=weight, num_clusters=3, memory_size=memory_size),
        num_classes=NUM_CLASSES,
        embedding_dim=TINY.embedding_dim,
    )
    return Trainer(built, loss, config, seed=0, device=torch.device("cpu"))


def batches(first_step: int, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """The rank's slices of global batches that are a function of the step."""
    mine = slice_of_rank(BATCH, rank=rank, world_size=world_size)
    for step in range(first_step, NUM_STEPS):
        draw = np.random.default_rng(step)
        labels = torch.from_numpy(np.arange(BATCH) % NUM_CLASSES)
        pixels = draw.integers(0, 256, (BATCH, 3, 32, 32), dtype=np.uint8) // 2
        pixels += (labels.numpy() * 20).astype(np.uint8)[:, None, None, None]
        yield torch.from_numpy(pixels[mine]), labels[mine]


def flat_state(trained: Trainer) -> dict[str, Tensor]:
    state = trained.state()
    parts = [part for part in ("model", "loss", "trained", "examined") if part in state]
    return {f"{part}.{name}": value.clone() for part in parts for name, value in state[part].items()}


def interrupted(rank: int, world_size: int, path: Path, **of_trainer: Any) -> dict[str, Tensor]:
    """Two steps, then the state through a file into a trainer made anew, then the rest."""
    first = make_trainer(**of_trainer)
    for result in first.run(batches(0, rank=rank, world_size=world_size)):
        if result.step == 1:
            break
    torch.save(first.state(), path)
    again = make_trainer(**of_trainer)
    again.load_state(torch.load(path, weights_only=True))
    for _ in again.run(batches(2, rank=rank, world_size=world_size)):
        pass
    return flat_state(again)


def uninterrupted(rank: int, world_size: int, **of_trainer: Any) -> tuple[dict[str, Tensor], list[float]]:
    trained = make_trainer(**of_trainer)
    totals = [result.total for result in trained.run(batches(0, rank=rank, world_size=world_size))]
    return flat_state(trained), totals


def on_each_rank(folder: Path) -> dict[str, Any]:
    """Everything that the tests below compare."""
    rank, world_size = collectives.rank(), collectives.world_size()
    staged: dict[str, Any] = {"config": STAGED, "network": VIT, "base": "contrastive", "memory_size": 20}
    return {
        "uninterrupted": uninterrupted(rank, world_size)[0],
        "interrupted": interrupted(rank, world_size, folder / f"state-{rank}-{world_size}.pt"),
        "staged": uninterrupted(rank, world_size, **staged)[0],
        "staged, interrupted": interrupted(
            rank, world_size, folder / f"staged-{rank}-{world_size}.pt", **staged
        ),
        "plain": uninterrupted(rank, world_size, base="contrastive", weight=0.0, r=0.0)[1],
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By world size and rank, what `on_each_rank` found."""
    return on_ranks(on_each_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("names", [("uninterrupted", "interrupted"), ("staged", "staged, interrupted")])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    results: Results, world_size: int, names: tuple[str, str]
) -> None:
    for rank in range(world_size):
        whole, parted = (results[world_size][rank][name] for name in names)
        assert parted.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(parted[name], value), name


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", ["uninterrupted", "staged"])
def test_all_ranks_hold_the_same_weights(results: Results, world_size: int, name: str) -> None:
    for rank in range(1, world_size):
        torch.testing.assert_close(results[world_size][rank][name], results[world_size][0][name])


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_backbone_that_thaws_is_the_same_on_any_number_of_ranks(results: Results, world_size: int) -> None:
    """All but biases before a BatchNorm: their gradient is 0 but for rounding, and AdamW enlarges it."""
    one, other = (results[size][0]["staged"] for size in (1, world_size))
    assert any(not torch.equal(one[name], one[name.replace("trained", "examined")]) for name in one)
    names = [name for name in one if not re.search(r"structure\.\d\.(bias|running_mean)", name)]
    for name in names:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-5, msg=name)


def test_without_structure_and_ranking_loss_ddp_waits_for_nothing(
    results: Results,
) -> None:
    np.testing.assert_allclose(results[3][0]["plain"], results[1][0]["plain"], rtol=1e-4)


def test_the_loss_falls() -> None:
    _, totals = uninterrupted(0, 1, base="contrastive")
    assert totals[-1] < totals[0]


def test_a_frozen_backbone_stays_as_it_is_and_its_statistics_too() -> None:
    config = TrainingConfig(
        num_steps=NUM_STEPS, learning_rate=1e-3, backbone_learning_rate=0, batchnorm="local"
    )
    trained = make_trainer(config)
    before = {name: value.clone() for name, value in trained.model.backbone.state_dict().items()}
    sample = trained.model.heads.sample.weight.clone()
    for _ in trained.run(batches(0)):
        pass
    torch.testing.assert_close(dict(trained.model.backbone.state_dict()), before, rtol=0, atol=0)
    assert not torch.equal(trained.model.heads.sample.weight, sample)


def test_the_backbone_stays_as_it_is_until_it_thaws() -> None:
    config = replace(TRAINING, backbone=BackboneRecipe(frozen_steps=2), batchnorm="local")
    trained = make_trainer(config)
    states = [trained.model.backbone.state_dict()["conv_stem.weight"].clone()]
    statistics = [trained.model.backbone.state_dict()["bn1.running_mean"].clone()]
    for _ in trained.run(batches(0)):
        states.append(trained.model.backbone.state_dict()["conv_stem.weight"].clone())
        statistics.append(trained.model.backbone.state_dict()["bn1.running_mean"].clone())
    for kept in (states, statistics):
        assert [torch.equal(*pair) for pair in pairwise(kept)] == [True, True, False, False]


def test_the_average_is_what_is_examined_and_a_plain_model_loads_it() -> None:
    trained = make_trainer(STAGED, network=VIT)
    assert trained.examined is trained.model
    weight = trained.model.heads.sample.weight
    weights = [weight.detach().clone() for _ in trained.run(batches(0))]
    mean = weights[0]
    for weight in weights[1:]:
        mean = 0.6 * mean + 0.4 * weight
    torch.testing.assert_close(trained.examined.heads.sample.weight.detach(), mean)
    plain = model.build(VIT, seed=3)
    plain.load_state_dict(trained.state()["model"])
    pixels, _ = next(batches(0))
    for ours, theirs in zip(plain.eval()(pixels), trained.examined.eval()(pixels), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_holds_each_tensor_once(tmp_path: Path) -> None:
    sizes = {}
    for name, config in (("plain", TRAINING), ("averaged", replace(TRAINING, average_decay=0.9))):
        trained = make_trainer(config)
        trained.step(*next(batches(0)))
        torch.save(trained.state(), tmp_path / name)
        sizes[name] = (tmp_path / name).stat().st_size
    weights = sum(value.nbytes for value in make_trainer().model.state_dict().values())
    assert sizes["averaged"] - sizes["plain"] < 1.2 * weights


def test_rates_rise_linearly_and_fall_along_a_half_cosine() -> None:
    config = TrainingConfig(num_steps=14, warmup_steps=4, schedule="cosine")
    assert [rate_factor(config, step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rate_factor(config, 4) == 1
    assert rate_factor(config, 9) == pytest.approx(0.5)
    assert 0 < rate_factor(config, 13) < 0.03
    assert rate_factor(TrainingConfig(num_steps=14, warmup_steps=4), 13) == 1


def test_rates_fall_by_stairs_where_nasas_do() -> None:
    """Its 90 epochs of 100 steps fall to a fifth after 40, 60 and 80 of them."""
    config = TrainingConfig(num_steps=9000, schedule="stairs")
    factors = [rate_factor(config, step) for step in (0, 3999, 4000, 5999, 6000, 7999, 8000, 8999)]
    assert factors == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008])


def test_a_loss_that_is_not_finite_names_step_and_terms_and_spares_the_weights() -> None:
    trained = make_trainer()
    trained.step(*next(batches(0)))
    weights = flat_state(trained)
    with torch.no_grad():
        trained.model.heads.sample.bias.fill_(math.nan)
    with pytest.raises(NamrError, match=r"step 1 is not finite: total nan, metric nan, .*learning rates"):
        trained.step(*next(batches(1)))
    assert trained.next_step == 1
    assert torch.equal(flat_state(trained)["model.heads.sample.weight"], weights["model.heads.sample.weight"])


def test_a_step_tells_what_its_time_went_to() -> None:
    trained = make_trainer()
    began = time.perf_counter()
    for batch in batches(0):
        trained.step(*batch)
    times = trained.times()
    assert set(times) == {"forward", "sync", "loss", "backward", "update", "data"}
    assert times["forward"] > 0 and times["backward"] > 0
    assert sum(times.values()) * NUM_STEPS <= time.perf_counter() - began


def test_batches_that_end_too_soon_are_an_error() -> None:
    with pytest.raises(NamrError, match="ended after 1 of 4 steps"):
        list(make_trainer().run([next(batches(0))]))


def test_automatic_batchnorm_is_frozen_on_pretrained_backbones_alone() -> None:
    auto = TrainingConfig(num_steps=1)
    assert batchnorm_policy(auto, TINY) == "local"
    assert batchnorm_policy(auto, ModelConfig(backbone="test_efficientnet")) == "frozen"
    with pytest.raises(ConfigError, match="needs GPUs"):
        make_trainer(TrainingConfig(num_steps=1, batchnorm="sync"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("learning_rate", 0.0), ("weight_decay", -1.0), ("max_gradient_norm", math.nan)],
)
def test_a_wrong_number_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"training.{field} is {value}"):
        TrainingConfig(**{"num_steps": 1, field: value})  # type: ignore[arg-type]
