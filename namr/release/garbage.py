"""Collecting what no release needs any more: old releases and their objects, work of builds, what kills left.

What stays:

- of releases the current one, the `keep` that were current last (by its `previous`, and by creation too:
  after a roll-back these are others), what was current within `min_age_hours`, what a reader holds, and while
  the pointer is pinned all that nothing was published after: a roll-back may have left it
- of those that were prepared to be switched to (`prepared`) the newest of each model, until `keep` others
  were published after it
- of the others, which lost the race for the pointer or died before it, those that may yet win: they follow
  the current one
- every object that a release lists which stays
- whatever is younger than `min_age_hours`, by the store's own clock: no clock of a machine is asked

A work folder goes as a whole, when nothing in it is young. A root with a release that can't be read is left
as it is: nobody knows what that release lists.

Who publishes at the same moment is safe by the order that `doomed` speaks of: look, doom, look again, and
delete what both looks found. Manifests are deleted before objects, so a kill leaves whole releases and some
garbage for the next time. Last it finds out what nothing is left of that was erased (`erasures`).

Not covered: embeddings (`old_embeddings`), datasets, releases of other roots.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

from namr import checks
from namr.errors import ManifestError
from namr.release import doomed, erasures, releases, users
from namr.release.releases import ReleaseManifest
from namr.store import storage
from namr.store.lease import Lease
from namr.store.manifests import Pointer
from namr.store.storage import Entry

_NUM_DELETERS = 16
_MANIFEST = "/manifest.json"
_WORK_NAME = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class CollectionConfig:
    """What a collection leaves."""

    keep: int = 7
    """releases that were current last, the current one among them; they can be rolled back to"""
    min_age_hours: float = 24.0
    """nothing younger is deleted; more than the longest night and the longest pause of a service take"""

    def __post_init__(self) -> None:
        checks.in_range(self, "keep", at_least=1)
        checks.in_range(self, "min_age_hours", at_least=0)


class Freed(NamedTuple):
    """What was deleted of one kind, or would have been."""

    what: str
    num: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class CollectionReport:
    """What a collection did."""

    kept: tuple[str, ...]
    """releases, by id"""
    freed: tuple[Freed, ...]
    gone: tuple[str, ...] = ()
    """erasures of which nothing is left in this root, since now"""
    is_dry_run: bool = False

    def with_more(self, *freed: Freed) -> "CollectionReport":
        """This, and what another collection freed."""
        return replace(self, freed=(*self.freed, *freed))

    @property
    def num_bytes(self) -> int:
        """Of all kinds."""
        return sum(each.num_bytes for each in self.freed)

    @property
    def in_words(self) -> str:
        """All of it, in one line."""
        verb = "would free" if self.is_dry_run else "freed"
        found = [f"{each.what} {each.num} ({each.num_bytes} bytes)" for each in self.freed if each.num]
        gone = f"; nothing is left of erasure {', '.join(self.gone)}" if self.gone else ""
        return (
            f"{verb} {self.num_bytes} bytes: {', '.join(found) or 'nothing'}; keeps {len(self.kept)} "
            f"releases{gone}"
        )


class _Garbage(NamedTuple):
    """What one look found to be of no use to anybody."""

    kept: dict[str, str]
    """by the id of a release, when it goes"""
    releases: list[Entry]
    """their manifests"""
    objects: list[Entry]
    readers: list[Entry]
    work: list[Entry]
    """of the root's own work folder"""

    @property
    def names(self) -> list[str]:
        """As `doomed` knows them."""
        return [*(_id_of(entry) for entry in self.releases), *(entry.name for entry in self.objects)]


