"""The multi-cluster ranking loss against the same loss taken otherwise, forward and backward.

    python -m tests.benchmarks.loss

loop:    anchor by anchor.
blocked: as many anchors at once as their differences to all others, (A, B, D), fit into 8 MB: the same
         operations without a loop in Python.

Both take each anchor's or block's gradient at once, so that they need no more memory than one does and are
not slowed by allocation. Checks that values and gradients are equal, then times all three in turns. The last
line is the worse of the two against its target.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from namr.model.distances import mean_pairwise
from namr.model.losses import multi_cluster_ranking

TARGETS = {"loop": 20.0, "blocked": 1.5}
BLOCK_BYTES = 8 << 20  # of 2 to 64 MB what is fastest on two cores; 64 takes three times as long
CHECKED = 256  # images on which both sides are compared
ALPHA, T = 10.0, 3.0
SIDES: tuple[Literal["query", "both"], ...] = ("query", "both")


class Outcome(NamedTuple):
    """Value and gradients."""

    loss: Tensor
    of_x: Tensor
    of_s: Tensor


def as_products(x: Tensor, s: Tensor, *, num_clusters: int, side: Literal["query", "both"]) -> Outcome:
    x, s = x.clone().requires_grad_(), s.clone().requires_grad_()
    loss = multi_cluster_ranking(x, s, num_clusters=num_clusters, structure_side=side, alpha=ALPHA, t=T)
    return Outcome(loss.detach(), *torch.autograd.grad(loss, (x, s)))


def as_blocks(x: Tensor, s: Tensor, *, num_clusters: int, side: Literal["query", "both"]) -> Outcome:
    num, dim = x.shape
    size = max(1, BLOCK_BYTES // (num * dim * x.element_size()))
    with torch.no_grad():
        plain = torch.cat([(anchors[:, None] - x).square().sum(2).sqrt() for anchors in x.split(size)])
        mean = plain.mean()
        lowest = torch.maximum(0.2 * mean, mean - T * plain.std())
        centres = mean + (lowest - mean) * torch.linspace(0, 1, num_clusters, dtype=x.dtype, device=x.device)
    x, s = x.clone().requires_grad_(), s.clone().requires_grad_()
    total = x.new_zeros(())
    for anchors in torch.arange(num, device=x.device).split(size):
        weights = s[anchors, None] if side == "query" else (s[anchors, None] + s) / 2
        others = torch.arange(num, device=x.device) != anchors[:, None]
        stretched = (weights * (x[anchors, None] - x).square()).sum(2)[others].sqrt()
        gaps = (stretched - centres[:, None]).abs()
        loss = (torch.softmax(-ALPHA * gaps, 0) * gaps).sum() / (num * (num - 1))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    assert x.grad is not None and s.grad is not None
    return Outcome(total, x.grad, s.grad)


def as_loop(x: Tensor, s: Tensor, *, num_clusters: int, side: Literal["query", "both"]) -> Outcome:
    num = len(x)
    with torch.no_grad():
        plain = torch.stack([(anchor - x).square().sum(1).sqrt() for anchor in x])
        mean = plain.mean()
        lowest = torch.maximum(0.2 * mean, mean - T * plain.std())
        centres = [mean + (lowest - mean) * c / (num_clusters - 1) for c in range(num_clusters)]
    x, s = x.clone().requires_grad_(), s.clone().requires_grad_()
    total = x.new_zeros(())
    for anchor in range(num):
        others = torch.arange(num, device=x.device) != anchor
        weights = s[anchor] if side == "query" else (s[anchor] + s) / 2
        stretched = (weights * (x[anchor] - x).square()).sum(1)[others].sqrt()
        gaps = torch.stack([(stretched - centre).abs() for centre in centres])
        loss = (torch.softmax(-ALPHA * gaps, 0) * gaps).sum() / (num * (num - 1))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    assert x.grad is not None and s.grad is not None
    return Outcome(total, x.grad, s.grad)


PEERS = {"loop": as_loop, "blocked": as_blocks}


def check_equal(x: Tensor, s: Tensor, *, num_clusters: int, side: Literal["query", "both"]) -> None:
    """In float64: in float32 a distance that rounds to the other side of a centre pulls the other way."""
    x, s = x[:CHECKED].double(), s[:CHECKED].double()
    ours = as_products(x, s, num_clusters=num_clusters, side=side)
    for peer, run in PEERS.items():
        theirs = run(x, s, num_clusters=num_clusters, side=side)
        for name, a, b in zip(Outcome._fields, ours, theirs, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            print(f"  {peer}, {name}: relative difference {error:.1e} in float64, {len(x)} images")
            if not error < 1e-9:
                sys.exit(f"{name} differs: all must compute the same thing before they are timed")


def seconds(run: Callable[[], Outcome], device: str, *, repeats: int) -> float:
    """Median over the repeats."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(device: str) -> int:
    """The most that was ever in use: of the GPU, or of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="B, images in the global batch")
    parser.add_argument("--dim", type=int, default=512, help="D, dimension of the embeddings")
    parser.add_argument("--clusters", type=int, default=2, help="C")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    num, dim, device = options.images, options.dim, options.device

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, dim, generator=generator).to(device)
    x = x / mean_pairwise(x)
    s = (0.5 + torch.rand(num, dim, generator=generator)).to(device)
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"B = {num}, D = {dim}, C = {options.clusters}, float32, {where}, torch {torch.__version__}")

    as_products(x[:32], s[:32], num_clusters=options.clusters, side="both")  # threads and pools are up
    ratios: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for side in SIDES:
        print(f"structure_side {side}")
        products, *peers = (
            partial(run, x, s, num_clusters=options.clusters, side=side)
            for run in (as_products, *PEERS.values())
        )
        if side == SIDES[0]:
            before = peak_bytes(device)
            products()
            peak, square = peak_bytes(device) - before, num * num * 4
            print(
                f"  peak memory {peak / 1e6:.0f} MB = {peak / square:.1f} matrices of B x B; "
                f"B x B x D would be {square * dim / 1e6:.0f} MB"
            )
        check_equal(x, s, num_clusters=options.clusters, side=side)
        for name, peer in zip(PEERS, peers, strict=True):
            fast = seconds(products, device, repeats=3 * options.repeats)
            slow = seconds(peer, device, repeats=options.repeats)
            ratios[name].append(slow / fast)
            print(f"  products {fast * 1e3:.0f} ms, {name} {slow * 1e3:.0f} ms, ratio {slow / fast:.1f}")
    worst = min(TARGETS, key=lambda name: min(ratios[name]) / TARGETS[name])
    print(f"loss ratio {min(ratios[worst]):.1f} target {TARGETS[worst]:g}")


if __name__ == "__main__":
    main()
