"""As little is built as makes the next release: a segment more, or all of it anew."""

from dataclasses import replace
from pathlib import Path

import pytest

from namr.data.datasets import Dataset
from namr.nightly import building
from namr.nightly.building import Made
from namr.release import releases
from namr.release.build import BuildConfig
from namr.release.releases import Release
from namr.store import manifests
from namr.store.cache import Cache
from tests.nightly.test_reindexing import a_report
from tests.small_nights import MODEL, a_night, as_release, embeddings_of

CONFIG = BuildConfig(index_key="IVF4,Flat", num_parts=2, num_held_out=20)


def make(root: Path, dataset: Dataset, current: Release | None, *, is_alike: bool = True) -> Made:
    return building.make(
        dataset,
        embeddings_of(root),
        str(root / "releases"),
        CONFIG,
        model_digest=MODEL,
        metric="l2",
        current=current,
        is_alike=is_alike,
        cache=Cache(root / "cache", 10**9),
    )


def released(made: Made, *, aged: str | None = None) -> Release:
    root = str(Path(made.built.dataset.uri).parent / "releases")
    release = as_release(root, made.built)
    report = releases.store(root, "report.json", manifests.encode_manifest(replace(a_report(), aged=aged)))
    return Release(root, replace(release.manifest, report_json=report))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_each_night_builds_as_little_as_it_can_and_says_why_no_less(tmp_path: Path) -> None:
    first = make(tmp_path, a_night(tmp_path, [100]), None)
    assert (first.how, first.kept, first.first_new_id) == ("whole: there was no release", None, None)

    current = released(first)
    second = make(tmp_path, a_night(tmp_path, [20, 10], dead=[3, 4]), current)
    assert second.how == "added to of-version-1: 2 shards, and 2 images taken out"
    assert (second.kept, second.first_new_id) == (current, 1 << 32)

    current = released(second)
    third = make(tmp_path, a_night(tmp_path, [], dead=[5]), current)
    assert third.how == "added to of-version-2: 0 shards, and 1 images taken out"
    assert (third.kept, third.first_new_id) == (current, None)
    assert third.built.segments == second.built.segments

    fourth = make(tmp_path, a_night(tmp_path, [10]), released(third, aged="recall@10 fell"))
    assert fourth.how == "whole: with a new template, since recall@10 fell"
    assert fourth.built.template != first.built.template and fourth.kept is None

    dataset = a_night(tmp_path, [10])
    other = make(tmp_path, dataset, released(fourth), is_alike=False)
    assert other.how == "whole: of-version-4 is of another model, or of other settings"
    gone = replace(released(fourth).manifest, dataset_uri="/elsewhere")
    moved = make(tmp_path, dataset, Release(str(tmp_path / "releases"), gone))
    assert moved.how == "whole: the current release is of another dataset, /elsewhere"
