"""Progress: lines at intervals in a log, a bar on a terminal."""

import io

from namr import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end() -> None:
    log, now = io.StringIO(), [0.0]
    with progress.shown("train", 10, stream=log, clock=lambda: now[0]) as show:
        for done, at in ((1, 1.0), (2, 29.0), (3, 31.0), (4, 40.0), (5, 62.0), (10, 63.0), (10, 99.0)):
            now[0] = at
            show(done, f"loss {done}")
    assert log.getvalue().splitlines() == [
        "train: 3 of 10 loss 3 (0:01:45 left)",
        "train: 5 of 10 loss 5 (0:01:16 left)",
        "train: 10 of 10 loss 10",
    ]


def test_a_log_gets_a_line_each_time_where_that_is_asked_for() -> None:
    log = io.StringIO()
    with progress.shown("sweep", 3, stream=log, clock=lambda: 0.0, interval_s=0) as show:
        for done in (1, 2, 3):
            show(done, "ended")
    assert log.getvalue().splitlines() == [f"sweep: {done} of 3 ended" for done in (1, 2, 3)]


def test_a_terminal_gets_a_bar() -> None:
    terminal = Terminal()
    with progress.shown("train", 10, stream=terminal) as show:
        show(10, "loss 1")
    assert "train" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()
    assert "loss 1" in terminal.getvalue()
