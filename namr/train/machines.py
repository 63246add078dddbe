"""System metrics of each machine of a run, in the run's own metrics: one process of a machine sends them.

They are sent by a diary of their own, so that a server that is away holds nothing up; what it didn't take by
the end is dropped, since no result depends on it.

Not covered: what is measured (`registry.system_metrics`).
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from namr.errors import StorageError
from namr.registry.registry import Registry
from namr.registry.system_metrics import Sample
from namr.train.diary import Diary

_WAIT_S = 5.0


@contextmanager
def watched(runs: Registry, run_id: str, sample: Sample, *, every_s: float) -> Iterator[None]:
    """While inside, what `sample` measures is sent every so many seconds.

    Its step is the number of such intervals since 1970: a run that goes on goes on with it.
    """
    diary = Diary(runs, run_id, lambda *_: None, wait_s=_WAIT_S)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            diary.write(sample(), step=int(time.time() // every_s))

    watcher = threading.Thread(target=watch, name="namr-machine", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(_WAIT_S)
        with suppress(StorageError):
            diary.close()
