"""Connections on which no request begins are closed; those that work are left alone."""

import asyncio
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI

from namr.errors import ConfigError
from namr.serve import server
from tests.running import running

WHOLE = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
HEADER_TIMEOUT_S, SLOW_S = 0.5, 0.8


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    app = FastAPI()

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(SLOW_S)
        return "slow"

    with running(app, header_timeout_s=HEADER_TIMEOUT_S) as url:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        yield parts.hostname, parts.port


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes; a test that hangs here fails by its own time-out."""
    connection.settimeout(30)
    pieces = []
    while piece := connection.recv(4096):
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("begun", [b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: "])
def test_a_connection_whose_request_never_begins_is_closed(address: tuple[str, int], begun: bytes) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(begun)
        assert read_all(connection) == b""


def test_many_of_them_are_all_closed(address: tuple[str, int]) -> None:
    connections = [socket.create_connection(address) for _ in range(50)]
    for connection in connections:
        with connection:
            assert read_all(connection) == b""


@pytest.mark.slow
def test_a_request_under_way_takes_as_long_as_it_takes_and_the_next_may_follow(
    address: tuple[str, int],
) -> None:
    """Both answers come on one connection, which is then closed for want of a third request."""
    with socket.create_connection(address) as connection:
        connection.sendall(WHOLE)
        first = connection.recv(4096)
        assert first.startswith(b"HTTP/1.1 200")
        connection.sendall(WHOLE)
        assert read_all(connection).count(b"HTTP/1.1 200") == 1


@pytest.mark.slow
def test_pipelined_requests_are_both_answered(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(WHOLE + WHOLE)
        assert read_all(connection).count(b"HTTP/1.1 200") == 2


def test_a_body_that_nobody_waits_for_does_not_keep_a_connection(address: tuple[str, int]) -> None:
    """The route is unknown, so it is answered at once; the rest of its body never comes."""
    with socket.create_connection(address) as connection:
        connection.sendall(b"POST /nosuch HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        assert read_all(connection).startswith(b"HTTP/1.1 404")


def test_a_port_that_is_taken_is_named(address: tuple[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1 port {address[1]}: .*choose another"):
        server.listen(*address)
