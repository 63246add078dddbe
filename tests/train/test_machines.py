"""System metrics: sent while a run lasts, and never in its way."""

import pytest

from namr.errors import StorageError
from namr.train import machines
from tests.train.test_diary import Away


def samples(server: Away) -> list[dict[str, float]]:
    return [numbers for _, numbers in server.got]


def test_what_is_measured_is_sent_until_the_run_ends() -> None:
    server = Away()
    server.is_back = True
    counts = iter(range(1000))

    def sample() -> dict[str, float]:
        return {"system/host/cpu": float(next(counts))}

    with machines.watched(server, "r", sample, every_s=0.01):  # type: ignore[arg-type]
        assert server.asked.wait(5)
    assert samples(server)[0] == {"system/host/cpu": 0.0}
    steps = [step for step, _ in server.got]
    assert steps == sorted(steps) and steps[0] > 1e9


def test_a_server_that_is_away_costs_a_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_WAIT_S", 0.05)
    server = Away()
    with machines.watched(server, "r", lambda: {"x": 1.0}, every_s=0.01):  # type: ignore[arg-type]
        assert server.asked.wait(5)
    assert server.got == []


def test_a_failure_of_the_run_is_told_as_it_is() -> None:
    server = Away()
    server.is_back = True
    with (
        pytest.raises(StorageError, match="of the run itself"),
        machines.watched(server, "r", dict, every_s=60),  # type: ignore[arg-type]
    ):
        raise StorageError("of the run itself")
