"""Many ranges of objects over kept connections, by URLs that are signed once for each object.

A signed URL holds for every range of its object, so a request is a few lines of HTTP: in processor time a
seventh of one through s3fs, which builds and signs each anew. It is a fast way and not the only one: what it
doesn't get, for whatever reason, is left to the caller, who has a client that tries again and explains.

Not covered: signing (the caller's), retries, proxies (with one it gets nothing).
"""

import http.client
import os
import queue
import ssl
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import SplitResult

SIGNED_FOR_S = 3600
_USED_FOR_S = 1800.0
_TIMEOUT_S = 60.0
_MOST_AT_ONCE = 32
_MOST_REFUSED = 8
_OFF_FOR_S = 60.0
_OF_THE_OBJECT = (404, 416)
"""Answers that tell of an object or a range, and not that this way is closed."""


class _Signed(NamedTuple):
    url: SplitResult
    until: float


class RangedGets:
    """The connections and signed URLs of one process; many threads may read at once."""

    def __init__(self, sign: Callable[[str], str]) -> None:
        """sign: from the URI of an object to a URL that is good for `SIGNED_FOR_S`."""
        self._sign = sign
        self._signed: dict[str, _Signed] = {}
        self._idle: dict[str, queue.LifoQueue[http.client.HTTPConnection]] = {}
        self._threads = ThreadPoolExecutor(_MOST_AT_ONCE, "namr-range")
        self._num_refused = 0
        self._off_until = 0.0
        weakref.finalize(self, _close, self._idle)

    def read(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """The bytes of each (URI, start, stop), none of them empty, in order; None for what didn't come.

        Where several in a row didn't, nothing is tried for a minute.
        """
        if time.monotonic() < self._off_until:
            return [None] * len(ranges)
        return list(self._threads.map(self._read, ranges))

    def _read(self, wanted: tuple[str, int, int]) -> bytes | None:
        uri, start, stop = wanted
        try:
            status, data = self._answer(self._url(uri), start, stop)
        except (OSError, http.client.HTTPException):
            status, data = 0, b""
        if status == http.client.PARTIAL_CONTENT:
            self._num_refused = 0
            return data
        if status not in _OF_THE_OBJECT:
            self._signed.pop(uri, None)  # credentials may be others by now
            self._num_refused += 1
            if self._num_refused >= _MOST_REFUSED:
                self._num_refused, self._off_until = 0, time.monotonic() + _OFF_FOR_S
        return None

    def _url(self, uri: str) -> SplitResult:
        signed = self._signed.get(uri)
        if signed is None or signed.until < time.monotonic():
            until = time.monotonic() + _USED_FOR_S
            signed = self._signed[uri] = _Signed(urllib.parse.urlsplit(self._sign(uri)), until)
        return signed.url

    def _answer(self, url: SplitResult, start: int, stop: int) -> tuple[int, bytes]:
        """Status and body; a kept connection that the server has closed meanwhile is replaced once."""
        idle = self._idle.setdefault(f"{url.scheme}://{url.netloc}", queue.LifoQueue())
        target = f"{url.path}?{url.query}"
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        while True:
            try:
                connection, is_new = idle.get_nowait(), False
            except queue.Empty:
                connection, is_new = _connected(url), True
            try:
                connection.request("GET", target, headers=headers)
                answer = connection.getresponse()
                data = answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                if is_new:
                    raise
                continue
            idle.put(connection)
            return answer.status, data


def _close(idle: "dict[str, queue.LifoQueue[http.client.HTTPConnection]]") -> None:
    for connections in idle.values():
        while not connections.empty():
            connections.get_nowait().close()


def _connected(url: SplitResult) -> http.client.HTTPConnection:
    if url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.hostname or ""):
        raise OSError("there is a proxy")
    if url.scheme == "https":
        trusted = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
        return http.client.HTTPSConnection(url.netloc, timeout=_TIMEOUT_S, context=trusted)
    return http.client.HTTPConnection(url.netloc, timeout=_TIMEOUT_S)
