"""Programs started, waited for and ended by pid, with everything that they started in turn.

Ray and MLflow start processes of their own, some in new sessions, some re-parented to init, so that neither
a process group nor a process tree finds them all. Every process that a Program starts therefore inherits a
token in its environment, and on Linux the token finds them. Elsewhere the process group has to do.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

TOKEN_VARIABLE = "NAMR_INFRA_PROGRAM"
FIRST_PORT, LAST_PORT = 21_000, 31_000
"""Below the kernel's ephemeral range, so that no outgoing connection takes a port between choice and use."""


class StartFailed(RuntimeError):
    """A program ended, or did not answer in time; the message carries the end of its log."""


def free_ports(num: int) -> list[int]:
    """`num` different TCP ports that nothing listens on now, at any address of this machine."""
    ports: list[int] = []
    while len(ports) < num:
        port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT)
        if port in ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        ports.append(port)
    return ports


def _ends_with_its_starter() -> tuple[str, ...]:
    """What to put before a command so that it gets SIGTERM even if this process is killed outright.

    A starter that was killed before the kernel was asked is gone by then: what it started doesn't begin.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return ()
    unless_orphaned = f'[ "$PPID" = {os.getpid()} ] && exec "$@"'
    return (setpriv, "--pdeathsig", "TERM", "--", "sh", "-c", unless_orphaned, "sh")


class Program:
    """One running program; a context manager that ends it and all that it started."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._token = secrets.token_hex(16)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*_ends_with_its_starter(), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {}), TOKEN_VARIABLE: self._token},
                cwd=folder,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def pids(self) -> list[int]:
        """The processes of this program that are alive, its own first when it is one of them."""
        found = [self.pid] if self.is_running() else []
        wanted = f"{TOKEN_VARIABLE}={self._token}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != self.pid:
                    found.append(int(entry.name))
            except OSError:  # ended meanwhile, or another user's
                continue
        return found

    def wait_until(self, answers: Callable[[], bool], *, timeout_s: float) -> None:
        """Poll `answers` until it is true; StartFailed when the program ends or the time is over."""
        deadline = time.monotonic() + timeout_s
        while not answers():
            if not self.is_running():
                raise StartFailed(
                    f"{self.name} ended with status {self._process.returncode} while starting; "
                    f"the end of {self.log_path}:\n{self.end_of_log()}"
                )
            if time.monotonic() > deadline:
                raise StartFailed(
                    f"{self.name} did not answer within {timeout_s:.0f} s; "
                    f"the end of {self.log_path}:\n{self.end_of_log()}"
                )
            time.sleep(0.1)

    def end_of_log(self, num_bytes: int = 2000) -> str:
        return self.log_path.read_bytes()[-num_bytes:].decode(errors="replace")

    def stop(self, *, grace_s: float = 15.0) -> None:
        """Ask the program to end, then what is left of its processes, then kill. Twice is once."""
        if self.is_running():
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kill below is the answer
                self._process.wait(grace_s)
        for signal_number, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            self._signal_all(signal_number)
            deadline = time.monotonic() + patience_s
            while self.pids() and time.monotonic() < deadline:
                time.sleep(0.05)
        self._process.wait(5)

    def kill(self) -> None:
        """End the program and all that it started at once and unasked, as a power cut would."""
        self._signal_all(signal.SIGKILL)
        self._process.wait(5)

    def _signal_all(self, signal_number: signal.Signals) -> None:
        if self.is_running():
            os.killpg(self.pid, signal_number)
        for pid in self.pids():
            try:
                os.kill(pid, signal_number)
            except ProcessLookupError:
                continue

    def __enter__(self) -> "Program":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
