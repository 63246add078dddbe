"""Who is at work on a root of releases: one writer at a time, and readers that hold what they have open.

    <releases>/lease.json              of the night, or the collection, that is under way (`store.lease`)
    <releases>/compaction.json         of the compaction that is under way, beside nights
    <releases>/readers/<name>.json     the release that a service has open, written again and again

A night and a collection are never under way at once, so that neither spoils the other's work; what keeps a
release whole should both run all the same is the order that `doomed` speaks of.

A hold counts for a day after it was last written, by the store's clock: what a killed service left ends by
itself. Not covered: readers that may not write; what was current within the last day is kept for them
(`garbage`).
"""

import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from namr.errors import ObjectMissing
from namr.store import manifests, storage
from namr.store.lease import Lease
from namr.store.storage import Entry

FOLDER = "readers/"
HOLD_S = 24 * 3600.0
_RENEW_S = 600.0

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class _Held:
    FORMAT: ClassVar[str] = "namr-reader"
    FORMAT_VERSION: ClassVar[int] = 1
    release_id: str
    reader: str
    """only shown"""


def write_alone(releases_uri: str, *, what: str) -> Lease:
    """The lease of all who build, publish or collect; Conflict, which says who has it, if somebody does."""
    return Lease.take(_lease_uri(releases_uri), what=what)


def is_at_home(releases_uri: str) -> bool:
    """Whether somebody has ever written alone there, and the root was not deleted since."""
    return storage.exists(_lease_uri(releases_uri))


def compact_alone(releases_uri: str) -> Lease:
    """The lease of those who compact; Conflict, which says who does, if somebody does."""
    return Lease.take(storage.join(storage.absolute(releases_uri), "compaction.json"), what="a compaction")


def _lease_uri(releases_uri: str) -> str:
    return storage.join(storage.absolute(releases_uri), "lease.json")


class Hold:
    """What one reader has open: it stays until a day after the last `renew`, or until `end`."""

    def __init__(self, releases_uri: str, *, clock: Clock = time.monotonic) -> None:
        """Writes nothing yet."""
        self._name = re.sub(r"[^A-Za-z0-9-]", "-", f"{socket.gethostname()}-{os.getpid()}")
        folder = storage.join(storage.absolute(releases_uri), FOLDER)
        self._uri = storage.join(folder, f"{self._name}-{uuid.uuid4().hex[:8]}.json")
        self._clock = clock
        self._written: tuple[str, float] | None = None

    def renew(self, release_id: str) -> None:
        """To be called again and again: writes where the release is another, or ten minutes have passed."""
        now = self._clock()
        if self._written and self._written[0] == release_id and now - self._written[1] < _RENEW_S:
            return
        held = _Held(release_id=release_id, reader=self._name)
        storage.write(self._uri, manifests.encode_manifest(held))
        self._written = (release_id, now)

    def end(self) -> None:
        """Nothing is held any more."""
        if self._written:
            storage.delete(self._uri)
            self._written = None


@contextmanager
def holding(releases_uri: str, release_id: str) -> Iterator[None]:
    """While inside, no collection takes the release, unless it had begun to."""
    hold = Hold(releases_uri)
    hold.renew(release_id)
    try:
        yield
    finally:
        hold.end()


def held(releases_uri: str, readers: Iterable[Entry]) -> frozenset[str]:
    """The releases of these holds, as a listing of the root found them; ManifestError for a damaged one."""
    found = set()
    for entry in readers:
        uri = storage.join(releases_uri, entry.name)
        try:
            found.add(manifests.decode_manifest(storage.read(uri), _Held, uri).release_id)
        except ObjectMissing:  # ended since it was listed
            continue
    return frozenset(found)
