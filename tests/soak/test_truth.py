"""What the crasher looks for is found where it is broken, and only there."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from namr.data import datasets
from namr.release import releases, takedowns
from namr.store import manifests, storage
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import NOW, Recipe
from tests.soak import truth
from tests.soak.truth import Account, Form, Places

KEYS = {f"digit/{row}" for row in range(80)}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A release of 80 images in two segments."""
    recipe = Recipe(num_shards=2, num_segments=2)
    small_release.publish(tmp_path, recipe)
    return Places(*(str(tmp_path / name) for name in ("dataset", "embeddings", "releases")))


def looked(
    places: Places, tmp_path: Path, *, offered: set[str] = KEYS, packed: set[str] = KEYS, **taken: set[str]
) -> list[str]:
    account = Account({key: forms(places)[key] for key in offered}, dict.fromkeys(packed, 0), **taken)
    return broken(account, places, tmp_path)


def broken(account: Account, places: Places, tmp_path: Path) -> list[str]:
    return truth.broken(account, places, Cache(tmp_path / "cache", max_bytes=1 << 30))


def forms(places: Places) -> defaultdict[str, list[Form]]:
    """What each image is, as an account has it."""
    found: defaultdict[str, list[Form]] = defaultdict(list)
    for table in datasets.open_version(places.dataset_uri).all_samples():
        for key, label, size in zip(table.keys, table.labels, table.sizes.tolist(), strict=True):
            found[key].append(Form(str(label), size))
    return found


def test_what_is_whole_is_found_whole(places: Places, tmp_path: Path) -> None:
    assert looked(places, tmp_path) == []
    takedowns.take_out(places.releases_uri, places.dataset_uri, ["digit/3"], now=NOW)
    assert looked(places, tmp_path, going={"digit/3"}) == []
    assert looked(places, tmp_path, going={"digit/3"}, gone={"digit/3"}) == []
    assert truth.left_over(places) == []


def test_a_key_that_was_confirmed_and_is_not_there_is_found(places: Places, tmp_path: Path) -> None:
    (found,) = looked(places, tmp_path, packed=KEYS | {"digit/80"}, offered=KEYS | {"digit/80"})
    assert found == "1 confirmed keys that the dataset lacks, among them digit/80"
    (found,) = looked(places, tmp_path, offered=KEYS - {"digit/7"}, packed=set())
    assert found == "1 keys that nobody offered, among them digit/7"


def test_a_take_down_that_did_not_last_is_found(places: Places, tmp_path: Path) -> None:
    gone = {"going": {"digit/3"}, "gone": {"digit/3"}}
    assert looked(places, tmp_path, **gone) == [
        "1 keys that were taken down and live, among them digit/3",
        "release first: 1 keys that are answered and were taken down, among them digit/3",
    ]
    datasets.tombstone(places.dataset_uri, ["digit/5"], now=NOW)
    assert looked(places, tmp_path) == ["1 keys that nobody took down and are dead, among them digit/5"]


def test_an_image_that_is_not_what_it_was_changed_to_is_found(places: Places, tmp_path: Path) -> None:
    key, other, account = "digit/9", Form("other", 1), Account(forms(places), dict.fromkeys(KEYS, 0))
    account.offered[key].append(other)
    assert broken(account, places, tmp_path) == [], "the change may be under way"
    account.packed[key] = 1
    assert broken(account, places, tmp_path) == [
        "1 keys with another image than was confirmed last, among them digit/9"
    ]
    account.offered[key].reverse()
    assert broken(account, places, tmp_path) == [], "and once it is there all is well"


def test_entries_that_are_lost_or_there_twice_are_found(places: Places, tmp_path: Path) -> None:
    release = releases.open_release(places.releases_uri)
    one, other = release.manifest.segments
    twice = replace(release.manifest, release_id="twice", segments=(one, one))
    for release_id, segments, expected in (
        ("twice", (one, one), "40 ids that are in the index twice, among them 0, 1, 10"),
        ("lost", (one,), "segments"),
    ):
        manifest = replace(twice, release_id=release_id, segments=segments)
        uri = releases.manifest_uri(places.releases_uri, release_id)
        storage.write(uri, manifests.encode_manifest(manifest))
        found = looked(places, tmp_path)
        assert any(each.startswith(f"release {release_id}: ") and expected in each for each in found), found
        storage.delete(uri)
    storage.delete(storage.join(places.releases_uri, other.file.name))
    (found,) = looked(places, tmp_path)
    assert found.startswith("release first: ManifestError: ") and "is missing" in found


def test_what_nothing_names_is_found(places: Places) -> None:
    releases.store(places.releases_uri, "leaked.bin", b"of a night that was killed")
    (found,) = truth.left_over(places)
    assert found.endswith("/leaked.bin is named by nothing")
