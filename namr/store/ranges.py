"""Many small reads as few larger ones.

On an object store a request costs as much as reading some hundred kilobytes, so ranges that lie near each
other are read as one. Files on local disk (a dataset there, or a cache) are treated alike, with a smaller
gap, since their bytes have to be copied all the same.
"""

from collections.abc import Sequence

from namr.store import storage
from namr.store.storage import Range

REMOTE_GAP_BYTES = 256 << 10
LOCAL_GAP_BYTES = 16 << 10
MAX_JOINED_BYTES = 16 << 20


def read_near(ranges: Sequence[Range]) -> list[bytes]:
    """`storage.read_ranges`, with near ranges joined; the ranges may overlap and be of any objects."""
    joined, place_of = join(ranges)
    parts = _read(joined)
    cut = []
    for wanted, place in zip(ranges, place_of, strict=True):
        start = wanted.start - joined[place].start
        cut.append(parts[place][start : start + wanted.stop - wanted.start])
    return cut


def join(ranges: Sequence[Range]) -> tuple[list[Range], list[int]]:
    """The requests that read them, and in which of these each of them lies."""
    joined: list[Range] = []
    place_of = [0] * len(ranges)
    for place in sorted(range(len(ranges)), key=lambda place: ranges[place]):
        wanted = ranges[place]
        if joined and _is_near(joined[-1], wanted):
            joined[-1] = joined[-1]._replace(stop=max(joined[-1].stop, wanted.stop))
        else:
            joined.append(wanted)
        place_of[place] = len(joined) - 1
    return joined, place_of


def _is_near(before: Range, after: Range) -> bool:
    """Whether one request for both is cheaper than two; `after` does not start before `before` does."""
    gap = LOCAL_GAP_BYTES if storage.is_local(after.uri) else REMOTE_GAP_BYTES
    return (
        before.uri == after.uri
        and after.start <= before.stop + gap
        and after.stop <= before.start + MAX_JOINED_BYTES
    )


def _read(ranges: Sequence[Range]) -> list[bytes]:
    """Local and remote ones each in one call."""
    parts: dict[int, bytes] = {}
    for local in (True, False):
        places = [place for place, wanted in enumerate(ranges) if storage.is_local(wanted.uri) == local]
        parts |= zip(places, storage.read_ranges([ranges[place] for place in places]), strict=True)
    return [parts[place] for place in range(len(ranges))]