def collect(
    releases_uri: str,
    config: CollectionConfig,
    *,
    held: Lease,
    work_uri: str | None = None,
    is_dry_run: bool = False,
) -> CollectionReport:
    """Delete what nobody needs, and say what that was.

    held: of `users.write_alone`. work_uri: where builds work, if not in the root. Raises ManifestError for a
    release or a hold that can't be read (nothing was deleted then), Conflict where the lease was lost.
    """
    root = storage.absolute(releases_uri)
    looking = _Looking(root, config)
    found = looking.look()
    elsewhere = storage.absolute(work_uri) if work_uri else None
    other_work = looking.old_work(storage.list_entries(elsewhere)) if elsewhere else []
    num_left = 0
    gone: tuple[str, ...] = ()
    if not is_dry_run:
        if found.names:
            held.check()
            doomed.add(root, found.names, now=looking.now)
            found = _both(found, looking.look())
        for uri, entries in (
            (root, found.releases),
            (root, [*found.objects, *found.readers, *found.work]),
            (elsewhere or root, other_work),
        ):
            _delete(uri, entries, held)
        num_left = storage.clear_leftovers(root, before=looking.now - looking.min_age_s)
        gone = erasures.close(root, min_age_s=looking.min_age_s, work_uri=elsewhere, now=looking.now)
    return CollectionReport(
        kept=tuple(sorted(found.kept)),
        freed=(
            _freed("releases", found.releases),
            _freed("objects", found.objects),
            _freed("files of work", [*found.work, *other_work]),
            _freed("holds of readers that are gone", found.readers),
            Freed("things left by killed writers", num_left, 0),
        ),
        gone=gone,
        is_dry_run=is_dry_run,
    )


def when_they_go(releases_uri: str, config: CollectionConfig) -> dict[str, str]:
    """By the id of each release that a collection would leave now: when a later one takes it, in words."""
    return _Looking(storage.absolute(releases_uri), config).look().kept


class _Looking:
    """Looks at a root as often as it takes; manifests, which never change, are read once."""

    def __init__(self, root: str, config: CollectionConfig) -> None:
        self.root, self.config = root, config
        self.now = storage.now(root)
        self.min_age_s = 3600 * config.min_age_hours
        self._manifests: dict[str, ReleaseManifest] = {}

    def look(self) -> _Garbage:
        """The pointer stood still meanwhile, so that its release and all that may follow it are known."""
        pointer = releases.read_pointer(self.root)
        while True:
            garbage = self._look(pointer)
            standing = releases.read_pointer(self.root)
            if standing == pointer:
                return garbage
            pointer = standing

    def _look(self, pointer: Pointer | None) -> _Garbage:
        entries = storage.list_entries(self.root)
        manifests = {_id_of(entry): entry for entry in entries if _is_manifest(entry)}
        readers = [entry for entry in entries if entry.name.startswith(users.FOLDER)]
        gone = [entry for entry in readers if self.now - entry.modified >= users.HOLD_S]
        held = users.held(self.root, (entry for entry in readers if entry not in gone))
        known = [self._read(release_id) for release_id in manifests]
        kept = self._kept(known, manifests, pointer, held)
        listed = {stored.name for each in known if each.release_id in kept for stored in each.objects()}
        objects = [entry for entry in entries if entry.name.startswith("objects/")]
        work = [entry for entry in entries if entry.name.startswith("building/")]
        return _Garbage(
            kept=kept,
            releases=[manifests[name] for name in manifests if name not in kept],
            objects=[each for each in objects if self._is_old(each) and each.name not in listed],
            readers=gone,
            work=self.old_work(work, prefix="building/"),
        )

    def old_work(self, entries: Iterable[Entry], *, prefix: str = "") -> list[Entry]:
        """Files of work folders in which nothing is young; what is no work folder of ours is left."""
        folders = defaultdict(list)
        for entry in entries:
            folders[entry.name.removeprefix(prefix).partition("/")[0]].append(entry)
        return [
            entry
            for name, files in folders.items()
            if _WORK_NAME.fullmatch(name) and all(map(self._is_old, files))
            for entry in files
        ]

    def _kept(
        self,
        known: Sequence[ReleaseManifest],
        manifests: dict[str, Entry],
        pointer: Pointer | None,
        held: frozenset[str],
    ) -> dict[str, str]:
        if pointer is None:
            return dict.fromkeys(manifests, "not before one is current")
        if pointer.target not in manifests:
            raise ManifestError(
                f"{self.root} has no manifest of its current release {pointer.target}; restore it, or roll "
                "back to another, and collect then"
            )
        by_id = {each.release_id: each for each in known}
        were_current = [each for each in known if each.release_id in _were_current(known, pointer)]
        were_current.sort(key=lambda each: (each.created, each.release_id))
        later = [_when_more_are(num + 1) for num in reversed(range(self.config.keep))]
        newest_first = [each.release_id for each in reversed(were_current)]
        kept = dict(zip(newest_first, later, strict=False))
        at: str | None = pointer.target
        for when in later:
            if at in by_id:
                kept.setdefault(at, when)
                at = by_id[at].previous
        is_full = len(were_current) >= self.config.keep
        for name in _prepared(known, since=were_current[-self.config.keep].created if is_full else ""):
            kept.setdefault(name, f"{later[0]}, for it is prepared")
        for each in known:
            if not self._is_old(manifests[each.release_id]):
                for name in by_id.keys() & {each.release_id, each.previous}:
                    kept.setdefault(name, f"{self.config.min_age_hours:g} hours after it was current")
            may_win = each.previous == pointer.target or pointer.pin is not None
            if each not in were_current and may_win:
                kept.setdefault(each.release_id, "when it can't be current any more")
        kept |= {name: "when no service has it open" for name in held & by_id.keys()}
        return kept | ({pointer.target: "not while it is pinned"} if pointer.pin else {})

    def _read(self, release_id: str) -> ReleaseManifest:
        if release_id not in self._manifests:
            try:
                self._manifests[release_id] = releases.open_release(self.root, release_id).manifest
            except ManifestError as error:
                raise ManifestError(
                    f"nothing is collected while a release can't be read, because what it lists is not "
                    f"known: {error}"
                ) from error
        return self._manifests[release_id]

    def _is_old(self, entry: Entry) -> bool:
        return self.now - entry.modified >= self.min_age_s


