"""The loop around the steps: a pause costs no speed."""

import pytest

from namr.train import loop


def test_speed_counts_steady_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    speed = loop._Speed(num_images=8)
    for number in range(9):
        now[0] += 10.0 if number < 5 else 0.5
        speed.step()
    assert speed.images_per_s == 16.0
    speed.pause()
    now[0] += 100.0
    speed.step()
    now[0] += 0.5
    speed.step()
    assert speed.images_per_s == 16.0
