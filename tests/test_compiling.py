"""A compiled function against itself; where nothing can be kept is tested with the search's loop."""

import numpy as np
import pytest
from numba import types

from namr.compiling import compiled, inlined


@inlined(nogil=True)
def _square(number: int) -> int:
    return number * number


def _sum_of_squares(numbers: np.ndarray) -> int:
    total = 0
    for number in numbers:
        total += _square(number)
    return total


def test_a_loop_and_what_it_calls_are_compiled_for_the_types_that_are_told_alone() -> None:
    made = compiled(_sum_of_squares, types.int64(types.Array(types.int64, 1, "C", readonly=True)), nogil=True)
    numbers = np.arange(10)
    assert made(numbers) == 285
    with pytest.raises(TypeError, match="No matching definition"):
        made(numbers.astype(np.float32))
