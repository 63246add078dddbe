"""What ranks tell each other: gather with gradient, sums. Identity when not distributed.

The law (DESIGN 2.5): every rank gathers the features of all ranks and computes the same, global loss. The
backward pass of `gather` sums the gradients of all ranks, so that a rank's own parameters get world_size
times their share and the average that DistributedDataParallel takes is the exact gradient of the global
loss. Nothing is multiplied by the world size anywhere.

Every function here is collective: all ranks call it, in the same order. Tensors may lie on the CPU under
any backend. Starting and ending process groups is not covered (Ray Train or torchrun does it).
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from namr.errors import ShapeError


def is_distributed() -> bool:
    """Whether a process group is up (of one process, too)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 when not distributed."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes there are, 1 when not distributed."""
    return dist.get_world_size() if is_distributed() else 1


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks, in rank order, on every rank. (n, ...) -> (sum of n, ...).

    n may differ from rank to rank and be 0; the other dimensions may not (ShapeError, on every rank).
    With gradient for floating point: the backward pass sums over ranks and is collective too, so every
    rank's loss must depend on the result.
    """
    if not is_distributed():
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def gather_sizes(x: Tensor) -> list[int]:
    """Number of rows of each rank's tensor, in rank order."""
    if not is_distributed():
        return [len(x)]
    mine = torch.tensor([len(x), math.prod(x.shape[1:])], device=_meeting_device(x))
    everybodys = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everybodys, mine)
    sizes, widths = zip(*(each.tolist() for each in everybodys), strict=True)
    if len(set(widths)) > 1:
        raise ShapeError(f"ranks gather rows of {list(widths)} elements: all ranks need the same")
    return list(sizes)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        sizes = gather_sizes(x)
        start = sum(sizes[: rank()])
        ctx.mine = slice(start, start + len(x))
        padded = torch.zeros(max(sizes), *x.shape[1:], dtype=x.dtype, device=_meeting_device(x))
        padded[: len(x)] = x
        everybodys = [torch.empty_like(padded) for _ in sizes]
        if max(sizes) > 0:
            dist.all_gather(everybodys, padded)
        whole = torch.cat([rows[:size] for rows, size in zip(everybodys, sizes, strict=True)])
        return whole.to(x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_ranks(grads[0])[ctx.mine]


def sum_over_ranks(t: Tensor) -> Tensor:
    """A new tensor: the elementwise sum of all ranks' tensors, which have one shape. No gradient."""
    total = t.detach().clone(memory_format=torch.contiguous_format)
    if is_distributed():
        total = total.to(_meeting_device(t))
        dist.all_reduce(total)
    return total.to(t.device)


def broadcast(t: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank; all pass one of the same shape and type. No gradient."""
    if not is_distributed():
        return t
    told = t.detach().to(_meeting_device(t)).contiguous()
    dist.broadcast(told, src=0)
    return told.to(t.device)


def _meeting_device(t: Tensor) -> torch.device:
    """Where ranks can exchange a tensor: NCCL takes none on the CPU."""
    if t.device.type == "cpu" and dist.get_backend() == dist.Backend.NCCL:
        return torch.device("cuda", torch.cuda.current_device())
    return t.device


def barrier() -> None:
    """Waits until every rank has come here."""
    if is_distributed():
        dist.barrier()