def _when_more_are(num: int) -> str:
    return f"when {num} more {'is' if num == 1 else 'are'} published"


def _were_current(known: Iterable[ReleaseManifest], pointer: Pointer) -> set[str | None]:
    """What the pointer showed at some time, for sure: the last one before a roll-back is not among it."""
    return {pointer.target, *(each.previous for each in known)}


def _prepared(known: Iterable[ReleaseManifest], *, since: str) -> set[str]:
    """The newest that was prepared of each model, if it was made then or later."""
    in_order = sorted(known, key=lambda each: (each.created, each.release_id))
    newest = {
        each.model_digest: each.release_id for each in in_order if each.is_prepared and each.created >= since
    }
    return set(newest.values())


def _is_manifest(entry: Entry) -> bool:
    return entry.name.endswith(_MANIFEST) and entry.name.count("/") == 1


def _id_of(entry: Entry) -> str:
    return entry.name.removesuffix(_MANIFEST)


def _both(one: _Garbage, other: _Garbage) -> _Garbage:
    """What both looks found; other is the newer one."""

    def common(of: Callable[[_Garbage], list[Entry]]) -> list[Entry]:
        names = {entry.name for entry in of(one)}
        return [entry for entry in of(other) if entry.name in names]

    return _Garbage(
        kept=other.kept,
        releases=common(lambda each: each.releases),
        objects=common(lambda each: each.objects),
        readers=common(lambda each: each.readers),
        work=common(lambda each: each.work),
    )


def _delete(root: str, entries: Sequence[Entry], held: Lease) -> None:
    def delete(entry: Entry) -> None:
        held.check()
        storage.delete(storage.join(root, entry.name))

    with ThreadPoolExecutor(_NUM_DELETERS) as pool:
        for _ in pool.map(delete, entries):
            pass


def _freed(what: str, entries: Sequence[Entry]) -> Freed:
    return Freed(what, len(entries), sum(entry.size_bytes for entry in entries))
