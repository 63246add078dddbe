"""The HTTP server under the app: it listens, and closes connections whose request never begins.

uvicorn waits without end for the header of a first request, and for what is left of a body after the answer;
so a timer of our own runs whenever no request is under way.
"""

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from namr.errors import ConfigError


def make(app: Any, *, header_timeout_s: float) -> uvicorn.Server:
    """A server of an ASGI app; `run(sockets=[...])` serves until it is told to stop."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_impatient(header_timeout_s),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=10,
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, port 0 for a free one; ConfigError where it can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {host} port {port}: {error.strerror}; choose another port, or 0 for a free one"
        ) from error


def _impatient(header_timeout_s: float) -> type[H11Protocol]:
    """uvicorn makes a protocol for each connection, from a class and nothing else."""

    class ImpatientProtocol(H11Protocol):
        _closing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._begin_waiting()

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before and not self.cycle.response_complete:
                self._end_waiting()

        def on_response_complete(self) -> None:
            self._begin_waiting()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_waiting()
            super().connection_lost(exc)

        def _begin_waiting(self) -> None:
            self._end_waiting()
            self._closing = self.loop.call_later(header_timeout_s, self.transport.close)

        def _end_waiting(self) -> None:
            if self._closing is not None:
                self._closing.cancel()

    return ImpatientProtocol
