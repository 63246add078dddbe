"""What a call takes: processor time and anonymous memory, in a process of its own.

Processes are forked from one that has imported what is heavy and done nothing else, so a call begins with the
same memory whatever was called before it. Its memory is looked at from outside, every few milliseconds
(RssAnon of /proc/<pid>/status): pages of mapped files don't count, and a peak that is shorter can be missed.

Not covered: memory that processes share, and calls that start processes of their own (`Tasks` does that).
"""

import functools
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

A = TypeVar("A")
R = TypeVar("R")

_INTERVAL_S = 0.005
_IMPORTED = ["pandas", "pyarrow.dataset", "pyarrow.pandas_compat", "tests.scale_stages"]
"""heavy, or imported where it is first used"""


class Used(NamedTuple):
    """What one call took."""

    cpu_s: float
    wall_s: float
    peak_bytes: int
    """anonymous memory at its highest, above what the process had before"""
    held_bytes: int
    """what is left of it when the call has returned"""


class Process:
    """A process that makes calls, one after the other, and keeps what they leave in its modules."""

    def __enter__(self) -> Self:
        context = _context()
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        self._ours.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()  # which ends it
        self._process.join()

    def call(self, function: Callable[..., R], *arguments: Any) -> tuple[R, Used]:
        """What a function of a module returns, and what it took; an exception of it is raised here."""
        pid = self._process.pid
        assert pid is not None
        self._ours.send(function)
        self._ours.recv()  # its module is there, also where the processes' parent was another's before
        before = peak = anonymous_bytes(pid)
        begun = time.perf_counter()
        self._ours.send(arguments)
        while not self._ours.poll(_INTERVAL_S):
            peak = max(peak, anonymous_bytes(pid))
        try:
            result, cpu_s = self._ours.recv()
            wall_s = time.perf_counter() - begun
            self._ours.recv()  # the process has let go of the result
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{function.__name__} ended with code {self._process.exitcode}") from None
        if isinstance(result, Exception):
            raise result
        return result, Used(cpu_s, wall_s, peak - before, anonymous_bytes(pid) - before)


class Tasks:
    """Stands in for Ray: tasks one after the other, each in a process of its own, and what they took."""

    def __init__(self) -> None:
        self.used: dict[str, list[Used]] = {}

    def map_tasks(
        self, function: Callable[[A], R], arguments: Iterable[A], **_: object
    ) -> Iterator[tuple[int, R]]:
        """As `ray_connection.map_tasks`."""
        for at, argument in enumerate(arguments):
            with Process() as process:
                result, used = process.call(function, argument)
            self.used.setdefault(function.__name__, []).append(used)
            yield at, result


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file stands behind; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) << 10 if found else 0


@functools.cache
def _context() -> ForkServerContext:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait spin else, and their time counts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def _serve(connection: Connection) -> None:
    connection.send(None)
    while True:
        try:
            function = connection.recv()
            connection.send(None)
            arguments = connection.recv()
        except EOFError:
            return
        begun = time.process_time()
        try:
            result = function(*arguments)
        except Exception as error:  # raised where the call was made
            result = error
        connection.send((result, time.process_time() - begun))
        del function, arguments, result
        gc.collect()
        connection.send(None)
