"""A TCP proxy in a process of its own that lets some requests to an S3 server fail, in three ways.

    refused     503 is answered, and nothing was done
    cut off     the connection ends before the request reaches the server
    unheard     the request is done, and the connection ends in place of the answer

Not covered: requests that are sent before the last one was answered, which no client of ours does.
"""

import asyncio
import contextlib
import multiprocessing
import random
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

WAYS = ("refused", "cut off", "unheard")
_REFUSAL = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d"
    b"\r\n\r\n%s"
)
_BODY = b"<Error><Code>SlowDown</Code><Message>told to fail</Message></Error>"


class Failing:
    """A running proxy: its address, how much fails, and what failed so far."""

    def __init__(self, endpoint: str, share: Any, num_failed: Any) -> None:
        """Made by `failing_proxy`."""
        self.endpoint = endpoint
        self._share, self._num_failed = share, num_failed

    def fail(self, share: float) -> None:
        """From now on so much of all requests fails."""
        self._share.value = share

    @property
    def num_failed(self) -> dict[str, int]:
        """Requests that failed, by way."""
        return dict(zip(WAYS, self._num_failed[:], strict=True))


@contextmanager
def failing_proxy(endpoint: str, *, share: float, seed: int, port: int = 0) -> Iterator[Failing]:
    """A way to `endpoint` on which a share of all requests fails, for any number of connections.

    port: to listen on; 0 takes one that is free.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    shared, num_failed = context.Value("d", share), context.Array("q", len(WAYS))
    process = context.Process(
        target=_serve, args=(endpoint, port, shared, num_failed, seed, theirs), daemon=True
    )
    process.start()
    try:
        yield Failing(f"http://127.0.0.1:{ours.recv()}", shared, num_failed)
    finally:
        process.terminate()
        process.join()


def _serve(endpoint: str, port: int, share: Any, num_failed: Any, seed: int, ready: Connection) -> None:
    target, draw = urllib.parse.urlsplit(endpoint), random.Random(seed)

    def drawn() -> str | None:
        if draw.random() >= share.value:
            return None
        way = draw.choice(WAYS)
        num_failed[WAYS.index(way)] += 1
        return way

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(target.hostname, target.port)
        except OSError:  # the server is down
            writer.close()
            return
        way: str | None = None
        is_answered = True

        async def requests() -> None:
            nonlocal way, is_answered
            while data := await reader.read(1 << 16):
                if is_answered:  # the first bytes since the last answer are a new request
                    way, is_answered = drawn(), False
                if way == "refused":
                    writer.write(_REFUSAL % (len(_BODY), _BODY))
                    await writer.drain()
                if way in ("refused", "cut off"):
                    return
                to_server.write(data)
                await to_server.drain()

        async def answers() -> None:
            nonlocal is_answered
            while data := await from_server.read(1 << 16):
                if way == "unheard":
                    return
                is_answered = True
                writer.write(data)
                await writer.drain()

        async def until_closed(work: Any) -> None:
            with contextlib.suppress(OSError):
                await work

        both = [asyncio.create_task(until_closed(work)) for work in (requests(), answers())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            for side in (writer, to_server):
                side.close()

    async def serve() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        asyncio.get_running_loop().add_reader(parent.sentinel, sys.exit)  # whoever started it was killed
        server = await asyncio.start_server(connected, "127.0.0.1", port)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())
