"""What a release is: objects under their digests, verified wherever they lie; one file for plain FAISS."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.data.shards import make_id
from namr.errors import Conflict, ManifestError
from namr.index import index_files
from namr.release import export, publication, releases
from namr.release.calibrated import Calibration, Weight
from namr.release.releases import ReleaseManifest
from namr.search.searcher import Searcher
from namr.store import storage
from namr.store.cache import Cache
from namr.store.folders import Folders
from tests import small_release
from tests.small_release import NOW, Recipe


def test_nothing_is_there_before_the_first_release(tmp_path: Path) -> None:
    assert releases.current(str(tmp_path)) is None
    assert releases.read_pointer(str(tmp_path)) is None
    with pytest.raises(ManifestError, match="no current release"):
        releases.open_release(str(tmp_path))


def test_a_published_release_reads_back_whole(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    published = publication.publish(uri, manifest, expected=None)
    opened = releases.current(uri)
    assert opened is not None
    assert opened == published == releases.open_release(uri, "first")
    assert opened.manifest == manifest
    assert len(small_release.table_of(opened)) == manifest.num_entries == 120 - 2 - 1
    assert manifest.counts.num_indexed == 116
    assert opened.tombstones().tolist() == [make_id(1, 7)]
    assert small_release.table_of(opened).keys[0] == "digit/0"


@pytest.mark.parametrize("num_vector_files", [1, 3])
@pytest.mark.parametrize("key", ["Flat", "IVF4,Flat"])
def test_re_rank_vectors_lie_in_the_order_of_the_lists(
    tmp_path: Path, key: str, num_vector_files: int
) -> None:
    refused = [make_id(0, 3), make_id(2, 39)]
    recipe = Recipe(index_key=key, num_segments=2, num_vector_files=num_vector_files, refused=refused)
    release = small_release.publish(tmp_path, recipe)
    cache, (stored,) = Cache(tmp_path / "cache", 10**9), release.manifest.vectors
    in_order = np.concatenate(
        [index_files.ids_in(release.path(of.file, cache)) for of in release.manifest.segments]
    )
    assert (np.diff(in_order) > 0).all() == (key == "Flat")
    both = np.concatenate([np.load(release.path(of.file, cache)) for of in stored.files])
    assert (both.shape, both.dtype) == ((118, 2, 16), np.float16)
    expected = [small_release.random_vectors(40, 16, seed=number) for number in range(3)]
    for row, item in enumerate(in_order.tolist()):
        x, s = (of[item & 0xFFFFFFFF] for of in expected[item >> 32])
        np.testing.assert_array_equal(both[row], np.stack([x, s]).astype(np.float16))
    np.testing.assert_array_equal(release.places(cache).of(in_order), np.arange(118))
    assert release.places(cache).of(np.array(refused)).tolist() == [-1, -1]
    assert release.manifest.gallery_min_structure == both[:, 1].min()


def test_cosine_vectors_are_stored_with_unit_length(tmp_path: Path) -> None:
    release = small_release.publish(tmp_path, Recipe(metric="cosine", num_shards=1))
    (of_all,) = release.manifest.vector_files
    x = np.load(release.path(of_all.file, Cache(tmp_path / "c", 10**9)))[:, 0]
    np.testing.assert_allclose(np.linalg.norm(x.astype(np.float64), axis=1), 1, atol=1e-3)


def test_an_object_that_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    first = releases.store(str(tmp_path), "a.bin", b"abc")
    changed = (tmp_path / first.name).stat().st_mtime_ns
    assert releases.store(str(tmp_path), "a.bin", b"abc") == first
    assert (tmp_path / first.name).stat().st_mtime_ns == changed
    assert first.name == f"objects/{storage.sha256(b'abc')}/a.bin"


def flip_bytes(path: Path, num: int) -> None:
    """Change that many bytes in the middle of a file, and not its size."""
    data = np.fromfile(path, np.uint8)
    start = (len(data) - num) // 2
    data[start : start + num] ^= 0x10
    path.unlink()  # others share the file
    data.tofile(path)


@pytest.mark.parametrize("what", ["segment", "vectors", "shards", "rows"])
def test_a_local_file_with_other_bytes_of_the_same_size_is_never_opened(
    fresh: tuple[str, ReleaseManifest], what: str, tmp_path: Path
) -> None:
    uri, manifest = fresh
    release = publication.publish(uri, manifest, expected=None)
    cache, (vectors,) = Cache(tmp_path / "cache", 10**9), manifest.vectors
    of = {
        "segment": manifest.segments[0].file,
        "vectors": vectors.files[0].file,
        "shards": vectors.shards,
        "rows": vectors.rows,
    }
    stored = of[what]
    Searcher.of(release, cache=cache, query_model=None)
    flip_bytes(Path(uri, stored.name), num=100)
    with pytest.raises(ManifestError, match=rf"{stored.name} is damaged: .*{stored.sha256}"):
        release.path(stored, cache)
    with pytest.raises(ManifestError, match="is damaged"):
        Searcher.of(release, cache=cache, query_model=None)


def test_a_damaged_or_missing_local_object_is_noticed_when_it_is_opened(three: str, tmp_path: Path) -> None:
    release, cache = releases.open_release(three), Cache(tmp_path / "cache", 10**9)
    victim = Path(three, release.manifest.items[0].name)
    data = victim.read_bytes()
    victim.unlink()
    with pytest.raises(ManifestError, match="is missing"):
        release.path(release.manifest.items[0], cache)
    victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ManifestError, match="damaged"):
        list(release.items())
    victim.write_bytes(data[:-1])
    with pytest.raises(ManifestError, match="is damaged"):
        release.path(release.manifest.items[0], cache)


def test_a_manifest_of_an_earlier_namr_opens_if_its_layout_is_the_same(three: str) -> None:
    path = Path(three, "second", "manifest.json")
    body = json.loads(path.read_text())
    del body["config_digest"], body["calibration"], body["tables"]
    path.write_text(json.dumps(body))
    manifest = releases.open_release(three, "second").manifest
    assert (manifest.config_digest, manifest.calibration, manifest.tables) == ("", None, {})
    (vectors,) = body.pop("vectors")
    path.write_text(json.dumps(body | {"format_version": 2, "vectors": vectors}))
    assert releases.open_release(three, "second").manifest == manifest


def test_a_release_keeps_its_calibration(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    weight = Weight(side="both", k=10, depth=100, nprobe=4, weight=0.7)
    kept = Calibration(num_queries=500, rate=1 / 501, adaptive_rate=5 / 501, weights=(weight,))
    publication.publish(uri, replace(manifest, calibration=kept), expected=None)
    assert releases.open_release(uri).manifest.calibration == kept


def test_a_release_with_one_table_of_items_is_refused_with_the_version_that_is_read(three: str) -> None:
    path = Path(three, "second", "manifest.json")
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 1'))
    with pytest.raises(ManifestError, match="format version 1, and this namr reads 2, 3 of namr-release"):
        releases.open_release(three, "second")


@pytest.mark.s3
def test_releases_on_an_object_store(s3: str, tmp_path: Path) -> None:
    uri = f"{s3}/releases"
    recipe = Recipe(index_key="IVF4,Flat", num_segments=2)
    release = small_release.publish(tmp_path, recipe, releases_uri=uri)
    began = releases.read_pointer(uri)
    second = small_release.renamed(release.manifest, "second")
    publication.publish(uri, second, expected=began)
    with pytest.raises(Conflict):
        publication.publish(uri, small_release.renamed(release.manifest, "late"), expected=began)
    assert releases.open_release(uri).manifest.release_id == "second"
    assert publication.roll_back(uri, now=NOW).manifest.release_id == "first"
    assert releases.read_pointer(uri)[0] == "first"
    cache = Cache(tmp_path / "cache", 10**9)
    (vectors,) = release.manifest.vector_files
    assert np.load(release.path(vectors.file, cache)).shape == (120, 2, 16)
    assert export.export(release, tmp_path / "whole.faiss").num_vectors == 120
    storage.delete(storage.join(uri, vectors.file.name))
    with pytest.raises(ManifestError, match="missing"):
        publication.roll_back(uri, to="second", now=NOW)


class FolderAsBucket(Folders):
    """Serves s3://<path> from the folder /<path>; every download waits until another is under way."""

    def __init__(self) -> None:
        self.both, self.downloaded = threading.Barrier(2), list[str]()

    def size(self, uri: str) -> int:
        return super().size(uri.removeprefix("s3:/"))

    def download(self, uri: str, path: Path) -> None:
        self.both.wait(30)
        self.downloaded.append(uri)
        super().download(uri.removeprefix("s3:/"), path)


