"""Which release is current: verified, published, rolled back, pinned.

Publishing verifies that every object is there, reconciles the counts, and then swaps the pointer as it was
read when the run began: of two runs at once one wins and the other gets a Conflict. What the dataset has
tombstoned joins the take-down list, so that no earlier release shows it either.

Rolling back is the same swap to a release that exists, and pins it: the reason to go back holds for the next
night too. Nothing is published over a pin until somebody lifts it.

Not covered: what a release is made of (`releases`), whether it is good enough (the night's gate).
"""

import getpass
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from namr.data import datasets
from namr.errors import ConfigError, Conflict, ManifestError, ObjectMissing
from namr.index.index_files import sum_of_ids
from namr.release import doomed, releases, takedowns, users
from namr.release.places import Places
from namr.release.releases import Forced, Release, ReleaseManifest
from namr.store import manifests, scratch, storage
from namr.store.cache import Cache
from namr.store.manifests import Pin, Pointer, StoredObject

_NUM_CHECKERS = 16
_MAX_NPY_HEADER_BYTES = 256
_BLOCK_ROWS = 1 << 20


def utc_now() -> datetime:
    """The time of a release."""
    return datetime.now(UTC)


def new_id(at: datetime) -> str:
    """An id that no other release has; those of later times are greater."""
    return f"{at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


def forced(reason: str, objections: str) -> Forced:
    """That whoever runs this process overrules objections. ConfigError for an empty reason."""
    if not reason.strip():
        raise ConfigError("force is empty; say why the gate is overruled, for those who find the release")
    return Forced(by=operator(), reason=reason, objections=objections)


def operator() -> str:
    """Who runs this process, for those who find what it did."""
    return f"{getpass.getuser()} on {socket.gethostname()}"


def publish(releases_uri: str, manifest: ReleaseManifest, *, expected: Pointer | None) -> Release:
    """Verify a release, write its manifest and make it current; returns it.

    expected: the pointer as it was read when the run began. Raises ManifestError if an object is missing or
    the counts don't add up, and Conflict if somebody else moved the pointer, or pinned it, or a collection is
    about to delete an object; what was current stays so. Publishing again what this run published already
    changes nothing.
    """
    root = storage.absolute(releases_uri)
    manifest_uri = releases.manifest_uri(root, manifest.release_id)
    if expected and expected.target == manifest.release_id:
        return releases.open_release(root, manifest.release_id)
    if expected and expected.pin:
        raise _held(manifest.release_id, expected.target, expected.pin)
    manifest = replace(manifest, previous=expected.target if expected else None)
    verify(root, manifest)
    dataset = datasets.open_version(manifest.dataset_uri, manifest.dataset_version)
    takedowns.take_down(root, manifest.dataset_uri, dataset.version.tombstones)
    manifests.write_manifest(manifest_uri, manifest)
    _check_not_doomed(root, manifest)
    token = f"publish-{manifest.release_id}"
    try:
        manifests.swap_pointer(
            releases.pointer_uri(root), manifest.release_id, expected=expected, token=token
        )
    except Conflict as error:
        now = releases.read_pointer(root)
        if now and now.pin:
            raise _held(manifest.release_id, now.target, now.pin) from error
        raise
    return Release(root, manifest)


def keep(releases_uri: str, manifest: ReleaseManifest) -> None:
    """Write the manifest of a release that is not to be current, so that people can look at it.

    Raises ManifestError as `publish` does, and Conflict if a collection is about to delete an object: it is
    not kept then.
    """
    root = storage.absolute(releases_uri)
    verify(root, manifest)
    uri = releases.manifest_uri(root, manifest.release_id)
    manifests.write_manifest(uri, manifest)
    try:
        _check_not_doomed(root, manifest, verb="kept")
    except Conflict:
        storage.delete(uri)
        raise


