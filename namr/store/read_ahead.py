"""Results in order, with the next ones already under way: what reads many objects waits for none of them.

Not covered: processes (`ray_connection.map_tasks`), and reads that belong together (`ranges`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