def test_objects_are_downloaded_side_by_side_and_verified(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, manifest = fresh
    bucket = FolderAsBucket()
    monkeypatch.setattr(storage, "_s3", bucket)
    release = releases.Release(f"s3:/{uri}", manifest)
    wanted = [*manifest.vectors[0].objects(), manifest.template]
    assert len(wanted) == 4
    cache = Cache(tmp_path / "cache", 10**9)
    release.fetch([*wanted, wanted[0]], cache)
    assert len(bucket.downloaded) == 4
    bucket.both.abort()  # nothing else is downloaded
    for stored in wanted:
        assert storage.sha256(release.path(stored, cache).read_bytes()) == stored.sha256


def test_objects_that_are_fetched_are_missed_and_verified_as_those_that_are_opened(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path
) -> None:
    uri, manifest = fresh
    release, cache = releases.Release(uri, manifest), Cache(tmp_path / "cache", 10**9)
    rows = Path(uri, manifest.vectors[0].rows.name)
    data = rows.read_bytes()
    rows.unlink()
    with pytest.raises(ManifestError, match="is missing, and the release lists it"):
        release.fetch(manifest.vectors[0].objects(), cache)
    rows.write_bytes(data[:-1] + b"x")
    with pytest.raises(ManifestError, match=r"is damaged.*restore it or build again"):
        release.fetch(manifest.vectors[0].objects(), cache)


def test_what_has_no_room_is_left_to_be_opened_one_by_one(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, manifest = fresh
    bucket = FolderAsBucket()
    monkeypatch.setattr(bucket, "both", threading.Barrier(1))
    monkeypatch.setattr(storage, "_s3", bucket)
    release, listed = releases.Release(f"s3:/{uri}", manifest), list(manifest.vectors[0].objects())
    cache = Cache(tmp_path / "cache", max(stored.size_bytes for stored in listed))
    release.fetch(listed, cache)
    assert len(bucket.downloaded) < len(listed)
    for stored in listed:
        assert release.path(stored, cache).stat().st_size == stored.size_bytes
