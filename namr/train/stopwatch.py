"""What the seconds of a step go to: data, forward, sync, loss, backward, update.

    data      waiting for the next batch
    forward   the backbone
    sync      features and labels of all ranks, and what of the sum of gradients is not hidden behind backward
    loss      heads and losses, on the global batch
    backward  all gradients, with the sum that the gathered features need
    update    clipping and the optimiser

On a GPU a part is what lies between two events of its stream, and nothing waits for them until they are read.

Not covered: examinations and checkpoints, which pause it; throughput (`loop`).
"""

import time
from collections import defaultdict
from typing import Any

import torch

_WHOLE, _HIDDEN = "backward_comm_time", "backward_compute_comm_overlap_time"
"""What DistributedDataParallel itself measures of some steps, in nanoseconds."""


class Stopwatch:
    """Runs from `begin` to `begin`, through all parts of a step; `read` now and then, on every rank."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[str, Any, Any]] = []
        self._part: str | None = None
        self._since: Any = None
        self._num_steps = 0

    def begin(self, part: str) -> None:
        """The last part ends here and this one begins."""
        now = self._now()
        if self._part is not None:
            self._laps.append((self._part, self._since, now))
        self._part, self._since = part, now

    def end_step(self) -> None:
        """A step is done; from here on the next batch is waited for."""
        self.begin("data")
        self._num_steps += 1

    def pause(self) -> None:
        """What lasts now belongs to no step."""
        self._part = None

    def read(self, parallel: Any = None) -> dict[str, float]:
        """Seconds a step of each part, a mean since the last reading; empty before the first step.

        parallel: the DistributedDataParallel that was run, if one was: what it waited for after backward
        is told as sync.
        """
        seconds: defaultdict[str, float] = defaultdict(float)
        for part, since, until in self._laps:
            seconds[part] += self._between(since, until)
        num_steps, self._num_steps = self._num_steps, 0
        self._laps.clear()
        if not num_steps:
            return {}
        told = {part: each / num_steps for part, each in seconds.items()}
        waited = min(_waited_s(parallel), told.get("backward", 0.0))
        if waited > 0:
            told["backward"] -= waited
            told["sync"] = told.get("sync", 0.0) + waited
        return told

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, since: Any, until: Any) -> float:
        if not self._on_gpu:
            return float(until - since)
        until.synchronize()
        return float(since.elapsed_time(until)) / 1000


def _waited_s(parallel: Any) -> float:
    """Of the last step that it measured: its first ten and then one in a hundred."""
    if not hasattr(parallel, "_get_ddp_logging_data"):
        return 0.0
    measured = parallel._get_ddp_logging_data()
    whole, hidden = measured.get(_WHOLE, 0), measured.get(_HIDDEN, 0)
    return float(max(0, whole - hidden)) / 1e9
