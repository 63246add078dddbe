import random
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator

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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_tasks_in_order_draw_an_argument_when_a_result_is_taken() -> None:
    drawn: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(8, 20):
            drawn.append(number)
            yield number

    results = ray_connection.tasks_in_order(squared_after_a_moment, numbers(), max_in_flight=3)
    assert next(results) == 64 and drawn == [8, 9, 10]
    assert list(results) == [number**2 for number in range(9, 20)]
    with pytest.raises(ConfigError, match="seven is not allowed"):
        list(ray_connection.tasks_in_order(squared, range(9), max_in_flight=2))


@pytest.mark.parametrize("is_made_by_turns", [False, True])
def test_results_are_in_the_order_of_arguments_however_these_are_made(
    is_made_by_turns: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tasks, which stand in for Ray's, end two by two, the second first."""
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number

    def by_two(function: Callable[[int], int], arguments: Iterable[int], **_: object):
        waiting = enumerate(arguments)
        for at, first in waiting:
            yield from [(at + 1, function(next(waiting)[1])), (at, function(first))]
            if is_made_by_turns:
                assert len(made) == at + 2

    monkeypatch.setattr(ray_connection, "map_tasks", by_two)
    found = ray_connection.in_order("squaring", squared, numbers(), num=4 if is_made_by_turns else None)
    assert found == [0, 1, 4, 9]
    assert capsys.readouterr().err == "squaring: 4 of 4\n"


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
