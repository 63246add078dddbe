"""Bodies that are too large, too slow or too many, over real sockets."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI, Request

from namr.serve.guard import Guard
from namr.serve.limits import Limits
from namr.serve.telemetry import Metrics
from tests.running import running, wait_for
from tests.serve.test_server import read_all

LIMITS = Limits(max_upload_bytes=1 << 20, max_bodies_bytes=3 << 20, body_timeout_s=30)


class Service(NamedTuple):
    address: tuple[str, int]
    metrics: Metrics

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.address)
        connection.settimeout(30)
        return connection

    def counted(self, line: str) -> float:
        counted = re.search(rf"^{re.escape(line)} (\S+)$", self.metrics.text().decode(), re.MULTILINE)
        return float(counted[1]) if counted else 0.0


@contextmanager
def serving(limits: Limits) -> Iterator[Service]:
    app, metrics = FastAPI(), Metrics()

    @app.post("/body")
    async def body(request: Request) -> int:
        return len(await request.body())

    app.add_middleware(Guard, metrics=metrics, limits=limits, busy=lambda: None)
    with running(app) as url:
        parts = urlsplit(url)
        yield Service((str(parts.hostname), int(parts.port or 0)), metrics)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(LIMITS) as made:
        yield made


def head(length: int | None) -> bytes:
    said = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST /body HTTP/1.1\r\nHost: x\r\n{said}\r\n\r\n".encode()


def answer_of(connection: socket.socket) -> tuple[int, str, dict[str, dict[str, str]] | int]:
    """Status, header and body; the server is to have closed, or else has one answer to give."""
    data = b""
    while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < length_of(data):
        piece = connection.recv(65536)
        assert piece, f"closed after {data!r}"
        data += piece
    header, _, body = data.partition(b"\r\n\r\n")
    return int(header.split()[1]), header.decode().lower(), json.loads(body)


def length_of(data: bytes) -> int:
    said = re.search(rb"(?i)content-length: (\d+)", data)
    assert said
    return int(said[1])


def test_a_body_within_the_limits_is_passed_on(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(head(1 << 20) + bytes(1 << 20))
        assert answer_of(connection)[::2] == (200, 1 << 20)


@pytest.mark.slow
def test_a_body_that_is_said_to_be_too_large_is_refused_before_any_of_it_is_sent(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(head(100 << 20))
        status, header, body = answer_of(connection)
        assert (status, body) == (
            413,
            {
                "error": {
                    "type": "TooLarge",
                    "message": "the request is larger than 1 MB; send a smaller picture",
                }
            },
        )
        assert "connection: close" in header
        assert read_all(connection) == b""


def test_a_body_that_grows_too_large_is_refused_before_its_end(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(head(None))
        for _ in range(17):
            connection.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        assert answer_of(connection)[0] == 413


def test_a_body_that_stalls_is_refused_and_let_go() -> None:
    """Thirty of them hold all that may be held; when their time is over there is room again."""
    limits = Limits(max_upload_bytes=1 << 20, max_bodies_bytes=3 << 20, body_timeout_s=0.5)
    with serving(limits) as service:
        stalled = [service.connect() for _ in range(30)]
        for connection in stalled:
            connection.sendall(head(1 << 20) + bytes(100_000))
        for connection in stalled:
            with connection:
                status, header, body = answer_of(connection)
                assert (status, body["error"]["type"]) == (408, "TooSlow")
                assert "was not here after 0.5 s; send it again" in body["error"]["message"]
                assert "connection: close" in header
        with service.connect() as connection:
            connection.sendall(head(1 << 20) + bytes(1 << 20))
            assert answer_of(connection)[0] == 200
        assert service.counted('namr_refused_total{kind="TooSlow"}') == 30
        assert service.counted('namr_requests_total{route="/body",status="408"}') == 30


def test_bodies_that_are_too_many_together_are_refused_and_later_taken(service: Service) -> None:
    """Bodies on their way hold nearly all that may be held, until their senders go away."""
    before = service.counted('namr_requests_total{route="/body",status="500"}')
    almost = (1 << 20) - 1
    wait_for(lambda: service.counted("namr_held_bytes"), 0)
    held = [service.connect() for _ in range(3)]
    for connection in held:
        connection.sendall(head(1 << 20) + bytes(almost))
    wait_for(lambda: service.counted("namr_held_bytes"), 3 * almost)
    with service.connect() as connection:
        connection.sendall(head(1 << 20) + bytes(1 << 20))
        status, header, body = answer_of(connection)
        assert (status, body["error"]["message"]) == (429, "the service holds 3 MB of requests already")
        assert "retry-after: 1" in header
    for connection in held:
        connection.close()
    wait_for(lambda: service.counted("namr_held_bytes"), 0)
    with service.connect() as connection:
        connection.sendall(head(1 << 20) + bytes(1 << 20))
        assert answer_of(connection)[0] == 200
    assert service.counted('namr_refused_total{kind="Busy"}') >= 1
    assert service.counted('namr_requests_total{route="/body",status="500"}') >= before
