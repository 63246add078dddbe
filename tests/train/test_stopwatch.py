"""What the seconds of a step go to, by a clock that the test turns."""

from typing import Any

import pytest
import torch

from namr.train import stopwatch
from namr.train.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def step(watch: Stopwatch, clock: list[float], seconds: dict[str, float]) -> None:
    for part, lasts in seconds.items():
        if part != "data":
            watch.begin(part)
        clock[0] += lasts
    watch.end_step()


def test_each_part_is_told_as_its_mean_over_the_steps_since_the_last_reading(clock: list[float]) -> None:
    watch = Stopwatch(torch.device("cpu"))
    step(watch, clock, {"forward": 1.0, "loss": 0.5, "backward": 2.0})
    step(watch, clock, {"data": 3.0, "forward": 2.0, "loss": 0.5, "backward": 4.0})
    assert watch.read() == {"forward": 1.5, "loss": 0.5, "backward": 3.0, "data": 1.5}
    assert watch.read() == {}
    step(watch, clock, {"data": 0.5, "forward": 1.0})
    assert watch.read() == {"data": 0.5, "forward": 1.0}


def test_a_pause_belongs_to_no_step(clock: list[float]) -> None:
    watch = Stopwatch(torch.device("cpu"))
    step(watch, clock, {"forward": 1.0})
    watch.pause()
    clock[0] += 100.0
    step(watch, clock, {"forward": 1.0})
    assert watch.read() == {"forward": 1.0}


def test_what_ranks_wait_for_after_backward_is_sync(clock: list[float]) -> None:
    class Parallel:
        def _get_ddp_logging_data(self) -> dict[str, Any]:
            return {"backward_comm_time": 800_000_000, "backward_compute_comm_overlap_time": 300_000_000}

    watch = Stopwatch(torch.device("cpu"))
    step(watch, clock, {"sync": 0.25, "loss": 0.5, "backward": 2.0})
    assert watch.read(Parallel()) == {"sync": 0.75, "loss": 0.5, "backward": 1.5}
