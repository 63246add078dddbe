"""A draft becomes a release with its numbers: all of them where all is new, else kept ones and a few."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.nightly import building, kept_truth, measuring, release_report, truth
from namr.nightly.aging import AgingConfig
from namr.nightly.assessment import AssessmentConfig
from namr.nightly.building import Made
from namr.nightly.measuring import Measured, Settings
from namr.nightly.truth import Truth
from namr.release.build import BuildConfig
from namr.release.releases import Release, ReleaseManifest, TemplateBirth
from namr.reports.grids import Album
from namr.search.queries import Queries
from namr.search.searcher import Searcher
from namr.store.cache import Cache
from tests.small_nights import MODEL, a_night, as_release, embeddings_of

CONFIG = BuildConfig(index_key="IVF8,Flat", num_parts=2, num_held_out=60)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gallery has none."""
    monkeypatch.setattr(Album, "images", lambda _, ids: [b""] * len(ids))


def night(
    root: Path, num_rows: list[int], current: Release | None, *, aging: AgingConfig | None = None
) -> tuple[Made, Measured]:
    dataset, uri, cache = a_night(root, num_rows), str(root / "releases"), Cache(root / "cache", 10**9)
    made = building.make(
        dataset,
        embeddings_of(root),
        uri,
        CONFIG,
        model_digest=MODEL,
        metric="l2",
        current=current,
        is_alike=True,
        cache=cache,
    )
    draft = replace(
        as_release(uri, made.built).manifest, report_json=None, report_html=None, template_birth=None
    )
    settings = Settings(CONFIG, AssessmentConfig(depth=20, target_recall=0.9), aging or AgingConfig())
    measured = measuring.measure(Release(uri, draft), made, settings, current=current, cache=cache)
    return made, measured._replace(manifest=measuring.with_reports(measured))


def read_searched(root: str, manifest: ReleaseManifest) -> int:
    """How many images asked their gallery."""
    found = release_report.read(Release(root, manifest)).searched
    assert found is not None
    return found.num_asked


def counted(neighbours: Callable[..., Truth], compared: list[int]) -> Callable[..., Truth]:
    """Notes how many items are compared with everything."""

    def compare(searcher: Searcher, asked: Queries, **more: object) -> Truth:
        compared.append(len(asked.x))
        return neighbours(searcher, asked, **more)

    return compare


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local", "without_pictures")
def test_what_was_added_to_keeps_its_effort_and_is_measured_by_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (first, report, *_) = night(tmp_path, [600], None)
    birth = TemplateBirth(num_entries=600, recall_at_10=first.recall_at_10, imbalance=report.imbalance)
    assert first.template_birth == birth
    assert (report.built, report.aged, report.assessment.by_age) == (
        "whole: there was no release",
        None,
        None,
    )

    root = str(tmp_path / "releases")
    compared: list[int] = []
    monkeypatch.setattr(truth, "neighbours", counted(truth.neighbours, compared))
    _, measured = night(tmp_path, [100], Release(root, first))
    assert compared == [50], "of those from before only what is new was compared"
    second, added = measured.manifest, measured.report
    assert (second.nprobe, second.depth, second.calibration) == (first.nprobe, first.depth, first.calibration)
    assert second.template_birth == birth
    assert added.built.startswith("added to of-version-1: 1 shards")
    assert added.certainty == report.certainty
    by_age = added.assessment.by_age
    assert by_age is not None and second.report_html is not None
    assert (by_age.new.num_queries, by_age.old.num_queries) == (50, added.assessment.num_queries - 50)
    assert 40 < by_age.old.num_queries <= report.assessment.num_queries
    shares = np.array([by_age.old.num_queries, by_age.new.num_queries])
    recalls = np.array([by_age.old.recall_at_10, by_age.new.recall_at_10])
    assert added.assessment.recall_at_10 == pytest.approx((shares * recalls).sum() / shares.sum())
    # images of another shard lie around other centres here, which no list was made for
    assert by_age.new.error > 1.3 * by_age.old.error and by_age.new.recall_at_10 < by_age.old.recall_at_10
    assert added.aged is not None and added.aged.startswith("recall@10 is 0.")
    assert added.assessment.filtered == report.assessment.filtered != ()
    tried, searched = report.assessment.frontier, [read_searched(root, each) for each in (first, second)]
    assert tried is not None and added.assessment.frontier == tried and tried.release_id == first.release_id
    assert tried.points[-1][:3] == (first.nprobe, first.depth, first.recall_at_10)
    assert searched == [600, 100]
    assert set(second.tables) == {"near-duplicates", "label-suspects"}
    before, kept = (kept_truth.read(Release(root, each)).query_ids for each in (first, second))
    assert set(kept[kept < 1 << 32]) <= set(before) and 0 < (kept >= 1 << 32).sum() < 20
    assert added.against_current is not None and added.against_current.num_queries == by_age.old.num_queries
    assert added.map_at_r is not None and added.map_at_r.num_queries == by_age.old.num_queries
    assert added.drift is not None and added.drift.shift is not None and 0 < added.drift.shift < 0.5
    assert added.latency is not None and added.latency.then is not None
    assert (report.map_at_r, report.drift.then, report.latency.then) == (None, None, None)
    for what, recall in added.assessment.recalls.items():
        assert sum(measured.lost_where(what)) == pytest.approx(1 - recall)
    page = Release(root, second).read(second.report_html).decode()
    assert (
        "added to of-version-1" in page
        and "from before" in page
        and "the next build trains a new template, since recall@10" in page
    )

    made, (third, anew, *_) = night(tmp_path, [], Release(root, second))
    assert made.how.startswith("whole: with a new template, since recall@10 is 0.")
    assert third.template_birth is not None and third.template_birth.num_entries == 700
    assert anew.aged is None
