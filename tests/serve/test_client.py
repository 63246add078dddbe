"""The client against a real service: typed answers, the service's errors as ours, patience and its end."""

import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from namr.data.shards import make_id
from namr.errors import Busy, ConfigError, ImageRefused, NamrError, ObjectMissing, ShapeError, StorageError
from namr.search.answers import Item, SearchOptions
from namr.search.searcher import Searcher
from namr.serve.app import create_app
from namr.serve.client import Client
from namr.store.cache import Cache
from tests import small_release
from tests.running import running


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    root = tmp_path_factory.mktemp("served")
    folder = small_release.publish_with_model(root)
    cache = Cache(root / "cache", 10**9)
    return Searcher.open(str(root / "releases"), cache=cache, model_folder=folder, num_threads=1)


@pytest.fixture(scope="module")
def client(searcher: Searcher) -> Iterator[Client]:
    with running(create_app(searcher)) as url, Client(f"{url}/") as opened:
        yield opened


def test_answers_are_those_of_the_searcher(client: Client, searcher: Searcher) -> None:
    expected = searcher.search(
        images=[small_release.digit(3)], options=SearchOptions(k=4, side="query", depth=7)
    )[0]
    answer = client.search_image(small_release.digit(3), SearchOptions(k=4, side="query", depth=7))
    assert [hit.key for hit in answer.hits] == [hit.key for hit in expected.hits]
    assert answer.hits[0].fields == {"row": 3}
    assert (answer.side, answer.certainty, answer.release_id) == ("query", expected.certainty, "first")
    assert (answer.model_name, answer.model_version) == ("digits", "1")
    assert answer.timings.embed_ms > 0
    expected = searcher.search(keys=["digit/3"], options=SearchOptions(k=4, exact=True))[0]
    answer = client.search_key("digit/3", SearchOptions(k=4, exact=True))
    assert [(hit.id, hit.distance) for hit in answer.hits] == [
        (hit.id, hit.distance) for hit in expected.hits
    ]
    assert answer.certainty == "proved"


def test_an_adaptive_depth_is_asked_for_and_told(client: Client, searcher: Searcher) -> None:
    options = SearchOptions(k=4, side="both", depth="adaptive")
    expected = searcher.search(keys=["digit/3"], options=options)[0]
    answer = client.search_key("digit/3", options)
    assert (answer.certainty, answer.depth, answer.hits) == ("proved", expected.depth, expected.hits)
    x, s = searcher.embed([small_release.digit(3)])
    expected = searcher.search(embeddings=x, structures=s, options=options)[0]
    (answer,) = client.search_vectors(x, s, options=options)
    assert (answer.certainty, answer.depth) == ("proved", expected.depth)
    assert client.release().calibrated_rate is None


def test_numpy_vectors_are_taken(client: Client, searcher: Searcher) -> None:
    x, s = searcher.embed([small_release.digit(number) for number in (5, 6)])
    answers = client.search_vectors(x, s, options=SearchOptions(k=3))
    assert [answer.hits[0].key for answer in answers] == ["digit/5", "digit/6"]
    plain = client.search_vectors(x.tolist(), options=SearchOptions(k=3, side="none", nprobe=1))
    neighbours = searcher.search_arrays(x, options=SearchOptions(k=3, side="none"))
    assert [[hit.id for hit in answer.hits] for answer in plain] == neighbours.ids.tolist()


def test_filters_are_sent_with_every_way_of_searching(client: Client) -> None:
    options = SearchOptions(side="none", filter={"row": {"max": 1}, "label": {"in": ["0", "1"]}})
    answers = [client.search_image(small_release.digit(3), options), client.search_key("digit/3", options)]
    answers += client.search_vectors([[0.0] * 16], options=options)
    assert [{hit.key for hit in answer.hits} for answer in answers] == [{"digit/0", "digit/1"}] * 3
    with pytest.raises(ConfigError, match="perhaps you meant 'row'"):
        client.search_key("digit/3", SearchOptions(filter={"raw": 1}))


def test_items_are_drawn_of_all_or_of_those_that_a_filter_lets_through(
    client: Client, searcher: Searcher
) -> None:
    assert client.items(7, seed=3) == searcher.items.draw(7, seed=3)
    assert len(client.items()) == 24
    drawn = client.items(100, filter={"row": {"max": 2}, "label": {"in": ["0", "1"]}})
    assert {item.key for item in drawn} == {"digit/0", "digit/1"}
    with pytest.raises(ConfigError, match="perhaps you meant 'row'"):
        client.items(filter={"raw": 1})


