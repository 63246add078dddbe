"""One step of learning: its law over 1, 2 and 3 processes, resuming, the schedule, and what it refuses."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from namr import learning, model
from namr.errors import ConfigError, NamrError
from namr.learning import Learning, TrainingConfig, rate_factor
from namr.losses import JointLoss, LossConfig
from namr.model import ModelConfig
from namr.sampling import slice_of_rank

NUM_CLASSES, NUM_STEPS, BATCH = 5, 6, 13  # 13 images are ragged over 2 and over 3 ranks
TINY = ModelConfig(
    backbone="test_efficientnet", weights="none", embedding_dim=8, structure_hidden_dim=16, image_size_px=32
)
TRAINING = TrainingConfig(
    num_steps=NUM_STEPS, learning_rate=1e-3, backbone_learning_rate=1e-3, batchnorm="frozen", warmup_steps=2
)


def make_learning(
    config: TrainingConfig = TRAINING, *, base: Any = "proxy_anchor", weight: float = 2.0, r: float = 0.5
) -> Learning:
    built = model.build(ModelConfig(**{**vars(TINY), "structure_range": r}), seed=1)
    loss = JointLoss(
        LossConfig(base=base, ranking_weight=weight, num_clusters=3),
        num_classes=NUM_CLASSES,
        embedding_dim=TINY.embedding_dim,
    )
    return Learning(built, loss, config, device=torch.device("cpu"))


def batches(first_step: int, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """The rank's slices of global batches that are a function of the step."""
    mine = slice_of_rank(BATCH, rank=rank, world_size=world_size)
    for step in range(first_step, NUM_STEPS):
        draw = np.random.default_rng(step)
        labels = torch.from_numpy(np.arange(BATCH) % NUM_CLASSES)
        pixels = draw.integers(0, 256, (BATCH, 3, 32, 32), dtype=np.uint8) // 2
        pixels += (labels.numpy() * 20).astype(np.uint8)[:, None, None, None]
        yield torch.from_numpy(pixels[mine]), labels[mine]


def flat_state(learned: Learning) -> dict[str, Tensor]:
    state = learned.state()
    return {**{f"model.{k}": v.clone() for k, v in state["model"].items()},
            **{f"loss.{k}": v.clone() for k, v in state["loss"].items()}}  # fmt: skip


def interrupted(rank: int, world_size: int, path: Path) -> dict[str, Tensor]:
    """Two steps, then the state through a file into a learner made anew, then the rest."""
    first = make_learning()
    for result in first.run(batches(0, rank=rank, world_size=world_size)):
        if result.step == 1:
            break
    torch.save(first.state(), path)
    again = make_learning()
    again.load_state(torch.load(path, weights_only=True))
    for _ in again.run(batches(2, rank=rank, world_size=world_size)):
        pass
    return flat_state(again)


def uninterrupted(rank: int, world_size: int, **of_learning: Any) -> tuple[dict[str, Tensor], list[float]]:
    learned = make_learning(**of_learning)
    totals = [result.total for result in learned.run(batches(0, rank=rank, world_size=world_size))]
    return flat_state(learned), totals


def first_gradient(rank: int, world_size: int) -> dict[str, Tensor]:
    learned = make_learning(TrainingConfig(**{**vars(TRAINING), "max_gradient_norm": 1e9}))
    learned.step(*next(batches(0, rank=rank, world_size=world_size)))
    return {n: p.grad.clone() for n, p in learned.learner.named_parameters() if p.grad is not None}


def double_gradient(rank: int, world_size: int) -> dict[str, Tensor]:
    """Of features that are given, in float64: heads and proxies."""
    learned = make_learning()
    learned.learner.double()
    mine = slice_of_rank(BATCH, rank=rank, world_size=world_size)
    generator = torch.Generator().manual_seed(3)
    width = learned.model.heads.sample.in_features
    features = torch.randn(BATCH, width, generator=generator, dtype=torch.float64)[mine].requires_grad_()
    labels = (torch.arange(BATCH) % NUM_CLASSES)[mine]
    learned.learner.model.backbone.requires_grad_(False)
    parallel = learned.learner
    if world_size > 1:
        parallel = torch.nn.parallel.DistributedDataParallel(learned.learner)
    terms = parallel(features, labels, 0)
    terms.total.backward()
    gradients = {n: p.grad.clone() for n, p in learned.learner.named_parameters() if p.grad is not None}
    return {**gradients, "total": terms.total.detach()}


