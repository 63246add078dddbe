"""The service over real HTTP: what it answers, what it refuses and how, and how it takes up a new release."""

import functools
import io
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from namr.data import datasets
from namr.data.shards import make_id
from namr.errors import Busy, TimedOut
from namr.search import fields, stages
from namr.search.answers import Answer, SearchOptions
from namr.search.searcher import Searcher
from namr.serve.app import create_app
from namr.serve.client import Client
from namr.serve.limits import Limits
from namr.store.cache import Cache
from tests import small_release
from tests.running import running, wait_for
from tests.search.test_searcher import flip
from tests.small_release import Recipe


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
    neighbours = searcher.search_arrays(x, options=SearchOptions(k=3, side="none"))
    assert [[hit["id"] for hit in answer["hits"]] for answer in plain] == neighbours.ids.tolist()
    np.testing.assert_allclose(
        [[hit["distance"] for hit in answer["hits"]] for answer in plain], neighbours.distances, rtol=1e-6
    )


def test_an_adaptive_depth_is_asked_for_in_json_and_in_forms(http: httpx.Client) -> None:
    """Of 80 items all are candidates in the end, which proves every answer."""
    body = {"key": "digit/17", "side": "query", "depth": "adaptive"}
    by_key = http.post("/search/key", json=body)
    by_image = upload(http, small_release.digit(17), side="query", depth="adaptive")
    for reply in (by_key, by_image):
        assert (reply.json()["certainty"], reply.json()["depth"] in (50, 100)) == ("proved", True)
    fixed = upload(http, small_release.digit(17), side="query", depth="11").json()
    assert (fixed["certainty"], fixed["depth"]) == ("unproved", 11)
    for wrong in ("deep", "0", "true"):
        status, _, message = error_of(upload(http, small_release.digit(17), depth=wrong))
        assert status == 422 and "depth" in message


def test_a_filter_is_taken_as_json_and_as_text_of_a_form(http: httpx.Client) -> None:
    wanted = {"row": {"min": 10, "max": 12}, "label": {"in": ["0", "1", "2", None]}}
    by_key = http.post("/search/key", json={"key": "digit/17", "filter": wanted}).json()
    by_image = upload(http, small_release.digit(17), filter=json.dumps(wanted)).json()
    x = {"embeddings": [[0.1] * 16], "side": "none", "filter": wanted}
    (by_vector,) = http.post("/search/vector", json=x).json()["answers"]
    for answer in (by_key, by_image, by_vector):
        assert sorted(hit["fields"]["row"] for hit in answer["hits"]) == [10, 11, 12]
    none = http.post("/search/key", json={"key": "digit/17", "filter": {"row": -1}})
    assert (none.status_code, none.json()["hits"]) == (200, [])


def test_items_are_drawn_of_those_that_a_filter_lets_through(http: httpx.Client) -> None:
    def drawn(**asked: object) -> list[int]:
        given = {"num": 30, "filter": json.dumps({"row": {"min": 10, "max": 49}}), **asked}
        items = http.get("/items", params=given).json()["items"]
        return [item["fields"]["row"] for item in items]

    assert len(set(drawn())) == 30
    assert set(drawn(num=200)) == set(range(10, 50))
    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(filter=json.dumps({"row": -1})) == []
    assert len(drawn(filter="null")) == 30  # as a search takes it: all


