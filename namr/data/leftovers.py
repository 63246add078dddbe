"""What a source offers and a dataset doesn't get: images refused for a reason, and things that are none.

A refused image counts as bad; what is passed over doesn't, but is counted by kind and named, so that nobody
misses images without learning why. Not covered: how many bad ones a run allows (`packing`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

_NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class RefusedImage:
    """An image that was not packed, and why."""

    key: str
    location: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """Things of one kind that are no images."""

    kind: str
    """a suffix (".txt"), or what it is ("hidden", "fifo")"""
    num: int
    names: tuple[str, ...]
    """the first few"""

    def __str__(self) -> str:
        more = ", ..." if self.num > len(self.names) else ""
        return f"{self.num} {self.kind} ({', '.join(self.names)}{more})"


class Tally:
    """Counts what is passed over."""

    def __init__(self) -> None:
        self._num: Counter[str] = Counter()
        self._names: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, name: str) -> None:
        """One more of a kind."""
        self._add(PassedOver(kind=kind, num=1, names=(printable(name),)))

    def add_all(self, counted: Iterable[PassedOver]) -> None:
        """What somebody else counted."""
        for each in counted:
            self._add(each)

    def total(self) -> tuple[PassedOver, ...]:
        """By kind, the most frequent first."""
        return tuple(
            PassedOver(kind=kind, num=num, names=tuple(self._names[kind]))
            for kind, num in sorted(self._num.items(), key=lambda each: (-each[1], each[0]))
        )

    def _add(self, counted: PassedOver) -> None:
        self._num[counted.kind] += counted.num
        room = _NUM_NAMED - len(self._names[counted.kind])
        self._names[counted.kind] += counted.names[:room]


def is_text(text: str) -> bool:
    """Whether it is Unicode: a lone surrogate, as in a name that is not UTF-8, can't be stored as text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """The text with lone surrogates told as \\udcff, so that it can be stored and printed."""
    return text.encode(errors="backslashreplace").decode()
