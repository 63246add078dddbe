"""What a service serves now, and how it comes to serve the next release.

A newer release is opened beside the one in use and then takes its place, so that no query fails or waits.
What is taken down is asked for by a poll of its own, which no opening of a large release holds up. What fails
while following (a damaged release, a model that can't be fetched) is logged, counted and told by /ready, and
what is served goes on.
"""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import NamedTuple, TypeVar

import numpy as np

from namr.data.reading import Pictures
from namr.errors import Busy
from namr.search import first_stage, stages
from namr.search.answers import Answer, SearchOptions
from namr.search.rerank import Stop
from namr.search.searcher import Searcher
from namr.serve.follower import Follower
from namr.serve.limits import Filtered, Limits, Slots
from namr.serve.telemetry import Metrics

T = TypeVar("T")
Admit = Callable[[int], None]
Work = Callable[[Stop, Admit], list[Answer]]

_log = logging.getLogger("namr.serve")


class Served(NamedTuple):
    """One release in use."""

    searcher: Searcher
    pictures: Pictures


class Live:
    """What is served now; a request takes it once and keeps it to its end."""

    def __init__(self, searcher: Searcher, *, limits: Limits) -> None:
        self.metrics, self.limits = Metrics(), limits
        self._slots = Slots(limits)
        self._failures: dict[str, str] = {}
        self._take(searcher)

    @property
    def searcher(self) -> Searcher:
        return self.served.searcher

    @property
    def trouble(self) -> str | None:
        """Why others should be asked in place of this service; None where it is well."""
        busy = self.busy()
        if busy is not None:
            return str(busy)
        return "; ".join(self._failures.values()) or None

    def busy(self) -> Busy | None:
        """Why the next search would be refused, None while it would be taken."""
        return self._slots.busy()

    @asynccontextmanager
    async def following(self, follower: Follower | None, interval_s: float) -> AsyncIterator[None]:
        """While inside, what is current and what is taken down is looked for every interval_s."""
        steps: dict[str, Callable[[], None]] = {}
        if follower is not None:
            steps = {
                "what is taken down can't be read": lambda: self._hide(follower),
                "the current release can't be opened": lambda: self._follow(follower),
            }
        tasks = [
            asyncio.create_task(self._repeat(step, failing, interval_s)) for failing, step in steps.items()
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            self._slots.close()

    async def search(
        self, searcher: Searcher, options: SearchOptions, num_queries: int, work: Work
    ) -> list[Answer]:
        """The answers of one request, when there is room and within its time; options: what `work` asks for.

        `work` gets what to call between its steps, and what to call with how many items the filter lets
        through: only then is known what such a search takes. Raises ConfigError for more than a request may
        ask for, Busy, TimedOut, and what the search raises.
        """
        plan, index = stages.plan_of(options, searcher.manifest), searcher.index
        check = functools.partial(
            self.limits.check_search,
            num_queries=num_queries,
            k=plan.k,
            depth=plan.depth if stages.refines(index, plan.side) else plan.k,
            num_items=len(searcher.items),
            exact=plan.exact,
            is_adaptive=plan.is_adaptive,
        )

        def admit(num_allowed: int) -> None:
            are_few = stages.compares_all(plan, num_allowed)
            times = first_stage.times_as_deep(num_allowed, index.num_vectors)
            check(filtered=Filtered(num_allowed, are_few, times))

        if options.filter is None:
            check()
        else:
            self.limits.check_hits(num_queries=num_queries, k=plan.k)
        answers = await self._slots.run(lambda stop: work(stop, admit))
        self.metrics.searched(
            side=answers[0].side,
            certainties=[answer.certainty for answer in answers],
            stages_ms=asdict(answers[0].timings),
        )
        return answers

    async def in_line(self, work: Callable[[Stop], T]) -> T:
        """What `work` returns, which waits for its turn as searches do. Raises Busy, TimedOut."""
        return await self._slots.run(work)

    def _take(self, searcher: Searcher) -> None:
        manifest = searcher.manifest
        self.served = Served(searcher, Pictures(manifest.dataset_uri, manifest.dataset_version))
        self.metrics.serving(
            release_id=manifest.release_id,
            model=f"{manifest.model_name} {manifest.model_version}",
            num_items=len(searcher.items),
        )

    async def _repeat(self, step: Callable[[], None], failing: str, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await asyncio.to_thread(step)
            except Exception as error:  # the edge of the watching task: what is served goes on
                self.metrics.failures.inc()
                self._failures[failing] = f"{failing}: {error}"
                _log.exception("%s (%s); serving on what was known", failing, error)
            else:
                self._failures.pop(failing, None)

    def _follow(self, follower: Follower) -> None:
        successor = follower.successor(self.searcher)
        if successor is not None:
            self._take(successor)
            _log.warning("now serving release %s", successor.manifest.release_id)

    def _hide(self, follower: Follower) -> None:
        searcher = self.searcher
        taken_down = follower.taken_down(searcher)
        if not np.array_equal(taken_down, searcher.taken_down):
            searcher.hide(taken_down)
            self.metrics.items.set(len(self.searcher.items))
            _log.warning("%d ids are taken down", len(taken_down))
