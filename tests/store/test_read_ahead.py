"""Reading ahead: order, how far, no stall, and what happens when a call fails."""

import threading
from collections.abc import Generator, Iterator

import pytest

from namr.errors import ManifestError
from namr.store import read_ahead


def test_results_come_in_order_whatever_ends_first() -> None:
    second_ended = threading.Event()

    def call(number: int) -> int:
        if number == 0:
            assert second_ended.wait(10)
        if number == 1:
            second_ended.set()
        return number * number

    assert list(read_ahead.in_order(call, range(20), num_threads=3)) == [n * n for n in range(20)]


def test_arguments_are_taken_no_further_than_the_threads_reach() -> None:
    taken = []

    def arguments() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = read_ahead.in_order(lambda number: number, arguments(), num_threads=4)
    assert next(results) == 0
    assert len(taken) == 5
    results.close()  # type: ignore[attr-defined]
    assert len(taken) == 5


def test_a_slow_call_does_not_hold_up_those_behind_it() -> None:
    begun, release = threading.Semaphore(0), threading.Event()

    def call(number: int) -> int:
        begun.release()
        if number == 0:
            assert release.wait(10)
        return number

    results = read_ahead.in_order(call, range(4), num_threads=4)
    first = threading.Thread(target=lambda: next(results))
    first.start()
    for _ in range(4):
        assert begun.acquire(timeout=10)
    release.set()
    first.join(10)
    assert list(results) == [1, 2, 3]


def test_a_failure_is_raised_in_its_place_and_ends_the_rest() -> None:
    called = []

    def call(number: int) -> int:
        called.append(number)
        if number == 2:
            raise ValueError("two")
        return number

    results = read_ahead.in_order(call, range(1000), num_threads=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(called) < 10


def test_what_is_made_beside_comes_in_order_so_far_ahead_and_from_one_other_thread() -> None:
    made: list[int] = []
    threads = set()
    second_made = threading.Event()

    def items() -> Generator[int, None, None]:
        for number in range(100):
            made.append(number)
            threads.add(threading.get_ident())
            if number == 2:
                second_made.set()
            yield number

    results = read_ahead.beside(items(), num_ahead=2)
    assert next(results) == 0
    assert second_made.wait(10)
    results.close()
    assert made in ([0, 1, 2], [0, 1, 2, 3])
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(read_ahead.beside(items(), num_ahead=3)) == list(range(100))


def test_an_exception_beside_is_raised_in_its_place_and_a_generator_left_early_is_closed() -> None:
    closed = threading.Event()

    def items() -> Generator[int, None, None]:
        try:
            yield 1
            raise ManifestError("damaged")
        finally:
            closed.set()

    results = read_ahead.beside(items(), num_ahead=2)
    assert next(results) == 1
    with pytest.raises(ManifestError, match="damaged"):
        next(results)
    assert list(results) == []
    closed.clear()
    left = read_ahead.beside(items(), num_ahead=1)
    next(left)
    left.close()
    assert closed.is_set()
