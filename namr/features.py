"""Each image once over the ranks: in blocks, gathered in order; and a cache of a frozen backbone's features.

Block k of an image list belongs to rank k modulo the number of ranks, so one round of blocks is a
contiguous run of rows, whatever the number of ranks, and nothing has to be sorted afterwards.

Not covered: reading the images of a block (`reading`).
Legend: N rows, W width of what is computed of a row, F features.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from namr import collectives
from namr.errors import ShapeError
from namr.model import NamrModel

BLOCK_ROWS = 64
Features = npt.NDArray[np.float32]


def blocks_of_rank(num_rows: int, *, rank: int, world_size: int) -> list[range]:
    """The rows that a rank computes, block by block."""
    starts = range(rank * BLOCK_ROWS, num_rows, world_size * BLOCK_ROWS)
    return [range(start, min(start + BLOCK_ROWS, num_rows)) for start in starts]


def in_order(computed: Iterable[Tensor], *, num_rows: int, width: int) -> Iterator[npt.NDArray[np.float32]]:
    """All ranks' rows in order, on every rank, from what each computes of its own blocks.

    `computed`: (n, W) float32, one for each of `blocks_of_rank`. Yields contiguous runs of rows, (N, W)
    together. Collective: every rank has to exhaust it. ShapeError if rows are missing or too many.
    """
    blocks = iter(computed)
    num_seen = 0
    for _ in range(0, num_rows, collectives.world_size() * BLOCK_ROWS):
        mine = next(blocks, None)
        run = collectives.gather(torch.empty(0, width) if mine is None else mine.detach().float().cpu())
        num_seen += len(run)
        yield run.numpy()
    if num_seen != num_rows:
        raise ShapeError(f"{num_seen} rows were computed where {num_rows} were expected")


def cached_features(
    folder: Path,
    key: str,
    computed: Callable[[], Iterable[Tensor]],
    *,
    num_rows: int,
    num_features: int,
    writes: bool,
) -> Features:
    """(N, F) float32, memory-mapped from `folder`; computed over all ranks if a node lacks them.

    `writes`: this rank writes for its node (one rank of each does). A cache file is complete or absent.
    """
    path = folder / f"features-{key}.npy"
    present = collectives.sum_over_ranks(torch.tensor(path.exists()).long())
    if int(present) < collectives.world_size():
        runs = in_order(computed(), num_rows=num_rows, width=num_features)
        if writes and not path.exists():
            _write(path, runs, (num_rows, num_features))
        else:
            for _ in runs:
                pass
        collectives.barrier()
    features: Features = np.load(path, mmap_mode="r")
    if features.shape != (num_rows, num_features):
        raise ShapeError(
            f"{path} holds {features.shape}, expected {(num_rows, num_features)}; delete it and run again"
        )
    return features


def backbone_digest(model: NamrModel) -> str:
    """SHA-256 over the backbone's weights and the preprocessing: what an image's features depend on."""
    digest = hashlib.sha256(repr(model.preprocessing).encode())
    for name, value in sorted(model.backbone.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, runs: Iterator[Features], shape: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        columns = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        row = 0
        for run in runs:
            columns[row : row + len(run)] = run
            row += len(run)
        columns.flush()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
