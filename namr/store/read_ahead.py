"""Results in order, with the next ones already under way: what reads many objects waits for none of them.

Not covered: processes (`ray_connection.tasks_in_order`), and reads that belong together (`ranges`).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

A = TypeVar("A")
R = TypeVar("R")


def in_order(function: Callable[[A], R], arguments: Iterable[A], *, num_threads: int) -> Iterator[R]:
    """`function` of each argument, in their order, by `num_threads` threads and no more than that ahead.

    A result that is taken starts the next call at once, so no call waits for a whole group to end. An
    exception is raised in its place; calls that were not begun by then, or when the iterator is closed, are
    not made.
    """
    under_way: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="namr-read") as pool:
        try:
            for argument in arguments:
                under_way.append(pool.submit(function, argument))
                if len(under_way) > num_threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def beside(items: Generator[A, Any, None], *, num_ahead: int) -> Generator[A, Any, None]:
    """The items, made by one thread, up to `num_ahead` of them before they are asked for.

    An exception is raised in its place. When the iterator is closed, so is the generator, after the item that
    it is making.
    """
    ended = object()
    with ThreadPoolExecutor(1, thread_name_prefix="namr-beside") as pool:
        under_way: deque[Future[Any]] = deque(pool.submit(next, items, ended) for _ in range(num_ahead))
        try:
            while (item := under_way.popleft().result()) is not ended:
                under_way.append(pool.submit(next, items, ended))
                yield item
        finally:
            for future in under_way:
                future.cancel()
            pool.submit(items.close).result()
