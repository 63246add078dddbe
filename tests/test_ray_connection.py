import random
import subprocess
import time

import pytest

from namr import ray_connection
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
    results = dict(ray_connection.map_tasks(squared, range(6), max_in_flight=2))
    assert results == {number: number**2 for number in range(6)}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_task_that_fails_raises_its_own_exception() -> None:
    with pytest.raises(ConfigError, match="seven is not allowed"):
        list(ray_connection.map_tasks(squared, range(30)))


FAILS_OFTEN = """
from tests import test_ray_connection
from namr import errors, ray_connection
ray_connection.connect(None, num_cpus=2)
for _ in range(600):
    try:
        list(ray_connection.map_tasks(test_ray_connection.squared_after_a_moment, range(4, 16)))
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
    assert list(ray_connection.map_tasks(squared, [])) == []


def test_an_address_where_nothing_listens_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_connection.ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"no Ray answers at '127\.0\.0\.1:9'"):
        ray_connection.connect("127.0.0.1:9")
