"""What is computed of each image once, put together from all ranks; and a cache of backbone features.

Not covered: reading the images (`reading`), and who computes which (`sampling.slice_of_rank`).
Legend: N images, W width of what is computed of an image, F features, b images of a batch.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from namr import collectives
from namr.errors import ShapeError
from namr.model.model import NamrModel
from namr.store import scratch

Values = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]


class Computed(NamedTuple):
    """A batch of results, with the places that they have among all images."""

    places: Places
    """(b,) int64"""
    values: Values
    """(b, W) float32"""


def from_all_ranks(mine: Iterable[Computed], *, width: int) -> Iterator[Computed]:
    """The batches of all ranks, on every rank, a batch of each at a time, until no rank has any left.

    Collective: every rank has to exhaust it.
    """
    batches = iter(mine)
    while True:
        batch = next(batches, None)
        places, values = batch or (np.empty(0, np.int64), np.empty((0, width), np.float32))
        of_all = collectives.gather(torch.from_numpy(places))
        if not len(of_all):
            return
        yield Computed(of_all.numpy(), collectives.gather(torch.from_numpy(values)).numpy())


def whole(mine: Iterable[Computed], *, num_rows: int, width: int) -> Values:
    """(N, W) float32, on every rank; ShapeError unless every place came once."""
    rows = np.empty((num_rows, width), np.float32)
    _fill(rows, from_all_ranks(mine, width=width))
    return rows


def cached(
    path: Path, compute: Callable[[], Iterable[Computed]], *, num_rows: int, width: int, writes: bool
) -> Values:
    """`whole`, memory-mapped from the file at `path`; computed if it is missing on any rank's machine.

    `writes`: this rank writes for its machine (one rank of each does). The file is complete or absent.
    """
    missing = collectives.sum_over_ranks(torch.tensor([int(not path.exists())]))
    if int(missing):
        batches = from_all_ranks(compute(), width=width)
        if writes and not path.exists():
            _write(path, batches, (num_rows, width))
        else:
            for _ in batches:
                pass
        collectives.barrier()
    stored: Values = np.load(path, mmap_mode="r")
    if stored.shape != (num_rows, width):
        raise ShapeError(
            f"{path} holds {stored.shape}, expected {(num_rows, width)}; delete it and run again"
        )
    return stored


def batches_of(
    model: NamrModel, pixels: Iterable[tuple[Tensor, Tensor]], *, batch_size: int
) -> Iterator[Computed]:
    """The features of (uint8 (b, 3, H, W), places (b,)) batches, in eval mode, on the model's device.

    A batch of fewer than `batch_size` images is padded, so that an image's features are the same bits
    whichever batch, and so whichever rank, it falls to.
    """
    device = next(model.parameters()).device
    model.eval()
    for images, places in pixels:
        padding = images.new_zeros((batch_size - len(images), *images.shape[1:]))
        with torch.no_grad():
            values = model.features(torch.cat([images, padding]).to(device, non_blocking=True))
        yield Computed(places.numpy(), values[: len(places)].float().cpu().numpy())


def _fill(rows: Values, batches: Iterable[Computed]) -> None:
    times = np.zeros(len(rows), np.int64)
    for places, values in batches:
        rows[places] = values
        np.add.at(times, places, 1)
    wrong = np.flatnonzero(times != 1)
    if len(wrong):
        raise ShapeError(
            f"{len(wrong)} of {len(rows)} images were not computed exactly once, first {wrong[0]}"
        )


def _write(path: Path, batches: Iterable[Computed], shape: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.sweep(path.parent)
    with scratch.beside(path) as temporary:
        rows = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        _fill(rows, batches)
        rows.flush()
        temporary.replace(path)
