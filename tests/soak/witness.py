"""A command of namr in a process of its own, which tells its stages and keeps an appointment to fail.

A line `@<stage>|<points>` tells that a stage began, and how many points the one before it had: its beginning,
and every call to the store; `@end|<points>` that all ended well. An appointment is kept at some point of some
stage:

    before, after   the process kills itself (SIGKILL) just before the call, or just after it
    store           whoever reads the line kills the store
    memory          from then on the process gets hardly any more memory
    disk            from then on it can't write a byte to any file, as on a full disk

SIGUSR1 shows where each thread is. Functions are wrapped, and a lease that nobody renews ends in 10 s and not
in 30, since whoever comes after a kill waits for that; else the command is the one that people run.
"""

import faulthandler
import importlib
import inspect
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from namr import cli
from namr.data import packing
from namr.nightly import reindexing
from namr.serve import process
from namr.store import storage
from namr.store.lease import Lease
from tests.soak import shortage

ROOT = Path(__file__).parents[2]
PRELOADED = (packing, process, reindexing)
"""with `cli` all that commands import, for the process that they are forked from"""

_MADE = {
    "extract": ("namr.embed.extraction", "extract"),
    "build": ("namr.nightly.building", "make"),
    "measure": ("namr.nightly.measuring", "measure"),
    "report": ("namr.nightly.measuring", "with_reports"),
    "judge": ("namr.nightly.gate", "check"),
}
_PUBLISH = {"publish": ("namr.release.publication", "publish")}
_NIGHT = {**_MADE, **_PUBLISH, "collect": ("namr.nightly.collection", "collect")}
STAGES: dict[str, dict[str, tuple[str, str]]] = {
    "jobs/pack.py": {
        "find images": ("namr.data.packing", "_own_work"),
        "write shards": ("namr.data.packing", "_run"),
        "publish": ("namr.data.datasets", "publish_version"),
    },
    "jobs/reindex.py --prepare": {**_MADE, "keep": ("namr.release.publication", "keep")},
    "jobs/reindex.py --no-compact": _NIGHT,
    "jobs/reindex.py": {**_NIGHT, "compact": ("namr.nightly.compacting", "attempt")},
    "jobs/compact.py": {
        "look": ("namr.nightly.compacting", "_due"),
        "build": ("namr.release.compaction", "build"),
        "compare": ("namr.nightly.likeness", "check"),
        "report": ("namr.nightly.measuring", "with_reports"),
        **_PUBLISH,
    },
    "takedown": {
        "find": ("namr.data.datasets", "open_version"),
        "list": ("namr.release.takedowns", "take_down"),
        "dataset": ("namr.data.datasets", "tombstone"),
    },
    "releases collect": {
        "look": ("namr.release.garbage", "collect"),
        "doom": ("namr.release.doomed", "add"),
        "delete": ("namr.release.garbage", "_delete"),
        "embeddings": ("namr.release.old_embeddings", "collect"),
    },
    "releases publish": {"look": ("namr.release.prepared", "switch"), **_PUBLISH},
    "rollback": {
        "verify": ("namr.release.publication", "roll_back"),
        "swap": ("namr.store.manifests", "swap_pointer"),
    },
    "releases unpin": {"unpin": ("namr.release.publication", "unpin")},
    "jobs/serve.py": {},
}
"""By command the stages in their order, each with the function that begins it; the first that fits counts."""
COMMANDS = {
    "pack": "jobs/pack.py",
    "takedown": "takedown",
    "night": "jobs/reindex.py",
    "collect": "releases collect",
    "compaction": "jobs/compact.py",
    "rollback": "rollback",
    "unpin": "releases unpin",
    "prepare": "jobs/reindex.py --prepare",
    "switch": "releases publish",
}
"""How they are called here, each with its first words."""
WITH_WORKERS = {"write shards", "extract", "build", "compact"}
"""Stages that have Ray's workers do something."""
START = "start"
"""Before the first stage: imports, flags, the lease."""
_KILLED_WITHIN_S = 0.5
_LEASE = {"ttl_s": 10.0, "renew_s": 2.0}


class Appointment(NamedTuple):
    """To fail in this way at that point of that stage, counted from 0."""

    stage: str
    num_points: int
    how: str


class _Told:
    """Where the process is: a stage, and the points that it passed in it."""

    def __init__(self, appointment: Appointment | None, stages: Iterable[str]) -> None:
        self._appointment, self._ahead = appointment, [*stages]
        self._stage, self.num_points = START, 0

    def begins(self, stage: str) -> None:
        """Stages only ever go on: what a later one calls of an earlier one is its own."""
        if stage not in self._ahead:
            return
        del self._ahead[: self._ahead.index(stage) + 1]
        print(f"@{stage}|{self.num_points}", file=sys.stderr, flush=True)
        self._stage, self.num_points = stage, 0
        self.calls(lambda: None)

    def calls(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        due = self._appointment
        is_due = due is not None and due[:2] == (self._stage, self.num_points)
        self.num_points += 1
        if due is None or not is_due:
            return call(*arguments, **named)
        if due.how == "after":
            call(*arguments, **named)
        _fail(due.how)
        return call(*arguments, **named)


def _fail(how: str) -> None:
    print(f"@failing|{how}", file=sys.stderr, flush=True)
    if how == "memory":
        shortage.of_memory(os.getpid())
    elif how == "disk":
        shortage.of_disk(os.getpid())
    elif how == "store":
        time.sleep(_KILLED_WITHIN_S)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def _wrap(module: ModuleType, name: str, around: Callable[..., Any]) -> None:
    wrapped = getattr(module, name)
    assert inspect.isfunction(wrapped), f"{module.__name__}.{name} is no function any more"
    setattr(module, name, lambda *arguments, **named: around(wrapped, *arguments, **named))


STORE_CALLS = (
    *("read", "read_with_etag", "write", "write_if_absent", "upload_if_absent", "move_if_absent", "size"),
    *("replace_if_match", "list_entries", "delete", "download", "check_writable", "clear_leftovers"),
)


def stages_of(command: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The stages of a command, `jobs/<name>.py ...` or `namr <words> ...`."""
    words = " ".join(command).removeprefix("namr ")
    return next(stages for name, stages in STAGES.items() if words.startswith(name))


def all_stages() -> list[tuple[str, str]]:
    """Of all commands, in order."""
    return [(name, stage) for name, words in COMMANDS.items() for stage in stages_of([words])]


def run(due: Appointment | None, command: list[str], environment: dict[str, str], said: Connection) -> None:
    """The life of a process that runs one command; all that it says goes to `said`."""
    for standard in (1, 2):
        os.dup2(said.fileno(), standard)
    said.close()
    os.environ.update(environment)
    os.chdir(ROOT)
    faulthandler.register(signal.SIGUSR1)
    stages = stages_of(command)
    told = _Told(due, stages)

    def beginning(stage: str) -> Callable[..., Any]:
        def begins(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            told.begins(stage)
            return call(*arguments, **named)

        return begins

    for stage, (module, function) in stages.items():
        _wrap(importlib.import_module(module), function, beginning(stage))
    for function in STORE_CALLS:
        _wrap(storage, function, told.calls)
    Lease.take.__func__.__kwdefaults__ |= _LEASE  # type: ignore[attr-defined]
    sys.argv = command
    if command[0] == "namr":
        cli.main()
    else:
        runpy.run_path(command[0], run_name="__main__")
    print(f"@end|{told.num_points}", file=sys.stderr, flush=True)
