"""What a service lets one request, and all requests together, take: bytes, seconds, places in line.

What a request asks for beyond its limits is the caller's to mend (ConfigError); what all together ask for
beyond theirs is Busy, with a time after which to ask again; what takes too long is stopped (TimedOut).

Not covered: limits for each caller. Put a proxy that knows them in front.
"""

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from namr import checks
from namr.errors import Busy, ConfigError, TimedOut
from namr.search import certainty
from namr.search.rerank import Stop

T = TypeVar("T")

MAX_QUERIES = 256
"""of one request"""
MAX_K = 1000
MAX_DEPTH = 10_000

_COMPARED_AT_ONCE = 8
"""items that are compared one by one, with all queries together, in about the time that a candidate takes"""
_NEWEST = 0.2
"""what the newest search counts in the mean time of one"""


class Filtered(NamedTuple):
    """What a filter makes of a search."""

    num_allowed: int
    """items that it lets through"""
    are_few: bool
    """so few that each query is compared with all of them"""
    times: int
    """how many times as deep the index is searched where they are not"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a service lets requests take."""

    max_upload_bytes: int = 20 << 20
    """a larger body is refused before it is read"""
    max_bodies_bytes: int = 256 << 20
    """of all bodies that are held at once; beyond it bodies are refused with 429"""
    max_candidates: int = 1 << 18
    """queries x depth (or k, where that is more) of one request; under a filter as deep as the index is then
    searched, or an eighth of the items where it lets few through and all of them are compared"""
    max_hits: int = 25_600
    """queries x k of one request"""
    max_exact_items: int = 200_000
    """items of the largest gallery, or of what a filter lets through of it, that is searched with `exact`"""
    max_waiting: int = 64
    """searches that wait for a core; those beyond, or that would wait too long, are refused with 429"""
    deadline_s: float = 10.0
    """a search that is not done by then, its waiting included, is stopped"""
    header_timeout_s: float = 10.0
    """a connection whose request has not begun by then is closed"""
    body_timeout_s: float = 30.0
    """a request whose body is not there by then is refused with 408"""

    def __post_init__(self) -> None:
        checks.in_range(self, "max_upload_bytes", "max_candidates", "max_hits", at_least=1)
        checks.in_range(self, "max_bodies_bytes", at_least=self.max_upload_bytes)
        checks.in_range(self, "max_exact_items", "max_waiting", at_least=0)
        checks.in_range(self, "deadline_s", "header_timeout_s", "body_timeout_s", above=0)

    def check_hits(self, *, num_queries: int, k: int) -> None:
        """ConfigError for a search that would return too much."""
        self._check(num_queries, k, f"k {k}", "hits", self.max_hits, "lower k, or ")

    def check_search(
        self,
        *,
        num_queries: int,
        k: int,
        depth: int,
        num_items: int,
        exact: bool,
        is_adaptive: bool = False,
        filtered: Filtered | None = None,
    ) -> None:
        """ConfigError for a search that would take or return too much.

        depth: candidates that each query gets, with an adaptive depth at first. What that may take is
        counted as if no answer were ever sure. num_items: of the gallery.
        """
        self.check_hits(num_queries=num_queries, k=k)
        if exact:
            self._check_exact(num_items, filtered)
        elif filtered is not None and filtered.are_few:
            num, each = filtered.num_allowed, -(-filtered.num_allowed // _COMPARED_AT_ONCE)
            asked = f"{num} items each, which the filter lets through, {_COMPARED_AT_ONCE} for a candidate,"
            self._check(num_queries, each, asked, "candidates", self.max_candidates, "")
        else:
            depths = certainty.doubled(depth) if is_adaptive else [depth]
            option = "depth" if depths[-1] > k else "k"
            each, times = sum(max(k, each) for each in depths), 1 if filtered is None else filtered.times
            asked, mend = f"{option} {each}", f"lower {option}, or "
            if is_adaptive and option == "depth":
                asked, mend = f"an adaptive depth, each up to {each} in all,", "give a depth, or "
            asked += f" under a filter, {times} times as deep," if times > 1 else ""
            self._check(num_queries, each * times, asked, "candidates", self.max_candidates, mend)

    def _check_exact(self, num_items: int, filtered: Filtered | None) -> None:
        found = f"this gallery has {num_items} items"
        if filtered is not None:
            num_items, found = filtered.num_allowed, f"the filter lets {filtered.num_allowed} items through"
        if num_items > self.max_exact_items:
            raise ConfigError(
                f"exact compares with every item, and {found}; expected at most {self.max_exact_items}: "
                "use depth"
            )

    @staticmethod
    def _check(num_queries: int, each: int, asked: str, what: str, most: int, mend: str) -> None:
        if num_queries * each > most:
            raise ConfigError(
                f"{num_queries} queries with {asked} are {num_queries * each} {what}; expected at most "
                f"{most} in one request: {mend}send fewer queries at once"
            )


class Slots:
    """Runs searches, no more at once than there are cores, since more would only wait for each other.

    Those that come meanwhile wait in a line of limited length. For use from one event loop.
    """

    def __init__(self, limits: Limits, *, num: int | None = None) -> None:
        """num: searches at once; None is one a core."""
        self._num = num or os.cpu_count() or 1
        self._limits = limits
        self._pool = ThreadPoolExecutor(self._num, thread_name_prefix="namr-search")
        self._counting = threading.Lock()
        self._num_inside = 0
        self._mean_s = 0.0

    def busy(self) -> Busy | None:
        """Why the next search would be refused: the line is full, or too long for its deadline."""
        num_before = self._num_inside - self._num + 1
        wait_s = max(0.0, self._mean_s * num_before / self._num)
        if num_before <= self._limits.max_waiting and (
            num_before <= 0 or wait_s + self._mean_s <= self._limits.deadline_s
        ):
            return None
        return Busy(
            f"the service works on {self._num_inside} searches already, and no more may wait",
            float(max(1, math.ceil(wait_s / 2))),
        )

    async def run(self, work: Callable[[Stop], T]) -> T:
        """What `work` returns; it has to call what it is given between its steps. Raises Busy, TimedOut.

        After the deadline the caller is told at once, and the work ends with its next step.
        """
        busy = self.busy()
        if busy is not None:
            raise busy
        deadline = time.monotonic() + self._limits.deadline_s

        def stop() -> None:
            if time.monotonic() >= deadline:
                raise self._timed_out()

        def timed_work() -> T:
            stop()
            began = time.monotonic()
            try:
                return work(stop)
            finally:
                took_s = time.monotonic() - began
                self._mean_s += (_NEWEST if self._mean_s else 1) * (took_s - self._mean_s)

        with self._counting:
            self._num_inside += 1
        future = self._pool.submit(timed_work)
        future.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._limits.deadline_s)
        except TimeoutError:
            raise self._timed_out() from None

    def close(self) -> None:
        """No more searches; those that wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leave(self, _: "Future[T]") -> None:
        with self._counting:
            self._num_inside -= 1

    def _timed_out(self) -> TimedOut:
        return TimedOut(
            f"the search was not done after {self._limits.deadline_s:g} s and was stopped: lower depth or "
            "nprobe, send fewer queries at once, or ask when the service has less to do"
        )
