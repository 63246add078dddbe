"""Loops that numba compiles for this processor when they are first called, and keeps.

What was compiled is kept beside the module that has the function, or in the user's cache folder; where
neither can be written, or what was kept is damaged, it is compiled anew, which takes seconds.

Not covered: the loops themselves (`data.resampling`, `search.kernel`).
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])


def inlined(**how: Any) -> Callable[[F], F]:
    """Decorates what is called by compiled functions alone, and is compiled with them.

    how: numba's options.
    """

    def decorate(function: F) -> F:
        compiled: F = numba.njit(**how)(function)
        return compiled

    return decorate


def compiled(function: F, signature: object, **how: Any) -> F:
    """The function, compiled for arguments of these types alone.

    how: numba's options.
    """
    made: F
    try:
        made = numba.njit(signature, cache=True, **how)(function)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):  # no folder to keep it, or a bad file
        made = numba.njit(signature, **how)(function)
    return made
