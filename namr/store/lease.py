"""One holder at a time for a URI: a small JSON object that its holder keeps changing.

A contender never compares a clock of another machine with its own. It watches the object: whoever changes it
within `ttl_s` of the contender's monotonic clock lives; what stays as it is for so long is dead and is taken
over, with the fence number raised by one. All changes are conditional puts, so of two contenders one wins.

A holder that was away (stopped, cut off) for longer than `ttl_s` may have been replaced without knowing it
yet: whoever publishes calls `check` first, and can write the fence number beside what it publishes. Not
covered: refusing writes of an old holder in the store itself (S3 knows no fences).
"""

import dataclasses
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import ClassVar, Self

from namr.errors import ConfigError, Conflict, NamrError
from namr.store import manifests, storage

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class _Record:
    FORMAT: ClassVar[str] = "namr-lease"
    FORMAT_VERSION: ClassVar[int] = 1
    holder: str
    since: str
    """Of the holder's own clock; only shown."""
    token: str
    fence: int
    renewals: int
    ttl_s: float
    released: bool


class Lease:
    """A lease that is held: renewed by a thread until `release`, the end of the block, or of the process."""

    def __init__(self, uri: str, record: _Record, *, renew_s: float, clock: Clock, renewed_at: float) -> None:
        """Callers use `take`."""
        self.uri, self.holder, self.fence = uri, record.holder, record.fence
        self._record, self._clock, self._renewed_at = record, clock, renewed_at
        self._lost: Conflict | None = None
        self._away: NamrError | None = None
        self._changing, self._ended = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep, args=(renew_s,), name="namr-lease", daemon=True).start()

    @classmethod
    def take(
        cls, uri: str, *, what: str, ttl_s: float = 30.0, renew_s: float = 5.0, clock: Clock = time.monotonic
    ) -> Self:
        """The lease at `uri`; Conflict, which says who holds it since when, if somebody else does.

        Takes up to `ttl_s` where the last holder died without releasing it, and until the holder's next
        renewal where it lives. what: the holder in a few words, as in "train job birds".
        """
        if not 0 < renew_s < ttl_s:
            raise ConfigError(
                f"a lease with ttl_s {ttl_s} and renew_s {renew_s}; expected 0 < renew_s < ttl_s"
            )
        wanted = _Record(
            holder=f"{what} (process {os.getpid()} on {socket.gethostname()})",
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
            fence=1,
            renewals=0,
            ttl_s=ttl_s,
            released=False,
        )
        taken, at = _take(uri, wanted, clock)
        return cls(uri, taken, renew_s=renew_s, clock=clock, renewed_at=at)

    def check(self) -> None:
        """Conflict unless the lease is still held; to be called before anything final is published.

        Asks the store only where the last renewal is older than `ttl_s`.
        """
        if self._ended.is_set():
            raise Conflict(f"{self.uri} was released by {self.holder}; take it again to go on")
        if self._lost is None and self._clock() - self._renewed_at >= self._record.ttl_s:
            self._renew()
        if self._lost is not None:
            raise Conflict(str(self._lost)) from self._lost
        age_s = self._clock() - self._renewed_at
        if age_s >= self._record.ttl_s:
            raise Conflict(
                f"{self.uri} could not be renewed for {age_s:.0f} s, so somebody else may hold it: "
                f"{self._away}; nothing may be published until the store answers again"
            ) from self._away

    def release(self) -> None:
        """Let others take it at once. Where the store is away they wait for `ttl_s`, as for the dead."""
        self._ended.set()
        with self._changing:
            try:
                self._change(released=True)
            except NamrError as error:
                self._away = error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _keep(self, renew_s: float) -> None:
        while not self._ended.wait(renew_s) and self._lost is None:
            self._renew()

    def _renew(self) -> None:
        with self._changing:
            if self._ended.is_set() or self._lost is not None:
                return
            started = self._clock()
            try:
                self._change(released=False)
            except NamrError as error:
                self._away = error
            else:
                if self._lost is None:
                    self._renewed_at = started

    def _change(self, *, released: bool) -> None:
        """One conditional put over what is ours; `_lost` is set where somebody else's is found."""
        record, etag = _read(self.uri)
        if record is None or record.token != self._record.token:
            self._lost = _lost(self.uri, self.holder, record)
            return
        changed = dataclasses.replace(record, renewals=record.renewals + 1, released=released)
        if not _put(self.uri, changed, etag):
            raise Conflict(f"{self.uri} changed while it was renewed")


def fence_of(uri: str) -> int | None:
    """The fence of whoever took the lease last, for processes that work on behalf of a holder."""
    record, _ = _read(uri)
    return record.fence if record else None


def _take(uri: str, wanted: _Record, clock: Clock) -> tuple[_Record, float]:
    """The record as it was put, and the time before the put."""
    watched: str | None = None
    watched_from = 0.0
    while True:
        record, etag = _read(uri)
        if record is not None and not record.released:
            ttl_s = max(wanted.ttl_s, record.ttl_s)
            if watched is None:
                watched, watched_from = etag, clock()
            elif etag != watched:
                raise _held(uri, record)
            if clock() - watched_from < ttl_s:
                time.sleep(min(1.0, ttl_s / 20))
                continue
        started = clock()
        taken = dataclasses.replace(wanted, fence=record.fence + 1 if record else 1)
        if _put(uri, taken, etag):
            return taken, started
        quicker, _ = _read(uri)
        if quicker is None:
            raise Conflict(f"{uri} is not there and can't be created; check that its bucket exists")
        if not quicker.released:
            raise _held(uri, quicker)
        watched = None


def _read(uri: str) -> tuple[_Record | None, str | None]:
    return manifests.read_to_change(uri, _Record)


def _put(uri: str, record: _Record, etag: str | None) -> bool:
    """Whether the record stands there now. A put whose answer was lost finds itself."""
    try:
        storage.replace_if_match(uri, manifests.encode_manifest(record), etag=etag)
    except Conflict:
        standing, _ = _read(uri)
        return standing == record
    return True


def _held(uri: str, record: _Record) -> Conflict:
    return Conflict(
        f"{uri} is held by {record.holder} since {record.since} of its clock; "
        "wait until it has ended, or end it"
    )


def _lost(uri: str, holder: str, record: _Record | None) -> Conflict:
    now = (
        f"{record.holder} took it at {record.since} of its clock, with fence {record.fence}"
        if record
        else "it was deleted"
    )
    return Conflict(
        f"{uri} is not held by {holder} any more: {now}; nothing may be published, start the job anew"
    )
