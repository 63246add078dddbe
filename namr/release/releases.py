"""Releases: an index, its re-rank vectors and its items, published together and never changed again.

    <releases>/current.json                       the pointer: a release id
    <releases>/<release id>/manifest.json         written after everything that it lists
    <releases>/objects/<sha256>/<file name>       segments, vectors, items, reports and tables; shared

    <releases>/tombstones.json                    what was taken down since, see `takedowns`
    <releases>/building/<build>/                  work of builds, see `build`
    <releases>/lease.json, compaction.json        who writes, see `users`
    <releases>/readers/                           who reads what
    <releases>/doomed.json                        what a collection deletes, see `doomed`
    <releases>/erasures/                          receipts of what was erased, see `erasures`

Objects are named by their digest, so a release that keeps most of the last one's parts lists them again
and writes nothing. Everything that is opened is verified by its digest, wherever it lies.

Not covered: which release is current and how that changes (`publication`), collecting objects that no release
lists any more (`garbage`), adding to them (`increment`) and one file of all (`export`).
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from namr.errors import ConfigError, ManifestError, ObjectMissing, StorageError
from namr.model.distances import Metric, Side
from namr.release import arrays, doomed, places
from namr.release.calibrated import Calibration
from namr.release.places import Places
from namr.store import item_files, manifests, read_ahead, storage
from namr.store.cache import Cache
from namr.store.item_files import ItemFile
from namr.store.manifests import Pointer, StoredObject, Upgrade

_NUM_DOWNLOADS = 8
_NO_IDS = ("building", "erasures", "objects", "readers")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One merged index file."""

    file: StoredObject
    num_entries: int
    """vectors in it, dead ones included"""


@dataclass(frozen=True, kw_only=True)
class VectorFile:
    """Re-rank vectors: a float16 .npy file (num_rows, 2, D), an item's embedding and structure side by side.

    The embedding is as it is searched, of unit length for the metric "cosine".
    """

    file: StoredObject
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class StoredVectors:
    """The re-rank vectors of what some shards have in segments, in the order of their lists."""

    files: tuple[VectorFile, ...]
    """one after the other; one, unless it would be larger than 4 GiB"""
    shards: StoredObject
    """with `rows`: which row an id has, see `places`"""
    rows: StoredObject
    min_structure: float
    """no structure weight is below it; 1 where there is no vector"""

    @property
    def num_rows(self) -> int:
        """Of all files."""
        return sum(each.num_rows for each in self.files)

    def objects(self) -> Iterator[StoredObject]:
        """All of them."""
        yield from (self.shards, self.rows)
        yield from (each.file for each in self.files)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Where every sample of the dataset version went: num_samples is the sum of the other three."""

    num_samples: int
    num_indexed: int
    num_refused: int
    num_tombstoned: int

    @property
    def in_words(self) -> str:
        """All four."""
        return (
            f"{self.num_samples} samples: {self.num_indexed} indexed, {self.num_refused} refused, "
            f"{self.num_tombstoned} tombstoned"
        )


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Why a release was published although the night's gate had objections."""

    by: str
    """user and machine"""
    reason: str
    objections: str


@dataclass(frozen=True, kw_only=True)
class TemplateBirth:
    """What a template was trained for, to tell later how it has aged."""

    num_entries: int
    recall_at_10: float
    """at the nprobe and depth that were chosen then"""
    imbalance: float
    """of the lists"""


def _with_one_segment(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"vectors": [body.get("vectors")]}


