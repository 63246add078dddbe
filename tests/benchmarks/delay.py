"""A TCP proxy in a process of its own that waits before it hands on each HTTP request."""

import asyncio
import contextlib
import multiprocessing
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection


@contextmanager
def delaying_proxy(endpoint: str, delay_s: float) -> Iterator[str]:
    """An endpoint like `endpoint` whose every answer comes `delay_s` later, for any number of connections."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(endpoint, delay_s, theirs), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(endpoint: str, delay_s: float, ready: Connection) -> None:
    target = urllib.parse.urlsplit(endpoint)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = await asyncio.open_connection(target.hostname, target.port)
        answered = asyncio.Event()
        answered.set()

        async def requests() -> None:
            while data := await reader.read(1 << 16):
                if answered.is_set():  # the first bytes since the last answer are a new request
                    answered.clear()
                    await asyncio.sleep(delay_s)
                to_server[1].write(data)
                await to_server[1].drain()

        async def answers() -> None:
            while data := await to_server[0].read(1 << 16):
                answered.set()
                writer.write(data)
                await writer.drain()

        async def until_closed() -> None:
            with contextlib.suppress(OSError):
                await asyncio.wait(
                    [asyncio.create_task(requests()), asyncio.create_task(answers())],
                    return_when=asyncio.FIRST_COMPLETED,
                )

        try:
            await until_closed()
        finally:
            for side in (writer, to_server[1]):
                side.close()

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())
