"""Asking now and then, on all ranks after the same step, whether to leave.

The ranks have to ask together, and a question takes milliseconds, which a step may be shorter than. So they
ask some seconds apart by rank 0's clock, which says after each question how many steps that is.

Not covered: what is asked (`ray_group.Worker.is_warned`), and leaving (`loop`, `job`).
"""

import time
from collections.abc import Callable

import torch

from namr import collectives

_EVERY_S = 5.0
"""Ray looks for announcements as often."""


class Notice:
    """`is_given` is called after every step, on every rank; so it is collective at those where it asks."""

    def __init__(self, ask: Callable[[], bool], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._num_steps = self._num_left = 1
        self._since = clock()

    def is_given(self) -> bool:
        """What was answered after this step; False where it wasn't asked."""
        self._num_left -= 1
        if self._num_left > 0:
            return False
        self._num_steps = self._num_left = int(collectives.broadcast(torch.tensor(self._steps_until_next())))
        return self._ask()

    def _steps_until_next(self) -> int:
        """At most twice as many as last time: steps may become slower."""
        now = self._clock()
        per_step_s = (now - self._since) / self._num_steps
        self._since = now
        return min(2 * self._num_steps, max(1, int(_EVERY_S / max(per_step_s, 1e-6))))
