"""What stands before the app: bodies that are too large, too slow or too many are refused, all is measured.

Plain ASGI. A header that is too slow is `server`'s to refuse, since no request exists before it is there.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

from namr.errors import Busy
from namr.serve.limits import Limits
from namr.serve.telemetry import Metrics

_LINGER_S = 2.0
_LARGE_BYTES = 1 << 16
_MEGABYTE = 1 << 20


def error_body(kind: str, message: str) -> dict[str, Any]:
    """What every error looks like."""
    return {"error": {"type": kind, "message": message}}


class Guard:
    """ASGI middleware around a service."""

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        *,
        metrics: Metrics,
        limits: Limits,
        busy: Callable[[], Busy | None],
    ) -> None:
        """busy: why a search would be refused now, None while it would not."""
        self._app, self._metrics, self._limits, self._busy = app, metrics, limits, busy
        self._held_bytes = 0
        self._turns = asyncio.Lock()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, body = time.perf_counter(), _Body(self, scope, receive, send)
        try:
            said = dict(scope["headers"]).get(b"content-length", b"0")
            if said.isdigit() and int(said) > self._limits.max_upload_bytes:
                body.refusal = self._too_large()
            else:
                with suppress(_BodyRefused):
                    await self._app(scope, body.receive, body.send)
            body.release()
            if body.refusal is not None and body.status is None:
                await self._refuse(body, receive, send)
        finally:
            body.release()
            route, status = getattr(scope.get("route"), "path", "other"), body.status or 500
            if body.refusal is not None:
                status = body.refusal.status
                self._metrics.refused.labels(body.refusal.kind).inc()
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def turn(self, path: str) -> "_Refusal | None":
        """Large bodies are handed to the app one at a time, and others are served before the next.

        To parse one takes long enough that fifty at once would stop everything else. Why a search's body is
        not worth parsing, None if it is.
        """
        async with self._turns:
            await asyncio.sleep(0)
        busy = self._busy() if path.startswith("/search/") else None
        return None if busy is None else _Refusal(429, "Busy", str(busy), busy.retry_after_s)

    def hold(self, num_bytes: int) -> bool:
        """Count bytes that are held from now on (or, below 0, no more); False if they are too many."""
        self._held_bytes += num_bytes
        self._metrics.held_bytes.set(self._held_bytes)
        return self._held_bytes <= self._limits.max_bodies_bytes

    def check(self, num_bytes: int, *, is_held: bool) -> "_Refusal | None":
        """Why a body of which this much has come is refused, None if it isn't."""
        if num_bytes > self._limits.max_upload_bytes:
            return self._too_large()
        if not is_held:
            return _Refusal(
                429,
                "Busy",
                f"the service holds {self._limits.max_bodies_bytes / _MEGABYTE:.3g} MB of requests already",
            )
        return None

    def too_slow(self) -> "_Refusal":
        """Why a body that is still on its way is refused."""
        return _Refusal(
            408, "TooSlow", f"the request was not here after {self._limits.body_timeout_s:g} s; send it again"
        )

    @property
    def body_timeout_s(self) -> float:
        """How long a body may take."""
        return self._limits.body_timeout_s

    def _too_large(self) -> "_Refusal":
        most = self._limits.max_upload_bytes / _MEGABYTE
        return _Refusal(413, "TooLarge", f"the request is larger than {most:.3g} MB; send a smaller picture")

    async def _refuse(self, refused: "_Body", receive: Any, send: Any) -> None:
        """Answers while the body is on its way, and closes.

        A server that closes at once makes the client's system throw the answer away; one that doesn't close
        reads the body to its end. So: answer, leave the client a moment to see it, close.
        """
        refusal = refused.refusal
        assert refusal is not None
        body = json.dumps(error_body(refusal.kind, refusal.message)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if refusal.status == 429:
            headers.append((b"retry-after", str(math.ceil(refusal.retry_after_s)).encode()))
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": not refused.is_whole})
        if refused.is_whole:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                num_bytes = 0
                while num_bytes < self._limits.max_upload_bytes:
                    message = await receive()
                    if not message.get("more_body", False):
                        break
                    num_bytes += len(message["body"])
                else:
                    await asyncio.sleep(_LINGER_S)  # reading no more: the client has to wait, and look
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Refusal(NamedTuple):
    status: int
    kind: str
    message: str
    retry_after_s: float = 1.0


class _BodyRefused(Exception):
    """Ends the app's reading of a body; what the app says of it is not sent, `Guard._refuse` answers."""


class _Body:
    """The channels of one request, as the app sees them."""

    def __init__(self, guard: Guard, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self._path: str = scope["path"]
        self._guard, self._receive, self._send = guard, receive, send
        self._deadline = asyncio.get_running_loop().time() + guard.body_timeout_s
        self._num_bytes = 0
        self.is_whole = False
        self.refusal: _Refusal | None = None
        self.status: int | None = None

    async def receive(self) -> Any:
        if self.is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refusal = self._guard.too_slow()
            raise _BodyRefused from None
        self.is_whole = not message.get("more_body", False)
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        self.refusal = self._guard.check(self._num_bytes, is_held=self._guard.hold(num_bytes))
        if self.refusal is None and self.is_whole and self._num_bytes > _LARGE_BYTES:
            self.refusal = await self._guard.turn(self._path)
        if self.refusal is not None:
            raise _BodyRefused
        return message

    async def send(self, message: Any) -> None:
        if self.refusal is not None and self.status is None:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    def release(self) -> None:
        """What came is no longer held."""
        self._guard.hold(-self._num_bytes)
        self._num_bytes = 0
