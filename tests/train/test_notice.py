"""When ranks ask: together, seconds apart by one clock, and at once when steps are long."""

from namr.train.notice import Notice


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def asked_after(step_s: list[float]) -> list[int]:
    """The numbers of the steps, from 1 on, after which it was asked, of steps that take so long."""
    clock, asked = Clock(), list[int]()

    def ask() -> bool:
        asked.append(number)
        return False

    notice = Notice(ask, clock=clock)
    for number, seconds in enumerate(step_s, 1):  # noqa: B007  `ask` reads it
        clock.now_s += seconds
        assert not notice.is_given()
    return asked


def test_after_long_steps_it_is_asked_each_time() -> None:
    assert asked_after([7.0] * 4) == [1, 2, 3, 4]


def test_after_short_steps_it_is_asked_seconds_apart() -> None:
    asked = asked_after([0.01] * 2000)
    assert asked[:5] == [1, 3, 7, 15, 31]
    assert asked[-1] - asked[-2] in (499, 500)


def test_what_is_answered_is_given_once_it_is_asked() -> None:
    clock = Clock()
    answers = iter([False, True])
    notice = Notice(lambda: next(answers), clock=clock)
    given = []
    for _ in range(3):
        clock.now_s += 1.0
        given.append(notice.is_given())
    assert given == [False, False, True]
