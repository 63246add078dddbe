"""A receipt is closed by the collection after which nothing of its root holds what was erased, not before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from namr.data import datasets
from namr.data import erasing as of_shards
from namr.data.shards import Sample, make_id
from namr.errors import ConfigError, ManifestError
from namr.release import erasures, releases
from namr.release.erasures import Left, Receipt
from namr.release.releases import ReleaseManifest
from namr.store import manifests, storage
from tests import small_dataset, small_release
from tests.release.test_garbage import collect, later  # noqa: F401  (a fixture)
from tests.small_release import NOW, Recipe


class Place:
    """A dataset of two versions, an image erased from the shard of the second, and its receipt."""

    def __init__(self, folder: Path, uri: str, manifest: ReleaseManifest) -> None:
        self.uri, self.manifest = uri, manifest
        self.dataset = small_release.make_dataset(folder, Recipe(num_shards=1, rows_per_shard=4))
        more = [Sample(key="more", image=b"more", extension="png")]
        entry = small_dataset.shard_of(self.dataset.uri, folder, 1, more)
        datasets.publish_version(datasets.head(self.dataset.uri), [entry], now=NOW)
        now = of_shards.empty(self.dataset.uri, [make_id(1, 0)], erasure_id="e", now=NOW)
        self.receipt = Receipt(
            erasure_id="e",
            created=NOW.isoformat(),
            by="somebody",
            dataset_uri=self.dataset.uri,
            dataset_version=now.version.version,
            keys=(),
            emptied=now.version.emptied,
            embeddings_uri=str(folder / "embeddings"),
            embeddings=(),
            work_uri=str(folder / "work"),
            holding=(),
        )
        manifests.write_manifest(erasures.uri_of(uri, "e"), self.receipt)

    def publish(self, name: str, *, of_version: int, dataset_uri: str | None = None) -> None:
        """Of no images: what is proved goes by the version alone."""
        pointer = releases.read_pointer(self.uri)
        day = len(storage.list_names(self.uri))
        made = replace(
            small_release.renamed(self.manifest, name, created=f"2026-11-{day}T02:00:00+00:00"),
            dataset_uri=dataset_uri or self.dataset.uri,
            dataset_version=of_version,
            previous=pointer.target if pointer else None,
        )
        manifests.write_manifest(releases.manifest_uri(self.uri, name), made)
        manifests.swap_pointer(releases.pointer_uri(self.uri), name, expected=pointer, token=name)

    def left(self, *, work_uri: str | None = None) -> Left:
        found = self.receipt
        return erasures.left(
            self.uri, found.dataset_uri, found.emptied, written_before=float("inf"), work_uri=work_uri
        )


@pytest.fixture
def place(fresh: tuple[str, ReleaseManifest], tmp_path: Path) -> Place:
    return Place(tmp_path, *fresh)


def test_it_is_closed_when_the_last_release_that_had_the_image_is_gone(place: Place) -> None:
    assert erasures.find(place.uri, "e") == place.receipt and erasures.find(place.uri, "f") is None
    place.publish("without", of_version=1)
    place.publish("with", of_version=2)
    place.publish("after", of_version=3)
    place.publish("elsewhere", of_version=2, dataset_uri="/another")
    assert place.left() == Left(["with"], 0, 0)
    kept = collect(place.uri, keep=3)
    assert (kept.kept, kept.gone) == (("after", "elsewhere", "with"), ())
    assert collect(place.uri, keep=2, is_dry_run=True).gone == ()
    assert not erasures.is_gone(place.uri, "e")
    done = collect(place.uri, keep=2)
    assert (done.kept, done.gone) == (("after", "elsewhere"), ("e",))
    assert done.in_words.endswith("keeps 2 releases; nothing is left of erasure e")
    assert erasures.is_gone(place.uri, "e") and collect(place.uri, keep=2).gone == ()
    assert storage.list_names(storage.join(place.uri, "erasures")) == ["e-gone.json", "e.json"]


def test_what_builds_left_counts_and_what_is_written_soon_after_too(
    place: Place,
    later: Callable[[float], None],  # noqa: F811
) -> None:
    place.publish("after", of_version=3)
    storage.write(storage.join(place.uri, "objects", "x", "index.faiss"), b"of a build that was killed")
    storage.write(storage.join(place.uri, "building", "0" * 32, "part-0.faiss"), b"part")
    assert place.left() == Left([], 1, 1)
    for hours in (0, 23.9):
        later(hours)
        assert collect(place.uri, min_age_hours=24).gone == ()
    later(24.1)
    assert collect(place.uri, min_age_hours=24).gone == ("e",)
    assert place.left() == Left([], 0, 0)


def test_work_elsewhere_counts_where_it_is_known(
    place: Place,
    tmp_path: Path,
    later: Callable[[float], None],  # noqa: F811
) -> None:
    place.publish("after", of_version=3)
    work = str(tmp_path / "work")
    storage.write(storage.join(work, "a folder of somebody", "part-0.faiss"), b"part")
    assert place.left(work_uri=work).num_work == 1
    later(25)
    by_night, by_hand = {"work_uri": work}, {}
    for more in (by_night, by_hand):
        assert collect(place.uri, min_age_hours=24, **more).gone == (), "no work of ours, and perhaps of it"
    storage.delete(storage.join(work, "a folder of somebody", "part-0.faiss"))
    assert collect(place.uri, min_age_hours=24).gone == ("e",)


def test_what_an_extraction_that_was_under_way_wrote_since_is_deleted(place: Place) -> None:
    place.publish("after", of_version=3)
    (emptied,) = place.receipt.emptied
    assert place.receipt.old_tars == {emptied.tar.sha256}
    names = [f"{'a' * 64}/{sha256}.parquet" for sha256 in (emptied.tar.sha256, "0" * 64)]
    for name in names:
        storage.write(storage.join(place.receipt.embeddings_uri, name), b"")
    collect(place.uri)
    assert storage.list_names(place.receipt.embeddings_uri) == names[1:]


def test_what_can_not_be_known_counts_as_there(place: Place) -> None:
    place.publish("old", of_version=1)
    place.publish("with", of_version=2)
    assert place.left().releases == ["with"]
    storage.delete(storage.join(place.dataset.uri, "versions/1.json"))
    assert place.left().releases == ["old", "with"]
    storage.write(releases.manifest_uri(place.uri, "old"), b"{")
    with pytest.raises(ManifestError, match=r"what release old has of erased images is not known: .*damaged"):
        place.left()


def test_no_release_has_the_name_of_the_receipts() -> None:
    with pytest.raises(ConfigError, match="release id 'erasures'"):
        releases.manifest_uri("releases", "erasures")
