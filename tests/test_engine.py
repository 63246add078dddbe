import random
import subprocess
import time

import pytest

from namr import engine
from namr.errors import ConfigError


def squared(number: int) -> int:
    if number == 7:
        raise ConfigError("seven is not allowed")
    return number * number


def squared_after_a_moment(number: int) -> int:
    until = time.perf_counter() + random.random() / 1000
    while time.perf_counter() < until:
        pass
    return squared(number)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_tasks_yield_every_result_with_its_position() -> None:
    results = dict(engine.map_tasks(squared, range(6), max_in_flight=2))
    assert results == {number: number**2 for number in range(6)}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_task_that_fails_raises_its_own_exception() -> None:
    with pytest.raises(ConfigError, match="seven is not allowed"):
        list(engine.map_tasks(squared, range(30)))


FAILS_OFTEN = """
import test_engine
from namr import engine, errors
engine.connect(None, num_cpus=2)
for _ in range(600):
    try:
        list(engine.map_tasks(test_engine.squared_after_a_moment, range(4, 16)))
    except errors.ConfigError:
        print("told", flush=True)
"""


@pytest.mark.ray
def test_a_failure_never_ends_the_process(python: str) -> None:
    """Ray aborts a process that cancels a task in the moment in which it ends: once in some hundred times."""
    run = subprocess.run([python, "-c", FAILS_OFTEN], capture_output=True, text=True, timeout=240)
    assert run.stdout.split() == ["told"] * 600, run.stderr[-3000:]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_no_arguments_are_no_tasks() -> None:
    assert list(engine.map_tasks(squared, [])) == []


def test_an_address_where_nothing_listens_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"no Ray answers at '127\.0\.0\.1:9'"):
        engine.connect("127.0.0.1:9")
