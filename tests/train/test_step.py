"""Steps of training: resuming over 1, 2 and 3 processes, the schedule, and what is refused.

That processes agree in loss and gradients is shown in test_ddp_law.
"""

import math
from collections.abc import Iterator
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
from namr.train import step as training_step
from namr.train.step import Trainer, TrainingConfig, rate_factor
from tests.ranks import Results, on_ranks

NUM_CLASSES, NUM_STEPS, BATCH = 5, 4, 13  # 13 images are ragged over 2 and over 3 ranks
TINY = ModelConfig(
    backbone="test_efficientnet", weights="none", embedding_dim=8, structure_hidden_dim=16, image_size_px=32
)
TRAINING = TrainingConfig(
    num_steps=NUM_STEPS, learning_rate=1e-3, backbone_learning_rate=1e-3, batchnorm="frozen", warmup_steps=2
)


def make_trainer(
    config: TrainingConfig = TRAINING, *, base: Any = "proxy_anchor", weight: float = 2.0, r: float = 0.5
) -> Trainer:
    built = model.build(ModelConfig(**{**vars(TINY), "structure_range": r}), seed=1)
    loss = JointLoss(
        LossConfig(base=base, ranking_weight=weight, num_clusters=3),
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
    return {**{f"model.{k}": v.clone() for k, v in state["model"].items()},
            **{f"loss.{k}": v.clone() for k, v in state["loss"].items()}}  # fmt: skip


def interrupted(rank: int, world_size: int, path: Path) -> dict[str, Tensor]:
    """Two steps, then the state through a file into a trainer made anew, then the rest."""
    first = make_trainer()
    for result in first.run(batches(0, rank=rank, world_size=world_size)):
        if result.step == 1:
            break
    torch.save(first.state(), path)
    again = make_trainer()
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
    return {
        "uninterrupted": uninterrupted(rank, world_size)[0],
        "interrupted": interrupted(rank, world_size, folder / f"state-{rank}-{world_size}.pt"),
        "plain": uninterrupted(rank, world_size, base="contrastive", weight=0.0, r=0.0)[1],
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By world size and rank, what `on_each_rank` found."""
    return on_ranks(on_each_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(results: Results, world_size: int) -> None:
    for rank in range(world_size):
        whole, parted = (results[world_size][rank][name] for name in ("uninterrupted", "interrupted"))
        assert parted.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(parted[name], value), name


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_hold_the_same_weights(results: Results, world_size: int) -> None:
    for rank in range(1, world_size):
        torch.testing.assert_close(
            results[world_size][rank]["uninterrupted"], results[world_size][0]["uninterrupted"]
        )


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


def test_batches_that_end_too_soon_are_an_error() -> None:
    with pytest.raises(NamrError, match="ended after 1 of 4 steps"):
        list(make_trainer().run([next(batches(0))]))


def test_automatic_batchnorm_is_frozen_on_pretrained_backbones_alone() -> None:
    auto = TrainingConfig(num_steps=1)
    assert training_step.batchnorm_policy(auto, TINY) == "local"
    assert training_step.batchnorm_policy(auto, ModelConfig(backbone="test_efficientnet")) == "frozen"
    with pytest.raises(ConfigError, match="needs GPUs"):
        make_trainer(TrainingConfig(num_steps=1, batchnorm="sync"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("learning_rate", 0.0), ("weight_decay", -1.0), ("max_gradient_norm", math.nan)],
)
def test_a_wrong_number_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"training.{field} is {value}"):
        TrainingConfig(**{"num_steps": 1, field: value})  # type: ignore[arg-type]
