"""Several acts on one store, call by call in an order that the test gives.

Each act runs in a thread of its own and stops before every call of `namr.store.storage`; a schedule says
whose turn it is. What an act does in threads of its own counts as part of the call before.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from namr.store import storage

_CALLS = (
    *("read", "read_with_etag", "write", "write_if_absent", "upload_if_absent", "replace_if_match"),
    *("list_entries", "delete", "exists", "size"),
)


class _Act:
    """One act, stopped before its first call."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.outcome: Future[Any] = Future()
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def step(self) -> bool:
        """On to the next call, or to the end; whether there is more to do."""
        if not self.outcome.done():
            self._go.release()
            assert self._stopped.acquire(timeout=60)
        return not self.outcome.done()

    def wait(self) -> None:
        """Called in the act's own thread before each call."""
        self._stopped.release()
        self._go.acquire()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self.outcome.set_result(self._work())
        except Exception as error:
            self.outcome.set_exception(error)
        self._stopped.release()


def run(acts: Sequence[Callable[[], Any]], schedule: Iterable[tuple[int, int]]) -> list[Future[Any]]:
    """What became of each act. schedule: pairs of an act and how many calls it goes on; then all, in turn."""
    running = [_Act(work) for work in acts]
    of_thread = {act.thread: act for act in running}

    def stopping(call: Callable[..., Any]) -> Callable[..., Any]:
        def stopped(*arguments: Any, **named: Any) -> Any:
            if act := of_thread.get(threading.current_thread()):
                act.wait()
            return call(*arguments, **named)

        return stopped

    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS:
            assert inspect.isfunction(getattr(storage, name))
            patch.setattr(storage, name, stopping(getattr(storage, name)))
        for at, num in schedule:
            for _ in range(num):
                running[at].step()
        for act in running:
            while act.step():
                pass
    return [act.outcome for act in running]


def num_calls(act: Callable[[], Any]) -> int:
    """How often an act stops, alone."""
    with pytest.MonkeyPatch.context() as patch:
        calls = [0]
        mine = threading.current_thread()

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **named: Any) -> Any:
                calls[0] += threading.current_thread() is mine
                return call(*arguments, **named)

            return counted

        for name in _CALLS:
            patch.setattr(storage, name, counting(getattr(storage, name)))
        act()
    return calls[0]
