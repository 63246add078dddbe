"""A webhook hears what came of a night, by a real server; one that is away or says no spoils nothing."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs import reindex
from namr import config
from namr.embed.embeddings import EmbeddingSet, SetManifest
from namr.embed.extraction import ExtractReport
from namr.embed.throughput import Throughput
from namr.errors import Conflict, StorageError
from namr.nightly import notice
from namr.nightly.gate import NotGoodEnough
from namr.nightly.notice import Notice
from namr.nightly.reindexing import ReindexReport
from namr.release.releases import Release
from namr.store.manifests import Pin
from tests import small_release
from tests.nightly.test_reindexing import a_report
from tests.small_release import Recipe

TOKEN = "T0K3Nxyz"
NOTICE = Notice(event="published", text="published release one")


@contextmanager
def webhook(*answers: int) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Its URL, and what was posted to it; it gives these answers, the last one again and again."""
    heard: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == f"/hooks/{TOKEN}"
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answers[min(len(heard), len(answers)) - 1])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hooks/{TOKEN}", heard
        finally:
            server.shutdown()
            thread.join()


def a_night(folder: Path) -> ReindexReport:
    manifest = small_release.make_manifest(folder, Recipe(num_shards=1))
    return ReindexReport(
        release=Release(str(folder), manifest), is_new=False, extracted=None, report=a_report()
    )


def an_extraction() -> ExtractReport:
    manifest = SetManifest(
        model_digest="m" * 64,
        dataset_id="d",
        dataset_version=1,
        dataset_digest="d" * 64,
        embedding_dim=8,
        dtype="float16",
        num_samples=50,
        num_embedded=50,
        num_refused=0,
        files=(),
    )
    took = Throughput(num_images=50, read_s=1, decode_s=1, model_s=2, write_s=1, waited_s=2, seconds=4)
    return ExtractReport(
        embedding_set=EmbeddingSet(root_uri="nowhere", manifest=manifest),
        num_samples=50,
        num_embedded=50,
        num_refused=0,
        num_new=50,
        num_new_files=1,
        throughput=took,
        refused=(),
    )


def test_a_webhook_hears_the_event_the_line_and_the_numbers(tmp_path: Path) -> None:
    night = a_night(tmp_path)
    extracted = an_extraction()
    with webhook(200) as (url, heard):
        notice.tell(url, notice.of_report(replace(night, is_new=True, extracted=extracted)))
    (told,) = heard
    assert told["event"] == "published" and told["release_id"] == night.release.manifest.release_id
    assert told["num_indexed"] == night.release.manifest.counts.num_indexed
    assert (told["num_embedded_now"], told["images_per_s"]) == (50, 12.5)
    assert "50 embedded now at 12.5 a second" in str(told["text"])
    assert "images/s of one alone: read 50, decode 50, model 25, write 50; models waited 50%" in str(
        told["text"]
    )


def test_a_night_that_had_nothing_to_do_shows_no_speed(tmp_path: Path) -> None:
    told = notice.of_report(a_night(tmp_path))
    assert (told.event, told.images_per_s, told.num_embedded_now) == ("unchanged", None, 0)
    assert told.text.startswith("nothing is new; current is release") and "images/s" not in told.text
    held = notice.of_report(replace(a_night(tmp_path / "held"), held=Pin("today", "cats answer for dogs")))
    assert held.event == "unchanged"
    assert "is pinned since today (cats answer for dogs); nothing was done" in held.text


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (NotGoodEnough("release x is not published: recall"), "refused"),
        (Conflict("another night is under way"), "refused"),
        (StorageError("the bucket\nis away, says http://me:secret@host"), "failed"),
        (ZeroDivisionError("ours"), "failed"),
    ],
)
def test_what_stops_a_night_is_told_and_raised(error: Exception, event: str) -> None:
    with webhook(204) as (url, heard), pytest.raises(type(error)), notice.failures_told(url):
        raise error
    (told,) = heard
    assert told["event"] == event and str(told["text"]).startswith(type(error).__name__)
    assert "secret" not in str(told) and "\n" not in str(told["text"])


def test_a_webhook_that_says_not_now_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    with webhook(503, 429, 200) as (url, heard):
        notice.tell(url, NOTICE, pauses_s=(0, 0))
    assert len(heard) == 3 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (404, 1), (302, 1)])
def test_one_that_says_no_is_told_of_without_its_token(
    status: int, tries: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with webhook(status) as (url, heard):
        notice.tell(url, NOTICE, pauses_s=(0, 0))
    said = capsys.readouterr().err
    assert said == f"the webhook at 127.0.0.1 was not told: it answered {status}\n"
    assert len(heard) == tries and TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"http://127.0.0.1:9/{TOKEN}", "127.0.0.1 was not told: ConnectError"),
        (f"ftp://host/{TOKEN}", "host was not told: UnsupportedProtocol"),
        (f"http://[::1/{TOKEN}", "no host was not told: InvalidURL, is the URL right?"),
    ],
)
def test_one_that_is_not_there_spoils_nothing(
    url: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    notice.tell(url, NOTICE, pauses_s=())
    error = capsys.readouterr().err
    assert said in error and TOKEN not in error


def test_the_job_tells_by_the_environments_url_and_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("dataset", "embeddings", "releases")
    flags = [word for name in names for word in (f"--{name}-uri", str(tmp_path / name))]
    monkeypatch.setattr("sys.argv", ["reindex.py", *flags, "--model", str(tmp_path / "none")])
    with webhook(200) as (url, heard):
        monkeypatch.setenv(notice.URL_VARIABLE, url)
        with pytest.raises(SystemExit) as ended:
            config.run(reindex.main)
    assert ended.value.code == 2
    assert [told["event"] for told in heard] == ["failed"]
    assert "no saved model in" in str(heard) and "no saved model in" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["reindex.py", *flags, "--notify-url", TOKEN])
    with pytest.raises(SystemExit):
        config.run(reindex.main)
    said = capsys.readouterr().err
    assert "notify_url is no http:// or https:// URL" in said and TOKEN not in said
