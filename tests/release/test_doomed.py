"""Collections, nights and roll-backs at once, call by call: what is current is whole, whoever is first."""

import itertools
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from namr.errors import Conflict, ManifestError
from namr.release import doomed, garbage, publication, releases, users
from namr.release.releases import ReleaseManifest
from namr.store import storage
from tests import interleaving, small_release
from tests.release.test_garbage import InTurn, assert_whole, collect, publish
from tests.small_release import NOW

STRIDE = 3
"""with 1 both are stopped before each of their calls, which takes minutes"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread but the acts, nothing forced to the disk, and a release is held to be good if it is there."""
    monkeypatch.setattr(garbage, "ThreadPoolExecutor", InTurn)
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def verify(uri: str, manifest: ReleaseManifest) -> None:
        for stored in manifest.objects():
            publication._check_object(uri, stored)

    monkeypatch.setattr(publication, "verify", verify)


class Place:
    """A root with old releases a and b, of which b is current, and an object that nothing lists yet."""

    def __init__(self, folder: Path, fresh: tuple[str, ReleaseManifest]) -> None:
        self.uri = str(folder)
        self.manifest = fresh[1]
        for name in storage.list_names(fresh[0]):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).hardlink_to(Path(fresh[0], name))
        for name in ("a", "b"):
            publish(self.uri, self.manifest, name)
        releases.store(self.uri, "report.json", b"{} of a night that was killed")

    def night(self) -> None:
        """Publishes a release with the object that lay about, and one of release a."""
        expected = releases.read_pointer(self.uri)
        report = releases.store(self.uri, "report.json", b"{} of a night that was killed")
        page = releases.store(self.uri, "report.html", b"a")
        made = replace(small_release.renamed(self.manifest, "c"), report_json=report, report_html=page)
        publication.publish(self.uri, made, expected=expected)

    def resumed(self) -> None:
        """The same by a night that made them before it was killed, and asks whether they are there."""
        expected = releases.read_pointer(self.uri)
        old = releases.open_release(self.uri, "b").manifest
        name = f"objects/{storage.sha256(b'{} of a night that was killed')}/report.json"
        report = replace(old.report_json, name=name, size_bytes=len(b"{} of a night that was killed"))
        if releases.is_there(self.uri, report):
            made = replace(small_release.renamed(old, "c"), report_json=report)
            publication.publish(self.uri, made, expected=expected)

    def roll_back(self) -> None:
        publication.roll_back(self.uri, "a", now=NOW)

    def collection(self) -> None:
        collect(self.uri)


def check(place: Place, act: str, schedule: list[tuple[str, int]]) -> bool:
    """Whether the act came to its end beside a collection; if not it refused, and said so."""
    acts = list(dict.fromkeys(name for name, _ in schedule))
    steps = [(acts.index(name), num) for name, num in schedule]
    outcomes = dict(zip(acts, interleaving.run([getattr(place, name) for name in acts], steps), strict=True))
    for name, outcome in outcomes.items():
        error = outcome.exception()
        assert error is None or isinstance(error, Conflict | ManifestError), (name, error, schedule)
    assert_whole(place.uri)
    is_done = outcomes[act].exception() is None
    pointer = releases.read_pointer(place.uri)
    if is_done and act != "resumed":  # which may find that it has to begin anew
        assert pointer is not None and pointer.target == {"night": "c", "roll_back": "a"}[act]
    collect(place.uri)
    assert_whole(place.uri)
    return is_done


def switched(act: str, folder: Path, fresh: tuple[str, ReleaseManifest], stride: int) -> list[bool]:
    """An act and a collection: one goes some calls, the other some, the first ends, the other ends.

    Of all numbers of calls, and of who is first, every stride-th.
    """
    num = {
        name: interleaving.num_calls(getattr(Place(folder / f"alone-{name}", fresh), name))
        for name in (act, "collection")
    }
    schedules = [
        [(first, i), (second, j)]
        for first, second in ((act, "collection"), ("collection", act))
        for i, j in itertools.product(range(num[first] + 1), range(num[second] + 1))
    ]
    return [
        check(Place(folder / str(at), fresh), act, schedules[at]) for at in range(0, len(schedules), stride)
    ]


ACTS = ("night", "resumed", "roll_back")


@pytest.mark.parametrize("act", ACTS)
def test_a_collection_beside_another_act_leaves_what_is_current_whole(
    act: str, tmp_path: Path, fresh: tuple[str, ReleaseManifest]
) -> None:
    assert any(switched(act, tmp_path, fresh, stride=73))


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_so_it_does_wherever_both_are_stopped(
    act: str, tmp_path: Path, fresh: tuple[str, ReleaseManifest]
) -> None:
    ends = switched(act, tmp_path, fresh, stride=STRIDE)
    assert any(ends)
    assert not all(ends), "somewhere it has to give way, else the test sees nothing"


@pytest.mark.parametrize("seed", range(3))
def test_collections_that_sleep_and_go_on_delete_nothing_that_came_into_use(
    seed: int, tmp_path: Path, fresh: tuple[str, ReleaseManifest]
) -> None:
    """Two collections, as after a lease was lost, and a night and a roll-back, in any order."""
    rng, acts = random.Random(seed), ["night", "collection", "collection", "roll_back"]
    for number in range(4):
        schedule = [(rng.randrange(len(acts)), rng.randrange(1, 12)) for _ in range(12)]
        place = Place(tmp_path / str(number), fresh)
        outcomes = interleaving.run([getattr(place, name) for name in acts], schedule)
        refused = [error for outcome in outcomes if (error := outcome.exception()) is not None]
        assert [error for error in refused if not isinstance(error, Conflict | ManifestError)] == [], schedule
        assert_whole(place.uri)
        collect(place.uri)
        assert_whole(place.uri)


def test_a_night_whose_release_lists_what_is_doomed_is_told_and_changes_nothing(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path
) -> None:
    place = Place(tmp_path / "place", fresh)
    made = small_release.renamed(place.manifest, "c")
    doomed.add(place.uri, [made.report_html.name], now=0)
    expected = releases.read_pointer(place.uri)
    with pytest.raises(Conflict, match=r"release c is not published: a collection is about to delete obj"):
        publication.publish(place.uri, made, expected=expected)
    assert releases.read_pointer(place.uri) == expected
    doomed.add(place.uri, ["a"], now=0)
    with pytest.raises(Conflict, match=r"a is not current again: a collection is about to delete a and 0"):
        place.roll_back()
    assert releases.read_pointer(place.uri) == expected
    assert not any(name.startswith(users.FOLDER) for name in storage.list_names(place.uri))


def test_what_the_release_before_lists_may_be_listed_again_though_it_was_doomed_once(
    fresh: tuple[str, ReleaseManifest], tmp_path: Path
) -> None:
    """It was published with it, so the collection that doomed it saw that it is used."""
    place = Place(tmp_path / "place", fresh)
    doomed.add(place.uri, [place.manifest.template.name], now=0)
    publish(place.uri, place.manifest, "c")
    assert_whole(place.uri)


def test_names_are_let_go_after_a_day_of_the_stores_clock(tmp_path: Path) -> None:
    uri = str(tmp_path)
    assert doomed.names(uri) == set()
    doomed.add(uri, ["a", "b"], now=1000)
    doomed.add(uri, ["b", "c"], now=1000 + 24 * 3600 - 1)
    assert doomed.names(uri) == {"a", "b", "c"}
    doomed.add(uri, [], now=1000 + 24 * 3600)
    assert doomed.names(uri) == {"b", "c"}
