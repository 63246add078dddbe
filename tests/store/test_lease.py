"""One holder at a time: who lives, who is dead, who was replaced, whatever the clocks of others say."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from namr.errors import ConfigError, Conflict, ManifestError, StorageError
from namr.store import storage
from namr.store.lease import Lease

LONG_S, SHORT_S = 60.0, 0.4
HOUR_S = 3600.0


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path / "root") if request.param == "local" else str(request.getfixturevalue("s3"))
    return storage.join(root, "jobs", "birds.lease.json")


def record_at(uri: str) -> dict[str, object]:
    return dict(json.loads(storage.read(uri)))


def leave_behind(uri: str, **changes: object) -> None:
    """What a holder that was killed leaves, with some fields changed."""
    dead = Lease.take(uri, what="a job that dies", ttl_s=SHORT_S, renew_s=SHORT_S / 2)
    dead.release()
    left = json.dumps(record_at(uri) | {"released": False} | changes)
    storage.write(uri, left.encode())


def test_a_second_contender_is_told_who_holds_it_since_when(uri: str) -> None:
    with Lease.take(uri, what="train job birds", ttl_s=LONG_S, renew_s=0.05) as first:
        said = rf"held by train job birds \(process {os.getpid()} on .*\) since {record_at(uri)['since']}"
        with pytest.raises(Conflict, match=said.replace("+", r"\+")):
            Lease.take(uri, what="another", ttl_s=LONG_S, renew_s=0.05)
        first.check()
        assert first.fence == 1


def test_a_lease_that_was_released_is_taken_at_once_with_the_next_fence(uri: str) -> None:
    fences = []
    for _ in range(3):
        with Lease.take(uri, what="a job", ttl_s=LONG_S, renew_s=1) as lease:
            fences.append(lease.fence)
    assert fences == [1, 2, 3]
    with pytest.raises(Conflict, match="was released"):
        lease.check()


def test_a_block_that_fails_releases_too(uri: str) -> None:
    with (
        pytest.raises(ValueError, match="of the job"),
        Lease.take(uri, what="a job", ttl_s=LONG_S, renew_s=1),
    ):
        raise ValueError("of the job")
    assert record_at(uri)["released"] is True


@pytest.mark.parametrize("since", ["1999-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
def test_what_does_not_change_for_its_ttl_is_dead_whatever_its_clock_said(uri: str, since: str) -> None:
    leave_behind(uri, since=since)
    with Lease.take(uri, what="the next", ttl_s=SHORT_S, renew_s=SHORT_S / 2) as lease:
        assert lease.fence == 2
        lease.check()


def test_a_contender_waits_as_long_as_the_holder_asked_for(tmp_path: Path) -> None:
    uri, now = str(tmp_path / "lease"), [0.0]
    leave_behind(uri, ttl_s=100.0)

    def clock() -> float:
        now[0] += 60
        return now[0]

    with Lease.take(uri, what="the next", ttl_s=1, renew_s=0.5, clock=clock):
        assert now[0] >= 100


def test_of_contenders_for_a_dead_lease_one_wins(uri: str) -> None:
    leave_behind(uri)
    taken: list[Lease] = []
    refused: list[Conflict] = []

    def contend() -> None:
        try:
            taken.append(Lease.take(uri, what="a contender", ttl_s=SHORT_S, renew_s=SHORT_S / 8))
        except Conflict as error:
            refused.append(error)

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(taken), len(refused)) == (1, 5)
    taken[0].check()
    assert taken[0].fence == 2
    taken[0].release()


HOLDER = """
import sys, threading
from namr.store.lease import Lease
lease = Lease.take(sys.argv[1], what="the victim", ttl_s=float(sys.argv[2]), renew_s=float(sys.argv[3]))
print(lease.fence, flush=True)
for word in sys.stdin:
    try:
        lease.check()
        print("held", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def holder(uri: str, ttl_s: float, renew_s: float) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, uri, str(ttl_s), str(renew_s)],
        stdin=-1,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    return process


@pytest.mark.slow
def test_a_killed_holder_is_replaced(uri: str) -> None:
    with holder(uri, 1.0, 0.05) as victim:
        victim.kill()
    with Lease.take(uri, what="the next", ttl_s=1.0, renew_s=0.05) as lease:
        assert lease.fence == 2


@pytest.mark.slow
def test_a_holder_that_was_stopped_and_replaced_learns_it_before_it_publishes(uri: str) -> None:
    with holder(uri, 1.0, 0.9) as victim:  # stopped between two renewals, so not within the folder's lock
        assert victim.stdin is not None and victim.stdout is not None
        victim.send_signal(signal.SIGSTOP)
        with Lease.take(uri, what="the next", ttl_s=1.0, renew_s=0.05) as lease:
            victim.send_signal(signal.SIGCONT)
            victim.stdin.write("publish?\n")
            victim.stdin.flush()
            answer = victim.stdout.readline()
            assert answer.startswith("Conflict") and "the next" in answer and "fence 2" in answer
            lease.check()
        victim.kill()


def test_a_holder_keeps_what_nobody_took_while_the_store_was_away(tmp_path: Path) -> None:
    root, gone, now = tmp_path / "root", tmp_path / "gone", [0.0]
    with Lease.take(str(root / "l"), what="a job", ttl_s=30, renew_s=29, clock=lambda: now[0]) as lease:
        root.rename(gone)
        root.write_text("")
        now[0] = 29
        lease.check()
        now[0] = 31
        with pytest.raises(Conflict, match=r"could not be renewed for 31 s.*Not a directory"):
            lease.check()
        root.unlink()
        gone.rename(root)
        lease.check()


def test_a_lease_object_that_was_deleted_is_lost(tmp_path: Path) -> None:
    now = [0.0]
    with Lease.take(str(tmp_path / "l"), what="a job", ttl_s=30, renew_s=29, clock=lambda: now[0]) as lease:
        storage.delete(str(tmp_path / "l"))
        now[0] = HOUR_S
        for _ in range(2):
            with pytest.raises(Conflict, match="it was deleted"):
                lease.check()


def test_a_put_whose_answer_was_lost_is_known_as_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = storage.replace_if_match

    def lose_answer(uri: str, data: bytes, *, etag: str | None) -> None:
        replace(uri, data, etag=etag)
        replace(uri, data, etag=etag)

    now = [0.0]
    monkeypatch.setattr(storage, "replace_if_match", lose_answer)
    with Lease.take(str(tmp_path / "l"), what="a job", ttl_s=30, renew_s=29, clock=lambda: now[0]) as lease:
        now[0] = HOUR_S
        lease.check()
        assert record_at(lease.uri)["renewals"] == 1


def test_what_is_no_lease_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("{}")
    with pytest.raises(ManifestError, match="not a namr-lease"):
        Lease.take(str(tmp_path / "l"), what="a job")
    with pytest.raises(ConfigError, match="expected 0 < renew_s < ttl_s"):
        Lease.take(str(tmp_path / "m"), what="a job", ttl_s=5, renew_s=5)


@pytest.mark.s3
def test_a_bucket_that_is_missing_is_told(s3: str) -> None:
    with pytest.raises(StorageError, match="there is no such bucket; create it first"):
        Lease.take(f"{s3}-missing/l", what="a job")
