"""What rank 0 tells while it trains: numbers to MLflow, and how far it is to whoever shows it.

Numbers are sent by a thread, in order, so a server that is slow or away never holds up a step. What was not
taken yet is tried again, travels with each checkpoint, and goes on from there in whoever resumes the run. An
entry keeps the time at which it was written: MLflow takes the same number of the same time once, so one whose
answer was lost is not there twice. Steps that are done again, after workers were lost, are not told again:
what MLflow has of a step before the first entry is sent, it keeps.

Not covered: numbers of the other ranks (they are the same).
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from namr.errors import StorageError
from namr.registry.registry import Registry

_MOST_ENTRIES = 100_000
"""Kept while MLflow is away, some 100 MB: of a million steps."""
_UNSENT_FILE = "unsent.json"
_AFTER_A_FAILURE_S = 10.0


class Entry(NamedTuple):
    """The numbers of one step."""

    step: int
    time_ms: int
    """When they were written, since 1970."""
    numbers: dict[str, float]


class Diary:
    """A context manager: at its end what is left is sent, or told."""

    def __init__(
        self,
        runs: Registry,
        run_id: str,
        say: Callable[[int, str], object],
        *,
        unsent: Iterable[Entry] = (),
        retry_s: float = 5.0,
        wait_s: float = 60.0,
    ) -> None:
        """unsent: `read_unsent` of the checkpoint. wait_s: how long the end waits for what is left."""
        self._runs, self._run_id, self._say = runs, run_id, say
        self._retry_s, self._wait_s = retry_s, wait_s
        self._unsent = deque(unsent)
        self._num_dropped = 0
        self._told: dict[str, int] = {}
        self._fault: StorageError | None = None
        self._changed = threading.Condition()
        self._closing, self._given_up = threading.Event(), threading.Event()
        threading.Thread(target=self._send, name="namr-diary", daemon=True).start()

    def write(self, numbers: dict[str, float], *, step: int) -> None:
        """Keep numbers, to be sent soon. Returns at once."""
        with self._changed:
            if len(self._unsent) < _MOST_ENTRIES:
                self._unsent.append(Entry(step, time.time_ns() // 1_000_000, numbers))
            else:
                self._num_dropped += 1
            fault, num_kept = self._fault, len(self._unsent)
            self._changed.notify_all()
        if fault is not None:
            self.say(step, f"(MLflow: {fault}; kept {num_kept} entries)")

    def say(self, step: int, words: str) -> None:
        """How far it is."""
        self._say(step, words)

    def write_unsent(self, folder: Path) -> None:
        """Write what was not sent yet into a checkpoint's folder."""
        with self._changed:
            entries = list(self._unsent)
        (folder / _UNSENT_FILE).write_text(json.dumps(entries))

    def close(self) -> None:
        """Send what is left; StorageError if MLflow didn't take all of it in time."""
        num_left = self._drain(self._wait_s)
        if num_left or self._num_dropped:
            lost = f"; {self._num_dropped} more did not fit and are lost" if self._num_dropped else ""
            raise StorageError(
                f"{num_left} entries of run {self._run_id} were not taken by MLflow within {self._wait_s:g} s"
                f" ({self._fault or 'no answer'}){lost}. The last checkpoint has them: go on under the same "
                "run name when MLflow is back"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._drain(min(self._wait_s, _AFTER_A_FAILURE_S))  # the failure is worth more than what is left

    def _drain(self, wait_s: float) -> int:
        """Wait until all is sent or the time is over, then stop. -> how many entries are left."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._unsent, wait_s)
            self._given_up.set()
            return len(self._unsent)

    def _send(self) -> None:
        while (entry := self._next()) is not None:
            try:
                if entry.step > self._last_told(next(iter(entry.numbers))):
                    self._runs.log_metrics(
                        self._run_id, entry.numbers, step=entry.step, time_ms=entry.time_ms
                    )
            except StorageError as error:
                with self._changed:
                    self._fault = error
                    self._changed.notify_all()
                if self._closing.wait(self._retry_s):
                    self._given_up.wait(min(self._retry_s, 1.0))
                continue
            with self._changed:
                self._fault = None
                self._unsent.popleft()
                self._changed.notify_all()

    def _last_told(self, name: str) -> int:
        """The last step of which MLflow had this number before this diary sent any; -1 where it had none.

        The numbers of one step are sent together, so one of them stands for all.
        """
        if name not in self._told:
            steps = [step for step, _ in self._runs.history(self._run_id, name)]
            self._told[name] = max(steps, default=-1)
        return self._told[name]

    def _next(self) -> Entry | None:
        """The oldest entry, when there is one; None when there is no more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._unsent or self._closing.is_set())
            return self._unsent[0] if self._unsent and not self._given_up.is_set() else None


def read_unsent(folder: Path) -> list[Entry]:
    """What `write_unsent` wrote into a checkpoint; nothing for a checkpoint of before it did."""
    path = folder / _UNSENT_FILE
    return [Entry(*fields) for fields in json.loads(path.read_text())] if path.exists() else []
