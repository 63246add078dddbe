"""A command of namr in a process of its own, which tells its stages and keeps an appointment to fail.

A line `@<stage>|<calls>` tells that a stage began, and how many calls to the store the one before it made;
`@end|<calls>` that all ended well. An appointment is kept at some call of some stage:

    before, after   the process kills itself (SIGKILL) just before the call, or just after it
    memory          from then on the process gets hardly any more memory
    disk            from then on it can't write a byte to any file, as on a full disk

SIGUSR1 shows where each thread is. Only functions are wrapped: the command is the one that people run.
"""

import faulthandler
import importlib
import inspect
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from namr import cli
from namr.data import packing
from namr.nightly import reindexing
from namr.serve import process
from namr.store import storage

ROOT = Path(__file__).parents[2]
PRELOADED = (packing, process, reindexing)
"""with `cli` all that commands import, for the process that they are forked from"""

STAGES: dict[str, dict[str, tuple[str, str]]] = {
    "jobs/pack.py": {
        "find images": ("namr.data.packing", "_own_work"),
        "write shards": ("namr.data.packing", "_run"),
        "publish": ("namr.data.datasets", "publish_version"),
    },
    "jobs/reindex.py": {
        "extract": ("namr.embed.extraction", "extract"),
        "build": ("namr.nightly.building", "make"),
        "measure": ("namr.nightly.measuring", "measure"),
        "judge": ("namr.nightly.gate", "check"),
        "publish": ("namr.release.publication", "publish"),
        "collect": ("namr.nightly.collection", "collect"),
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
    "rollback": {
        "verify": ("namr.release.publication", "roll_back"),
        "swap": ("namr.store.manifests", "swap_pointer"),
    },
    "releases unpin": {"unpin": ("namr.release.publication", "unpin")},
    "jobs/serve.py": {},
}
"""By command the stages in their order, each with the function that begins it."""
START = "start"
"""Before the first stage: imports, flags, the lease."""
_HARDLY_ANY_BYTES = 16 << 20


class Appointment(NamedTuple):
    """To fail in this way at that call to the store, counted from 0, of that stage."""

    stage: str
    num_calls: int
    how: str


class _Told:
    """Where the process is: a stage, and the calls that it made in it."""

    def __init__(self, appointment: Appointment | None) -> None:
        self.stage, self.num_calls, self._appointment = START, 0, appointment

    def begins(self, stage: str) -> None:
        print(f"@{stage}|{self.num_calls}", file=sys.stderr, flush=True)
        self.stage, self.num_calls = stage, 0

    def calls(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        due = self._appointment
        is_due = due is not None and due[:2] == (self.stage, self.num_calls)
        self.num_calls += 1
        if due is None or not is_due:
            return call(*arguments, **named)
        if due.how == "after":
            call(*arguments, **named)
        _fail(due.how)
        return call(*arguments, **named)


def _fail(how: str) -> None:
    print(f"@failing|{how}", file=sys.stderr, flush=True)
    if how == "memory":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _HARDLY_ANY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    elif how == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
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


def run(due: Appointment | None, command: list[str], environment: dict[str, str], said: Connection) -> None:
    """The life of a process that runs one command; all that it says goes to `said`."""
    for standard in (1, 2):
        os.dup2(said.fileno(), standard)
    said.close()
    os.environ.update(environment)
    os.chdir(ROOT)
    faulthandler.register(signal.SIGUSR1)
    told = _Told(due)

    def beginning(stage: str) -> Callable[..., Any]:
        def begins(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            told.begins(stage)
            return call(*arguments, **named)

        return begins

    for stage, (module, function) in stages_of(command).items():
        _wrap(importlib.import_module(module), function, beginning(stage))
    for function in STORE_CALLS:
        _wrap(storage, function, told.calls)
    sys.argv = command
    if command[0] == "namr":
        cli.main()
    else:
        runpy.run_path(command[0], run_name="__main__")
    print(f"@end|{told.num_calls}", file=sys.stderr, flush=True)