def roll_back(
    releases_uri: str, to: str | None = None, *, reason: str | None = None, now: datetime
) -> Release:
    """Make an earlier release current again, the one before the current one or the one named, and pin it.

    One that compacts another is gone back over together with that one, since both answer alike. reason: of
    the pin; which release was left where none is given. Raises ConfigError if there is none before,
    ManifestError if the release is gone or an object of it is, Conflict if somebody publishes at the
    same moment, or the release is being collected. Nothing is changed then.
    """
    pointer = _pointer(releases_uri, "roll back")
    target = to or _before(releases.open_release(releases_uri, pointer.target).manifest, releases_uri)
    if target is None:
        raise ConfigError(f"{releases_uri}: {pointer.target} is the first release; there is none before it")
    with users.holding(releases_uri, target):
        release = releases.open_release(releases_uri, target)
        doomed.check(releases_uri, [target], what=f"{target} is not current again")
        verify(release.releases_uri, release.manifest)
        _swap(releases_uri, target, pointer, _pin(reason or f"rolled back from {pointer.target}", now))
    return release


def _before(manifest: ReleaseManifest, releases_uri: str) -> str | None:
    """The last release that answers otherwise."""
    while manifest.compacts is not None:
        manifest = releases.open_release(releases_uri, manifest.compacts).manifest
    return manifest.previous


def pin(releases_uri: str, *, reason: str, now: datetime) -> Pointer:
    """Keep the current release current until `unpin`; returns the pointer. An earlier pin is replaced."""
    pointer = _pointer(releases_uri, "pin")
    made = _pin(reason, now)
    _swap(releases_uri, pointer.target, pointer, made)
    return pointer._replace(pin=made)


def unpin(releases_uri: str) -> Pointer:
    """Let the next release be published again; returns the pointer as it was, with its pin if it had one."""
    pointer = _pointer(releases_uri, "unpin")
    if pointer.pin:
        _swap(releases_uri, pointer.target, pointer, None)
    return pointer


def _check_not_doomed(root: str, manifest: ReleaseManifest, *, verb: str = "published") -> None:
    """Conflict if a collection is about to delete what the release needs.

    Not asked of what the release before it lists: when that was published it had shown that it needs it.
    """
    used = {manifest.release_id, *(stored.name for stored in manifest.objects())}
    if manifest.previous:
        before = releases.open_release(root, manifest.previous).manifest
        used -= {stored.name for stored in before.objects()}
    doomed.check(root, used, what=f"release {manifest.release_id} is not {verb}")


def _pointer(releases_uri: str, verb: str) -> Pointer:
    pointer = releases.read_pointer(releases_uri)
    if pointer is None:
        raise ConfigError(f"{releases_uri} has no current release, so there is nothing to {verb}")
    return pointer


def _pin(reason: str, now: datetime) -> Pin:
    if not reason.strip():
        raise ConfigError("the reason of a pin is empty; say why, for those who find it")
    return Pin(since=now.isoformat(timespec="seconds"), reason=reason)


def _swap(releases_uri: str, target: str, expected: Pointer, pin: Pin | None) -> None:
    token = f"by-hand-{uuid.uuid4().hex}"
    manifests.swap_pointer(
        releases.pointer_uri(releases_uri), target, expected=expected, token=token, pin=pin
    )


def _held(release_id: str, current: str, pin: Pin) -> Conflict:
    return Conflict(
        f"release {release_id} is not published: {current} is pinned since {pin.since} ({pin.reason}); lift "
        "it with `namr releases unpin` and publish again"
    )


def verify(releases_uri: str, manifest: ReleaseManifest) -> None:
    """ManifestError unless every object is there with its size and every count agrees with the others.

    Digests are not compared here, but wherever an object is opened (`Release.path` and `read`): the night has
    just opened all of a release to measure it, a service opens all of it before it answers from it, and a
    release on an object store would have to be downloaded whole.
    """
    with ThreadPoolExecutor(_NUM_CHECKERS) as pool:
        for _ in pool.map(lambda stored: _check_object(releases_uri, stored), manifest.objects()):
            pass
    what = f"release {manifest.release_id} is not published"
    if manifest.report_json is None or manifest.report_html is None:
        raise ManifestError(f"{what}: it was not measured, so it has no report")
    counts, dead = manifest.counts, Release(releases_uri, manifest).tombstones()
    went = {"indexed": counts.num_indexed, "refused": counts.num_refused, "tombstoned": counts.num_tombstoned}
    _reconcile(what, "samples of its dataset", counts.num_samples, went)
    num_entries, num_rows = manifest.num_entries, sum(each.num_rows for each in manifest.vectors)
    _reconcile(
        what, "entries of its segments", num_entries, {"indexed": counts.num_indexed, "dead": len(dead)}
    )
    _reconcile(what, "rows of its re-rank vectors", num_rows, {"entries of its segments": num_entries})
    release = Release(releases_uri, manifest)
    with scratch.folder("verify-") as folder:
        _check_items(what, release, _checked_places(what, release, folder))
    if manifest.nprobe < 1 or manifest.depth < 1 or manifest.gallery_min_structure <= 0:
        raise ManifestError(
            f"{what}: nprobe {manifest.nprobe} and depth {manifest.depth} have to be at least 1, and the "
            f"smallest structure weight {manifest.gallery_min_structure:g} above 0"
        )


