"""What publishing keeps: nothing half-published or lost unseen, one winner of two, a roll-back that holds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.data import datasets
from namr.data.shards import make_id
from namr.errors import ConfigError, Conflict, ManifestError
from namr.release import arrays, listing, publication, releases, takedowns
from namr.release.releases import Release, ReleaseManifest
from namr.store import storage
from tests import small_release
from tests.small_release import NOW, Recipe


@pytest.mark.parametrize(
    "lost", [{"num_samples": 121}, {"num_indexed": 115}, {"num_refused": 1}, {"num_tombstoned": 3}]
)
def test_a_difference_in_the_counts_stops_the_publication(
    fresh: tuple[str, ReleaseManifest], lost: dict[str, int]
) -> None:
    uri, manifest = fresh
    wrong = replace(manifest, counts=replace(manifest.counts, **lost))
    with pytest.raises(ManifestError, match=r"first is not published: .* against"):
        publication.publish(uri, wrong, expected=None)
    assert releases.current(uri) is None
    assert listing.list_releases(uri).manifests == []


def test_counts_that_agree_among_themselves_are_held_against_the_segments(
    fresh: tuple[str, ReleaseManifest],
) -> None:
    uri, manifest = fresh
    lost = replace(manifest.counts, num_indexed=115, num_refused=3)
    with pytest.raises(ManifestError, match="117 entries of its segments against 115 indexed \\+ 1 dead"):
        publication.publish(uri, replace(manifest, counts=lost), expected=None)


def swap(rows: np.ndarray, release: Release, item_id: int, row: int) -> np.ndarray:
    """The table of rows where this item's is another."""
    other = rows.copy()
    other[rows == small_release.places_of(release).of(np.array([item_id]))[0]] = row
    return other


def moved(rows: np.ndarray, release: Release, item_id: int) -> np.ndarray:
    """The table of rows where a sample that is no item has this item's row."""
    other = swap(rows, release, item_id, -1)
    other[np.flatnonzero(rows < 0)[0]] = small_release.places_of(release).of(np.array([item_id]))[0]
    return other


def test_items_are_held_against_the_counts_and_the_vectors(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path
) -> None:
    uri, manifest = fresh
    release = Release(uri, manifest)
    ids, rows = np.concatenate([file.ids for file in release.items()]), small_release.places_of(release).rows
    for harm, message in (
        (swap(rows, release, ids[5], -1), "116 samples have a place among 117 re-rank vectors, and not each"),
        (
            swap(rows, release, ids[5], int(rows[0])),
            "117 samples have a place among 117 .*not each one of its",
        ),
        (rows[:-1], "the shards have 120 samples, and 119 places are known"),
        (moved(rows, release, ids[5]), f"item {ids[5]} has no re-rank vector, and 0 others"),
    ):
        stored = releases.store(uri, "vector-rows.npy", arrays.encode_array(harm))
        wrong = replace(manifest, vectors=(replace(manifest.vectors[0], rows=stored),))
        with pytest.raises(ManifestError, match=f"first is not published: {message}|{message}"):
            publication.publish(uri, wrong, expected=None)
    (file,) = manifest.vector_files
    lost = (replace(manifest.vectors[0], files=(replace(file, num_rows=116),)),)
    with pytest.raises(
        ManifestError, match="116 rows of its re-rank vectors against 117 entries of its segm"
    ):
        publication.publish(uri, replace(manifest, vectors=lost), expected=None)
    with pytest.raises(ManifestError, match="which are not 117 pairs of float16 vectors of dimension 17"):
        publication.publish(uri, replace(manifest, embedding_dim=17), expected=None)
    assert releases.current(uri) is None
    other = small_release.make_manifest(tmp_path / "other", Recipe(num_shards=1))
    data = storage.read(storage.join(str(tmp_path / "other" / "releases"), other.items[0].name))
    foreign = replace(manifest, items=(releases.store(uri, "items.arrow", data),))
    with pytest.raises(ManifestError, match="item 3 has no re-rank vector, and 0 others"):
        publication.publish(uri, foreign, expected=None)
    with pytest.raises(ManifestError, match="0 items against 117 entries of its segments"):
        publication.publish(uri, replace(manifest, items=()), expected=None)
    twice = replace(manifest, items=manifest.items * 2)
    with pytest.raises(ManifestError, match="the ids of its items don't ascend"):
        publication.publish(uri, twice, expected=None)