def rank_main(rank: int, folder: Path) -> None:
    """Everything that the tests below compare, with 3, 2 and 1 processes."""
    torch.set_num_threads(1)
    for world_size in (3, 2, 1):
        if rank >= world_size:
            return
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store-{world_size}", rank=rank, world_size=world_size
        )
        results = {
            "gradient": first_gradient(rank, world_size),
            "double": double_gradient(rank, world_size),
            "uninterrupted": uninterrupted(rank, world_size)[0],
            "interrupted": interrupted(rank, world_size, folder / f"state-{rank}-{world_size}.pt"),
            "plain": uninterrupted(rank, world_size, base="contrastive", weight=0.0, r=0.0)[1],
        }
        torch.save(results, folder / f"results-{rank}-{world_size}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """(rank, world size) -> what `rank_main` found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=3)
    return {
        (rank, world_size): torch.load(folder / f"results-{rank}-{world_size}.pt")
        for world_size in (1, 2, 3)
        for rank in range(world_size)
    }


def as_vector(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_gradient_does_not_depend_on_the_number_of_processes(
    results: dict[tuple[int, int], dict[str, Any]], world_size: int
) -> None:
    one = as_vector(results[0, 1]["gradient"])
    for rank in range(world_size):
        several = as_vector(results[rank, world_size]["gradient"])
        assert (several - one).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize("world_size", [2, 3])
def test_in_float64_loss_and_gradients_of_heads_and_proxies_agree_to_1e_9(
    results: dict[tuple[int, int], dict[str, Any]], world_size: int
) -> None:
    one = results[0, 1]["double"]
    assert any(name.startswith("loss.") for name in one)
    for rank in range(world_size):
        torch.testing.assert_close(results[rank, world_size]["double"], one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    results: dict[tuple[int, int], dict[str, Any]], world_size: int
) -> None:
    for rank in range(world_size):
        found = results[rank, world_size]
        assert found["interrupted"].keys() == found["uninterrupted"].keys()
        for name, value in found["uninterrupted"].items():
            assert torch.equal(found["interrupted"][name], value), name


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_hold_the_same_weights(
    results: dict[tuple[int, int], dict[str, Any]], world_size: int
) -> None:
    for rank in range(1, world_size):
        torch.testing.assert_close(
            results[rank, world_size]["uninterrupted"], results[0, world_size]["uninterrupted"]
        )


def test_without_structure_and_ranking_loss_ddp_waits_for_nothing(
    results: dict[tuple[int, int], dict[str, Any]],
) -> None:
    np.testing.assert_allclose(results[0, 3]["plain"], results[0, 1]["plain"], rtol=1e-4)


def test_the_loss_falls() -> None:
    _, totals = uninterrupted(0, 1, base="multi_similarity")
    assert totals[-1] < totals[0]


def test_a_frozen_backbone_stays_as_it_is_and_its_statistics_too() -> None:
    config = TrainingConfig(
        num_steps=NUM_STEPS, learning_rate=1e-3, backbone_learning_rate=0, batchnorm="local"
    )
    learned = make_learning(config)
    before = {name: value.clone() for name, value in learned.model.backbone.state_dict().items()}
    sample = learned.model.heads.sample.weight.clone()
    for _ in learned.run(batches(0)):
        pass
    torch.testing.assert_close(dict(learned.model.backbone.state_dict()), before, rtol=0, atol=0)
    assert not torch.equal(learned.model.heads.sample.weight, sample)


def test_rates_rise_linearly_and_fall_along_a_half_cosine() -> None:
    config = TrainingConfig(num_steps=14, warmup_steps=4, schedule="cosine")
    assert [rate_factor(config, step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rate_factor(config, 4) == 1
    assert rate_factor(config, 9) == pytest.approx(0.5)
    assert 0 < rate_factor(config, 13) < 0.03
    assert rate_factor(TrainingConfig(num_steps=14, warmup_steps=4), 13) == 1


def test_a_loss_that_is_not_finite_names_step_and_terms_and_spares_the_weights() -> None:
    learned = make_learning()
    learned.step(*next(batches(0)))
    weights = flat_state(learned)
    with torch.no_grad():
        learned.model.heads.sample.bias.fill_(math.nan)
    with pytest.raises(NamrError, match=r"step 1 is not finite: total nan, metric nan, .*learning rates"):
        learned.step(*next(batches(1)))
    assert learned.next_step == 1
    assert torch.equal(flat_state(learned)["model.heads.sample.weight"], weights["model.heads.sample.weight"])


def test_batches_that_end_too_soon_are_an_error() -> None:
    with pytest.raises(NamrError, match="ended after 1 of 6 steps"):
        list(make_learning().run([next(batches(0))]))


def test_automatic_batchnorm_is_frozen_on_pretrained_backbones_alone() -> None:
    auto = TrainingConfig(num_steps=1)
    assert learning.batchnorm_policy(auto, TINY) == "local"
    assert learning.batchnorm_policy(auto, ModelConfig(backbone="test_efficientnet")) == "frozen"
    with pytest.raises(ConfigError, match="needs GPUs"):
        make_learning(TrainingConfig(num_steps=1, batchnorm="sync"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("learning_rate", 0.0), ("weight_decay", -1.0), ("max_gradient_norm", math.nan)],
)
def test_a_wrong_number_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"training.{field} is {value}"):
        TrainingConfig(**{"num_steps": 1, field: value})  # type: ignore[arg-type]
