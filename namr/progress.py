"""How far long work has come and how long it will take: a bar on a terminal, a line every 30 s in a log.

Not covered: collecting progress from other processes; whoever shows it has to know it.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_INTERVAL_S = 30.0

Show = Callable[[int, str], None]
"""Say how many are done, and a few words."""


@contextmanager
def shown(
    what: str,
    total: int,
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    interval_s: float = LINE_INTERVAL_S,
) -> Iterator[Show]:
    """While inside, what is told to the yielded function is shown on `stream` (standard error).

    interval_s: between two lines of a log; 0 is a line each time.
    """
    out = stream or sys.stderr
    if out.isatty():
        with _bar(what, total, out) as show:
            yield show
    else:
        yield _lines(what, total, out, clock, interval_s)


@contextmanager
def _bar(what: str, total: int, out: TextIO) -> Iterator[Show]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[words]}"))  # fmt: skip
    with Progress(*columns, console=Console(file=out)) as bar:
        task = bar.add_task(what, total=total, words="")
        yield lambda done, words: bar.update(task, completed=done, words=words)


def _lines(what: str, total: int, out: TextIO, clock: Callable[[], float], interval_s: float) -> Show:
    last, ended = clock(), False
    first: tuple[float, int] | None = None  # work that goes on doesn't begin at 0

    def show(done: int, words: str) -> None:
        nonlocal last, ended, first
        now = clock()
        first = first or (now, done)
        if ended or (done < total and now - last < interval_s):
            return
        last, ended = now, done >= total
        left = _left(now - first[0], done - first[1], total - done)
        print(" ".join(filter(None, (f"{what}: {done} of {total}", words, left))), file=out, flush=True)

    return show


def _left(seconds: float, num_done: int, num_left: int) -> str:
    """How long what is left takes at the pace so far; empty where there is none yet."""
    if num_left <= 0 or num_done <= 0 or seconds <= 0:
        return ""
    return f"({timedelta(seconds=round(seconds / num_done * num_left))} left)"
