"""Collectives on 1, 2 and 3 real gloo processes, and without any."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from namr import collectives
from namr.data.sampling import slice_of_rank
from namr.errors import ShapeError
from tests.ranks import Results, on_ranks

WHOLE = torch.arange(14.0, dtype=torch.float64).reshape(7, 2)


class Seen(NamedTuple):
    """What one rank saw."""

    rank: int
    world_size: int
    gathered: Tensor
    gradient: Tensor
    sizes: list[int]
    integers: Tensor
    lopsided: Tensor
    nothing: Tensor
    summed: Tensor
    summed_from: Tensor
    refused: str


def look() -> Seen:
    rank, world_size = collectives.rank(), collectives.world_size()
    mine = WHOLE[slice_of_rank(len(WHOLE), rank=rank, world_size=world_size)].clone().requires_grad_()
    gathered = collectives.gather(mine)
    weights = torch.arange(7.0, dtype=torch.float64)[:, None] + 1
    ((rank + 1) * (gathered * weights).sum()).backward()  # each rank's loss is another, to see the sum
    assert mine.grad is not None
    summed_from = torch.full((2, 3), float(rank + 1))
    summed = collectives.sum_over_ranks(summed_from)
    refused = ""
    try:
        collectives.gather(torch.zeros(2, 3 + rank))
    except ShapeError as error:
        refused = str(error)
    collectives.barrier()
    return Seen(
        rank=rank,
        world_size=world_size,
        gathered=gathered.detach(),
        gradient=mine.grad,
        sizes=collectives.gather_sizes(mine),
        integers=collectives.gather(torch.tensor([rank] * (rank + 1))),
        lopsided=collectives.gather(torch.ones(3 if rank == 0 else 0, 2)),
        nothing=collectives.gather(torch.ones(0, 2)),
        summed=summed,
        summed_from=summed_from,
        refused=refused,
    )


@pytest.fixture(scope="module")
def seen() -> Results:
    return on_ranks(look)


def test_ranks_know_themselves(seen: Results) -> None:
    for world_size, ranks in seen.items():
        assert [(one.rank, one.world_size) for one in ranks] == [(r, world_size) for r in range(world_size)]


def test_gather_brings_ragged_rows_in_rank_order(seen: Results) -> None:
    assert [one.sizes for one in seen[3]] == [[3, 2, 2]] * 3
    for ranks in seen.values():
        for one in ranks:
            assert torch.equal(one.gathered, WHOLE)
            assert one.integers.tolist() == [r for r in range(one.world_size) for _ in range(r + 1)]
            assert one.integers.dtype == torch.int64
            assert one.lopsided.shape == (3, 2)
            assert one.nothing.shape == (0, 2)


def test_the_backward_pass_of_gather_sums_over_ranks(seen: Results) -> None:
    """Rank r's loss is (r + 1) times the weighted sum of all rows, so the factors add up."""
    for world_size, ranks in seen.items():
        factor = sum(range(1, world_size + 1))
        expected = factor * (torch.arange(7.0, dtype=torch.float64) + 1)[:, None].expand(7, 2)
        assert torch.equal(torch.cat([one.gradient for one in ranks]), expected)


def test_sums_are_new_tensors(seen: Results) -> None:
    for world_size, ranks in seen.items():
        for one in ranks:
            assert torch.equal(one.summed, torch.full((2, 3), float(sum(range(1, world_size + 1)))))
            assert torch.equal(one.summed_from, torch.full((2, 3), float(one.rank + 1)))


def test_rows_of_different_width_are_refused_on_every_rank(seen: Results) -> None:
    assert seen[1][0].refused == ""
    assert all("rows of [3, 4, 5] elements" in one.refused for one in seen[3])


def test_without_processes_everything_is_the_identity() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.gather(x) is x
    assert collectives.gather_sizes(x) == [3]
    total = collectives.sum_over_ranks(x)
    assert torch.equal(total, x) and total is not x
    collectives.barrier()