def test_what_a_filter_can_name_is_told(http: httpx.Client, searcher: Searcher) -> None:
    body = http.get("/fields").json()
    assert body["num_items"] == len(searcher.items) == 80
    label, row = body["fields"]
    assert (label["name"], label["kind"], label["num_without"]) == ("label", "text", 8)
    assert sum(each["num_items"] for each in label["values"]) == 72
    assert (row["name"], row["kind"], row["min"], row["max"]) == ("row", "number", 0, 79)
    with Client(str(http.base_url)) as client:
        assert client.fields() == fields.described(searcher.items)
    assert label["values"][0]["value"] in {item.label for item in searcher.items}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"rov": 1}, "no item of this release has a field 'rov': perhaps you meant 'row'"),
        ({"row": "x"}, "filter: row is 'x'; expected a finite number"),
        ({"row": {"above": 3}}, "filter: row is {'above': 3}; expected a value, null, "),
    ],
)
def test_what_is_no_filter_is_the_callers_to_mend(http: httpx.Client, wanted: object, message: str) -> None:
    for reply in (
        http.post("/search/key", json={"key": "digit/17", "filter": wanted}),
        upload(http, small_release.digit(17), filter=json.dumps(wanted)),
        http.get("/items", params={"filter": json.dumps(wanted)}),
    ):
        status, kind, said = error_of(reply)
        assert (status, kind) == (422, "ConfigError")
        assert message in said
    for reply in (
        upload(http, small_release.digit(17), filter="{row: 1}"),
        http.get("/items", params={"filter": "{row: 1}"}),
    ):
        assert "filter is no JSON" in error_of(reply)[2]
    assert "filter: " in error_of(http.post("/search/key", json={"key": "digit/17", "filter": [1]}))[2]
    assert "filter is [1]; expected" in error_of(http.get("/items", params={"filter": "[1]"}))[2]


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
        (
            "/search/key",
            {"key": "digit/1", "depth": 0},
            422,
            "InvalidRequest",
            "depth.*greater than or equal",
        ),
        (
            "/search/key",
            {"key": "digit/1", "depth": 10**5},
            422,
            "InvalidRequest",
            "depth.*less than or equal",
        ),
        ("/search/key", {"key": "digit/1", "depth": "deep"}, 422, "InvalidRequest", "depth.*'adaptive'"),
        (
            "/search/key",
            {"key": "digit/1", "depth": True},
            422,
            "ConfigError",
            "depth is true; expected a num",
        ),
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
        assert reply.headers["cache-control"] == "private, max-age=60"
        assert reply.headers["x-content-type-options"] == "nosniff"
    again = http.get(f"/items/{item_id}/image", headers={"If-None-Match": full.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = http.get(f"/items/{item_id}/image", headers={"If-None-Match": small.headers["etag"]})
    assert other.status_code == 200


def test_unknown_items_are_404(http: httpx.Client) -> None:
    for path in (f"/items/{make_id(7, 0)}", f"/items/{make_id(0, 40)}/image"):
        assert error_of(http.get(path))[:2] == (404, "NotFound")
    assert error_of(http.get(f"/items/{2**70}"))[:2] == (404, "NotFound")
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
        "/items/{item_id}/image", "/fields", "/health", "/ready", "/release", "/metrics",
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


def limited(searcher: Searcher, **limits: float) -> AbstractContextManager[str]:
    return running(create_app(searcher, limits=Limits(**limits)))


def test_what_takes_too_much_is_refused_with_what_to_lower(searcher: Searcher) -> None:
    x, s = searcher.embed([small_release.digit(number) for number in range(5)])
    body = {"embeddings": x.tolist(), "structures": s.tolist(), "k": 3}
    with limited(searcher, max_candidates=99, max_hits=20, max_exact_items=79) as url:
        for more, message in (
            ({"depth": 20}, "5 queries with depth 20 are 100 candidates; expected at most 99"),
            ({}, "5 queries with depth 50 are 250 candidates"),
            (
                {"depth": "adaptive"},
                "5 queries with an adaptive depth, each up to 1550 in all, are 7750 candidates; expected at "
                "most 99 in one request: give a depth, or send fewer queries at once",
            ),
            ({"k": 5, "side": "none"}, "5 queries with k 5 are 25 hits; expected at most 20"),
            ({"exact": True}, "80 items; expected at most 79"),
        ):
            status, kind, said = error_of(httpx.post(f"{url}/search/vector", json={**body, **more}))
            assert (status, kind) == (422, "ConfigError")
            assert message in said
        few = {"row": {"min": 0, "max": 78}}  # each query is compared with these, whatever is asked for
        for more in (
            {"depth": 19},
            {"side": "none"},
            {"depth": 1000, "filter": few},
            {"depth": "adaptive", "filter": few},
            {"exact": True, "filter": few},
        ):
            assert httpx.post(f"{url}/search/vector", json={**body, **more}).status_code == 200
        status, kind, said = error_of(
            httpx.post(f"{url}/search/vector", json={**body, "exact": True, "filter": {}})
        )
        assert (status, kind) == (422, "ConfigError")
        assert "the filter lets 80 items through; expected at most 79" in said
    with limited(searcher, max_candidates=49) as url:
        reply = httpx.post(f"{url}/search/vector", json={**body, "depth": 1, "filter": few})
        assert "5 queries with 79 items each, which the filter lets through, 8 for" in error_of(reply)[2]


@pytest.mark.parametrize(("num_allowed", "times"), [(20, 1), (21, 4)])
def test_where_a_filter_lets_many_through_what_the_index_is_asked_for_counts(
    searcher: Searcher, num_allowed: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    search = searcher.index.search

    def counted(q: np.ndarray, num: int, *more: Any, **named: Any) -> Any:
        asked.append(len(q) * num)
        return search(q, num, *more, **named)

    monkeypatch.setattr(stages, "_FEW_ALLOWED", 0)
    monkeypatch.setattr(searcher.index, "search", counted)
    x, s = searcher.embed([small_release.digit(number) for number in range(5)])
    body = {"embeddings": x.tolist(), "structures": s.tolist(), "k": 3, "depth": 5}
    body["filter"] = {"row": {"max": num_allowed - 1}}
    for most, status in ((25 * times, 200), (25 * times - 1, 422)):
        with limited(searcher, max_candidates=most) as url:
            assert httpx.post(f"{url}/search/vector", json=body).status_code == status
    assert asked[0] == 25 * times


class HeldSearcher:
    """In place of a searcher's search: one that waits until it is let go, stoppable."""

    def __init__(self, searcher: Searcher, patch: pytest.MonkeyPatch) -> None:
        self.let_go, self.begun = threading.Event(), threading.Semaphore(0)
        search = searcher.search

        def held_search(**query: Any) -> list[Answer]:
            self.begun.release()
            while not self.let_go.wait(0.005):
                query["stop"]()
            return search(**query)

        patch.setattr(searcher, "search", held_search)


def test_when_no_more_may_wait_searches_are_shed_and_the_rest_goes_on(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, cores = HeldSearcher(searcher, monkeypatch), os.cpu_count() or 1
    with (
        limited(searcher, max_waiting=2, deadline_s=60) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(cores + 2) as pool,
    ):
        try:
            ask = functools.partial(client.post, "/search/key", json={"key": "digit/1"})
            waiting = [pool.submit(ask) for _ in range(cores + 2)]
            wait_for(lambda: client.get("/ready").status_code, 503)
            status, kind, reason = error_of(client.get("/ready"))
            assert (status, kind) == (503, "NotReady")
            assert reason == f"the service works on {cores + 2} searches already, and no more may wait"
            shed = ask()
            assert error_of(shed)[:2] == (429, "Busy")
            assert int(shed.headers["retry-after"]) >= 1
            assert upload(client, small_release.digit(1)).status_code == 429
            large = client.post("/search/vector", json={"embeddings": [[1 / 3] * 16] * 256})
            assert error_of(large)[:2] == (429, "Busy")  # and not parsed, for its side needs structures
            assert error_of(client.get("/items", params={"filter": "{}"}))[:2] == (429, "Busy")
            with Client(url) as impatient, pytest.raises(Busy, match=r"no more may wait; ask again in \d+ s"):
                impatient.search_key("digit/1")
            for path in ("/health", "/items", f"/items/{make_id(0, 1)}/image", "/release", "/"):
                assert client.get(path).status_code == 200
        finally:
            held.let_go.set()
        assert {each.result().status_code for each in waiting} == {200}
        assert ask().status_code == client.get("/ready").status_code == 200
        assert metric(client, 'namr_refused_total{kind="Busy"}') == 5


def test_a_search_that_is_not_done_in_time_is_stopped_and_the_next_is_answered(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldSearcher(searcher, monkeypatch)
    with limited(searcher, deadline_s=0.2) as url, httpx.Client(base_url=url, timeout=60) as client:
        status, kind, message = error_of(client.post("/search/key", json={"key": "digit/1"}))
        assert (status, kind) == (504, "TimedOut")
        assert "not done after 0.2 s" in message
        with Client(url) as late, pytest.raises(TimedOut, match="not done after"):
            late.search_key("digit/1")
        held.let_go.set()
        assert client.post("/search/key", json={"key": "digit/1"}).status_code == 200
        assert metric(client, 'namr_refused_total{kind="TimedOut"}') == 2


def test_damaged_vectors_are_the_operators_error_and_not_the_callers(tmp_path: Path) -> None:
    small_release.publish(tmp_path, Recipe(num_shards=1))
    damaged = Searcher.open(str(tmp_path / "releases"), cache=Cache(tmp_path / "cache", 10**9))
    flip(damaged, 7, "embedding", float("nan"))
    with running(create_app(damaged)) as url:
        status, kind, message = error_of(httpx.post(f"{url}/search/key", json={"key": "digit/7"}))
        assert (status, kind) == (503, "ManifestError")
        assert "the re-rank vectors of item 7 are damaged" in message


def test_queries_that_leave_float32_are_refused_and_no_answer_has_nulls(http: httpx.Client) -> None:
    for value, exact in ((1e19, False), (1e38, True), (-1e15, False)):
        body = {"embeddings": [[value] * 16], "side": "none", "exact": exact}
        status, kind, message = error_of(http.post("/search/vector", json=body))
        assert (status, kind) == (422, "ShapeError")
        assert "the largest that can be compared is 1e+14" in message
    largest = http.post("/search/vector", json={"embeddings": [[1e14] * 16], "side": "none", "k": 7})
    hits = largest.json()["answers"][0]["hits"]
    assert len(hits) == 7
    assert all(hit["distance"] > 0 and hit["plain_distance"] > 0 for hit in hits)
