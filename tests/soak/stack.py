"""What the crasher's commands run on: an S3 server behind a proxy that fails, and a Ray.

The server can be killed and is started again where it was. Where raylets are to be killed Ray has two nodes:
drivers connect to the head, which has no cores, and tasks run on the other, which another one replaces.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from infra import services
from infra.processes import Program, free_ports
from infra.services import ObjectStore, RayCluster, RayNode
from tests.soak import failing, shortage
from tests.soak.failing import Failing

BUCKET = "crasher"
A = TypeVar("A")
B = TypeVar("B")
_NODE = RayNode(num_cpus=2)
_RAY_ENVIRONMENT = {"RAY_worker_niceness": "0"}
"""workers give way to nothing: on a busy machine a run would stand still"""


class Stack:
    """All of it, running; made by `running`."""

    def __init__(self, folder: Path, *, seed: int, with_raylets: bool, exits: ExitStack) -> None:
        self._folder = folder
        *self._ports, proxy_port = free_ports(services.NUM_STORE_PORTS + 1)
        self._interrupting = threading.Lock()
        # What a thread starts ends with that thread (infra.processes), so one of them starts everything.
        self._starter = exits.enter_context(ThreadPoolExecutor(1))
        self._of_store = exits.enter_context(ExitStack())
        self.store = self._started(self._store, None)
        self.store.create_bucket(BUCKET)
        self.environment = {**self.store.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy_port}"}
        head = [RayNode(num_cpus=0)] if with_raylets else []
        cluster = services.ray_cluster(
            folder / "ray", nodes=[*head, _NODE], environment={**self.environment, **_RAY_ENVIRONMENT}
        )
        ray = self._starter.submit(exits.enter_context, cluster)  # while the proxy's process imports
        self.proxy: Failing = exits.enter_context(
            failing.failing_proxy(self.store.endpoint, port=proxy_port, share=0, seed=seed)
        )
        self.ray: RayCluster = ray.result()

    def interrupt_store(self, *, away_s: float) -> bool:
        """End the S3 server and all that it started, unasked, and start it again where it was.

        False where somebody is at it already, or it has to stay.
        """
        if not self._interrupting.acquire(blocking=False):
            return False
        try:
            assert self.store.program is not None
            self.store.program.kill()
            time.sleep(away_s)
            self._of_store.close()
            self.store = self._started(self._store, self.store)
        finally:
            self._interrupting.release()
        return True

    @contextmanager
    def store_stays(self) -> Iterator[None]:
        """While inside nobody interrupts the S3 server."""
        with self._interrupting:
            yield

    def kill_raylet(self) -> None:
        """End the raylet of the node that works, and start another node."""
        program = self.ray.programs[-1]
        os.kill(_raylet(program), signal.SIGKILL)
        program.stop()
        self.ray.programs.remove(program)
        self._started(self.ray.add, _NODE)

    def workers(self) -> list[tuple[int, str]]:
        """Ray's worker processes that have something to do: pid and what Ray calls them."""
        raylet = _raylet(self.ray.programs[-1])
        named = [(pid, _title(pid)) for pid in _children(raylet)]
        return [(pid, title) for pid, title in named if re.match(r"ray::(?!IDLE|\w+Agent)", title)]

    def _started(self, start: Callable[[A], B], of: A) -> B:
        return self._starter.submit(start, of).result()

    def _store(self, before: ObjectStore | None) -> ObjectStore:
        keys = {"access_key": before.access_key, "secret_key": before.secret_key} if before else {}
        return self._of_store.enter_context(
            services.object_store(self._folder / "store", ports=self._ports, **keys)
        )


@contextmanager
def running(folder: Path, *, seed: int, with_raylets: bool) -> Iterator[Stack]:
    """All of it, until the block ends, and no request fails yet; everything lies below `folder`."""
    with ExitStack() as exits:
        yield Stack(folder, seed=seed, with_raylets=with_raylets, exits=exits)


def strike(pid: int, what: str) -> bool:
    """Kill a worker, or let it get hardly any more memory, or no more disk; False where it has just ended."""
    try:
        if what == "worker":
            os.kill(pid, signal.SIGKILL)
        elif what == "worker's disk":
            shortage.of_disk(pid)
        else:
            shortage.of_memory(pid)
            timer = threading.Timer(shortage.KILLED_AFTER_S, _kill_if_there, [pid])
            timer.daemon = True
            timer.start()
    except (ProcessLookupError, FileNotFoundError):
        return False
    return True


def _kill_if_there(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _raylet(program: Program) -> int:
    """The process of the node that starts workers."""
    return next(pid for pid in program.pids() if _command(pid)[:1] and _command(pid)[0].endswith("/raylet"))


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _title(pid: int) -> str:
    return " ".join(_command(pid)).strip()
