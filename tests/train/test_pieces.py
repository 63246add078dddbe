"""A batch in pieces is the batch at once: in loss and gradients, on 1, 2, 3 ranks, and in what is random."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from namr import collectives
from namr.data.sampling import slice_of_rank
from namr.errors import ConfigError
from namr.model import model
from namr.model.losses import JointLoss, LossConfig
from namr.model.model import ModelConfig
from namr.train.recipe import TrainingConfig
from namr.train.step import StepResult, Trainer
from tests.ranks import Results, on_ranks

NUM_IMAGES = 13  # ragged over ranks, and over pieces
LABELS = torch.arange(NUM_IMAGES) % 4
PIXELS = torch.randint(
    0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
)
TINY = ModelConfig(
    backbone="test_resnet", weights="none", embedding_dim=8, structure_hidden_dim=6, image_size_px=32
)


class Stepped(NamedTuple):
    result: StepResult
    gradients: dict[str, Tensor]


def stepped(images_per_pass: int | None, *, drops: bool = False) -> Stepped:
    built = model.build(TINY, seed=0)
    if drops:
        built.backbone = nn.Sequential(built.backbone, nn.Dropout(0.5))
    loss = JointLoss(LossConfig(base="proxy_anchor"), num_classes=4, embedding_dim=8)
    config = TrainingConfig(num_steps=1, batchnorm="frozen", images_per_pass=images_per_pass)
    trainer = Trainer(built, loss, config, seed=0, device=torch.device("cpu"))
    mine = slice_of_rank(NUM_IMAGES, rank=collectives.rank(), world_size=collectives.world_size())
    result = trainer.step(PIXELS[mine], LABELS[mine])
    of_all = trainer.whole.named_parameters()
    return Stepped(result, {name: of.grad for name, of in of_all if of.grad is not None})


@pytest.fixture(scope="module")
def on_all_ranks() -> Results:
    return on_ranks(stepped, 3)


@pytest.mark.parametrize("images_per_pass", [1, 3, 13, 100])
def test_a_batch_in_pieces_is_the_batch_at_once(images_per_pass: int) -> None:
    same(stepped(images_per_pass), stepped(None))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_so_it_is_on_several_ranks(on_all_ranks: Results, world_size: int) -> None:
    for of_rank in on_all_ranks[world_size]:
        same(of_rank, stepped(None))


def test_what_is_random_is_drawn_alike_in_both_passes() -> None:
    """Whole pieces: the gradient of dropout that was drawn anew would be another's."""
    same(stepped(13, drops=True), stepped(None, drops=True))


def test_statistics_of_pieces_are_refused() -> None:
    config = TrainingConfig(num_steps=1, batchnorm="local", images_per_pass=4)
    loss = JointLoss(LossConfig(base="triplet"), num_classes=4, embedding_dim=8)
    with pytest.raises(ConfigError, match="images_per_pass is 4, and the backbone's BatchNorm is local"):
        Trainer(model.build(TINY, seed=0), loss, config, seed=0, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="images_per_pass"):
        TrainingConfig(num_steps=1, images_per_pass=0)


def same(one: Stepped, other: Stepped) -> None:
    """To the law's tolerance in float32: 1e-5 of the gradient's norm."""
    assert one.result.total == pytest.approx(other.result.total, rel=1e-5)
    assert one.gradients.keys() == other.gradients.keys()
    assert any(name.startswith("model.backbone") for name in one.gradients)
    ours, theirs = (torch.cat([grad.flatten() for grad in each.gradients.values()]) for each in (one, other))
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
