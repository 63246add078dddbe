"""What a request may take, and the line that searches stand in: its length and its deadline."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from namr.errors import Busy, ConfigError, TimedOut
from namr.search.rerank import Stop
from namr.serve.limits import Filtered, Limits, Slots

MANY = Filtered(600_000, are_few=False, times=4)
SOME = Filtered(20_000, are_few=False, times=1)
FEW = Filtered(8192, are_few=True, times=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_upload_bytes": 0},
        {"max_bodies_bytes": 1000},
        {"max_candidates": 0},
        {"max_hits": 0},
        {"max_exact_items": -1},
        {"max_waiting": -1},
        {"deadline_s": 0},
        {"header_timeout_s": float("nan")},
        {"body_timeout_s": -1},
    ],
)
def test_limits_that_are_wrong_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"num_queries": 256, "depth": 10_000},
            "256 queries with depth 10000 are 2560000 candidates; expected at most 262144 in one request: "
            "lower depth, or send fewer queries at once",
        ),
        (
            {"num_queries": 256, "k": 200, "depth": 200},
            "256 queries with k 200 are 51200 hits; expected at most 25600 in one request: lower k",
        ),
        (
            {"num_queries": 100, "is_adaptive": True},
            "100 queries with an adaptive depth, each up to 3100 in all, are 310000 candidates; expected at "
            "most 262144 in one request: give a depth",
        ),
        (
            {"num_queries": 256, "depth": 1000, "filtered": MANY},
            "256 queries with depth 1000 under a filter, 4 times as deep, are 1024000 candidates; expected",
        ),
        (
            {"num_queries": 90, "is_adaptive": True, "filtered": SOME},
            "90 queries with an adaptive depth, each up to 3100 in all, are 279000 candidates; expected",
        ),
        (
            {"num_queries": 256, "filtered": Filtered(8200, are_few=True, times=1)},
            "256 queries with 8200 items each, which the filter lets through, 8 for a candidate, are 262400 "
            "candidates; expected at most 262144 in one request: send fewer queries at once",
        ),
        ({"exact": True, "num_items": 200_001}, "this gallery has 200001 items; expected at most 200000"),
        (
            {"exact": True, "num_items": 10**9, "filtered": Filtered(200_001, are_few=True, times=1)},
            "exact compares with every item, and the filter lets 200001 items through; expected at most",
        ),
        (
            {"num_queries": 256, "k": 200, "filtered": FEW},
            "256 queries with k 200 are 51200 hits; expected at most 25600 in one request: lower k",
        ),
    ],
)
def test_a_search_that_would_take_too_much_is_told_what_to_lower(
    search: dict[str, Any], message: str
) -> None:
    usual = {"num_queries": 1, "k": 10, "depth": 100, "num_items": 1000, "exact": False}
    Limits().check_search(**usual)
    with pytest.raises(ConfigError) as refused:
        Limits().check_search(**{**usual, **search})
    assert message in str(refused.value)


def test_the_largest_search_of_one_query_is_allowed() -> None:
    Limits().check_search(num_queries=1, k=1000, depth=10_000, num_items=10**9, exact=False)
    Limits().check_search(num_queries=256, k=100, depth=1000, num_items=200_000, exact=True)
    Limits().check_search(num_queries=84, k=10, depth=100, num_items=10**9, exact=False, is_adaptive=True)


def test_under_a_filter_what_is_compared_counts_and_not_what_was_asked_for() -> None:
    """What a filter lets through may be little of a gallery too large for exact, or less than the depth."""
    usual = {"num_queries": 256, "k": 10, "num_items": 10**6}
    Limits().check_search(**usual, depth=100, exact=True, filtered=Filtered(200_000, are_few=True, times=4))
    Limits().check_search(**usual, depth=10_000, exact=False, filtered=FEW)
    Limits().check_search(**usual, depth=10_000, exact=False, is_adaptive=True, filtered=FEW)
    Limits().check_search(**usual, depth=1000, exact=False, filtered=SOME)
    Limits().check_search(**usual, depth=250, exact=False, filtered=MANY)


class Held:
    """Work that runs until it is let go, and counts; a deaf one is not to be stopped."""

    def __init__(self, *, is_deaf: bool = False) -> None:
        self.is_deaf = is_deaf
        self.let_go, self.counting = threading.Event(), threading.Lock()
        self.num_now = self.num_most = self.num_begun = 0

    def work(self, stop: Stop) -> str:
        with self.counting:
            self.num_now += 1
            self.num_begun += 1
            self.num_most = max(self.num_most, self.num_now)
        try:
            while not self.let_go.wait(0.005):
                if not self.is_deaf:
                    stop()
            return "done"
        finally:
            with self.counting:
                self.num_now -= 1


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)


def test_no_more_run_than_there_are_slots_and_no_more_wait_than_may() -> None:
    async def fill() -> None:
        slots, held = Slots(Limits(max_waiting=3), num=2), Held()
        inside = [asyncio.create_task(slots.run(held.work)) for _ in range(5)]
        await until(lambda: held.num_begun == 2 and slots.busy() is not None)
        with pytest.raises(Busy, match="works on 5 searches already, and no more may wait") as busy:
            await slots.run(held.work)
        assert busy.value.retry_after_s >= 1
        held.let_go.set()
        assert await asyncio.gather(*inside) == ["done"] * 5
        assert held.num_most == 2
        await until(lambda: slots.busy() is None)
        assert await slots.run(held.work) == "done"
        slots.close()

    asyncio.run(fill())


def test_after_the_deadline_work_stops_and_makes_room() -> None:
    async def overrun() -> None:
        slots, held = Slots(Limits(max_waiting=0, deadline_s=0.1), num=1), Held()
        with pytest.raises(TimedOut, match=r"was not done after 0\.1 s and was stopped: lower depth"):
            await slots.run(held.work)
        await until(lambda: held.num_now == 0 and slots.busy() is None)
        held.let_go.set()
        assert await slots.run(held.work) == "done"
        slots.close()

    asyncio.run(overrun())


def test_what_still_waits_at_its_deadline_never_begins() -> None:
    async def overrun() -> None:
        slots, held = Slots(Limits(max_waiting=1, deadline_s=0.1), num=1), Held(is_deaf=True)
        both = await asyncio.gather(slots.run(held.work), slots.run(held.work), return_exceptions=True)
        assert [type(each) for each in both] == [TimedOut, TimedOut]
        assert (held.num_begun, held.num_now) == (1, 1)  # its caller has been told, it has not ended
        held.let_go.set()
        await until(lambda: held.num_now == 0 and slots.busy() is None)
        assert await slots.run(held.work) == "done"
        assert held.num_begun == 2
        slots.close()

    asyncio.run(overrun())


def test_a_line_too_long_for_its_deadline_takes_nobody_in() -> None:
    """Searches that took 3 s each: the second in line would be done in 9 s, the third not within ten."""

    async def fill() -> None:
        slots, held = Slots(Limits(max_waiting=64, deadline_s=10), num=1), Held()
        slots._mean_s = 3.0
        inside = [asyncio.create_task(slots.run(held.work)) for _ in range(3)]
        await until(lambda: held.num_begun == 1)
        with pytest.raises(Busy, match="works on 3 searches already") as busy:
            await slots.run(held.work)
        assert busy.value.retry_after_s == 5
        held.let_go.set()
        assert await asyncio.gather(*inside) == ["done"] * 3
        slots._mean_s = 60.0  # one that would run at once is always taken
        await until(lambda: slots.busy() is None)
        assert await slots.run(held.work) == "done"
        slots.close()

    asyncio.run(fill())


def test_what_work_raises_is_raised_and_makes_room() -> None:
    def broken(_: Stop) -> str:
        raise ConfigError("k is wrong")

    async def fail() -> None:
        slots = Slots(Limits(max_waiting=0), num=1)
        for _ in range(3):
            with pytest.raises(ConfigError, match="k is wrong"):
                await slots.run(broken)
            await until(lambda: slots.busy() is None)
        slots.close()

    asyncio.run(fail())
