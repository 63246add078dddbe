"""The law of DESIGN 2.5: 1, 2 and 3 processes compute the same loss and the same gradients.

In float64, given features and given mined indices, to 1e-9: ragged batches, both heads with their BatchNorm
and the proxies included. The whole model in float32 with the backbone's BatchNorm frozen, to 1e-5 of the
gradient's norm. Gradients are those that DistributedDataParallel leaves behind.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from namr import collectives
from namr.data.sampling import slice_of_rank
from namr.model.heads import TwinHeads
from namr.model.losses import JointLoss, LossConfig, Mined
from namr.model.model import ModelConfig, build, set_batchnorm_policy
from namr.train.step import ModelWithLoss
from tests.ranks import Results, on_ranks

BASES = ("triplet", "contrastive", "margin", "multi_similarity", "proxy_anchor")
WHOLE_MODEL_BASES = ("contrastive", "proxy_anchor")  # those that take all pairs, so that rounding picks none
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3])  # 13: ragged on 2 and on 3 ranks
NUM_CLASSES = 5  # one more than there are in the batch
FEATURES, DIM = 12, 8


class Outcome(NamedTuple):
    """One base loss on one rank."""

    total: Tensor
    gradients: dict[str, Tensor]
    of_features: Tensor
    """Gradient of this rank's features, as its backbone would receive it."""
    buffers: dict[str, Tensor]


