"""A real service that follows: the next release, what is taken down, and its word on what it can't follow."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from namr.data.shards import make_id
from namr.errors import ManifestError, ModelMismatch
from namr.release import publication, releases, takedowns, users
from namr.search.searcher import Searcher
from namr.serve.app import create_app
from namr.serve.follower import Follower
from namr.serve.process import ServeConfig
from namr.store import storage
from tests import small_release
from tests.running import running, wait_for
from tests.serve.test_app import error_of, metric, upload


def config_of(root: Path) -> ServeConfig:
    return ServeConfig(
        releases_uri=str(root / "releases"), model_folder=root / "model", cache_folder=root / "cache"
    )


def follower_of(root: Path) -> Follower:
    return config_of(root).follower()


@contextmanager
def following(follower: Follower) -> Iterator[httpx.Client]:
    app = create_app(follower.first(), follower=follower, poll_interval_s=0.05)
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@contextmanager
def meanwhile(query: Callable[[], None]) -> Iterator[None]:
    """Three threads that query again and again until the block ends."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            query()

    threads = [threading.Thread(target=repeat) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def republish(root: Path, release_id: str) -> None:
    """The current release once more, under another id."""
    uri = str(root / "releases")
    manifest = small_release.renamed(releases.open_release(uri).manifest, release_id)
    publication.publish(uri, manifest, expected=releases.read_pointer(uri))


def served(client: httpx.Client) -> str:
    return client.get("/release").json()["release_id"]


@pytest.mark.slow
def test_a_new_release_is_taken_up_without_a_failed_query(tmp_path: Path) -> None:
    """The same model, then another one, which can't be had at first, while queries go on."""
    folder = small_release.publish_with_model(tmp_path)
    (tmp_path / "model").symlink_to(folder)
    statuses, seen = [], set()
    with following(follower_of(tmp_path)) as client:

        def query() -> None:
            reply = upload(client, small_release.digit(3), k="3")
            statuses.append(reply.status_code)
            seen.add((reply.json()["release_id"], reply.json()["hits"][0]["key"]))

        with meanwhile(query):
            republish(tmp_path, "second")
            wait_for(lambda: served(client), "second")
            wait_for(lambda: client.get("/ready").status_code, 200)

            other = small_release.publish_with_model(tmp_path, release_id="third", seed=1)
            wait_for(lambda: client.get("/ready").status_code, 503)
            status, kind, reason = error_of(client.get("/ready"))
            assert (status, kind) == (503, "NotReady")
            assert reason.startswith("the current release can't be opened: release third was made by model")
            assert metric(client, "namr_follow_failures_total") > 0
            assert served(client) == "second"
            assert client.get("/health").status_code == 200
            (tmp_path / "model").unlink()
            (tmp_path / "model").symlink_to(other)
            wait_for(lambda: served(client), "third")
            wait_for(lambda: client.get("/ready").status_code, 200)
            back = publication.roll_back(str(tmp_path / "releases"), "second", now=small_release.NOW)
            assert back.manifest.release_id == "second"
            (tmp_path / "model").unlink()
            (tmp_path / "model").symlink_to(folder)
            wait_for(lambda: served(client), "second")
    assert set(statuses) == {200}
    assert {release_id for release_id, _ in seen} == {"first", "second", "third"}
    assert {key for _, key in seen} == {"digit/3"}


def test_two_spaces_are_served_side_by_side_and_never_mixed(tmp_path: Path) -> None:
    """What is current by one model, and what was prepared by another, named; each with take-downs."""
    old = small_release.publish_with_model(tmp_path)
    uri = str(tmp_path / "releases")
    new = small_release.publish_with_model(tmp_path / "prepared", seed=1)
    aside = releases.open_release(str(tmp_path / "prepared" / "releases")).manifest
    shutil.copytree(tmp_path / "prepared" / "releases" / "objects", f"{uri}/objects", dirs_exist_ok=True)
    uri_of_dataset = releases.open_release(uri).manifest.dataset_uri
    made = replace(small_release.renamed(aside, "next"), is_prepared=True, dataset_uri=uri_of_dataset)
    publication.keep(uri, made)

    def searcher_of(model: Path, release: str | None) -> tuple[Follower, Searcher]:
        config = ServeConfig(
            releases_uri=uri, model_folder=model, cache_folder=tmp_path / "cache", release=release
        )
        follower = config.follower()
        return follower, follower.first()

    follower, served = searcher_of(new, "next")
    _, current = searcher_of(old, None)
    found = [each.search(images=[small_release.digit(3)])[0] for each in (current, served)]
    assert [(answer.release_id, answer.model_version) for answer in found] == [("first", "1"), ("next", "2")]
    assert [answer.hits[0].key for answer in found] == ["digit/3"] * 2
    for model, release in ((old, "next"), (new, None)):
        with pytest.raises(ModelMismatch, match="their embeddings can't be compared"):
            searcher_of(model, release)
    republish(tmp_path, "second")
    assert follower.successor(served) is None
    takedowns.take_down(uri, uri_of_dataset, [3])
    assert follower.taken_down(served).tolist() == [3]
    readers = [name for name in storage.list_names(uri) if name.startswith(users.FOLDER)]
    assert b"next" in b"".join(storage.read(storage.join(uri, name)) for name in readers)


@pytest.mark.slow
def test_what_is_taken_down_never_comes_back_whatever_release_serves(tmp_path: Path) -> None:
    """Taken down while the second release serves; the first, which a roll-back brings, has it still."""
    (tmp_path / "model").symlink_to(small_release.publish_with_model(tmp_path))
    republish(tmp_path, "second")
    uri, gone = str(tmp_path / "releases"), make_id(0, 3)
    dataset_uri = releases.open_release(uri).manifest.dataset_uri
    keys_seen: set[str] = set()
    with following(follower_of(tmp_path)) as client:

        def query() -> None:
            reply = upload(client, small_release.digit(3), k="79")
            keys_seen.update(hit["key"] for hit in reply.json()["hits"])

        query()
        assert "digit/3" in keys_seen
        takedowns.take_down(uri, dataset_uri, [gone])
        wait_for(lambda: client.get(f"/items/{gone}").status_code, 404)
        keys_seen.clear()
        with meanwhile(query):
            for release_id in ("first", "second", "first"):
                publication.roll_back(uri, release_id, now=small_release.NOW)
                wait_for(lambda: served(client), release_id)
                for path in (f"/items/{gone}", f"/items/{gone}/image", f"/items/{gone}/image?size_px=16"):
                    assert error_of(client.get(path))[:2] == (404, "NotFound")
                by_key = client.post("/search/key", json={"key": "digit/3"})
                assert error_of(by_key)[:2] == (404, "NotFound")
                drawn = client.get("/items", params={"num": 200}).json()["items"]
                assert len(drawn) == 79 == client.get("/release").json()["num_items"]
                assert metric(client, "namr_items") == 79
                query()
    assert len(keys_seen) == 79
    assert "digit/3" not in keys_seen
    assert follower_of(tmp_path).first().items.by_id(gone) is None


class SlowFollower(Follower):
    """Opens the next release when it is let go."""

    opening, let_go = threading.Event(), threading.Event()

    def successor(self, searcher: Searcher) -> Searcher | None:
        self.opening.set()
        assert self.let_go.wait(60)
        return super().successor(searcher)


def test_a_take_down_does_not_wait_for_a_release_that_is_being_opened(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(small_release.publish_with_model(tmp_path))
    uri, gone = str(tmp_path / "releases"), make_id(0, 3)
    dataset_uri = releases.open_release(uri).manifest.dataset_uri
    slow = SlowFollower(
        uri,
        model_folder=tmp_path / "model",
        tracking_uri=None,
        cache_folder=tmp_path / "c",
        cache_bytes=10**9,
    )
    with following(slow) as client:
        try:
            assert slow.opening.wait(60)
            takedowns.take_down(uri, dataset_uri, [gone])
            wait_for(lambda: client.get(f"/items/{gone}").status_code, 404)
        finally:
            slow.let_go.set()


def test_take_downs_that_cannot_be_read_are_told_and_what_was_hidden_stays_so(
    tmp_path: Path,
) -> None:
    (tmp_path / "model").symlink_to(small_release.publish_with_model(tmp_path))
    uri, gone = str(tmp_path / "releases"), make_id(0, 3)
    takedowns.take_down(uri, releases.open_release(uri).manifest.dataset_uri, [gone])
    with following(follower_of(tmp_path)) as client:
        listed = tmp_path / "releases" / "tombstones.json"
        whole = listed.read_bytes()
        listed.write_bytes(b"{")
        wait_for(lambda: client.get("/ready").status_code, 503)
        assert "what is taken down can't be read: " in error_of(client.get("/ready"))[2]
        assert client.get(f"/items/{gone}").status_code == 404
        assert upload(client, small_release.digit(3)).status_code == 200
        listed.write_bytes(whole)
        wait_for(lambda: client.get("/ready").status_code, 200)


def held(root: Path) -> list[str]:
    entries = storage.list_entries(str(root / "releases"))
    return sorted(users.held(str(root / "releases"), [e for e in entries if e.name.startswith("readers/")]))


def test_the_release_that_is_open_is_held_until_the_service_ends(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(small_release.publish_with_model(tmp_path))
    follower = follower_of(tmp_path)
    searcher = follower.first()
    assert held(tmp_path) == ["first"]
    republish(tmp_path, "second")
    successor = follower.successor(searcher)
    assert successor is not None and follower.successor(successor) is None
    assert held(tmp_path) == ["second"]
    follower.end()
    assert held(tmp_path) == []


def test_a_service_that_may_not_write_says_so_once_and_serves_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model").symlink_to(small_release.publish_with_model(tmp_path))

    (tmp_path / "releases" / "readers").write_text("a file, where a folder would be")
    follower = follower_of(tmp_path)
    searcher = follower.first()
    assert [follower.successor(searcher) for _ in range(3)] == [None] * 3
    (said,) = caplog.messages
    assert said.startswith("can't hold release first (cannot write ") and said.endswith(
        "serving it all the same"
    )
    follower.end()
    silent = replace(config_of(tmp_path), hold_release=False).follower()
    silent.first()
    assert len(caplog.messages) == 1


def test_where_nothing_is_published_there_is_nothing_to_serve(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no current release"):
        follower_of(tmp_path).first()
