"""What a collection deletes and what it leaves, however it ends."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from namr.errors import ConfigError, Conflict, ManifestError
from namr.release import doomed, garbage, listing, publication, releases, users
from namr.release.garbage import CollectionConfig, CollectionReport
from namr.release.releases import ReleaseManifest
from namr.store import manifests, storage
from tests import small_release
from tests.small_release import NOW

HOUR_S = 3600.0
ALWAYS = ("current.json", "doomed.json", "lease.json", "tombstones.json")


class Held:
    """A lease that nobody takes away, and that keeps nobody away: what is proved holds without leases."""

    def check(self) -> None:
        pass


def collect(uri: str, *, keep: int = 1, min_age_hours: float = 0, **more: Any) -> CollectionReport:
    config = CollectionConfig(keep=keep, min_age_hours=min_age_hours)
    return garbage.collect(uri, config, held=Held(), **more)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets hours pass in all stores."""
    now = storage.now

    def pass_by(hours: float) -> None:
        monkeypatch.setattr(storage, "now", lambda uri: now(uri) + HOUR_S * hours)

    return pass_by


def publish(uri: str, manifest: ReleaseManifest, name: str, *, own: bytes | None = None) -> ReleaseManifest:
    """The manifest under another name, with a report of its own."""
    report = releases.store(uri, "report.html", own or name.encode())
    made = replace(small_release.renamed(manifest, name), report_html=report)
    return publication.publish(uri, made, expected=releases.read_pointer(uri)).manifest


def ids(uri: str) -> list[str]:
    return sorted(each.release_id for each in listing.list_releases(uri).manifests)


def assert_whole(uri: str) -> None:
    """What is current can be opened, and so can every release that is there."""
    pointer = releases.read_pointer(uri)
    found = {each.release_id: each for each in listing.list_releases(uri).manifests}
    assert listing.list_releases(uri).damaged == {}
    if pointer:
        lost = [each.name for each in found[pointer.target].objects() if not is_there(uri, each.name)]
        assert lost == []


def is_there(uri: str, name: str) -> bool:
    return storage.exists(storage.join(uri, name))


def unnamed(uri: str) -> set[str]:
    """What is stored and no manifest names."""
    named = {f"{name}/manifest.json" for name in ids(uri)} | set(ALWAYS)
    for manifest in listing.list_releases(uri).manifests:
        named |= {stored.name for stored in manifest.objects()}
    return set(storage.list_names(uri)) - named


