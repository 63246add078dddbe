"""A real HTTP server around an app, in a thread of the test process."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from namr.serve import server


@contextmanager
def running(app: FastAPI, *, header_timeout_s: float = 10.0) -> Iterator[str]:
    """The address of the app, which listens until the block ends."""
    with server.listen("127.0.0.1", 0) as listening:
        made = server.make(app, header_timeout_s=header_timeout_s)
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]})
        thread.start()
        deadline = time.monotonic() + 30
        while not made.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            made.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not stop"


def wait_for(said: Callable[[], object], wanted: object) -> None:
    """Until something says what is wanted of it; an AssertionError after a time that no machine needs."""
    deadline = time.monotonic() + 60
    while said() != wanted:
        assert time.monotonic() < deadline, f"{said()} is not yet {wanted}"
        time.sleep(0.02)
