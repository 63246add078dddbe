"""What stands before the app: bodies that are too large, too slow or too many are refused, all is measured.

Plain ASGI. A header that is too slow is `server`'s to refuse, since no request exists before it is there.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

from namr.serve.limits import Limits
from namr.serve.telemetry import Metrics

_LINGER_S = 2.0
_MEGABYTE = 1 << 20


def error_body(kind: str, message: str) -> dict[str, Any]:
    """What every error looks like."""
    return {"error": {"type": kind, "message": message}}


class Guard:
    """ASGI middleware around a service."""

    def __init__(self, app: Callable[..., Awaitable[None]], *, metrics: Metrics, limits: Limits) -> None:
        self._app, self._metrics, self._limits = app, metrics, limits
        self._held_bytes = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, body = time.perf_counter(), _Body(self, receive, send)
        try:
            said = dict(scope["headers"]).get(b"content-length", b"0")
            if said.isdigit() and int(said) > self._limits.max_upload_bytes:
                body.refusal = self._too_large()
            else:
                with suppress(_BodyRefused):
                    await self._app(scope, body.receive, body.send)
            body.release()
            if body.refusal is not None and body.status is None:
                await self._refuse(body.refusal, receive, send)
        finally:
            body.release()
            route, status = getattr(scope.get("route"), "path", "other"), body.status or 500
            if body.refusal is not None:
                status = body.refusal.status
                self._metrics.refused.labels(body.refusal.kind).inc()
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def hold(self, num_bytes: int) -> bool:
        """Count bytes that are held from now on (or, below 0, no more); False if they are too many."""
        self._held_bytes += num_bytes
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

    async def _refuse(self, refusal: "_Refusal", receive: Any, send: Any) -> None:
        """Answers while the body is on its way, and closes.

        A server that closes at once makes the client's system throw the answer away; one that doesn't close
        reads the body to its end. So: answer, leave the client a moment to see it, close.
        """
        body = json.dumps(error_body(refusal.kind, refusal.message)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if refusal.status == 429:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
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


class _BodyRefused(Exception):
    """Ends the app's reading of a body; what the app says of it is not sent, `Guard._refuse` answers."""


class _Body:
    """The channels of one request, as the app sees them."""

    def __init__(self, guard: Guard, receive: Any, send: Any) -> None:
        self._guard, self._receive, self._send = guard, receive, send
        self._deadline = asyncio.get_running_loop().time() + guard.body_timeout_s
        self._num_bytes = 0
        self._is_whole = False
        self.refusal: _Refusal | None = None
        self.status: int | None = None

    async def receive(self) -> Any:
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refusal = self._guard.too_slow()
            raise _BodyRefused from None
        self._is_whole = not message.get("more_body", False)
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        self.refusal = self._guard.check(self._num_bytes, is_held=self._guard.hold(num_bytes))
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