def test_the_last_releases_stay_with_their_objects(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    made = [publish(uri, manifest, name) for name in ("a", "b", "c", "d")]
    leaked = releases.store(uri, "leaked.bin", b"of a night that was killed")
    report = collect(uri, keep=2)
    assert report.kept == ("c", "d") == tuple(ids(uri))
    assert [each[:2] for each in report.freed[:2]] == [("releases", 2), ("objects", 4)]
    assert [is_there(uri, each.report_html.name) for each in made] == [False, False, True, True]
    assert not is_there(uri, leaked.name)
    assert unnamed(uri) == set()
    assert_whole(uri)
    assert "freed" in report.in_words and "releases 2 (" in report.in_words
    publication.roll_back(uri, now=NOW)
    with pytest.raises(ManifestError, match=r"b/manifest\.json is missing"):
        publication.roll_back(uri, now=NOW)


def test_tables_beside_a_report_go_and_stay_with_their_release(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    stored = {name: releases.store(uri, "pairs.parquet", name.encode()) for name in ("a", "b")}
    for name, table in stored.items():
        publish(uri, replace(manifest, tables={"pairs": table}), name)
    collect(uri)
    assert [is_there(uri, table.name) for table in stored.values()] == [False, True]
    storage.delete(storage.join(uri, stored["b"].name))
    with pytest.raises(ManifestError, match=r"pairs\.parquet is missing"):
        publish(uri, replace(manifest, tables={"pairs": stored["b"]}), "c")


def test_nothing_young_is_deleted_whatever_the_clock_of_this_machine_says(
    fresh: tuple[str, ReleaseManifest], later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, manifest = fresh
    for name in ("a", "b", "c"):
        publish(uri, manifest, name)
    leaked = releases.store(uri, "leaked.bin", b"of a night that was killed")
    work = storage.join(uri, "building", "0" * 32, "part-0.faiss")
    storage.write(work, b"a part")
    for skew_s in (0, -HOUR_S, HOUR_S, 1000 * HOUR_S):
        monkeypatch.setattr("time.time", lambda skew_s=skew_s: 1.8e9 + skew_s)
        later(23.9)
        assert collect(uri, min_age_hours=24).num_bytes == 0
        assert ids(uri) == ["a", "b", "c"]
    later(24.1)
    assert collect(uri, min_age_hours=24).kept == ("c",)
    assert not is_there(uri, leaked.name) and not storage.exists(work)


def test_releases_of_a_machine_whose_clock_is_late_stay_like_others(
    fresh: tuple[str, ReleaseManifest],
) -> None:
    uri, manifest = fresh
    for name, hour in (("a", 5), ("b", 4), ("c", 3)):
        publish(uri, replace(manifest, created=f"2026-11-02T0{hour}:00:00+00:00"), name)
    assert collect(uri, keep=2).kept == ("a", "b", "c")  # a too, which seems the newest: never fewer
    assert collect(uri, keep=1).kept == ("a", "c")
    assert_whole(uri)


def test_what_was_current_until_just_now_stays(
    fresh: tuple[str, ReleaseManifest], later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that may not write holds nothing, and reads the release for some seconds more."""
    uri, manifest = fresh
    for name in ("a", "b", "c"):
        publish(uri, manifest, name)
    listed = storage.list_entries

    def aged(where: str) -> list[storage.Entry]:
        return [
            entry._replace(modified=entry.modified - 100 * HOUR_S * (entry.name[0] in "ab"))
            for entry in listed(where)
        ]

    monkeypatch.setattr(storage, "list_entries", aged)
    later(1)
    assert collect(uri, min_age_hours=24).kept == ("b", "c")


def test_of_each_release_that_stays_it_is_known_when_it_goes(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    for name in ("a", "b", "c", "d"):
        publish(uri, manifest, name)
    users.Hold(uri).renew("a")
    few = CollectionConfig(keep=2, min_age_hours=0)
    held, last = {"a": "when no service has it open"}, {"c": "when 1 more is published"}
    assert garbage.when_they_go(uri, few) == held | last | {"d": "when 2 more are published"}
    publication.pin(uri, reason="an audit", now=NOW)
    assert garbage.when_they_go(uri, few) == held | last | {"d": "not while it is pinned"}
    young = garbage.when_they_go(uri, CollectionConfig(keep=2))
    assert young["b"] == "24 hours after it was current" and tuple(sorted(young)) == ("a", "b", "c", "d")


def test_a_dry_run_tells_the_same_and_deletes_nothing(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    for name in ("a", "b"):
        publish(uri, manifest, name)
    before = storage.list_names(uri)
    told = collect(uri, is_dry_run=True)
    assert storage.list_names(uri) == before
    done = collect(uri)
    assert (told.kept, told.freed[:4]) == (done.kept, done.freed[:4])
    assert told.num_bytes == done.num_bytes > 0
    assert told.in_words.startswith("would free ")


def test_a_roll_back_keeps_what_it_left_until_the_next_release(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    for name in ("a", "b", "c", "d"):
        publish(uri, manifest, name)
    publication.roll_back(uri, "b", now=NOW)
    assert collect(uri).kept == ("b", "c", "d")
    publication.roll_back(uri, "d", now=NOW)
    publication.roll_back(uri, "b", now=NOW)
    publication.unpin(uri)
    assert collect(uri, keep=2).kept == ("b", "c")
    publish(uri, manifest, "e")
    assert collect(uri, keep=1).kept == ("e",)
    assert_whole(uri)


def test_what_a_reader_holds_stays_for_a_day_after_its_last_word(
    fresh: tuple[str, ReleaseManifest], later: Callable[[float], None]
) -> None:
    uri, manifest = fresh
    for name in ("a", "b", "c", "d"):
        publish(uri, manifest, name)
    one, other = users.Hold(uri), users.Hold(uri)
    one.renew("a")
    other.renew("b")
    assert collect(uri).kept == ("a", "b", "d")
    other.end()
    later(23.9)
    assert collect(uri).kept == ("a", "d")
    later(24.1)
    report = collect(uri)
    assert report.kept == ("d",)
    assert ("holds of readers that are gone", 1) in [each[:2] for each in report.freed]
    assert unnamed(uri) == set()


def test_losers_of_the_race_go_and_those_that_may_yet_win_stay(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    publish(uri, manifest, "a")
    began = releases.read_pointer(uri)
    publish(uri, manifest, "b")
    with pytest.raises(Conflict):
        publication.publish(uri, small_release.renamed(manifest, "loser"), expected=began)
    follower = replace(small_release.renamed(manifest, "stopped"), previous="b")
    manifests.write_manifest(releases.manifest_uri(uri, "stopped"), follower)
    assert collect(uri, keep=7).kept == ("a", "b", "stopped")
    publish(uri, manifest, "c")
    assert collect(uri, keep=7).kept == ("a", "b", "c")


def test_before_the_first_release_no_release_is_collected(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    manifests.write_manifest(
        releases.manifest_uri(uri, "stopped"), small_release.renamed(manifest, "stopped")
    )
    leaked = releases.store(uri, "leaked.bin", b"x")
    assert collect(uri).kept == ("stopped",)
    assert not is_there(uri, leaked.name)
    assert unnamed(uri) == set()


@pytest.mark.parametrize("harm", [b"{", b'{"format": "namr-release", "format_version": 99}'])
def test_a_release_that_cannot_be_read_keeps_everything(
    fresh: tuple[str, ReleaseManifest], harm: bytes
) -> None:
    """What a damaged one, or one of a newer namr, lists is not known."""
    uri, manifest = fresh
    for name in ("a", "b"):
        publish(uri, manifest, name)
    Path(uri, "a", "manifest.json").write_bytes(harm)
    before = storage.list_names(uri)
    with pytest.raises(ManifestError, match="nothing is collected while a release can't be read"):
        collect(uri)
    assert storage.list_names(uri) == before
    Path(uri, "b", "manifest.json").unlink()
    Path(uri, "a", "manifest.json").unlink()
    with pytest.raises(ManifestError, match="has no manifest of its current release b"):
        collect(uri)


def test_work_goes_by_whole_folders_and_strangers_stay(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path, later: Callable[[float], None]
) -> None:
    uri, _ = fresh
    elsewhere = tmp_path / "work"
    for root in (Path(uri, "building"), elsewhere):
        for name in ("1" * 32, "2" * 32, "z" * 32):
            (root / name).mkdir(parents=True)
            (root / name / "part.faiss").write_bytes(b"123")
    later(25)
    report = collect(uri, min_age_hours=24, work_uri=str(elsewhere))
    assert ("files of work", 4, 12) in report.freed
    left = [storage.list_names(str(root)) for root in (Path(uri, "building"), elsewhere)]
    assert left == [[f"{'z' * 32}/part.faiss"]] * 2


def test_a_config_that_would_delete_everything_is_refused() -> None:
    for wrong in ({"keep": 0}, {"min_age_hours": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            CollectionConfig(**wrong)


def test_a_kill_anywhere_leaves_whole_releases_and_the_next_collection_finishes(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, manifest = fresh
    for name in ("a", "b", "c"):
        publish(uri, manifest, name)
    delete, copy = storage.delete, str(tmp_path / "copy")
    monkeypatch.setattr(garbage, "ThreadPoolExecutor", InTurn)
    for num_deleted in itertools.count():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(uri, copy)
        left = [num_deleted]

        def killed(where: str, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            delete(where)

        monkeypatch.setattr(storage, "delete", killed)
        try:
            collect(copy)
        except KeyboardInterrupt:
            assert_whole(copy)
            for each in listing.list_releases(copy).manifests:
                assert all(is_there(copy, stored.name) for stored in each.objects())
            monkeypatch.setattr(storage, "delete", delete)
            assert collect(copy).kept == ("c",)
            assert unnamed(copy) == set()
        else:
            break
    assert num_deleted == 5  # two manifests, their reports, and one that nothing ever listed


class InTurn:
    """A pool of threads without threads."""

    def __init__(self, _: int) -> None:
        self.map = map

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_name_that_was_doomed_is_not_used_again_until_it_is_let_go(
    fresh: tuple[str, ReleaseManifest], later: Callable[[float], None]
) -> None:
    uri, manifest = fresh
    publish(uri, manifest, "a")
    first = releases.store(uri, "x.bin", b"x")
    collect(uri)
    again = releases.store(uri, "x.bin", b"x")
    assert again.name == f"objects/{first.sha256}.1/x.bin"
    assert not is_there(uri, first.name)
    assert releases.is_there(uri, again) and not releases.is_there(uri, first)
    later(25)
    collect(uri)
    later(50)
    releases.store(uri, "y.bin", b"y")
    collect(uri)
    assert releases.store(uri, "x.bin", b"x") == first


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "place") if request.param == "local" else str(request.getfixturevalue("s3"))


def test_no_byte_is_leaked_over_many_nights(
    stored: tuple[Path, ReleaseManifest], place: str, later: Callable[[float], None]
) -> None:
    """Nights that publish, lose, are killed in the middle and are rolled back; then one collection."""
    uri, (root, manifest) = storage.join(place, "releases"), stored
    for name in storage.list_names(str(root / "releases")):
        storage.upload(root / "releases" / name, storage.join(uri, name))
    for night in range(5):
        began = releases.read_pointer(uri)
        publish(uri, manifest, f"night-{night}")
        if night:
            with pytest.raises(Conflict):
                publication.publish(uri, small_release.renamed(manifest, f"late-{night}"), expected=began)
        releases.store(uri, "index.faiss", f"of a build that was killed in night {night}".encode())
        storage.write(storage.join(uri, "building", f"{night:032x}", "part.faiss"), b"part")
    users.Hold(uri).renew("night-0")
    later(0.01)
    report = collect(uri, keep=2)
    assert report.kept == ("night-0", "night-3", "night-4")
    (hold,) = unnamed(uri)
    assert hold.startswith("readers/")
    later(24.1)
    assert collect(uri, keep=2).kept == ("night-3", "night-4")
    assert unnamed(uri) == set()
    assert_whole(uri)
    assert doomed.names(uri) > {"night-0"}
