"""What the crasher's people do, each command in a process of its own, repeated until it is confirmed.

Not covered: what kills them (`crasher`), and what has to hold afterwards (`truth`).
"""

import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, TextIO

from tests.soak import shortage, witness
from tests.soak.tally import Tally
from tests.soak.witness import START, Appointment

ROOT = Path(__file__).parents[2]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.soak.witness"])  # imports are most of what a small command takes
_LONGEST_S = 900.0
"""a night waits for workers that are killed again and again"""
_MOST_ATTEMPTS = 25
_MOST_HELD = 5
_APPOINTED = 8
"""of the attempts at one thing, so many may have an appointment to fail"""
HOWS = {"before": 6, "after": 3, "memory": 1, "disk": 1, "store": 1}
"""how a command fails by appointment, and how often"""


class Broken(AssertionError):
    """Something did not hold; the message says what."""


class Ended(NamedTuple):
    """How one process ended."""

    code: int
    last_line: str
    stage: str
    output: str

    @property
    def kind(self) -> str:
        """In a word or two."""
        if self.code < 0:
            return signal.Signals(-self.code).name
        return re.split(r"[:( ]", self.last_line)[0] if self.code else "confirmed"

    @property
    def is_refused(self) -> bool:
        """By a message that asks for something else; a Conflict and a store that is away pass by."""
        return self.code == 2 and self.kind in ("ConfigError", "ManifestError", "NamrError")


def start(
    words: Sequence[str], environment: Mapping[str, str], due: Appointment | None = None
) -> tuple[BaseProcess, TextIO]:
    """A command in a process of its own, and what it says, which the caller closes."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = _FORKS.Process(target=witness.run, args=(due, list(words), dict(environment), theirs))
    process.start()
    theirs.close()
    with ours:
        return process, os.fdopen(os.dup(ours.fileno()))


@dataclass
class Running:
    """A process that is under way."""

    name: str
    process: BaseProcess
    stage: str = START


@dataclass
class Told:
    """What happened so far, from all threads."""

    history_path: Path
    tally: Tally
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    """by command and how the process ended"""
    lock: threading.Lock = field(default_factory=threading.Lock)
    began: float = field(default_factory=time.monotonic)

    def says(self, line: str) -> None:
        """One more line of the history."""
        with self.lock, self.history_path.open("a") as history:
            print(f"{time.monotonic() - self.began:7.1f} {line}", file=history, flush=True)

    def last(self, num: int = 60) -> str:
        """The newest lines of the history."""
        lines = self.history_path.read_text().splitlines() if self.history_path.exists() else []
        return "\n".join(lines[-num:])

    def killed(self, what: str, under_way: Iterable[tuple[str, str]]) -> None:
        """Count one kill, and every command and stage that it hit."""
        hit = list(under_way)
        self.tally.killed(what, hit)
        self.says(f"KILL {what}: {', '.join(f'{name} in {stage}' for name, stage in hit) or 'nothing'}")


class Runner:
    """Runs commands of namr, and knows which are under way."""

    def __init__(
        self,
        environment: Callable[[], Mapping[str, str]],
        told: Told,
        *,
        seed: str,
        kill_store: Callable[[], None],
    ) -> None:
        """environment: of the next process."""
        self.told, self.stopped = told, threading.Event()
        self.under_way: list[Running] = []
        self.share = 0.0
        """of the attempts that get an appointment to fail"""
        self._environment, self._kill_store = environment, kill_store
        self._draw = random.Random(f"{seed} appointments")
        self._num_points: dict[tuple[str, str], int] = defaultdict(lambda: 1)
        self._lock = threading.Lock()

    def confirm(self, name: str, words: Sequence[str], *, may_be_refused: bool = False) -> Ended:
        """Run a command until it ends well; Broken where it never does.

        Given up are one that a lease keeps away again and again, and one that may be refused and is.
        """
        num_held = 0
        for attempt in range(_MOST_ATTEMPTS):
            ended = self._run(name, words, self._appointed(name, words) if attempt < _APPOINTED else None)
            self.told.ends[name, ended.kind] += 1
            self.told.says(f"{name} {ended.kind} in {ended.stage}: {ended.last_line[:300]}")
            num_held += ended.kind == "Conflict" and "is held by" in ended.last_line
            is_over = num_held == _MOST_HELD or (may_be_refused and ended.is_refused)
            if ended.code == 0 or is_over or self.stopped.is_set():
                return ended
            if ended.code > 0 and ended.code != 2:
                self.told.says(f"output of {name}:\n{ended.output}")
            self.stopped.wait(self._draw.uniform(0.5, 3))
        raise Broken(f"{name} did not end well in {_MOST_ATTEMPTS} attempts; the last said {ended.output}")

    def least_killed(self, names: Iterable[str]) -> str:
        """The command with the stage in which fewest failed so far, of some."""
        fewest = {
            name: min(self.told.tally.num_hits(of, stage) for of, stage in witness.all_stages() if of == name)
            for name in names
        }
        with self._lock:
            return self._draw.choice([name for name, num in fewest.items() if num == min(fewest.values())])

    def _appointed(self, name: str, words: Sequence[str]) -> Appointment | None:
        """In the stage in which fewest failed so far; rather early in it, so that it is met."""
        with self._lock:
            if self._draw.random() >= self.share:
                return None
            num = {stage: self.told.tally.num_hits(name, stage) for stage in witness.stages_of(words)}
            stage = self._draw.choice([each for each in num if num[each] == min(num.values())])
            (how,) = self._draw.choices(list(HOWS), list(HOWS.values()))
            return Appointment(stage, int(self._num_points[name, stage] * self._draw.random() ** 2), how)

    def _run(self, name: str, words: Sequence[str], due: Appointment | None) -> Ended:
        process, output = start(words, self._environment(), due)
        running = Running(name, process)
        with self._lock:
            self.under_way.append(running)
        watch = threading.Timer(_LONGEST_S, _tell_and_kill, [process])
        watch.start()
        try:
            with output:
                lines = self._followed(running, output)
            process.join()
        finally:
            is_late = not watch.is_alive()
            watch.cancel()
            with self._lock:
                self.under_way.remove(running)
        if is_late:
            raise Broken(f"{name} did not end in {_LONGEST_S:.0f} s:\n{''.join(lines)}")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return Ended(process.exitcode or 0, last, running.stage, "".join(lines[-60:]))

    def _followed(self, running: Running, said: TextIO) -> list[str]:
        """The lines that people would see; the witness's own move `running` on."""
        lines: list[str] = []
        for line in said:
            if not line.startswith("@"):
                lines.append(line)
                continue
            word, _, of = line[1:].strip().partition("|")
            if word == "failing":
                what = "driver" if of in ("before", "after") else of
                if what == "store":
                    self._kill_store()
                    continue
                self.told.killed(what, [(running.name, running.stage)])
                if what == "memory":  # threads that can't be started leave others waiting for them
                    threading.Timer(shortage.KILLED_AFTER_S, running.process.kill).start()
                continue
            seen = running.name, running.stage
            self._num_points[seen] = max(self._num_points[seen], int(of))
            running.stage = word
        return lines


def _tell_and_kill(process: BaseProcess) -> None:
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR1)  # the witness tells where each of its threads is
        time.sleep(3)
        process.kill()
