"""What a collection is about to delete: the one word between it and those who publish at the same time.

    <releases>/doomed.json        releases and objects by name, each with the time it was doomed at

No lock keeps a collection and a night apart: either may sleep for hours and go on. They keep to an order
instead. Who uses a thing first shows that it does, by what every collection looks at, and then reads this
list:

    a release that is published       writes its manifest, then reads the list
    a roll-back                       writes a hold (`users`), then reads the list
    an object that is stored again    is there, then the list is read; a doomed name isn't used, but the next

Who collects writes this list first, then looks at all of that, and deletes only what is in its list and still
used by nobody. So of two at once at least one sees the other: the collection spares, or the user refuses
(`releases.store` takes another name), and what is current is always whole.

Names stay in the list for a day, so that even a collection that slept between its look and its deletion
deletes nothing that is used. Not covered: one that sleeps for longer, and what is deleted (`garbage`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from namr.errors import Conflict
from namr.store import manifests, storage

_KEPT_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class DoomedList:
    """The list, as stored."""

    FORMAT: ClassVar[str] = "namr-doomed"
    FORMAT_VERSION: ClassVar[int] = 1

    since: Mapping[str, float] = field(default_factory=dict)
    """by name, relative to the root: seconds since 1970, by the store's clock"""


def names(releases_uri: str) -> frozenset[str]:
    """Names that nobody may come to rely on; empty where nothing was ever collected."""
    return frozenset(_read(releases_uri)[0].since)


def add(releases_uri: str, added: Iterable[str], *, now: float) -> None:
    """Doom names, and let go those that have been doomed for long.

    now: of the store. Raises Conflict where another collection changed the list at the same moment.
    """
    listed, etag = _read(releases_uri)
    kept = {name: since for name, since in listed.since.items() if now - since < _KEPT_S}
    changed = DoomedList(since=kept | dict.fromkeys(sorted(added), now))
    storage.replace_if_match(_uri(releases_uri), manifests.encode_manifest(changed), etag=etag)


def check(releases_uri: str, used: Iterable[str], *, what: str) -> None:
    """Conflict if one of the names is doomed. Called after `what` is there for every collection to see."""
    found = sorted(names(releases_uri) & set(used))
    if found:
        raise Conflict(
            f"{what}: a collection is about to delete {found[0]} and {len(found) - 1} others that it needs; "
            "what is current stays so: run it again, or roll back to a newer release"
        )


def _read(releases_uri: str) -> tuple[DoomedList, str | None]:
    """The list and its tag; an empty one and None where there is none."""
    listed, etag = manifests.read_to_change(_uri(releases_uri), DoomedList)
    return listed or DoomedList(), etag


def _uri(releases_uri: str) -> str:
    return storage.join(storage.absolute(releases_uri), "doomed.json")
