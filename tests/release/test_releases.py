"""What publishing keeps: nothing half-published, nothing lost unseen, one winner of two."""

from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from namr.data.shards import make_id
from namr.errors import ConfigError, Conflict, ManifestError, ShapeError
from namr.release import releases
from namr.release.releases import ReleaseManifest
from namr.store import storage
from namr.store.cache import Cache
from namr.store.tables import EmbeddingTable
from tests import small_release
from tests.small_release import Recipe


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReleaseManifest]:
    """The objects of one release, with refused, tombstoned and dead samples; not published."""
    root = tmp_path_factory.mktemp("stored")
    recipe = Recipe(
        index_key="IVF4,Flat",
        refused=[make_id(0, 3), make_id(2, 39)],
        tombstoned=[make_id(1, 0)],
        dead=[make_id(1, 7)],
        num_segments=2,
    )
    return root, small_release.make_manifest(root, recipe)


@pytest.fixture
def fresh(stored: tuple[Path, ReleaseManifest], tmp_path: Path) -> tuple[str, ReleaseManifest]:
    """A releases folder of this test's own that holds those objects, and nothing published."""
    root, manifest = stored
    for name in storage.list_names(str(root / "releases" / "objects")):
        target = tmp_path / "releases" / "objects" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(root / "releases" / "objects" / name)
    return str(tmp_path / "releases"), manifest


def test_nothing_is_there_before_the_first_release(tmp_path: Path) -> None:
    assert releases.current(str(tmp_path)) is None
    assert releases.read_pointer(str(tmp_path)) is None
    assert releases.list_releases(str(tmp_path)) == []
    with pytest.raises(ManifestError, match="no current release"):
        releases.open_release(str(tmp_path))
    with pytest.raises(ConfigError, match="nothing to roll back"):
        releases.roll_back(str(tmp_path))


