"""What the crasher's commands run on: an S3 server behind a proxy that fails, and a Ray.

The server can be killed and is started again where it was. Where raylets are to be killed Ray has two nodes:
drivers connect to the head, which has no cores, and tasks run on the other, which another one replaces.
"""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from infra import services
from infra.processes import Program, free_ports
from infra.services import ObjectStore, RayCluster, RayNode
from tests.soak import failing
from tests.soak.failing import Failing

BUCKET = "crasher"
_NODE = RayNode(num_cpus=2)


class Stack:
    """All of it, running; made by `running`."""

    def __init__(self, folder: Path, *, seed: int, with_raylets: bool, exits: ExitStack) -> None:
        self._folder, self._exits = folder, exits
        self._ports = free_ports(services.NUM_STORE_PORTS)
        self._of_store = exits.enter_context(ExitStack())
        self.store = self._store(None)
        self.store.create_bucket(BUCKET)
        self.proxy: Failing = exits.enter_context(
            failing.failing_proxy(self.store.endpoint, share=0, seed=seed)
        )
        self.environment = {**self.store.environment, "AWS_ENDPOINT_URL": self.proxy.endpoint}
        head = [RayNode(num_cpus=0)] if with_raylets else []
        self.ray: RayCluster = exits.enter_context(
            services.ray_cluster(folder / "ray", nodes=[*head, _NODE], environment=self.environment)
        )

    def kill_store(self) -> None:
        """End the S3 server and all that it started, unasked; `start_store` starts it again."""
        assert self.store.program is not None
        self.store.program.kill()

    def start_store(self) -> None:
        """On the same folder and ports."""
        self._of_store.close()
        self.store = self._store(self.store)

    def kill_raylet(self) -> None:
        """End the raylet of the node that works, and start another node."""
        program = self.ray.programs[-1]
        os.kill(_raylet(program), signal.SIGKILL)
        program.stop()
        self.ray.programs.remove(program)
        self.ray.add(_NODE)

    def workers(self) -> list[tuple[int, str]]:
        """Ray's worker processes that have something to do: pid and what Ray calls them."""
        raylet = _raylet(self.ray.programs[-1])
        named = [(pid, _title(pid)) for pid in _children(raylet)]
        return [(pid, title) for pid, title in named if re.match(r"ray::(?!IDLE|\w+Agent)", title)]

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
