"""No error of storage tells a secret, nor does what it is chained to: canaries through every way to fail."""

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import botocore.exceptions
import pytest

from infra import services
from namr.errors import ConfigError, NamrError, StorageError
from namr.store import buckets, manifests, storage
from namr.store.cache import Cache
from namr.store.lease import Lease
from namr.store.storage import Range

KEY, SECRET, TOKEN = "AKIACANARYKEY", "wJal/K7+CanarySecret", "canary-session-token"
CANARIES = (KEY, SECRET, TOKEN, "CanarySecret")

ACTS: dict[str, Callable[[str, Path], object]] = {
    "read": lambda uri, _: storage.read(uri),
    "read_ranges": lambda uri, _: storage.read_ranges([Range(uri, 0, 9)]),
    "open_stream": lambda uri, _: storage.open_stream(uri).read(),
    "write": lambda uri, _: storage.write(uri, b"x"),
    "write_if_absent": lambda uri, _: storage.write_if_absent(uri, b"x"),
    "upload": lambda uri, path: storage.upload(path, uri),
    "upload_if_absent": lambda uri, path: storage.upload_if_absent(path, uri),
    "move_if_absent": lambda uri, path: storage.move_if_absent(path, uri),
    "download": lambda uri, path: storage.download(uri, path.with_name("back")),
    "read_with_etag": lambda uri, _: storage.read_with_etag(uri),
    "replace_if_match": lambda uri, _: storage.replace_if_match(uri, b"x", etag='"0"'),
    "size": lambda uri, _: storage.size(uri),
    "list_names": lambda uri, _: storage.list_names(uri),
    "now": lambda uri, _: storage.now(uri),
    "clear_leftovers": lambda uri, _: storage.clear_leftovers(uri, before=0),
    "delete": lambda uri, _: storage.delete(uri),
    "check_writable": lambda uri, _: storage.check_writable(uri),
    "sha256_of": lambda uri, _: storage.sha256_of(uri),
    "cache": lambda uri, path: Cache(path.parent / "cache", 100).path(uri, sha256="0" * 64),
    "read_pointer": lambda uri, _: manifests.read_pointer(uri),
    "write_object": lambda uri, _: manifests.write_object(uri, "name", b"x"),
    "lease": lambda uri, _: Lease.take(uri, what="a job").release(),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    return path


def told(act: str, uri: str, file: Path) -> str:
    """All that a traceback would show of what an act raises; "" if it raises nothing."""
    try:
        ACTS[act](uri, file)
    except NamrError as error:
        return "".join(traceback.format_exception(error))
    return ""


def assert_no_canary(text: str, *more: str) -> None:
    assert [canary for canary in (*CANARIES, *more) if canary in text] == []


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "uri", [f"s3://{KEY}:{SECRET}@bucket/key", f"s3://{KEY}:x{TOKEN}@bucket/key", f"s3://{TOKEN}@bucket/key"]
)
def test_credentials_in_a_uri_are_refused_before_anything_is_asked(act: str, uri: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"has credentials in it; expected s3://bucket/key, with AWS_ACC"):
        ACTS[act](uri, file)
    assert_no_canary(told(act, uri, file))


def test_keys_with_signs_of_all_kinds_are_no_credentials() -> None:
    for uri in ("s3://bucket/a@b:c", "s3://arn:aws:s3:eu-west-1:1:accesspoint/x", "s3://bucket"):
        assert not storage.is_local(uri)
    with pytest.raises(ConfigError, match=r"gs://\*\*\*@bucket") as caught:
        storage.is_local(f"gs://{KEY}:{SECRET}@bucket")
    assert_no_canary(str(caught.value))


@pytest.fixture
def connected_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets variables of the environment as a new process would meet them."""

    def connect(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        buckets.Buckets._filesystem_of.cache_clear()

    yield connect
    buckets.Buckets._filesystem_of.cache_clear()


@pytest.mark.s3
@pytest.mark.parametrize("act", ACTS)
def test_what_a_server_refuses_tells_no_secret(
    act: str,
    s3: str,
    file: Path,
    object_store: services.ObjectStore,
    connected_with: Callable[..., None],
) -> None:
    real = object_store.secret_key
    assert_no_canary(told(act, f"{s3}/missing", file), real)
    assert_no_canary(told(act, "s3://no-such-bucket-at-all/x", file), real)
    assert_no_canary(told(act, f"s3://{real}/{act}", file), real)
    connected_with(AWS_SECRET_ACCESS_KEY=SECRET)
    text = told(act, f"{s3}/x", file)
    assert text
    assert_no_canary(text, real)
    connected_with(AWS_ACCESS_KEY_ID=KEY, AWS_SESSION_TOKEN=TOKEN)
    text = told(act, f"{s3}/x", file)
    assert text
    assert_no_canary(text, real)


def test_a_server_that_is_away_is_named_without_what_stands_before_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> bytes:
        endpoint = f"http://{KEY}:{SECRET}@127.0.0.1:9/bucket"
        try:
            raise OSError(f"cannot connect to {endpoint}")
        except OSError as error:
            raise botocore.exceptions.EndpointConnectionError(endpoint_url=endpoint, error=error) from error

    monkeypatch.setattr(buckets.Buckets, "read", away)
    with pytest.raises(StorageError, match=r"http://\*\*\*@127\.0\.0\.1:9/bucket"):
        storage.read("s3://bucket/x")
    assert_no_canary(told("read", "s3://bucket/x", file))