def test_a_published_release_reads_back_whole(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    published = releases.publish(uri, manifest, expected=None)
    opened = releases.current(uri)
    assert opened is not None
    assert opened == published == releases.open_release(uri, "first")
    assert opened.manifest == manifest
    assert len(opened.items()) == manifest.counts.num_indexed == 120 - 2 - 1 - 1
    assert opened.tombstones().tolist() == [make_id(1, 7)]
    assert opened.items().keys[0] == "digit/0"


def test_re_rank_vectors_lie_at_the_row_of_their_id(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path
) -> None:
    uri, manifest = fresh
    release = releases.publish(uri, manifest, expected=None)
    cache = Cache(tmp_path / "cache", 10**9)
    for shard in manifest.vectors:
        x = np.load(release.path(shard.embedding, cache))
        s = np.load(release.path(shard.structure, cache))
        assert x.shape == s.shape == (40, 16)
        assert x.dtype == s.dtype == np.float16
        expected = small_release.random_vectors(40, 16, seed=shard.number)
        gone = np.isnan(x).any(axis=1)
        np.testing.assert_array_equal(x[~gone], expected.embeddings[~gone].astype(np.float16))
        np.testing.assert_array_equal(s[~gone], expected.structures[~gone].astype(np.float16))
        assert np.flatnonzero(gone).tolist() == {0: [3], 1: [0], 2: [39]}[shard.number]
        assert shard.min_structure == s[~gone].min()
    assert manifest.gallery_min_structure == min(shard.min_structure for shard in manifest.vectors)


def test_cosine_vectors_are_stored_with_unit_length(tmp_path: Path) -> None:
    release = small_release.publish(tmp_path, Recipe(metric="cosine", num_shards=1))
    x = np.load(release.path(release.manifest.vectors[0].embedding, Cache(tmp_path / "c", 10**9)))
    np.testing.assert_allclose(np.linalg.norm(x.astype(np.float64), axis=1), 1, atol=1e-3)


def test_vectors_of_another_shard_and_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    def table(ids: list[int], value: float) -> EmbeddingTable:
        x = np.full((len(ids), 4), value, np.float32)
        return EmbeddingTable(
            ids=np.array(ids), keys=["a"] * len(ids), labels=[None] * len(ids), embeddings=x,
            structures=np.ones_like(x), refused_ids=np.empty(0, np.int64), refused_keys=[],
            refused_reasons=[],
        )  # fmt: skip

    def put(of: EmbeddingTable) -> None:
        releases.store_vectors(str(tmp_path), of, number=3, num_rows=2, metric="l2")

    put(table([make_id(3, 1)], 1.0))
    with pytest.raises(ShapeError, match="other samples than the 2 of shard 3"):
        put(table([make_id(2, 1)], 1.0))
    with pytest.raises(ShapeError, match="other samples than the 2 of shard 3"):
        put(table([make_id(3, 2)], 1.0))
    with pytest.raises(ShapeError, match="1e\\+06 don't fit float16"):
        put(table([make_id(3, 1)], 1e6))


def test_an_object_that_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    first = releases.store(str(tmp_path), "a.bin", b"abc")
    changed = (tmp_path / first.name).stat().st_mtime_ns
    assert releases.store(str(tmp_path), "a.bin", b"abc") == first
    assert (tmp_path / first.name).stat().st_mtime_ns == changed
    assert first.name == f"objects/{storage.sha256(b'abc')}/a.bin"


@pytest.mark.parametrize(
    "lost", [{"num_samples": 121}, {"num_indexed": 115}, {"num_refused": 1}, {"num_tombstoned": 3}]
)
def test_a_difference_in_the_counts_stops_the_publication(
    fresh: tuple[str, ReleaseManifest], lost: dict[str, int]
) -> None:
    uri, manifest = fresh
    wrong = replace(manifest, counts=replace(manifest.counts, **lost))
    with pytest.raises(ManifestError, match=r"first is not published: .* against"):
        releases.publish(uri, wrong, expected=None)
    assert releases.current(uri) is None
    assert releases.list_releases(uri) == []


def test_counts_that_agree_among_themselves_are_held_against_the_segments(
    fresh: tuple[str, ReleaseManifest],
) -> None:
    uri, manifest = fresh
    lost = replace(manifest.counts, num_indexed=115, num_refused=3)
    with pytest.raises(ManifestError, match="117 entries of its segments against 115 indexed \\+ 1 dead"):
        releases.publish(uri, replace(manifest, counts=lost), expected=None)


def test_items_are_held_against_the_counts_and_the_vectors(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path
) -> None:
    uri, manifest = fresh
    shorter = replace(
        manifest, vectors=(*manifest.vectors[:2], replace(manifest.vectors[2], number=9)), release_id="wrong"
    )
    with pytest.raises(ManifestError, match=r"shard 2.* has no re-rank vector"):
        releases.publish(uri, shorter, expected=None)
    other = small_release.make_manifest(tmp_path / "other", Recipe(num_shards=1))
    data = storage.read(storage.join(str(tmp_path / "other" / "releases"), other.items.name))
    foreign = replace(manifest, items=releases.store(uri, "items.parquet", data))
    with pytest.raises(ManifestError, match="40 items against 116 indexed"):
        releases.publish(uri, foreign, expected=None)


def test_a_missing_or_shortened_object_stops_the_publication(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    victim = Path(uri, manifest.vectors[1].structure.name)
    data = victim.read_bytes()
    victim.unlink()
    with pytest.raises(ManifestError, match=r"structure-000001\.npy is missing"):
        releases.publish(uri, manifest, expected=None)
    victim.write_bytes(data[:-2])
    with pytest.raises(ManifestError, match=r"structure-000001\.npy has .* bytes"):
        releases.publish(uri, manifest, expected=None)
    victim.write_bytes(data)
    releases.publish(uri, manifest, expected=None)


def test_of_two_runs_that_began_alike_one_wins(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    began = releases.read_pointer(uri)
    releases.publish(uri, manifest, expected=began)
    with pytest.raises(Conflict):
        releases.publish(uri, small_release.renamed(manifest, "late"), expected=began)
    current = releases.current(uri)
    assert current is not None
    assert current.manifest.release_id == "first"


def test_publishing_again_what_was_published_changes_nothing(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    first = releases.publish(uri, manifest, expected=None)
    assert releases.publish(uri, manifest, expected=None) == first  # the answer of the first swap was lost
    assert releases.publish(uri, manifest, expected=releases.read_pointer(uri)) == first


def test_an_id_names_one_release_for_ever(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    releases.publish(uri, manifest, expected=None)
    releases.publish(uri, small_release.renamed(manifest, "second"), expected=releases.read_pointer(uri))
    with pytest.raises(ManifestError, match="says something else"):
        releases.publish(uri, replace(manifest, nprobe=9), expected=releases.read_pointer(uri))


@pytest.mark.parametrize("name", ["objects", "../up", "", "a/b", ".hidden"])
def test_a_release_id_that_is_no_name_is_refused(fresh: tuple[str, ReleaseManifest], name: str) -> None:
    uri, manifest = fresh
    with pytest.raises(ConfigError, match="release id"):
        releases.publish(uri, small_release.renamed(manifest, name), expected=None)


@pytest.fixture
def three(fresh: tuple[str, ReleaseManifest]) -> str:
    uri, manifest = fresh
    for day, name in enumerate(["first", "second", "third"], start=1):
        dated = small_release.renamed(manifest, name, created=f"2026-11-0{day}T00:00:00+00:00")
        releases.publish(uri, dated, expected=releases.read_pointer(uri))
    return uri


def current_id(uri: str) -> str:
    release = releases.current(uri)
    assert release is not None
    return release.manifest.release_id


def test_rolling_back_goes_to_the_one_before_and_again(three: str) -> None:
    assert [manifest.release_id for manifest in releases.list_releases(three)] == ["first", "second", "third"]
    assert releases.roll_back(three).manifest.release_id == current_id(three) == "second"
    assert releases.roll_back(three).manifest.release_id == current_id(three) == "first"
    with pytest.raises(ConfigError, match="first is the first release"):
        releases.roll_back(three)
    assert releases.roll_back(three, to="third").manifest.release_id == current_id(three) == "third"


def test_rolling_back_to_a_release_that_is_gone_changes_nothing(three: str) -> None:
    with pytest.raises(ManifestError, match=r"nosuch.*missing"):
        releases.roll_back(three, to="nosuch")
    lost = releases.open_release(three, "second").manifest.items
    Path(three, lost.name).unlink()
    with pytest.raises(ManifestError, match=r"items\.parquet is missing"):
        releases.roll_back(three)
    assert current_id(three) == "third"


def test_a_damaged_local_object_is_noticed_when_it_is_opened(three: str, tmp_path: Path) -> None:
    release = releases.open_release(three)
    victim = Path(three, release.manifest.items.name)
    data = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ManifestError, match="damaged"):
        release.items()
    victim.write_bytes(data[:-1])
    with pytest.raises(ManifestError, match="bytes, the release says"):
        release.path(release.manifest.items, Cache(tmp_path / "cache", 10**9))


@pytest.mark.parametrize("num_segments", [1, 3])
@pytest.mark.parametrize("key", ["Flat", "IVF4,Flat"])
def test_an_exported_file_is_one_that_plain_faiss_searches_alike(
    tmp_path: Path, key: str, num_segments: int
) -> None:
    release = small_release.publish(tmp_path, Recipe(index_key=key, num_segments=num_segments))
    info = releases.export(release, tmp_path / "whole.faiss")
    assert info.num_vectors == 120
    index = faiss.read_index(str(tmp_path / "whole.faiss"))
    x = np.concatenate([small_release.random_vectors(40, 16, seed=n).embeddings for n in range(3)])
    _, ids = index.search(x, 1)
    assert ids[:, 0].tolist() == [make_id(row // 40, row % 40) for row in range(120)]
    assert [path.name for path in tmp_path.glob(".export-*")] == []


def test_dead_entries_are_not_exported(fresh: tuple[str, ReleaseManifest], tmp_path: Path) -> None:
    uri, manifest = fresh
    release = releases.publish(uri, manifest, expected=None)
    with pytest.raises(ConfigError, match="hides 1 dead entries"):
        releases.export(release, tmp_path / "whole.faiss")


@pytest.mark.s3
def test_releases_on_an_object_store(s3: str, tmp_path: Path) -> None:
    uri = f"{s3}/releases"
    recipe = Recipe(index_key="IVF4,Flat", num_segments=2)
    release = small_release.publish(tmp_path, recipe, releases_uri=uri)
    began = releases.read_pointer(uri)
    second = small_release.renamed(release.manifest, "second")
    releases.publish(uri, second, expected=began)
    with pytest.raises(Conflict):
        releases.publish(uri, small_release.renamed(release.manifest, "late"), expected=began)
    assert current_id(uri) == "second"
    assert releases.roll_back(uri).manifest.release_id == current_id(uri) == "first"
    cache = Cache(tmp_path / "cache", 10**9)
    assert np.load(release.path(release.manifest.vectors[0].embedding, cache)).shape == (40, 16)
    assert releases.export(release, tmp_path / "whole.faiss").num_vectors == 120
    storage.delete(storage.join(uri, release.manifest.vectors[0].embedding.name))
    with pytest.raises(ManifestError, match="missing"):
        releases.roll_back(uri, to="second")
