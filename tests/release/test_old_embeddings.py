"""Embeddings go when no release of any root needs them, and never while somebody is at work on them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from namr.data.datasets import Dataset
from namr.embed import embeddings
from namr.errors import ManifestError
from namr.release import old_embeddings, releases
from namr.release.garbage import CollectionConfig
from namr.release.releases import ReleaseManifest
from namr.store import manifests, storage
from tests import small_release
from tests.release.test_garbage import Held
from tests.small_release import Recipe

A, B, C = "a" * 64, "b" * 64, "c" * 64
DAY = CollectionConfig(min_age_hours=24)


@pytest.fixture
def place(
    tmp_path: Path, fresh: tuple[str, ReleaseManifest], monkeypatch: pytest.MonkeyPatch
) -> Iterator["Place"]:
    yield Place(tmp_path, fresh[1], monkeypatch)


class Place:
    """Embeddings by three models of one dataset; each collection takes place two days later."""

    def __init__(self, folder: Path, manifest: ReleaseManifest, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.manifest, self.uri = folder, manifest, str(folder / "embeddings")
        for name in ("data", "other"):
            (folder / name).mkdir()
        self.dataset = small_release.make_dataset(folder / "data", Recipe(num_shards=2, rows_per_shard=10))
        for digest in (A, B, C):
            self.embed(digest, self.dataset)
        now = storage.now
        self.later: Callable[[], None] = lambda: monkeypatch.setattr(
            storage, "now", lambda uri: now(uri) + 48 * 3600
        )

    def embed(self, digest: str, dataset: Dataset) -> None:
        tables = small_release.embed(dataset, Recipe())
        files = [
            embeddings.write(self.uri, digest, entry, table).file
            for entry, table in zip(dataset.shards, tables, strict=True)
        ]
        embeddings.publish_set(self.uri, digest, dataset, files)

    def release(self, digest: str, dataset: Dataset, *, root: str = "releases") -> None:
        """A release that says it is made of these."""
        uri = str(self.folder / root)
        made = replace(
            small_release.renamed(self.manifest, f"of-{digest[:4]}-{dataset.version.version}"),
            model_digest=digest,
            dataset_digest=dataset.digest,
        )
        manifests.write_manifest(releases.manifest_uri(uri, made.release_id), made)
        manifests.swap_pointer(
            releases.pointer_uri(uri), made.release_id, expected=releases.read_pointer(uri), token="t"
        )
        old_embeddings.use(self.uri, uri)

    def collect(self, config: CollectionConfig = DAY, *, is_dry_run: bool = False) -> int:
        uri = str(self.folder / "releases")
        return old_embeddings.collect(self.uri, uri, config, held=Held(), is_dry_run=is_dry_run).num

    def models(self) -> set[str]:
        return {name[0] for name in storage.list_names(self.uri) if not name.startswith("users/")}


def test_models_that_no_release_was_made_with_go(place: Place) -> None:
    place.release(A, place.dataset)
    place.release(B, place.dataset, root="other releases")
    assert place.collect() == 0
    place.later()
    assert place.collect(is_dry_run=True) == 3 and place.models() == {"a", "b", "c"}
    assert place.collect() == 3
    named = set()
    for digest in (A, B):
        found = embeddings.open_set(place.uri, digest, place.dataset)
        assert len([embeddings.read(place.uri, file) for file in found.files]) == 2
        named |= {f"{digest}/sets/{place.dataset.digest}.json", *(file.stored.name for file in found.files)}
    assert {name for name in storage.list_names(place.uri) if not name.startswith("users/")} == named


def test_a_model_at_work_stays_whole(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of it is young: an extraction that takes days has no set yet."""
    place.release(A, place.dataset)
    listed = storage.list_entries

    def one_is_young(uri: str) -> list[storage.Entry]:
        return [
            entry._replace(modified=entry.modified + 47 * 3600 * entry.name.startswith(f"{B}/sets"))
            for entry in listed(uri)
        ]

    monkeypatch.setattr(storage, "list_entries", one_is_young)
    place.later()
    place.collect()
    assert place.models() == {"a", "b"}


def test_of_a_served_model_the_sets_of_earlier_nights_go(place: Place) -> None:
    place.release(A, place.dataset)
    first, latest = place.dataset, place.dataset
    for keys in (["digit/1"], ["digit/2"]):
        latest = small_release.datasets.tombstone(place.dataset.uri, keys, now=small_release.NOW)
        files = embeddings.open_set(place.uri, A, first).files
        embeddings.publish_set(place.uri, A, latest, files)
    names = {name for name in storage.list_names(place.uri) if name.startswith(A)}
    place.later()
    place.collect()
    left = {name for name in storage.list_names(place.uri) if name.startswith(A)}
    assert len(names - left) == 1
    assert embeddings.open_set(place.uri, A, first) and embeddings.open_set(place.uri, A, latest)


def test_a_model_that_embedded_another_dataset_is_left_to_its_people(place: Place) -> None:
    place.release(A, place.dataset)
    other = small_release.make_dataset(place.folder / "other", Recipe(num_shards=1, rows_per_shard=10))
    place.embed(B, other)
    place.later()
    place.collect()
    assert place.models() == {"a", "b"}


def test_an_old_set_that_lists_what_is_gone_goes_so_that_it_is_made_anew(place: Place) -> None:
    place.release(A, place.dataset)
    lost = embeddings.open_set(place.uri, A, place.dataset).files[0]
    Path(place.uri, lost.stored.name).unlink()
    place.later()
    place.collect()
    assert embeddings.known_files(place.uri, A, place.dataset) == {}


def test_where_it_is_not_known_who_needs_them_nothing_goes(place: Place) -> None:
    place.release(A, place.dataset)
    old_embeddings.use(place.uri, str(place.folder / "unmounted"))
    old_embeddings.use(place.uri, str(place.folder / "unmounted"))
    place.later()
    with pytest.raises(ManifestError, match="unmounted has no current release, or damaged ones; restore it"):
        place.collect()
    assert place.models() == {"a", "b", "c"}
