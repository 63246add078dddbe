"""Releases: an index, its re-rank vectors and its items, published together and never changed again.

    <releases>/current.json                       the pointer: a release id
    <releases>/<release id>/manifest.json         written after everything that it lists
    <releases>/objects/<sha256>/<file name>       segments, vectors, items, reports; shared by releases

Objects are named by their digest, so a release that keeps most of the last one's parts lists them again
and writes nothing. Publishing verifies that every object is there, reconciles the counts, and then swaps the
pointer as it was read when the run began: of two runs at once one wins and the other gets a Conflict.
Rolling back is the same swap to a release that exists.

Not covered: collecting objects that no release lists any more, and compacting segments.
"""

import io
import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from namr.data import shards
from namr.errors import ConfigError, ManifestError, ObjectMissing, ShapeError
from namr.index import ivf
from namr.model import distances
from namr.model.distances import Metric, Side
from namr.store import manifests, scratch, storage, tables
from namr.store.cache import Cache
from namr.store.manifests import Pointer, StoredObject
from namr.store.tables import EmbeddingTable, SampleTable

_NUM_CHECKERS = 16
_MAX_NPY_HEADER_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One merged index file."""

    file: StoredObject
    num_entries: int
    """vectors in it, dead ones included"""


@dataclass(frozen=True, kw_only=True)
class VectorShard:
    """The re-rank vectors of one shard: float16 (num_rows, D) .npy files, row = id & 0xffffffff.

    Rows that are not in the index (refused, tombstoned) are NaN.
    """

    number: int
    num_rows: int
    embedding: StoredObject
    """as it is searched: of unit length for the metric "cosine\""""
    structure: StoredObject
    min_structure: float
    """the smallest structure weight in it; 1 where it has no vector"""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Where every sample of the dataset version went: num_samples is the sum of the other three."""

    num_samples: int
    num_indexed: int
    num_refused: int
    num_tombstoned: int


@dataclass(frozen=True, kw_only=True)
class ReleaseManifest:
    """One release, as stored."""

    FORMAT: ClassVar[str] = "namr-release"
    FORMAT_VERSION: ClassVar[int] = 1

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
    """in the order of their ids"""
    tombstones: StoredObject | None
    """ids that segments hold and nobody may find: int64 .npy, ascending; None where there are none"""
    vectors: tuple[VectorShard, ...]
    items: StoredObject
    """a SampleTable of what can be found, ascending ids"""
    report_json: StoredObject | None
    """None only in a draft, which is measured before it is published; so for report_html"""
    report_html: StoredObject | None
    nprobe: int
    depth: int
    recall_at_10: float
    """of the index at `nprobe` against exact search, on held-out queries"""
    previous: str | None = None
    """the release that was current before; set by `publish`"""

    @property
    def gallery_min_structure(self) -> float:
        """No structure weight of the gallery is below this."""
        return min((shard.min_structure for shard in self.vectors), default=1.0)

    def objects(self) -> Iterator[StoredObject]:
        """Everything that has to be there for the release to work."""
        yield from (self.template, self.items)
        yield from (segment.file for segment in self.segments)
        yield from filter(None, (self.tombstones, self.report_json, self.report_html))
        for shard in self.vectors:
            yield from (shard.embedding, shard.structure)


@dataclass(frozen=True)
class Release:
    """A release, open for reading."""

    releases_uri: str
    manifest: ReleaseManifest

    def read(self, stored: StoredObject) -> bytes:
        """The verified bytes of one of its objects."""
        return manifests.read_object(self.releases_uri, stored)

    def path(self, stored: StoredObject, cache: Cache) -> Path:
        """A local file of one of its objects: the file itself where the release is local, else cached.

        What is downloaded is verified by its digest, what is local by its size.
        """
        uri = storage.join(self.releases_uri, stored.name)
        if not storage.is_local(uri):
            return cache.path(uri, sha256=stored.sha256)
        _check_object(self.releases_uri, stored)
        return storage.local_path(uri)

    def items(self) -> SampleTable:
        """What can be found, by ascending id."""
        return tables.decode_samples(self.read(self.manifest.items))

    def tombstones(self) -> npt.NDArray[np.int64]:
        """Ids that segments hold and nobody may find, ascending."""
        stored = self.manifest.tombstones
        return decode_array(self.read(stored), np.int64) if stored else np.empty(0, np.int64)


def store(releases_uri: str, name: str, data: bytes | Path) -> StoredObject:
    """Write an object of a release under its digest; one that is there already is not written again."""
    digest = storage.sha256(data) if isinstance(data, bytes) else storage.sha256_of_file(data)
    return manifests.write_object(releases_uri, f"objects/{digest}/{name}", data)


def store_vectors(
    releases_uri: str, table: EmbeddingTable, *, number: int, num_rows: int, metric: Metric
) -> VectorShard:
    """Write the re-rank vectors of one shard; rows that `table` lacks become NaN.

    table.embeddings (n, D) are as the model returned them. Raises ShapeError for ids of another shard, and
    for values that float16 can't hold.
    """
    rows = shards.row_of(table.ids)
    if (shards.shard_of(table.ids) != number).any() or (rows >= num_rows).any():
        raise ShapeError(
            f"embeddings of other samples than the {num_rows} of shard {number}: check their ids"
        )
    searched = distances.for_search(torch.from_numpy(table.embeddings), metric).numpy()
    files = []
    for what, vectors in (("embedding", searched), ("structure", table.structures)):
        stored = np.full((num_rows, vectors.shape[1]), np.nan, np.float16)
        with np.errstate(over="ignore"):
            stored[rows] = vectors
        if not np.isfinite(stored[rows]).all():
            largest = float(np.abs(vectors).max())
            raise ShapeError(
                f"shard {number}: {what}s up to {largest:g} don't fit float16 (65504); fold the model's scale"
            )
        files.append((store(releases_uri, f"{what}-{number:06d}.npy", encode_array(stored)), stored[rows]))
    (embedding, _), (structure, weights) = files
    return VectorShard(
        number=number,
        num_rows=num_rows,
        embedding=embedding,
        structure=structure,
        min_structure=float(weights.min()) if weights.size else 1.0,
    )


def read_pointer(releases_uri: str) -> Pointer | None:
    """What is current now; a run reads it when it begins and gives it to `publish`."""
    return manifests.read_pointer(_pointer_uri(releases_uri))


def current(releases_uri: str) -> Release | None:
    """The current release, None where nothing was published yet."""
    pointer = read_pointer(releases_uri)
    return open_release(releases_uri, pointer.target) if pointer else None


def open_release(releases_uri: str, release_id: str | None = None) -> Release:
    """A release by id, the current one if None; ManifestError where there is none."""
    if release_id is None:
        found = current(releases_uri)
        if found is None:
            raise ManifestError(f"{releases_uri} has no current release: check the URI, or publish one first")
        return found
    _check_id(release_id)
    root = storage.absolute(releases_uri)
    manifest = manifests.read_manifest(_manifest_uri(root, release_id), ReleaseManifest)
    if manifest.release_id != release_id:
        raise ManifestError(
            f"{_manifest_uri(root, release_id)} is of another release, {manifest.release_id!r}; restore it"
        )
    return Release(root, manifest)


def list_releases(releases_uri: str) -> list[ReleaseManifest]:
    """All releases, oldest first; those that lost the race for the pointer are among them."""
    found = []
    for name in storage.list_names(releases_uri):
        release_id, _, rest = name.partition("/")
        if rest == "manifest.json":
            found.append(open_release(releases_uri, release_id).manifest)
    return sorted(found, key=lambda manifest: (manifest.created, manifest.release_id))


def publish(releases_uri: str, manifest: ReleaseManifest, *, expected: Pointer | None) -> Release:
    """Verify a release, write its manifest and make it current; returns it.

    expected: the pointer as it was read when the run began. Raises ManifestError if an object is missing or
    the counts don't add up, and Conflict if somebody else moved the pointer; what was current stays so.
    Publishing again what this run published already changes nothing.
    """
    _check_id(manifest.release_id)
    root = storage.absolute(releases_uri)
    if expected and expected.target == manifest.release_id:
        return open_release(root, manifest.release_id)
    manifest = replace(manifest, previous=expected.target if expected else None)
    verify(root, manifest)
    manifests.write_manifest(_manifest_uri(root, manifest.release_id), manifest)
    manifests.swap_pointer(
        _pointer_uri(root), manifest.release_id, expected=expected, token=f"publish-{manifest.release_id}"
    )
    return Release(root, manifest)


def roll_back(releases_uri: str, to: str | None = None) -> Release:
    """Make an earlier release current again: the one before the current one, or the one named.

    Raises ConfigError if there is none before, ManifestError if the release is gone or an object of it is,
    Conflict if somebody publishes at the same moment. Nothing is changed then.
    """
    pointer = read_pointer(releases_uri)
    if pointer is None:
        raise ConfigError(f"{releases_uri} has no current release, so there is nothing to roll back")
    target = to or open_release(releases_uri, pointer.target).manifest.previous
    if target is None:
        raise ConfigError(f"{releases_uri}: {pointer.target} is the first release; there is none before it")
    release = open_release(releases_uri, target)
    verify(release.releases_uri, release.manifest)
    if target != pointer.target:
        manifests.swap_pointer(
            _pointer_uri(releases_uri), target, expected=pointer, token=f"roll-back-{uuid.uuid4().hex}"
        )
    return release


def export(release: Release, out_path: Path) -> ivf.IndexInfo:
    """Write the release as one file that plain FAISS reads, and say what it holds.

    Refused (ConfigError) while segments hold dead entries, because plain FAISS would find them.
    """
    manifest = release.manifest
    if manifest.tombstones:
        raise ConfigError(
            f"release {manifest.release_id} hides {len(release.tombstones())} dead entries that plain FAISS "
            "would find; run a full build, which leaves them out, and export that"
        )
    scratch.sweep(out_path.parent)
    with scratch.folder_beside(out_path) as folder:
        paths = []
        for at, segment in enumerate(manifest.segments):
            path = Path(folder, f"{at}.faiss")
            storage.download(storage.join(release.releases_uri, segment.file.name), path)
            if storage.sha256_of_file(path) != segment.file.sha256:
                raise ManifestError(
                    f"{segment.file.name} of release {manifest.release_id} is damaged; restore it"
                )
            paths.append(path)
        if len(paths) == 1:
            paths[0].replace(out_path)
            return ivf.inspect(out_path)
        return ivf.merge_parts(ivf.load_template(release.read(manifest.template)), paths, out_path)


def verify(releases_uri: str, manifest: ReleaseManifest) -> None:
    """ManifestError unless every object is there with its size and every count agrees with the others."""
    with ThreadPoolExecutor(_NUM_CHECKERS) as pool:
        for _ in pool.map(lambda stored: _check_object(releases_uri, stored), manifest.objects()):
            pass
    what = f"release {manifest.release_id} is not published"
    if manifest.report_json is None or manifest.report_html is None:
        raise ManifestError(f"{what}: it was not measured, so it has no report")
    counts, dead = manifest.counts, Release(releases_uri, manifest).tombstones()
    items = Release(releases_uri, manifest).items()
    went = {"indexed": counts.num_indexed, "refused": counts.num_refused, "tombstoned": counts.num_tombstoned}
    _reconcile(what, "samples of its dataset", counts.num_samples, went)
    num_entries = sum(segment.num_entries for segment in manifest.segments)
    _reconcile(
        what, "entries of its segments", num_entries, {"indexed": counts.num_indexed, "dead": len(dead)}
    )
    num_rows = sum(shard.num_rows for shard in manifest.vectors)
    _reconcile(what, "rows of its re-rank vectors", num_rows, {"samples of its dataset": counts.num_samples})
    _reconcile(what, "items", len(items), {"indexed": counts.num_indexed})
    if (np.diff(items.ids) <= 0).any():
        raise ManifestError(f"{what}: the ids of its items don't ascend")
    _check_vectors(what, manifest, items.ids)
    if manifest.nprobe < 1 or manifest.depth < 1 or manifest.gallery_min_structure <= 0:
        raise ManifestError(
            f"{what}: nprobe {manifest.nprobe} and depth {manifest.depth} have to be at least 1, and the "
            f"smallest structure weight {manifest.gallery_min_structure:g} above 0"
        )


def encode_array(array: npt.NDArray[np.float16] | npt.NDArray[np.int64]) -> bytes:
    """The .npy file of an array."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def decode_array(data: bytes, dtype: type[np.int64]) -> npt.NDArray[np.int64]:
    """The array of a .npy file; ManifestError if it is none or of another type."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise ManifestError(f"not a .npy file ({len(data)} bytes): {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise ManifestError(
            f"expected a .npy file of {np.dtype(dtype)}, got {getattr(array, 'dtype', 'none')}"
        )
    return array


def _reconcile(what: str, name: str, whole: int, parts: dict[str, int]) -> None:
    if whole != sum(parts.values()):
        said = " + ".join(f"{number} {part}" for part, number in parts.items())
        raise ManifestError(
            f"{what}: {whole} {name} against {said}, {whole - sum(parts.values()):+d}; nothing was changed, "
            "find what was lost and build again"
        )


def _check_vectors(what: str, manifest: ReleaseManifest, item_ids: npt.NDArray[np.int64]) -> None:
    for shard in manifest.vectors:
        for stored in (shard.embedding, shard.structure):
            header = stored.size_bytes - 2 * shard.num_rows * manifest.embedding_dim
            if not 0 < header <= _MAX_NPY_HEADER_BYTES:
                raise ManifestError(
                    f"{what}: {stored.name} has {stored.size_bytes} bytes, which are not {shard.num_rows} "
                    f"float16 vectors of dimension {manifest.embedding_dim}"
                )
    num_rows = {shard.number: shard.num_rows for shard in manifest.vectors}
    numbers = shards.shard_of(item_ids)
    last_of_shards = item_ids[np.append(numbers[1:] != numbers[:-1], True)] if len(item_ids) else item_ids
    for item_id in last_of_shards.tolist():
        if (item_id & 0xFFFFFFFF) >= num_rows.get(item_id >> 32, 0):
            raise ManifestError(f"{what}: item {item_id} (shard {item_id >> 32}) has no re-rank vector")


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


def _check_id(release_id: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", release_id) or release_id == "objects":
        raise ConfigError(
            f"release id {release_id!r}: expected letters, digits, '.', '_', '-', not 'objects'"
        )


def _pointer_uri(releases_uri: str) -> str:
    return storage.join(releases_uri, "current.json")


def _manifest_uri(releases_uri: str, release_id: str) -> str:
    return storage.join(releases_uri, release_id, "manifest.json")
