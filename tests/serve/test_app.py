"""The service over real HTTP: what it answers, what it refuses and how, and how it takes up a new release."""

import io
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs.serve import ServeJob
from namr import config
from namr.data import datasets
from namr.data.shards import make_id
from namr.errors import ConfigError
from namr.release import releases
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.serve.app import create_app
from namr.serve.process import ServeConfig, _Follower
from namr.store.cache import Cache
from tests import small_release
from tests.running import running
from tests.small_release import Recipe

ROOT = Path(__file__).parents[2]
MAX_BYTES = 1 << 20


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a release that a real model made, and the folder of the model."""
    root = tmp_path_factory.mktemp("served")
    return root, small_release.publish_with_model(root)


@pytest.fixture(scope="module")
def searcher(published: tuple[Path, Path]) -> Searcher:
    root, folder = published
    return Searcher.open(
        str(root / "releases"), cache=Cache(root / "cache", 10**9), model_folder=folder, num_threads=1
    )


@pytest.fixture(scope="module")
def http(searcher: Searcher) -> Iterator[httpx.Client]:
    app = create_app(searcher, max_upload_bytes=MAX_BYTES)
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def error_of(reply: httpx.Response) -> tuple[int, str, str]:
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "message"}
    return reply.status_code, body["error"]["type"], body["error"]["message"]


def upload(http: httpx.Client, data: bytes, **options: str) -> httpx.Response:
    return http.post("/search/image", files={"image": ("picture", data)}, data=options)


def test_an_uploaded_picture_of_the_gallery_is_found_first(http: httpx.Client, searcher: Searcher) -> None:
    for side in ("none", "query", "both", "scale"):
        reply = upload(http, small_release.digit(17), k="4", side=side)
        assert reply.status_code == 200, reply.text
        body = reply.json()
        assert body["hits"][0]["key"] == "digit/17"
        assert (len(body["hits"]), body["side"], body["release_id"]) == (4, side, "first")
        assert (body["model_name"], body["model_version"]) == ("digits", "1")
        expected = searcher.search(images=[small_release.digit(17)], options=SearchOptions(k=4, side=side))[0]
        assert [hit["id"] for hit in body["hits"]] == [hit.id for hit in expected.hits]
        assert body["certainty"] == expected.certainty
        assert body["hits"][1]["fields"] == expected.hits[1].fields


def test_vectors_are_answered_in_their_order(http: httpx.Client, searcher: Searcher) -> None:
    x, s = searcher.embed([small_release.digit(number) for number in range(5)])
    body = {"embeddings": x.tolist(), "structures": s.tolist(), "k": 3, "exact": True}
    answers = http.post("/search/vector", json=body).json()["answers"]
    assert [answer["hits"][0]["key"] for answer in answers] == [f"digit/{number}" for number in range(5)]
    assert {answer["certainty"] for answer in answers} == {"proved"}
    plain = http.post("/search/vector", json={"embeddings": x.tolist(), "k": 3, "side": "none"}).json()[
        "answers"
    ]
    found = searcher.search_arrays(x, options=SearchOptions(k=3, side="none"))
    assert [[hit["id"] for hit in answer["hits"]] for answer in plain] == found.ids.tolist()
    np.testing.assert_allclose(
        [[hit["distance"] for hit in answer["hits"]] for answer in plain], found.distances, rtol=1e-6
    )


def test_a_key_is_searched_without_itself(http: httpx.Client) -> None:
    body = http.post("/search/key", json={"key": "digit/17", "k": 79}).json()
    assert len(body["hits"]) == 79
    assert "digit/17" not in [hit["key"] for hit in body["hits"]]


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "message"),
    [
        ("/search/key", {"key": "nosuch"}, 404, "NotFound", "no item of release first has the key 'nosuch'"),
        ("/search/key", {"key": "digit/1", "k": 0}, 422, "InvalidRequest", "k: .*greater than or equal to 1"),
        ("/search/key", {"key": "digit/1", "k": 10**6}, 422, "InvalidRequest", "k: .*less than"),
        ("/search/key", {"key": "digit/1", "side": "left"}, 422, "InvalidRequest", "side: .*'none', 'query'"),
        ("/search/key", {"key": 5}, 422, "InvalidRequest", "key: .*string"),
        ("/search/key", {}, 422, "InvalidRequest", "key: .*required"),
        ("/search/vector", {"embeddings": []}, 422, "InvalidRequest", "embeddings: .*at least 1"),
        (
            "/search/vector",
            {"embeddings": [[1.0] * 3]},
            422,
            "ShapeError",
            r"embeddings are \(1, 3\); .*\(Q, 16\)",
        ),
        ("/search/vector", {"embeddings": [[1.0], [1, 2]]}, 422, "ShapeError", "rows of 1 to 2 numbers"),
        ("/search/vector", {"embeddings": [[]]}, 422, "ShapeError", r"\(1, 0\)"),
        ("/search/vector", {"embeddings": [["x"] * 16]}, 422, "InvalidRequest", "valid number"),
        ("/search/vector", {"embeddings": [[0.0] * 16]}, 422, "ShapeError", "needs structures"),
        ("/search/vector", {"embeddings": [[0.0] * 16] * 257}, 422, "InvalidRequest", "at most 256"),
        ("/search/image", {"image": "text"}, 422, "InvalidRequest", "image: .*required"),
        ("/nosuch", {}, 404, "NotFound", "Not Found"),
        ("/health", {}, 405, "MethodNotAllowed", "Method Not Allowed"),
    ],
)
def test_a_wrong_query_gets_one_clear_error(
    http: httpx.Client, path: str, body: dict[str, object], status: int, kind: str, message: str
) -> None:
    got_status, got_kind, got_message = error_of(http.post(path, json=body))
    assert (got_status, got_kind) == (status, kind), got_message
    assert re.search(message, got_message), got_message


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e39"])
def test_a_vector_that_is_not_finite_is_refused(http: httpx.Client, value: str) -> None:
    text = f'{{"embeddings": [[{", ".join([value] * 16)}]], "side": "none"}}'
    reply = http.post("/search/vector", content=text, headers={"Content-Type": "application/json"})
    assert error_of(reply)[:2] == (422, "ShapeError")
    assert "row 0 holds NaN or infinity" in error_of(reply)[2]


def test_json_that_is_none_is_refused(http: httpx.Client) -> None:
    reply = http.post("/search/key", content=b'{"key": ', headers={"Content-Type": "application/json"})
    assert error_of(reply)[:2] == (422, "InvalidRequest")


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"this is no picture", "not an image"),
        (small_release.digit(0)[:120], "damaged"),
        (bomb(), "too large"),
    ],
    ids=["empty", "text", "truncated", "bomb"],
)
def test_an_upload_that_is_no_picture_is_refused_with_the_reason(
    http: httpx.Client, data: bytes, message: str
) -> None:
    status, kind, said = error_of(upload(http, data))
    assert (status, kind) == (422, "ImageRefused")
    assert message in said


def test_a_large_upload_is_refused_before_it_is_read(http: httpx.Client) -> None:
    """100 MB are offered; the answer is there after a few of them, whether their length was said or not."""
    start = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        yield start
        for _ in range(1600):
            sent += 1 << 16
            yield b"\0" * (1 << 16)

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    began = time.monotonic()
    length = {"Content-Length": str(len(start) + (1600 << 16))}
    said = http.post("/search/image", content=pieces(), headers={**kind, **length})
    assert error_of(said) == (413, "TooLarge", "the request is larger than 1 MB; send a smaller picture")
    assert sent < 50 << 20
    sent = 0
    unsaid = http.post("/search/image", content=pieces(), headers=kind)
    assert error_of(unsaid)[:2] == (413, "TooLarge")
    assert sent < 50 << 20
    assert time.monotonic() - began < 20
    assert http.get("/health").status_code == 200


def test_items_and_their_pictures(http: httpx.Client) -> None:
    item_id = make_id(1, 2)
    expected = {"id": item_id, "key": "digit/42", "label": "1", "fields": {"row": 42}}
    assert http.get(f"/items/{item_id}").json() == expected
    full = http.get(f"/items/{item_id}/image")
    assert (full.content, full.headers["content-type"]) == (small_release.digit(42), "image/png")
    small = http.get(f"/items/{item_id}/image", params={"size_px": 16})
    assert small.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(small.content)).size == (16, 16)
    for reply in (full, small):
        assert reply.headers["cache-control"] == "private, max-age=3600"
        assert reply.headers["x-content-type-options"] == "nosniff"
    again = http.get(f"/items/{item_id}/image", headers={"If-None-Match": full.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = http.get(f"/items/{item_id}/image", headers={"If-None-Match": small.headers["etag"]})
    assert other.status_code == 200


def test_unknown_items_are_404(http: httpx.Client) -> None:
    for path in (f"/items/{make_id(7, 0)}", f"/items/{make_id(0, 40)}/image"):
        assert error_of(http.get(path))[:2] == (404, "NotFound")
    assert error_of(http.get("/items/abc"))[:2] == (422, "InvalidRequest")


def test_random_items_are_drawn_by_seed(http: httpx.Client) -> None:
    def drawn(seed: int) -> list[int]:
        return [item["id"] for item in http.get("/items", params={"num": 30, "seed": seed}).json()["items"]]

    assert len(set(drawn(1))) == 30
    assert drawn(1) == drawn(1) != drawn(2)


def test_a_dataset_that_is_gone_is_the_operators_error(tmp_path: Path) -> None:
    small_release.publish(tmp_path, Recipe(num_shards=1))
    dataset = datasets.open_version(str(tmp_path / "dataset"))
    Path(dataset.shard_uri(dataset.shards[0])).unlink()
    searcher = Searcher.open(str(tmp_path / "releases"), cache=Cache(tmp_path / "cache", 10**9))
    with running(create_app(searcher)) as url:
        status, kind, message = error_of(httpx.get(f"{url}/items/5/image"))
        assert (status, kind) == (503, "ObjectMissing")
        assert "shard-000000.tar" in message
        with httpx.Client(base_url=url) as client:
            assert error_of(upload(client, small_release.digit(0)))[:2] == (422, "ConfigError")
        assert httpx.post(f"{url}/search/key", json={"key": "digit/5"}).status_code == 200


def test_state_says_what_is_served(http: httpx.Client, searcher: Searcher) -> None:
    assert http.get("/health").json() == {"status": "up"}
    assert http.get("/ready").json() == {"status": "ready", "release_id": "first"}
    body = http.get("/release").json()
    assert (body["num_items"], body["embedding_dim"], body["takes_images"]) == (80, 16, True)
    assert body["model_digest"] == searcher.manifest.model_digest


def metric(http: httpx.Client, line: str) -> float:
    found = re.search(rf"^{re.escape(line)} ([\d.e+-]+)$", http.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics_count_what_happened(http: httpx.Client) -> None:
    names = {
        'namr_requests_total{route="/search/key",status="200"}': 2,
        'namr_requests_total{route="/search/key",status="404"}': 1,
        'namr_request_seconds_count{route="/search/key"}': 3,
        'namr_answers_total{certainty="proved",side="scale"}': 2,
        'namr_stage_seconds_count{stage="rerank"}': 2,
    }
    before = {name: metric(http, name) for name in names}
    for key in ("digit/1", "digit/2", "nosuch"):
        http.post("/search/key", json={"key": key, "side": "scale", "depth": 500})
    assert {name: metric(http, name) - before[name] for name in names} == names
    assert metric(http, "namr_items") == 80
    assert metric(http, 'namr_release_info{model="digits 1",release_id="first"}') == 1


def test_the_interface_is_described(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/search/image", "/search/vector", "/search/key", "/items", "/items/{item_id}",
        "/items/{item_id}/image", "/health", "/ready", "/release", "/metrics",
    }  # fmt: skip
    for methods in schema["paths"].values():
        for described in methods.values():
            assert described["description"]


def test_the_page_asks_nothing_of_other_hosts(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    names = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {name for name in names if name != "/"} == {
        "/static/icon.svg", "/static/search.css", "/static/search.js"
    }  # fmt: skip
    for name in names:
        reply = http.get(name)
        assert reply.status_code == 200
        assert not re.search(r"(https?:)?//(?!www\.w3\.org/2000/svg)[a-z]+\.[a-z]", reply.text)


def test_exact_is_refused_where_it_would_read_too_much(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("namr.serve.app._MAX_EXACT_ITEMS", 79)
    status, kind, message = error_of(http.post("/search/key", json={"key": "digit/1", "exact": True}))
    assert (status, kind) == (422, "ConfigError")
    assert "80 items; expected at most 79" in message


def wait_for(said, wanted: object) -> None:
    deadline = time.monotonic() + 20
    while said() != wanted:
        assert time.monotonic() < deadline, f"{said()} is not yet {wanted}"
        time.sleep(0.02)


def test_a_new_release_is_taken_up_without_a_failed_query(tmp_path: Path) -> None:
    """The same model, then another one, then a damaged release, while queries go on."""
    folder = small_release.publish_with_model(tmp_path)
    uri = str(tmp_path / "releases")
    follow = _Follower(
        ServeConfig(releases_uri=uri, model_folder=tmp_path / "model", cache_folder=tmp_path / "cache")
    )
    (tmp_path / "model").symlink_to(folder)
    searcher = follow.first()
    stop, statuses, seen = threading.Event(), [], set()
    with running(create_app(searcher, successor=follow, poll_interval_s=0.05)) as url:

        def query(client: httpx.Client) -> None:
            while not stop.is_set():
                reply = upload(client, small_release.digit(3), k="3")
                statuses.append(reply.status_code)
                seen.add((reply.json()["release_id"], reply.json()["hits"][0]["key"]))

        with httpx.Client(base_url=url, timeout=30) as client:
            threads = [threading.Thread(target=query, args=[client]) for _ in range(3)]
            for thread in threads:
                thread.start()
            try:

                def served() -> str:
                    return client.get("/ready").json()["release_id"]

                manifest = releases.open_release(uri).manifest
                second = small_release.renamed(manifest, "second")
                releases.publish(uri, second, expected=releases.read_pointer(uri))
                wait_for(served, "second")

                other = small_release.publish_with_model(tmp_path, release_id="third", seed=1)
                wait_for(lambda: metric(client, "namr_follow_failures_total") > 0, True)  # another model
                assert served() == "second"
                (tmp_path / "model").unlink()
                (tmp_path / "model").symlink_to(other)
                wait_for(served, "third")
                assert releases.roll_back(uri, "second").manifest.release_id == "second"
                (tmp_path / "model").unlink()
                (tmp_path / "model").symlink_to(folder)
                wait_for(served, "second")
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
    assert set(statuses) == {200}
    assert len(statuses) > 20
    assert {release_id for release_id, _ in seen} == {"first", "second", "third"}
    assert {key for _, key in seen} == {"digit/3"}


def test_a_config_that_is_wrong_names_its_field() -> None:
    for wrong in ({"port": 70000}, {"poll_interval_s": 0}, {"max_upload_bytes": 0}, {"cache_bytes": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ServeConfig(releases_uri="somewhere", **wrong)


def job(*flags: str) -> subprocess.Popen[str]:
    command = [".venv/bin/python" if Path(ROOT, ".venv").exists() else "python", "jobs/serve.py", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )


@pytest.mark.slow
def test_the_job_serves_until_it_is_told_to_stop(published: tuple[Path, Path]) -> None:
    root, folder = published
    flags = [f"--serve.releases-uri={root / 'releases'}", f"--serve.model-folder={folder}"]
    process = job(
        "--config", "jobs/configs/serve.toml", *flags, "--serve.port=0", f"--serve.cache-folder={root / 'c'}"
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(
            r"serving release first \(80 items, model digits 1\) on (http://127\.0\.0\.1:\d+)\n", line
        )
        assert found, line + process.stderr.read()
        with httpx.Client(base_url=found[1], timeout=30) as client:
            assert upload(client, small_release.digit(5)).json()["hits"][0]["key"] == "digit/5"
            taken = job(*flags, f"--serve.port={found[1].rpartition(':')[2]}")
            said = taken.communicate(timeout=120)[1]
            assert taken.returncode == 2
            assert "ConfigError: can't listen on 127.0.0.1 port" in said
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode in (0, -signal.SIGTERM), err
        assert "Traceback" not in err
    finally:
        process.kill()


@pytest.mark.slow
def test_the_job_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    process = job(f"--serve.releases-uri={tmp_path}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.fullmatch(r"ManifestError: .* has no current release: .*\n", err), err


def test_wrong_flags_are_named() -> None:
    for flags, message in (
        (["--serve.releases-ury=x"], "releases-ur"),
        (["--serve.releases-uri=x", "--serve.port=http"], "port"),
        ([], "releases-uri"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.load(ServeJob, flags)