class HeadsAndLoss(nn.Module):
    """What runs on the global batch, behind one layer that runs on a rank's slice alone."""

    def __init__(self, base: str, **settings: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(FEATURES, FEATURES)
        self.heads = TwinHeads(FEATURES, DIM, hidden_dim=6, structure_range=0.5)
        config = LossConfig(base=base, num_clusters=3, **settings)  # type: ignore[arg-type]
        self.loss = JointLoss(config, num_classes=NUM_CLASSES, embedding_dim=DIM)
        self.double()

    def forward(self, features: Tensor, labels: Tensor, mined: Mined) -> Tensor:
        x, s = self.heads(collectives.gather(self.backbone(features)))
        terms = self.loss(x, s, collectives.gather(labels), seed=0, step=0, mined=mined)
        total: Tensor = terms.total
        return total


def given_features() -> Tensor:
    return torch.randn(13, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def given_indices(base: str) -> Mined:
    """Mined once, on the whole batch, before any process group exists."""
    module = HeadsAndLoss(base)
    embedding, _ = module.heads(module.backbone(given_features()))
    return module.loss.mine(embedding, LABELS, seed=3, step=4)


def wrapped(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module) if collectives.is_distributed() else module


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def in_float64(indices: dict[str, Mined]) -> dict[str, Outcome]:
    mine = slice_of_rank(len(LABELS), rank=collectives.rank(), world_size=collectives.world_size())
    outcomes = {}
    for base in BASES:
        module = HeadsAndLoss(base)
        features = given_features()[mine].requires_grad_()
        parallel = wrapped(module)  # has to outlive the backward pass
        total = parallel(features, LABELS[mine], indices[base])
        total.backward()
        assert features.grad is not None
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        outcomes[base] = Outcome(total.detach(), gradients_of(module), features.grad, buffers)
    return outcomes


def whole_model() -> dict[str, Outcome]:
    mine = slice_of_rank(len(LABELS), rank=collectives.rank(), world_size=collectives.world_size())
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8, generator=generator)[mine]
    settings = ModelConfig(
        backbone="test_resnet", weights="none", embedding_dim=DIM, structure_hidden_dim=6, image_size_px=32
    )
    outcomes = {}
    for base in WHOLE_MODEL_BASES:
        model = build(settings, seed=0)
        set_batchnorm_policy(model, "frozen")
        loss = JointLoss(LossConfig(base=base), num_classes=NUM_CLASSES, embedding_dim=DIM)  # type: ignore[arg-type]
        whole = ModelWithLoss(model, loss, seed=0, precision="float32").train()
        parallel = wrapped(whole)
        total = parallel(pixels, LABELS[mine], 0).total
        total.backward()
        outcomes[base] = Outcome(total.detach(), gradients_of(whole), torch.empty(0), {})
    return outcomes


def with_memory() -> list[Outcome]:
    """Three steps in float64, the later ones against what the earlier ones embedded."""
    mine = slice_of_rank(len(LABELS), rank=collectives.rank(), world_size=collectives.world_size())
    module = HeadsAndLoss("contrastive", memory_size=20)
    parallel = wrapped(module)
    outcomes = []
    for step in range(3):
        module.zero_grad()
        total = parallel(given_features()[mine] + step, LABELS[mine], None)
        total.backward()
        buffers = {name: buffer.clone() for name, buffer in module.loss.named_buffers()}
        gradients = {name: gradient.clone() for name, gradient in gradients_of(module).items()}
        outcomes.append(Outcome(total.detach(), gradients, torch.empty(0), buffers))
    return outcomes


class Laws(NamedTuple):
    in_float64: dict[str, Outcome]
    with_memory: list[Outcome]
    whole_model: dict[str, Outcome]


def laws(indices: dict[str, Mined]) -> Laws:
    return Laws(in_float64(indices), with_memory(), whole_model())


@pytest.fixture(scope="module")
def indices() -> dict[str, Mined]:
    return {base: given_indices(base) for base in BASES}


@pytest.fixture(scope="module")
def alone(indices: dict[str, Mined]) -> Laws:
    """Without any process group."""
    return laws(indices)


@pytest.fixture(scope="module")
def together(indices: dict[str, Mined]) -> Results:
    return on_ranks(laws, indices)


@pytest.mark.parametrize("base", BASES)
def test_given_features_and_indices_all_worlds_agree(alone: Laws, together: Results, base: str) -> None:
    expected = alone.in_float64[base]
    assert any("proxies" in name for name in expected.gradients) == (base == "proxy_anchor")
    assert all(gradient.abs().max() > 0 for name, gradient in expected.gradients.items() if "weight" in name)
    for world_size, ranks in together.items():
        outcomes = [of_rank.in_float64[base] for of_rank in ranks]
        for outcome in outcomes:
            assert abs(outcome.total - expected.total) < 1e-9
            assert outcome.gradients.keys() == expected.gradients.keys()
            for name, gradient in expected.gradients.items():
                torch.testing.assert_close(outcome.gradients[name], gradient, rtol=1e-9, atol=1e-9, msg=name)
            for name, buffer in expected.buffers.items():
                torch.testing.assert_close(outcome.buffers[name], buffer, rtol=1e-9, atol=1e-9, msg=name)
        # a rank's own share comes world_size fold, for DDP to average
        of_features = torch.cat([outcome.of_features for outcome in outcomes]) / world_size
        torch.testing.assert_close(of_features, expected.of_features, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", WHOLE_MODEL_BASES)
def test_the_whole_model_agrees_in_float32(alone: Laws, together: Results, base: str) -> None:
    expected = alone.whole_model[base]
    assert any(name.startswith("model.backbone") for name in expected.gradients)
    whole = torch.cat([gradient.flatten() for gradient in expected.gradients.values()])
    for ranks in together.values():
        for of_rank in ranks:
            outcome = of_rank.whole_model[base]
            assert outcome.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
            assert outcome.gradients.keys() == expected.gradients.keys()
            theirs = torch.cat([outcome.gradients[name].flatten() for name in expected.gradients])
            assert ((theirs - whole).norm() / whole.norm()).item() < 1e-5


def test_a_memory_is_the_same_on_every_rank_and_so_is_what_it_does(alone: Laws, together: Results) -> None:
    assert alone.with_memory[0].total < alone.with_memory[1].total
    for ranks in together.values():
        for of_rank in ranks:
            for expected, outcome in zip(alone.with_memory, of_rank.with_memory, strict=True):
                assert abs(outcome.total - expected.total) < 1e-9
                assert expected.buffers["memory.num_kept"] == outcome.buffers["memory.num_kept"] > 0
                for part in ("gradients", "buffers"):
                    torch.testing.assert_close(
                        getattr(outcome, part), getattr(expected, part), rtol=1e-9, atol=1e-9
                    )