def test_a_missing_or_shortened_object_stops_the_publication(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    victim = Path(uri, manifest.vector_files[0].file.name)
    data = victim.read_bytes()
    victim.unlink()
    with pytest.raises(ManifestError, match=r"vectors-00000\.npy is missing"):
        publication.publish(uri, manifest, expected=None)
    victim.write_bytes(data[:-2])
    with pytest.raises(ManifestError, match=r"vectors-00000\.npy has .* bytes"):
        publication.publish(uri, manifest, expected=None)
    victim.write_bytes(data)
    publication.publish(uri, manifest, expected=None)


def test_of_two_runs_that_began_alike_one_wins(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    began = releases.read_pointer(uri)
    publication.publish(uri, manifest, expected=began)
    with pytest.raises(Conflict):
        publication.publish(uri, small_release.renamed(manifest, "late"), expected=began)
    current = releases.current(uri)
    assert current is not None
    assert current.manifest.release_id == "first"


def test_publishing_again_what_was_published_changes_nothing(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    first = publication.publish(uri, manifest, expected=None)
    assert publication.publish(uri, manifest, expected=None) == first  # the answer of the first swap was lost
    assert publication.publish(uri, manifest, expected=releases.read_pointer(uri)) == first


def test_an_id_names_one_release_for_ever(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    publication.publish(uri, manifest, expected=None)
    publication.publish(uri, small_release.renamed(manifest, "second"), expected=releases.read_pointer(uri))
    with pytest.raises(ManifestError, match="says something else"):
        publication.publish(uri, replace(manifest, nprobe=9), expected=releases.read_pointer(uri))


@pytest.mark.parametrize("name", ["objects", "building", "readers", "../up", "", "a/b", ".hidden"])
def test_a_release_id_that_is_no_name_is_refused(fresh: tuple[str, ReleaseManifest], name: str) -> None:
    uri, manifest = fresh
    with pytest.raises(ConfigError, match="release id"):
        publication.publish(uri, small_release.renamed(manifest, name), expected=None)


def current_id(uri: str) -> str:
    release = releases.current(uri)
    assert release is not None
    return release.manifest.release_id


def test_rolling_back_goes_to_the_one_before_and_again(three: str) -> None:
    assert publication.roll_back(three, now=NOW).manifest.release_id == current_id(three) == "second"
    assert publication.roll_back(three, now=NOW).manifest.release_id == current_id(three) == "first"
    with pytest.raises(ConfigError, match="first is the first release"):
        publication.roll_back(three, now=NOW)
    assert (
        publication.roll_back(three, to="third", now=NOW).manifest.release_id == current_id(three) == "third"
    )


def test_rolling_back_to_a_release_that_is_gone_changes_nothing(three: str) -> None:
    with pytest.raises(ManifestError, match=r"nosuch.*missing"):
        publication.roll_back(three, to="nosuch", now=NOW)
    lost = releases.open_release(three, "second").manifest.items[0]
    Path(three, lost.name).unlink()
    with pytest.raises(ManifestError, match=r"items\.arrow is missing"):
        publication.roll_back(three, now=NOW)
    assert current_id(three) == "third"


def test_nothing_can_be_rolled_back_or_pinned_before_the_first_release(tmp_path: Path) -> None:
    uri = str(tmp_path)
    with pytest.raises(ConfigError, match="nothing to roll back"):
        publication.roll_back(uri, now=NOW)
    with pytest.raises(ConfigError, match="nothing to pin"):
        publication.pin(uri, reason="a test", now=NOW)
    with pytest.raises(ConfigError, match="nothing to unpin"):
        publication.unpin(uri)


def test_a_roll_back_is_pinned_with_its_reason(three: str) -> None:
    publication.roll_back(three, now=NOW)
    assert releases.read_pointer(three).pin == (NOW.isoformat(), "rolled back from third")
    publication.roll_back(three, now=NOW, reason="cats answer for dogs")
    pointer = releases.read_pointer(three)
    assert (pointer.target, pointer.pin.reason) == ("first", "cats answer for dogs")


def test_nothing_is_published_over_a_pin_until_it_is_lifted(three: str) -> None:
    publication.roll_back(three, now=NOW, reason="cats answer for dogs")
    manifest = small_release.renamed(releases.open_release(three).manifest, "fourth")
    held = r"fourth is not published: second is pinned since 2026-11-01T02:00:00.*cats answer for dogs.*unpin"
    with pytest.raises(Conflict, match=held):
        publication.publish(three, manifest, expected=releases.read_pointer(three))
    assert current_id(three) == "second"
    assert not storage.exists(storage.join(three, "fourth", "manifest.json"))
    assert publication.unpin(three).pin.reason == "cats answer for dogs"
    assert publication.unpin(three).pin is None
    assert current_id(three) == "second"
    publication.publish(three, manifest, expected=releases.read_pointer(three))
    assert current_id(three) == "fourth"


def test_a_pin_that_came_during_the_night_is_told_as_one(three: str) -> None:
    began = releases.read_pointer(three)
    publication.pin(three, reason="an audit", now=NOW)
    manifest = small_release.renamed(releases.open_release(three).manifest, "fourth")
    with pytest.raises(Conflict, match=r"third is pinned since .*an audit"):
        publication.publish(three, manifest, expected=began)
    assert current_id(three) == "third"


def test_a_pin_needs_a_reason(three: str) -> None:
    with pytest.raises(ConfigError, match="the reason of a pin is empty"):
        publication.pin(three, reason="  ", now=NOW)
    assert releases.read_pointer(three).pin is None


def test_a_pointer_of_an_earlier_namr_has_no_pin(three: str) -> None:
    uri = storage.join(three, "current.json")
    assert set(json.loads(storage.read(uri))) == {"target", "token"}
    assert releases.read_pointer(three).pin is None


def test_what_the_dataset_has_taken_out_stays_out_after_a_roll_back(tmp_path: Path) -> None:
    first = small_release.publish(tmp_path, Recipe(num_shards=2, rows_per_shard=10))
    uri, dataset_uri = first.releases_uri, first.manifest.dataset_uri
    assert takedowns.taken_down(uri, dataset_uri).tolist() == []
    datasets.tombstone(dataset_uri, ["digit/3", "digit/12"], now=NOW)
    out = [3, make_id(1, 2)]
    recipe = Recipe(num_shards=2, rows_per_shard=10, tombstoned=out)
    second = small_release.publish(tmp_path, recipe, release_id="second")
    assert len(small_release.table_of(second)) == 18
    assert takedowns.taken_down(uri, dataset_uri).tolist() == out
    back = publication.roll_back(uri, now=NOW)
    # it is immutable: the list is what hides them
    assert set(out) <= set(small_release.table_of(back).ids.tolist())
    assert takedowns.taken_down(uri, dataset_uri).tolist() == out
