"""Runs a function on 1, 2 and 3 real gloo processes and brings back what each of them returned."""

import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Results = dict[int, list[Any]]
"""World size -> what each rank returned."""


def on_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    world_sizes: Sequence[int] = (1, 2, 3),
    timeout_s: float = 120,
) -> Results:
    """`function(*arguments)` in a process group of each size; one set of processes serves all sizes.

    The function is found by its module's name, and takes and returns what torch can save. A rank's exception
    is raised here; processes that outlive the timeout are ended.
    """
    multiprocessing.set_forkserver_preload(["namr.train.step"])  # imported once, not by each process
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _worker,
            (function, arguments, tuple(world_sizes), folder),
            nprocs=max(world_sizes),
            join=False,
            start_method="forkserver",
        )
        try:
            deadline = time.monotonic() + timeout_s
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} on {max(world_sizes)} ranks after {timeout_s} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return {
            world_size: [
                torch.load(_result(folder, world_size, rank), weights_only=False)
                for rank in range(world_size)
            ]
            for world_size in world_sizes
        }


def _worker(
    rank: int, function: Callable[..., Any], arguments: Sequence[Any], world_sizes: Sequence[int], folder: str
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for world_size in world_sizes:
        if rank >= world_size:
            continue
        meeting = (Path(folder) / f"meeting-{world_size}").as_uri()
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        try:
            torch.save(function(*arguments), _result(folder, world_size, rank))
        finally:
            dist.destroy_process_group()


def _result(folder: str, world_size: int, rank: int) -> Path:
    return Path(folder) / f"result-{world_size}-{rank}.pt"
