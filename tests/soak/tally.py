"""What was killed and looked at since, kept as JSON lines over any number of runs, and told as a table.

A kill counts once a look that began after it has found everything whole: what a run had not looked at when it
was ended itself is left out.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak import witness

COLUMNS = (
    *("driver", "worker", "raylet", "store", "reader"),
    *("memory", "disk", "worker's memory", "worker's disk"),
)
"""what is killed, or gets no more of something"""


@dataclass
class Tally:
    """Counts of all runs whose lines are in a file, this one's included; in memory alone without a file."""

    path: Path | None = None
    seed: int = 0
    hits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """by command, stage and what was killed; what several commands run on counts for each"""
    num_kills: Counter[str] = field(default_factory=Counter)
    """by what was killed"""
    sums: Counter[str] = field(default_factory=Counter)
    """of what rounds say of themselves at their end"""
    num_seen: int = 0
    """kills of this run"""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.path and self.path.exists():
            self._read(self.path.read_text().splitlines())
        self.sums["runs"] += 1
        self._write(run=self.seed)

    def killed(self, what: str, hit: Iterable[tuple[str, str]]) -> None:
        """One kill, and every command and stage that it hit."""
        with self._lock:
            self._add(what, hit)
            self.num_seen += 1
            self._write(killed=what, hit=list(hit))

    def looked(self, num: int) -> None:
        """Everything is whole after the first so many kills of this run."""
        with self._lock:
            self.sums["looks"] += 1
            self._write(looked=num)

    def ended(self, **numbers: int) -> None:
        """What a round that ended well says of itself."""
        with self._lock:
            self.sums.update(numbers, rounds=1)
            self._write(ended=numbers)

    def num_hits(self, name: str, stage: str) -> int:
        """Of one stage, by whatever."""
        return sum(self.hits[name, stage, what] for what in COLUMNS)

    @property
    def fewest(self) -> int:
        """Of the stage that has seen the fewest."""
        return min(self.num_hits(*of) for of in witness.all_stages())

    def table(self) -> str:
        """What was killed in which stage, as Markdown."""
        shown = [what for what in COLUMNS if any(of[2] == what for of in self.hits)]
        lines = [
            f"| command | stage | all | {' | '.join(shown)} |",
            "| --- | --- |" + " --- |" * (len(shown) + 1),
        ]
        others = sorted({of[:2] for of in self.hits}.difference(witness.all_stages()))
        for name, stage in [*witness.all_stages(), *others]:
            numbers = [self.num_hits(name, stage), *(self.hits[name, stage, what] for what in shown)]
            lines.append(f"| {name} | {stage} | {' | '.join(str(each or '') for each in numbers)} |")
        return "\n".join(lines)

    def in_words(self) -> str:
        """All of it but the table, in one line."""
        of_each = ", ".join(f"{what} {num}" for what, num in self.num_kills.most_common())
        told = ", ".join(f"{name} {num}" for name, num in self.sums.items())
        return f"{self.num_kills.total()} kills ({of_each}) in {self.minutes:.0f} minutes; {told}"

    @property
    def minutes(self) -> float:
        """Of all runs."""
        return (self._earlier_s + time.monotonic() - self._began) / 60

    _earlier_s: float = 0.0

    def _add(self, what: str, hit: Iterable[tuple[str, str]]) -> None:
        self.num_kills[what] += 1
        for name, stage in hit:
            self.hits[name, stage, what] += 1

    def _read(self, lines: list[str]) -> None:
        kills: list[dict[str, Any]] = []
        looked, last_s = 0, 0.0

        def end_run() -> None:
            for kill in kills[:looked]:
                self._add(kill["killed"], map(tuple, kill["hit"]))
            self._earlier_s += last_s

        for line in map(json.loads, lines):
            if "run" in line:
                end_run()
                kills, looked = [], 0
                self.sums["runs"] += 1
            elif "killed" in line:
                kills.append(line)
            elif "looked" in line:
                looked = max(looked, line["looked"])
                self.sums["looks"] += 1
            else:
                self.sums.update(line["ended"], rounds=1)
            last_s = line["at_s"]
        end_run()

    def _write(self, **line: Any) -> None:
        if self.path:
            with self.path.open("a") as file:
                print(json.dumps({**line, "at_s": round(time.monotonic() - self._began, 1)}), file=file)
