"""The one way to reach Ray: a cluster at an address, or a local one of this process.

Token authentication is set on purpose and not by what an earlier `ray.init` left behind: it is off unless
RAY_AUTH_MODE says otherwise. The address is always passed, so that no forgotten cluster is joined by chance.
"""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from namr import progress
from namr.errors import ConfigError

A = TypeVar("A")
R = TypeVar("R")


def connect(address: str | None = None, *, num_cpus: int | None = None) -> None:
    """Connect to the Ray at `address`; None is RAY_ADDRESS where a submitted job has it, else a local Ray.

    num_cpus: of a local Ray; None takes the cores of this machine. What workers of a local Ray print stays in
    Ray's own logs; their exceptions come here. Connecting again does nothing.
    ConfigError if nothing answers at the address.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    chosen = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_answers(chosen)
    local: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if chosen == "local" else {}
    try:
        ray.init(address=chosen, log_to_driver=chosen != "local", logging_level=logging.WARNING, **local)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray answers at {chosen!r}: {error}; start one, or leave the address out"
        ) from error


def disconnect() -> None:
    """Leave Ray, and end it if it was a local one."""
    ray.shutdown()


def total_cpus() -> int:
    """Cores of the whole Ray that is connected."""
    return int(_resources().get("CPU", 1))


def total_gpus() -> int:
    """GPUs of the whole Ray that is connected."""
    return int(_resources().get("GPU", 0))


def map_tasks(
    function: Callable[[A], R],
    arguments: Iterable[A],
    *,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    max_in_flight: int | None = None,
) -> Iterator[tuple[int, R]]:
    """Run `function` on each argument as Ray tasks; yields (position, result) as they end.

    At most `max_in_flight` (default: twice the cores) are under way, so a million arguments need no million
    futures. A task sees the GPUs that it has, and no other. The exception of one is raised here, at once, and
    no more are started. Those under way are left to end by themselves or with the job: ray.cancel of a task
    that is just ending aborts the whole process (Ray 2.60, "Tried to complete task that was not pending").
    """
    remote: Any = ray.remote(function)
    limit = max_in_flight or 2 * max(1, total_cpus())
    under_way: dict[Any, int] = {}
    waiting = enumerate(arguments)
    while True:
        for position, argument in waiting:
            options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
            under_way[remote.options(**options).remote(argument)] = position
            if len(under_way) >= limit:
                break
        if not under_way:
            return
        done, _ = ray.wait(list(under_way), num_returns=1)
        yield under_way.pop(done[0]), _result(done[0])


def tasks_in_order(function: Callable[[A], R], arguments: Iterable[A], *, max_in_flight: int) -> Iterator[R]:
    """`map_tasks` without positions, its results in the order of the arguments.

    An argument is drawn when fewer than `max_in_flight` results are waited for or not taken yet, so that
    memory has so many at most.
    """
    remote: Any = ray.remote(function)
    under_way: deque[Any] = deque()
    for argument in arguments:
        under_way.append(remote.remote(argument))
        if len(under_way) == max_in_flight:
            yield _result(under_way.popleft())
    while under_way:
        yield _result(under_way.popleft())


def in_order(
    what: str,
    function: Callable[[A], R],
    arguments: Iterable[A],
    *,
    num: int | None = None,
    num_gpus: float = 0.0,
) -> list[R]:
    """What Ray tasks made of each argument, in the order of the arguments; progress is shown as `what`.

    num: how many arguments there are, each made when it is its turn; None: they are there already.
    """
    if num is None:
        arguments = there = list(arguments)
        num = len(there)
    results: dict[int, R] = {}
    with progress.shown(what, num) as show:
        for at, result in map_tasks(function, arguments, num_gpus=num_gpus):
            results[at] = result
            show(len(results), "")
    return [results[at] for at in range(num)]


def _result(task: Any) -> Any:
    """What a task returned; its exception as it was raised there."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None if isinstance(error.cause, Exception) else error


def _resources() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes where nothing listens; this asks first."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray answers at {address!r}: {error}; start one, or leave the address out for a local one"
        ) from error