def _reconcile(what: str, name: str, whole: int, parts: dict[str, int]) -> None:
    if whole != sum(parts.values()):
        said = " + ".join(f"{number} {part}" for part, number in parts.items())
        raise ManifestError(
            f"{what}: {whole} {name} against {said}, {whole - sum(parts.values()):+d}; nothing was changed, "
            "find what was lost and build again"
        )


def _checked_places(what: str, release: Release, folder: Path) -> Places:
    """Where the vectors lie: every row is one sample's, and the files are as long as their rows.

    They are mapped, from `folder` where the release is remote, and looked at block by block.
    """
    dim = release.manifest.embedding_dim
    for each in release.manifest.vector_files:
        header = each.file.size_bytes - 2 * 2 * each.num_rows * dim
        if not 0 < header <= _MAX_NPY_HEADER_BYTES:
            raise ManifestError(
                f"{what}: {each.file.name} has {each.file.size_bytes} bytes, which are not {each.num_rows} "
                f"pairs of float16 vectors of dimension {dim}"
            )
    places = release.places(Cache(folder, max_bytes=1 << 40))
    num_rows = release.manifest.num_entries
    num_samples, num_placed, rows_sum, every_sum = release.manifest.counts.num_samples, 0, 0, 0
    _reconcile(
        what, "places of its re-rank vectors", len(places.rows), {"samples of its dataset": num_samples}
    )
    for start in range(0, len(places.rows), _BLOCK_ROWS):
        rows = places.rows[start : start + _BLOCK_ROWS]
        rows = rows[rows >= 0].astype(np.int64)
        num_placed, rows_sum = num_placed + len(rows), rows_sum + sum_of_ids(rows)
        every_sum += sum_of_ids(np.arange(start, min(start + _BLOCK_ROWS, num_rows)))
    if num_placed != num_rows or (rows_sum - every_sum) % 2**64:
        raise ManifestError(
            f"{what}: {num_placed} samples have a place among {num_rows} re-rank vectors, and not "
            "each one of its own"
        )
    return places


def _check_items(what: str, release: Release, places: Places) -> None:
    """File by file: as many as are in the segments, ids that ascend, and a re-rank vector for each."""
    num_items, last_id = 0, np.empty(0, np.int64)
    for file in release.items():
        if (np.diff(file.ids, prepend=last_id) <= 0).any():
            raise ManifestError(f"{what}: the ids of its items don't ascend")
        lacking = file.ids[places.of(file.ids) < 0]
        if len(lacking):
            raise ManifestError(
                f"{what}: item {lacking[0]} has no re-rank vector, and {len(lacking) - 1} others"
            )
        num_items, last_id = num_items + len(file), file.ids[-1:].copy() if len(file) else last_id
    _reconcile(what, "items", num_items, {"entries of its segments": release.manifest.num_entries})


def _check_object(releases_uri: str, stored: StoredObject) -> None:
    uri = storage.join(releases_uri, stored.name)
    try:
        size = storage.size(uri)
    except ObjectMissing as error:
        raise ManifestError(
            f"{uri} is missing, and the release lists it; restore it or build again"
        ) from error
    if size != stored.size_bytes:
        raise ManifestError(
            f"{uri} has {size} bytes, the release says {stored.size_bytes}; restore it or build again"
        )
