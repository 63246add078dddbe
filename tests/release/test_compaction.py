"""A release that was made one segment answers as before, with all that nights did meanwhile."""

from dataclasses import replace
from pathlib import Path

import pytest

from namr.data.shards import make_id
from namr.errors import Conflict, ManifestError
from namr.model import distances
from namr.release import build, compaction, publication, templates
from namr.release.build import BuildReport
from namr.release.releases import Release
from namr.store import storage
from tests import small_release
from tests.release.test_increment import KINDS, added, assert_same_answers, whole
from tests.small_nights import a_night, embeddings_of


def compacted(root: Path, release: Release) -> BuildReport:
    return compaction.build(release, embeddings_of(root), num_parts=2, work_uri=None)


def rebased(current: Release, old: Release, built: BuildReport) -> Release:
    """What would be published, verified as it is then."""
    manifest = replace(compaction.rebased(current, old, built), release_id="compacted")
    publication.verify(current.releases_uri, manifest)
    return Release(current.releases_uri, manifest)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("key", "metric"), KINDS)
def test_it_answers_as_before_with_nights_and_take_downs_meanwhile(
    tmp_path: Path, key: str, metric: distances.Metric
) -> None:
    refused = [3, make_id(1, 2), make_id(2, 1)]
    first = a_night(tmp_path, [200, 150], refused=refused, dead=[4])
    old = added(
        tmp_path,
        whole(tmp_path, first, key, metric),
        a_night(tmp_path, [40], refused=refused, dead=[3, 5, make_id(1, 7)]),
    )
    built = compacted(tmp_path, old)
    one = rebased(old, old, built)
    assert one.manifest.tombstones is None
    assert [segment.num_entries for segment in one.manifest.segments] == [384]
    assert (one.manifest.counts, one.manifest.compacts) == (old.manifest.counts, old.manifest.release_id)
    at_once = whole(tmp_path, a_night(tmp_path, []), key, metric, template=templates.of_release(old))
    assert at_once.manifest.segments == one.manifest.segments
    assert_same_answers(tmp_path, old, one)

    current = old
    for num_rows, gone in (([20], [6, make_id(1, 8), make_id(2, 0)]), ([], [make_id(3, 1)]), ([1], [])):
        current = added(tmp_path, current, a_night(tmp_path, num_rows, dead=gone))
    now = rebased(current, old, built)
    assert [segment.num_entries for segment in now.manifest.segments] == [384, 20, 1]
    assert now.tombstones().tolist() == [6, make_id(1, 8), make_id(2, 0), make_id(3, 1)]
    assert now.manifest.counts == current.manifest.counts
    assert_same_answers(tmp_path, current, now)
    again = rebased(now, now, compacted(tmp_path, now))
    assert [segment.num_entries for segment in again.manifest.segments] == [401]
    assert_same_answers(tmp_path, current, again)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_where_something_else_is_current_it_was_in_vain(tmp_path: Path) -> None:
    first = whole(tmp_path, a_night(tmp_path, [60]), "IVF4,Flat", "l2")
    old = added(tmp_path, first, a_night(tmp_path, [], dead=[1, 2]))
    built = compacted(tmp_path, old)
    vain = r"of-version-2 was made one segment in vain: {} is current by now and was not made by adding to it"
    with pytest.raises(Conflict, match=vain.format("of-version-1")):  # rolled back: it shows what was gone
        compaction.rebased(first, old, built)
    anew = whole(tmp_path, a_night(tmp_path, [10]), "IVF4,Flat", "l2")
    with pytest.raises(Conflict, match=vain.format("of-version-3")):
        compaction.rebased(anew, old, built)
    counts = replace(old.manifest.counts, num_refused=1, num_indexed=57)
    other = Release(old.releases_uri, replace(old.manifest, counts=counts))
    with pytest.raises(
        ManifestError, match=r"1 refused, 2 tombstoned; from .*embeddings came 60 samples: 58 "
    ):
        compacted(tmp_path, other)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_killed_and_begun_again_it_writes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = whole(tmp_path, a_night(tmp_path, [60]), "IVF4,SQ8", "l2")
    release = added(tmp_path, release, a_night(tmp_path, [30]))

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "checked", dies)
        with pytest.raises(KeyboardInterrupt):
            compacted(tmp_path, release)
    made = storage.list_entries(release.releases_uri)
    assert len(compacted(tmp_path, release).segments) == 1
    assert storage.list_entries(release.releases_uri) == made


def test_a_release_of_many_segments_or_many_dead_is_worn(tmp_path: Path) -> None:
    recipe = small_release.Recipe(num_shards=1, num_segments=8)
    release = small_release.publish(tmp_path, recipe)
    assert compaction.worn(release) == "it has 8 segments"
    release = small_release.publish(tmp_path / "dead", replace(recipe, num_segments=2, dead=[1, 2, 3, 4, 5]))
    assert compaction.worn(release) == "5 of its 40 entries are dead"
    release = small_release.publish(tmp_path / "few", replace(recipe, num_segments=7, dead=[1, 2, 3, 4]))
    assert compaction.worn(release) is None
