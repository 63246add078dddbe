"""A store that fails one request in ten, in any of three ways, loses and doubles nothing."""

import os
from collections.abc import Iterator

import pytest

from namr.store import manifests, storage
from namr.store.buckets import Buckets
from tests.soak import failing
from tests.soak.failing import Failing

pytestmark = pytest.mark.s3


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    assert s3.startswith("s3://")
    with failing.failing_proxy(os.environ["AWS_ENDPOINT_URL"], share=0.15, seed=0) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        monkeypatch.setattr(storage, "_s3", Buckets())
        yield made


def test_what_is_stored_through_it_is_what_was_meant(s3: str, proxy: Failing) -> None:
    uri, swaps = storage.join(s3, "current.json"), []
    for number in range(20):
        name = storage.join(s3, f"objects/{number}")
        storage.write_if_absent(name, b"%d" % number)
        expected = manifests.read_pointer(uri)
        swaps.append(expected.target if expected else None)
        manifests.swap_pointer(uri, f"{number}", expected=expected, token=f"token {number}")
    assert swaps == [None, *(f"{number}" for number in range(19))]
    assert [storage.read(storage.join(s3, f"objects/{number}")) for number in range(20)] == [
        b"%d" % number for number in range(20)
    ]
    assert len(storage.list_names(s3)) == 21
    assert all(num > 0 for num in proxy.num_failed.values()), proxy.num_failed


def test_without_failures_it_is_not_there(s3: str, proxy: Failing) -> None:
    proxy.fail(0)
    for number in range(20):
        storage.write(storage.join(s3, "x"), b"%d" % number)
    assert storage.read(storage.join(s3, "x")) == b"19"
    assert set(proxy.num_failed.values()) == {0}
