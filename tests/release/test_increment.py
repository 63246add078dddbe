"""A release that was added to is the one index over all its live entries; the rest of it is not touched."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.data import datasets
from namr.data.datasets import Dataset
from namr.data.shards import make_id
from namr.errors import ManifestError
from namr.model import distances
from namr.release import build, increment, releases, templates
from namr.release.build import BuildConfig
from namr.release.increment import Changes
from namr.release.releases import Release
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.store import storage
from namr.store.cache import Cache
from tests import small_release
from tests.small_nights import DIM, MODEL, a_night, as_release, embeddings_of
from tests.small_release import NOW

CONFIG = BuildConfig(num_parts=2, num_held_out=20)


def whole(root: Path, dataset: Dataset, key: str, metric: distances.Metric, **more: object) -> Release:
    config = replace(CONFIG, index_key=key)
    uri = str(root / "releases")
    of = {"model_digest": MODEL, "metric": metric}
    return as_release(uri, build.build(dataset, embeddings_of(root), uri, config, **of, **more))


def added(root: Path, current: Release, dataset: Dataset) -> Release:
    new = increment.changes(dataset, current)
    assert isinstance(new, Changes)
    cache = Cache(root / "cache", 10**9)
    report = increment.extend(current, new, dataset, embeddings_of(root), CONFIG, cache=cache)
    return as_release(current.releases_uri, report)


def searcher_of(root: Path, release: Release) -> Searcher:
    cache = Cache(root / "cache", 10**9)
    return Searcher.of(release, cache=cache, query_model=None, num_threads=1)


def assert_same_answers(root: Path, one: Release, other: Release) -> None:
    """Of 4-bit codes many are equally far, so that all are compared: which are candidates is nobody's."""
    asked = small_release.random_vectors(40, DIM, seed=99)
    depth = 700 if "x4fs" in one.manifest.index_key else 30
    left, right = searcher_of(root, one), searcher_of(root, other)
    assert [item.key for item in left.items] == [item.key for item in right.items]
    for side in ("none", "both"):
        for nprobe in (1, 3, 100):
            options = SearchOptions(k=12, side=side, depth=depth, nprobe=nprobe)
            a, b = (each.search_arrays(*asked, options=options) for each in (left, right))
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.distances, b.distances)