def test_items_pictures_and_the_release(client: Client) -> None:
    item = client.item(make_id(1, 1))
    assert (item.key, item.label, item.fields) == ("digit/41", "4", {"row": 41})
    assert client.image(item.id) == small_release.digit(41)
    assert client.image(item.id, size_px=20).startswith(b"\xff\xd8\xff")
    release = client.release()
    assert (release.release_id, release.num_items, release.takes_images) == ("first", 80, True)
    assert client.is_ready()


def test_what_the_service_refuses_is_raised_as_what_it_is(client: Client) -> None:
    with pytest.raises(ImageRefused, match="image refused: not an image") as refused:
        client.search_image(b"no picture")
    assert refused.value.reason.startswith("not an image")
    with pytest.raises(ShapeError, match=r"\(1, 3\)"):
        client.search_vectors([[1, 2, 3]], options=SearchOptions(side="none"))
    with pytest.raises(ShapeError, match="structures: row 0 holds NaN"):
        client.search_vectors(np.ones((1, 16)), np.full((1, 16), np.nan))
    with pytest.raises(ConfigError, match=r"k: .*less than or equal to 1000"):
        client.search_key("digit/1", SearchOptions(k=10**6))
    with pytest.raises(ObjectMissing, match="'nosuch'"):
        client.search_key("nosuch")
    with pytest.raises(ObjectMissing, match="no item has the id"):
        client.item(make_id(9, 9))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_service_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url, num_connect_retries=0) as nobody:
        assert not nobody.is_ready()
        with pytest.raises(StorageError, match=f"{url} can't be reached .*is the service running"):
            nobody.search_key("digit/1")


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="base_url is 'search:8000'"):
        Client("search:8000")


def test_a_connection_that_is_refused_at_first_is_tried_again() -> None:
    """The service opens its port half a second after the client asks."""
    port, ready = free_port(), threading.Event()

    def serve_later() -> None:
        time.sleep(0.4)
        with socket.create_server(("127.0.0.1", port)) as listening:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                body = b'{"status": "ready"}'
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                ready.set()

    thread = threading.Thread(target=serve_later)
    thread.start()
    with Client(f"http://127.0.0.1:{port}", num_connect_retries=5) as patient:
        assert patient.is_ready()
    thread.join()
    assert ready.is_set()


@pytest.fixture
def stranger() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_a_service_that_does_not_answer_is_given_up(stranger: socket.socket) -> None:
    url = f"http://127.0.0.1:{stranger.getsockname()[1]}"
    with Client(url, timeout_s=0.3) as waiting, pytest.raises(StorageError, match="did not answer in time"):
        waiting.release()


def test_another_service_is_recognised_by_its_errors(stranger: socket.socket) -> None:
    thread = answering(stranger, b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\nsorry!")
    url = f"http://127.0.0.1:{stranger.getsockname()[1]}"
    with Client(url) as lost, pytest.raises(NamrError, match="answered 502, and not as a namr service"):
        lost.release()
    thread.join()


def test_the_client_loads_neither_arrays_nor_what_serves(python: str) -> None:
    program = "import sys, namr.serve.client; print(*sys.modules)"
    loaded = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"numpy", "torch", "ray", "faiss", "fastapi", "pyarrow", "mlflow"} & set(loaded) == set()
    of_namr = {name for name in loaded if name.startswith("namr.")}
    assert of_namr == {
        "namr.checks", "namr.errors", "namr.search", "namr.search.answers", "namr.serve", "namr.serve.client",
        "namr.sides",
    }  # fmt: skip


def answering(listening: socket.socket, reply: bytes) -> threading.Thread:
    """A service that gives one answer and closes."""

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(reply)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("header", "wait_s"), [(b"Retry-After: 7\r\n", 7), (b"", 1), (b"Retry-After: Mon\r\n", 1)]
)
def test_a_busy_service_is_told_with_when_to_ask_again(
    stranger: socket.socket, header: bytes, wait_s: float
) -> None:
    body = b'{"error": {"type": "Busy", "message": "no more may wait"}}'
    reply = b"HTTP/1.1 429 Too Many Requests\r\n%bContent-Length: %d\r\n\r\n%b" % (header, len(body), body)
    thread = answering(stranger, reply)
    with Client(f"http://127.0.0.1:{stranger.getsockname()[1]}") as client:
        with pytest.raises(Busy, match=f"no more may wait; ask again in {wait_s} s") as busy:
            client.release()
        assert busy.value.retry_after_s == wait_s
    thread.join()


def test_what_a_newer_service_says_beyond_is_left_out(stranger: socket.socket) -> None:
    body = b'{"id": 5, "key": "a", "label": null, "fields": {}, "colour": "red"}'
    thread = answering(stranger, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    with Client(f"http://127.0.0.1:{stranger.getsockname()[1]}") as client:
        assert client.item(5) == Item(5, "a", None, {})
    thread.join()
