"""Ranges over plain HTTP: what comes is right, and what doesn't come is left to others."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from namr.errors import ObjectMissing
from namr.store import buckets, ranged_gets, storage
from namr.store.ranged_gets import RangedGets
from namr.store.storage import Range

DATA = bytes(range(256)) * 40


class Server(ThreadingHTTPServer):
    """Answers ranges of DATA below /good, and with the status that any other path names."""

    daemon_threads = True
    connections: list[object]
    keeps = True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.append(self.client_address)

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/")
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        body = DATA[int(first) : int(last) + 1] if name == "good" else b"no"
        self.send_response(206 if name == "good" else int(name))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = not self.server.keeps  # without a word, as an idle one ends

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.connections = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def gets(server: Server, signed: list[str]) -> RangedGets:
    def sign(uri: str) -> str:
        signed.append(uri)
        return f"http://127.0.0.1:{server.server_address[1]}/{uri}?signature=1"

    return RangedGets(sign)


def test_ranges_come_in_order_by_one_signed_url_and_kept_connections(server: Server) -> None:
    signed: list[str] = []
    reader = gets(server, signed)
    assert reader.read([("good", 0, 1)]) == [DATA[:1]]
    asked = [("good", start, start + 100) for start in range(0, 5000, 70)]
    for _ in range(3):
        assert reader.read(asked) == [DATA[start:stop] for _, start, stop in asked]
    assert signed == ["good"]
    assert len(server.connections) <= 32


def test_a_connection_that_the_server_has_closed_is_replaced(server: Server) -> None:
    server.keeps = False
    reader = gets(server, [])
    for start in range(5):
        assert reader.read([("good", start, start + 9)]) == [DATA[start : start + 9]]
    assert len(server.connections) == 5


@pytest.mark.parametrize("status", ["200", "302", "403", "404", "416", "503"])
def test_what_does_not_come_is_left_to_the_caller(server: Server, status: str) -> None:
    reader = gets(server, [])
    assert reader.read([("good", 0, 4), (status, 0, 4), ("good", 4, 6)]) == [DATA[:4], None, DATA[4:6]]


def test_a_way_that_is_closed_is_not_tried_for_a_while(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed: list[str] = []
    reader = gets(server, signed)
    for _ in range(20):
        assert reader.read([("404", 0, 4)]) == [None]  # an object that is gone closes nothing
    assert signed == ["404"]
    for _ in range(20):
        assert reader.read([("403", 0, 4)]) == [None]
    assert signed[1:] == ["403"] * 8
    assert reader.read([("good", 0, 4)]) == [None]
    monkeypatch.setattr(reader, "_off_until", 0.0)
    assert reader.read([("good", 0, 4)]) == [DATA[:4]]


def test_nothing_is_asked_past_a_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert gets(server, []).read([("good", 0, 4)]) == [None]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert gets(server, []).read([("good", 0, 4)]) == [DATA[:4]]


@pytest.mark.s3
def test_ranges_of_a_bucket_come_this_way_and_its_failures_are_explained(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(f"{s3}/a b+%2.tar", DATA)
    asked = [Range(f"{s3}/a b+%2.tar", start, start + 100) for start in range(0, 5000, 300)]
    filesystem = storage._s3.filesystem()
    with monkeypatch.context() as patch:
        patch.setattr(type(filesystem), "cat_ranges", None, raising=False)
        assert storage.read_ranges(asked) == [DATA[some.start : some.stop] for some in asked]
    with pytest.raises(ObjectMissing):
        storage.read_ranges([Range(f"{s3}/gone", 0, 5)])
    refused = RangedGets(lambda uri: filesystem.url(uri, expires=ranged_gets.SIGNED_FOR_S) + "0")
    assert refused.read(asked[:1]) == [None]
    monkeypatch.setattr(buckets.Buckets, "_ranged_gets_of", lambda *_: refused)
    assert storage.read_ranges(asked) == [DATA[some.start : some.stop] for some in asked]