KINDS = [("Flat", "l2"), ("IVF8,Flat", "cosine"), ("IVF8,SQ8", "l2"), ("IVF4,PQ8x4fs", "cosine")]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("key", "metric"), KINDS)
def test_nights_of_new_and_of_gone_images_are_one_index_over_what_is_left(
    tmp_path: Path, key: str, metric: distances.Metric
) -> None:
    refused = [3, make_id(1, 2), make_id(2, 0), make_id(4, 1)]
    changed = {make_id(5, 0): "image/10", make_id(5, 1): f"image/{make_id(1, 9)}"}
    nights = [
        a_night(tmp_path, [300, 250], refused=refused, dead=[4]),
        a_night(tmp_path, [40], refused=refused, dead=[3, 5, make_id(1, 7)]),  # one was refused before
        a_night(tmp_path, [], dead=[make_id(2, 1), make_id(2, 2)]),
        a_night(tmp_path, [1, 30], refused=refused, dead=[make_id(4, 1), make_id(4, 2)]),  # gone at once
        a_night(tmp_path, [2], dead=[10, make_id(1, 9)], keys=changed),
        a_night(tmp_path, [1], dead=[make_id(5, 0)], keys={make_id(6, 0): "image/10"}),  # and changed again
    ]
    release = whole(tmp_path, nights[0], key, metric)
    for dataset in nights[1:]:
        before, release = release, added(tmp_path, release, dataset)
        of_all = whole(tmp_path, dataset, key, metric, template=templates.of_release(release))
        assert release.manifest.counts == of_all.manifest.counts
        assert_same_answers(tmp_path, release, of_all)
        kept = set(before.manifest.objects()) - {before.manifest.tombstones}
        assert kept <= set(release.manifest.objects())
    counts = release.manifest.counts
    assert (counts.num_samples, counts.num_refused, counts.num_tombstoned) == (624, 2, 11)
    assert [segment.num_entries for segment in release.manifest.segments] == [547, 39, 29, 2, 1]
    dead = [5, 10, *(make_id(1, row) for row in (7, 9)), *(make_id(2, row) for row in (1, 2)), make_id(5, 0)]
    assert release.tombstones().tolist() == dead
    searcher = searcher_of(tmp_path, release)
    assert searcher.items.by_key("image/5") is None
    for key, now in (("image/10", make_id(6, 0)), (changed[make_id(5, 1)], make_id(5, 1))):
        assert [item.id for item in searcher.items if item.key == key] == [now]
        found = searcher.items.by_key(key)
        assert found and found.id == now
    assert searcher.items.label_counts() == {
        label: sum(item.label == label for item in searcher.items) for label in "012"
    }


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_many_new_images_are_added_by_ray_tasks_to_the_same_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = whole(tmp_path, a_night(tmp_path, [120]), "IVF4,SQ8", "l2")
    dataset = a_night(tmp_path, [30, 20])
    here = added(tmp_path, release, dataset)
    monkeypatch.setattr(increment, "_FEW", 49)
    by_tasks = added(tmp_path, release, dataset)
    assert by_tasks.manifest.segments == here.manifest.segments
    assert_same_answers(tmp_path, here, by_tasks)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_night_of_refused_images_alone_and_one_of_no_images_left(tmp_path: Path) -> None:
    release = whole(tmp_path, a_night(tmp_path, [100]), "IVF4,Flat", "l2")
    release = added(tmp_path, release, a_night(tmp_path, [2], refused=[make_id(1, 0), make_id(1, 1)]))
    assert (release.manifest.counts.num_indexed, release.manifest.counts.num_refused) == (100, 2)
    assert len(searcher_of(tmp_path, release).items) == 100
    release = added(tmp_path, release, a_night(tmp_path, [], dead=list(range(100))))
    assert release.manifest.counts.num_indexed == 0
    found = searcher_of(tmp_path, release).search_arrays(
        *small_release.random_vectors(2, DIM, seed=0), options=SearchOptions(k=3)
    )
    assert (found.ids == -1).all()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_night_that_was_killed_goes_on_and_writes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = whole(tmp_path, a_night(tmp_path, [120]), "IVF4,Flat", "l2")
    dataset = a_night(tmp_path, [30])
    known = set(storage.list_names(release.releases_uri))

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(releases, "store", dies)
        with pytest.raises(KeyboardInterrupt):
            added(tmp_path, release, dataset)
    with monkeypatch.context() as patch:
        patch.setattr(increment.build, "checked", dies)
        with pytest.raises(KeyboardInterrupt):
            added(tmp_path, release, dataset)
    made = set(storage.list_names(release.releases_uri))
    again = added(tmp_path, release, dataset)
    assert made > known
    assert set(storage.list_names(release.releases_uri)) == made
    assert again.manifest.num_entries == 150


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_cannot_be_added_to_says_why(tmp_path: Path) -> None:
    first = a_night(tmp_path, [60, 40])
    release = whole(tmp_path, first, "Flat", "l2")
    second = a_night(tmp_path, [10])
    of_second = whole(tmp_path, second, "Flat", "l2")
    said = increment.changes(first, of_second)
    assert said == "version 2 of the dataset is no earlier one of this"
    entry = replace(second.shards[1], index=second.shards[0].index)
    changed = replace(second, version=replace(second.version, shards=(second.shards[0], entry)))
    assert increment.changes(changed, release) == "1 shards were changed, shard [1] first"
    fewer = replace(second, version=replace(second.version, shards=second.shards[:1]))
    assert increment.changes(fewer, release) == "1 shards were changed, shard [] first"
    elsewhere = Release(release.releases_uri, replace(release.manifest, dataset_uri="/other"))
    assert increment.changes(second, elsewhere) == "the current release is of another dataset, /other"
    lost = Release(release.releases_uri, replace(release.manifest, dataset_version=9))
    assert "version of the current release can't be read: " in str(increment.changes(second, lost))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_embeddings_that_are_missing_stop_the_night(tmp_path: Path) -> None:
    release = whole(tmp_path, a_night(tmp_path, [60]), "Flat", "l2")
    before = datasets.head(str(tmp_path / "dataset"))
    dataset = datasets.publish_version(before, [], now=NOW, tombstones=[1])
    assert added(tmp_path, release, dataset).manifest.counts.num_indexed == 59  # nothing new to be embedded
    new = a_night(tmp_path, [10])
    Path(embeddings_of(tmp_path), MODEL, "sets", f"{new.digest}.json").unlink()
    with pytest.raises(ManifestError, match="is missing, so there is no namr-embeddings here"):
        added(tmp_path, release, new)
