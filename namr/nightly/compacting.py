"""One segment in place of many, as a step of its own that runs beside nights: built, compared, published.

    build      one segment of what is current when the step begins, which may take hours
    compare    what is current by then, and the same with that segment, asked with the same images
    publish    under the lease of the releases, which a night that is under way is waited for

Only the last step keeps nights away, for as long as it takes to add up what one of them added meanwhile. How
far a search looks, what is calibrated, what was measured and the template's age are kept: a compacted release
answers as the one before it.

Killed anywhere, the same step goes on where it was. Of two at once the second is told; where something else
than nights came meanwhile (a whole build, a roll-back, a pin) nothing is published.

Not covered: what is built (`release.compaction`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

from namr import checks
from namr.errors import Conflict, NamrError
from namr.nightly import likeness, measuring, release_report
from namr.nightly.measuring import Measured
from namr.release import compaction, publication, releases, users
from namr.release.build import BuildConfig, BuildReport
from namr.release.releases import Release, ReleaseManifest
from namr.search.searcher import Searcher
from namr.store import scratch, storage
from namr.store.cache import Cache
from namr.store.lease import Lease

_LOOK_AGAIN_S = 20.0


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """Which releases, and what their segments were built of."""

    releases_uri: str
    """root of all releases; the current one is compacted"""
    embeddings_uri: str
    """root of all embeddings"""
    num_parts: int = BuildConfig.num_parts
    """parts to build side by side; large indexes take more"""
    work_uri: str | None = None
    """where parts are kept until they are merged; <releases_uri>/building where none is named"""
    max_wait_hours: float = 12.0
    """how long to wait, with what was built, for a night or a collection that is under way"""

    def __post_init__(self) -> None:
        checks.in_range(self, "num_parts", at_least=1)
        checks.in_range(self, "max_wait_hours", at_least=0)


class CompactReport(NamedTuple):
    """What a compaction did."""

    release: Release | None
    """what it published; None where it published nothing"""
    how: str
    """what was done, or why nothing was, in words"""


class _Ready(NamedTuple):
    """A release that can be published in place of one."""

    replaces: str
    manifest: ReleaseManifest


def compact(config: CompactConfig, *, clock: Callable[[], datetime] = publication.utc_now) -> CompactReport:
    """Publish the current release with one segment, if it is worn.

    Raises Conflict where another compaction is under way, where a night stays for too long, and where what is
    current in the end was not made by adding to what was; ManifestError where the answers would be others;
    and what building raises. What is current stays so then.
    """
    root = storage.absolute(config.releases_uri)
    storage.check_writable(root)
    due = _due(root)
    if isinstance(due, str):
        return CompactReport(None, due)
    with users.compact_alone(root):
        due = _due(root)  # the lease may have been waited for
        if isinstance(due, str):
            return CompactReport(None, due)
        with users.holding(root, due.manifest.release_id), scratch.folder("compaction-") as folder:
            return _compacted(due, config, Cache(folder, 1 << 40), clock)


def attempt(config: CompactConfig, *, clock: Callable[[], datetime]) -> CompactReport:
    """`compact` after a night, which is good whatever comes of it: what failed is told, and due again."""
    try:
        return compact(config, clock=clock)
    except NamrError as error:
        return CompactReport(None, f"the compaction failed and is due again: {type(error).__name__}: {error}")


def _due(root: str) -> Release | str:
    """What is to be compacted; or why nothing is, in words."""
    pointer = releases.read_pointer(root)
    current = releases.open_release(root, pointer.target if pointer else None)
    name = current.manifest.release_id
    if pointer and pointer.pin:
        return f"nothing was compacted: {name} is pinned since {pointer.pin.since} ({pointer.pin.reason})"
    if compaction.worn(current) is None:
        return f"nothing was compacted: {name} is fit to be added to"
    if release_report.read(current).aged:
        return f"nothing was compacted: the next night builds {name} whole, since its template has aged"
    if not current.manifest.counts.num_indexed:
        return f"nothing was compacted: {name} has no image left"
    return current


def _compacted(
    old: Release, config: CompactConfig, cache: Cache, clock: Callable[[], datetime]
) -> CompactReport:
    root = old.releases_uri
    built = compaction.build(old, config.embeddings_uri, num_parts=config.num_parts, work_uri=config.work_uri)
    ready = _ready(releases.open_release(root), old, built, cache, clock())
    with _alone(root, wait_s=3600 * config.max_wait_hours) as lease:
        expected = releases.read_pointer(root)
        if expected and expected.target != ready.replaces:  # a night added to it since
            ready = _ready(releases.open_release(root, expected.target), old, built, cache, clock())
        lease.check()
        published = publication.publish(root, ready.manifest, expected=expected)
    return CompactReport(published, release_report.read(published).built)


def _ready(current: Release, old: Release, built: BuildReport, cache: Cache, at: datetime) -> _Ready:
    """What would replace the current release: compared with it, its reports stored."""
    now = current.manifest
    made = compaction.rebased(current, old, built)
    draft = replace(made, release_id=publication.new_id(at), created=at.isoformat(timespec="seconds"))
    before = Searcher.of(current, cache=cache, query_model=None)
    after = Searcher.of(Release(current.releases_uri, draft), cache=cache, query_model=None)
    asked = likeness.check(before, after)
    report = replace(
        release_report.read(current),
        num_parts=built.num_parts,
        imbalance=after.index.imbalance,
        build_s=built.seconds,
        considered=built.considered,
        built=(
            f"{now.release_id} with {len(draft.segments)} segments in place of {len(now.segments)}: "
            f"{compaction.worn(old)}; {len(asked)} images find the same in both"
        ),
    )
    keys = [item.key for each in asked.tolist() if (item := after.items.by_id(each))]
    return _Ready(now.release_id, measuring.with_reports(Measured(draft, report, after, keys)))


def _alone(root: str, *, wait_s: float) -> Lease:
    """The lease of all who write, waited for while somebody has it; Conflict in the end."""
    began = time.monotonic()
    while True:
        try:
            return users.write_alone(root, what="the end of a compaction")
        except Conflict:
            if time.monotonic() - began >= wait_s:
                raise
            time.sleep(_LOOK_AGAIN_S)