@dataclass(frozen=True, kw_only=True)
class ReleaseManifest:
    """One release, as stored."""

    FORMAT: ClassVar[str] = "namr-release"
    FORMAT_VERSION: ClassVar[int] = 3
    EARLIER: ClassVar[dict[int, Upgrade]] = {2: _with_one_segment}

    release_id: str
    created: str
    """ISO 8601, UTC"""
    model_name: str
    model_version: str
    model_digest: str
    dataset_uri: str
    dataset_version: int
    dataset_digest: str
    index_key: str
    template: StoredObject
    """the trained, empty index of all segments"""
    template_hash: str
    metric: Metric
    structure_side: Side
    """what a query gets that doesn't ask for a side"""
    embedding_dim: int
    counts: Counts
    segments: tuple[Segment, ...]
    """in the order of their ids; each was added by one build to those before"""
    tombstones: StoredObject | None
    """ids that segments hold and nobody may find: int64 .npy, ascending; None where there are none"""
    vectors: tuple[StoredVectors, ...]
    """of all entries of the segments, in their order"""
    items: tuple[StoredObject, ...]
    """files of what is in the segments (`item_files`), ids ascending over all of them"""
    report_json: StoredObject | None
    """None only in a draft, which is measured before it is published; so for report_html"""
    report_html: StoredObject | None
    nprobe: int
    depth: int
    recall_at_10: float
    """of the index at `nprobe` against exact search, on held-out queries"""
    calibration: Calibration | None = None
    """None where too few queries were held out to say anything, or an earlier namr made it"""
    config_digest: str = ""
    """SHA-256 of the configs that decided it, see `reindexing`; empty where an earlier namr made it"""
    template_birth: TemplateBirth | None = None
    """None where an earlier namr trained it"""
    kept_truth: StoredObject | None = None
    """what is nearest to some items, see `nightly.kept_truth`; None where an earlier namr measured"""
    forced: Forced | None = None
    """None where nothing stood against it"""
    tables: Mapping[str, StoredObject] = field(default_factory=dict)
    """Parquet files beside the report, by name, see `reports.beside`"""
    is_prepared: bool = False
    """whether it was made beside the current one, to be switched to later, see `prepared`"""
    objections: str | None = None
    """of the gate to what is prepared"""
    compacts: str | None = None
    """the release that it answers as, with fewer segments or dead entries; None where it has other images"""
    previous: str | None = None
    """the release that was current before; set by `publication.publish`"""

    @property
    def gallery_min_structure(self) -> float:
        """No structure weight of the gallery is below this."""
        return min(each.min_structure for each in self.vectors)

    @property
    def num_entries(self) -> int:
        """Vectors in all segments, dead ones included."""
        return sum(segment.num_entries for segment in self.segments)

    @property
    def vector_files(self) -> list[VectorFile]:
        """All re-rank vectors, one file after the other."""
        return [file for vectors in self.vectors for file in vectors.files]

    def objects(self) -> Iterator[StoredObject]:
        """Everything that has to be there for the release to work."""
        yield from (self.template, *self.items)
        yield from (segment.file for segment in self.segments)
        yield from filter(None, (self.tombstones, self.report_json, self.report_html, self.kept_truth))
        yield from self.tables.values()
        for vectors in self.vectors:
            yield from vectors.objects()


@dataclass(frozen=True)
class Release:
    """A release, open for reading."""

    releases_uri: str
    manifest: ReleaseManifest

    def read(self, stored: StoredObject) -> bytes:
        """The verified bytes of one of its objects."""
        return manifests.read_object(self.releases_uri, stored)

    def path(self, stored: StoredObject, cache: Cache) -> Path:
        """A local file of one of its objects, verified: itself where the release is local, else cached.

        ManifestError if it is missing or damaged; `cache` remembers what it has verified.
        """
        uri = storage.join(self.releases_uri, stored.name)
        with self._explained(uri):
            return cache.path(uri, sha256=stored.sha256)

    def fetch(self, listed: Iterable[StoredObject], cache: Cache) -> None:
        """Download and verify these of its objects side by side, so that `path` has them at hand.

        None takes the room of what somebody used lately, nor is held: what is not there then, `path` brings.
        """

        def brought(stored: StoredObject) -> None:
            uri = storage.join(self.releases_uri, stored.name)
            with self._explained(uri):
                cache.path_if_room(uri, sha256=stored.sha256)

        for _ in read_ahead.in_order(brought, dict.fromkeys(listed), num_threads=_NUM_DOWNLOADS):
            pass

    @contextmanager
    def _explained(self, uri: str) -> Iterator[None]:
        try:
            yield
        except ObjectMissing as error:
            raise ManifestError(
                f"{uri} is missing, and the release lists it; restore it or build again"
            ) from error
        except StorageError as error:
            if not storage.is_local(uri):
                raise
            raise ManifestError(f"{error}; restore it or build again") from error

    def items(self) -> Iterator[ItemFile]:
        """What is in the segments, by ascending id: one file after the other, verified and held in memory."""
        return (item_files.decode(self.read(stored)) for stored in self.manifest.items)

    def places(self, cache: Cache) -> Places:
        """Which row of the re-rank vectors an id has, mapped into memory."""
        nums_rows = [of.num_rows for of in self.manifest.vectors]
        paths = [(self.path(of.shards, cache), self.path(of.rows, cache)) for of in self.manifest.vectors]
        tables = [Places.open(*pair, num_rows=num) for pair, num in zip(paths, nums_rows, strict=True)]
        return places.joined(tables, nums_rows)

    def tombstones(self) -> npt.NDArray[np.int64]:
        """Ids that segments hold and nobody may find, ascending."""
        stored = self.manifest.tombstones
        return arrays.decode_array(self.read(stored), np.int64) if stored else np.empty(0, np.int64)


