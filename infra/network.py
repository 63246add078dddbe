"""Nodes of a network on one machine: Linux network namespaces joined to a bridge, for tests of several nodes.

Each node has its own loopback and ports and an interface `eth0`; this machine is on the bridge too, so that a
server bound to `gateway` is reached from all of them. Needs root and iproute2; nothing of it outlives the
context.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass


class Unavailable(RuntimeError):
    """This machine can't make network namespaces; the message says why."""


@dataclass(frozen=True, kw_only=True)
class NetworkNode:
    """One namespace: `prefix` before a command runs it there, `address` is its IP."""

    name: str
    address: str
    link: str
    """The bridge's end of its cable."""

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    def unplug(self) -> None:
        """Nothing gets from it or to it until `plug`; its processes go on."""
        _ip("link", "set", self.link, "down")

    def plug(self) -> None:
        """As it was before `unplug`."""
        _ip("link", "set", self.link, "up")


@dataclass(frozen=True, kw_only=True)
class Network:
    gateway: str
    nodes: tuple[NetworkNode, ...]


def _ip(*words: str) -> None:
    done = subprocess.run(("ip", *words), capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise Unavailable(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}")


@contextmanager
def bridged_nodes(num_nodes: int) -> Iterator[Network]:
    """`num_nodes` namespaces on one bridge; Unavailable where the machine doesn't allow it."""
    if shutil.which("ip") is None:
        raise Unavailable("network namespaces need `ip` (apt-get install iproute2)")
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    token = secrets.token_hex(3)  # interface names may not have more than 15 characters
    subnet = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
    bridge = f"nm{token}br"
    with ExitStack() as exits:
        _ip("link", "add", bridge, "type", "bridge")
        exits.callback(_ip, "link", "delete", bridge)
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        nodes = []
        for number in range(num_nodes):
            link = f"nm{token}v{number}"
            node = NetworkNode(name=f"nm{token}n{number}", address=f"{subnet}.{number + 2}", link=link)
            _ip("netns", "add", node.name)
            exits.callback(_ip, "netns", "delete", node.name)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", node.name)
            _ip("link", "set", link, "master", bridge, "up")
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            _ip("-n", node.name, "link", "set", "eth0", "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
            nodes.append(node)
        yield Network(gateway=f"{subnet}.1", nodes=tuple(nodes))