def store(
    releases_uri: str, name: str, data: bytes | Path, *, sha256: str | None = None, is_done_with: bool = False
) -> StoredObject:
    """Write an object of a release under its digest; one that is there already is not written again.

    It never gets a name that a collection is about to delete (`doomed`), but the next. sha256: of the data,
    where it is known. is_done_with: nobody writes to the file again, so that it need not be copied.
    """
    digest = manifests.describe_object(name, data, sha256=sha256).sha256
    names = (f"objects/{digest}{f'.{number}' if number else ''}/{name}" for number in itertools.count())
    before = doomed.names(releases_uri)
    for free in (each for each in names if each not in before):
        stored = manifests.write_object(releases_uri, free, data, sha256=digest, is_done_with=is_done_with)
        if free not in doomed.names(releases_uri):
            return stored
    raise AssertionError("there is always a next name")


def store_tombstones(releases_uri: str, dead: npt.NDArray[np.int64]) -> StoredObject | None:
    """Store ids, ascending, as a release lists those that nobody may find; None where there are none."""
    return store(releases_uri, "tombstones.npy", arrays.encode_array(dead)) if len(dead) else None


def is_there(releases_uri: str, stored: StoredObject) -> bool:
    """Whether a release may list what an earlier run stored: it is there, and no collection takes it."""
    uri = storage.join(releases_uri, stored.name)
    return storage.exists(uri) and stored.name not in doomed.names(releases_uri)


def read_pointer(releases_uri: str) -> Pointer | None:
    """What is current now; a run reads it when it begins and gives it to `publication.publish`."""
    return manifests.read_pointer(pointer_uri(releases_uri))


def current(releases_uri: str) -> Release | None:
    """The current release, None where nothing was published yet."""
    pointer = read_pointer(releases_uri)
    return open_release(releases_uri, pointer.target) if pointer else None


def open_release(releases_uri: str, release_id: str | None = None) -> Release:
    """A release by id, the current one if None; ManifestError where there is none."""
    if release_id is None:
        release = current(releases_uri)
        if release is None:
            raise ManifestError(f"{releases_uri} has no current release: check the URI, or publish one first")
        return release
    root = storage.absolute(releases_uri)
    uri = manifest_uri(root, release_id)
    manifest = manifests.read_manifest(uri, ReleaseManifest)
    if manifest.release_id != release_id:
        raise ManifestError(f"{uri} is of another release, {manifest.release_id!r}; restore it")
    return Release(root, manifest)


def pointer_uri(releases_uri: str) -> str:
    """Where the pointer lies."""
    return storage.join(releases_uri, "current.json")


def manifest_uri(releases_uri: str, release_id: str) -> str:
    """Where the manifest of a release lies; ConfigError for an id that is no name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", release_id) or release_id in _NO_IDS:
        raise ConfigError(
            f"release id {release_id!r}: expected letters, digits, '.', '_', '-', and none of {_NO_IDS}"
        )
    return storage.join(releases_uri, release_id, "manifest.json")
