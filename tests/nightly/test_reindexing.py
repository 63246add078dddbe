"""The night on real parts: embedded once, measured on held-out images, gated, published by one writer."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from namr.data import datasets
from namr.embed.extraction import ExtractionConfig
from namr.errors import ConfigError, Conflict, NamrError
from namr.model import model
from namr.model.model import ModelConfig
from namr.nightly import reindexing
from namr.nightly.assessment import Assessment, AssessmentConfig, SideResult
from namr.nightly.reindexing import GateConfig, ReindexConfig, ReleaseConfig
from namr.nightly.release_report import ReleaseReport
from namr.release import releases
from namr.release.build import BuildConfig
from namr.release.releases import Counts
from namr.store import manifests
from tests import small_release
from tests.small_release import NOW, Recipe

SIDES = ("none", "scale", "query", "both")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    net = model.build(
        ModelConfig(
            backbone="test_resnet", weights="none", embedding_dim=8, structure_hidden_dim=8, image_size_px=32
        ),
        seed=0,
    )
    model.save(net, folder)
    return folder


def config_of(folder: Path, model_folder: Path, **changes: object) -> ReindexConfig:
    return replace(
        ReindexConfig(
            dataset_uri=str(folder / "dataset"),
            embeddings_uri=str(folder / "embeddings"),
            releases_uri=str(folder / "releases"),
            model=str(model_folder),
            extraction=ExtractionConfig(batch_size_per_worker=16, num_workers=1),
            build=BuildConfig(index_key="IVF4,Flat", num_parts=3, num_held_out=30),
            assessment=AssessmentConfig(depth=20),
        ),
        **changes,
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_night_publishes_once_and_the_next_finds_nothing_new(tmp_path: Path, model_folder: Path) -> None:
    small_release.make_dataset(tmp_path, Recipe(num_shards=4, rows_per_shard=60))
    config = config_of(tmp_path, model_folder)
    first = reindexing.reindex(config, clock=lambda: NOW)
    manifest = first.release.manifest
    assert first.is_new
    assert manifest.counts == Counts(num_samples=240, num_indexed=240, num_refused=0, num_tombstoned=0)
    assert manifest.recall_at_10 == first.report.assessment.recall_at_10 >= 0.9
    assert 10 <= first.report.assessment.num_queries <= 48
    assert first.report.num_parts == 3
    page = first.release.read(manifest.report_html).decode()
    assert manifest.release_id in page
    assert page.count("data:image/") > 20
    again = reindexing.reindex(config, clock=lambda: NOW + timedelta(days=1))
    assert not again.is_new
    assert again.release.manifest == manifest
    assert again.report == first.report

    datasets.tombstone(config.dataset_uri, ["digit/3", "digit/77"], now=NOW)
    night = reindexing.reindex(config, clock=lambda: NOW + timedelta(days=2))
    assert night.release.manifest.counts.num_indexed == 238
    assert night.release.manifest.previous == manifest.release_id
    assert night.extracted is not None and night.extracted.num_new == 0


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_the_gate_stops_serves_nobody_and_of_two_nights_one_wins(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_release.make_dataset(tmp_path, Recipe(num_shards=2, rows_per_shard=60))
    strict = GateConfig(min_recall_at_10=1.0)
    one_list = AssessmentConfig(depth=20, target_recall=0.01)
    config = config_of(tmp_path, model_folder, gate=strict, assessment=one_list)
    with pytest.raises(NamrError, match=r"is not published: recall@10 is 0\.\d+ with 1 of \d+ lists"):
        reindexing.reindex(config, clock=lambda: NOW)
    assert releases.current(config.releases_uri) is None

    good = config_of(tmp_path, model_folder)
    original = releases.publish

    def somebody_was_faster(*arguments: object, **named: object) -> releases.Release:
        monkeypatch.setattr(releases, "publish", original)
        reindexing.release(good_release(good), clock=lambda: NOW)
        return original(*arguments, **named)

    monkeypatch.setattr(releases, "publish", somebody_was_faster)
    with pytest.raises(Conflict, match="somebody else"):
        reindexing.reindex(good, clock=lambda: NOW + timedelta(hours=1))
    assert releases.current(good.releases_uri).manifest.created == NOW.isoformat(timespec="seconds")


def good_release(config: ReindexConfig) -> ReleaseConfig:
    """The same without extraction."""
    shared = {name: value for name, value in vars(config).items() if name != "extraction"}
    return ReleaseConfig(**shared)


def a_report(*, indexed: int = 1000, tombstoned: int = 0, recall: float = 0.96, right: float = 0.8):
    counts = Counts(
        num_samples=indexed + tombstoned, num_indexed=indexed, num_refused=0, num_tombstoned=tombstoned
    )
    sides = tuple(SideResult(side=side, recall_at_1=right, recall_at_10=1.0, proved=0.0) for side in SIDES)
    return ReleaseReport(
        counts=counts,
        index_key="IVF4,Flat",
        num_parts=4,
        imbalance=1.0,
        build_s=1.0,
        assessment=Assessment(
            num_queries=10,
            num_labelled=10,
            num_items=indexed,
            nprobe=2,
            num_lists=4,
            recall_at_10=recall,
            recall_by_nprobe=((2, recall),),
            sides=sides,
            depth=20,
            queries_per_s=1.0,
        ),
    )


@pytest.fixture
def current(tmp_path: Path) -> releases.Release:
    """A published release whose report says 1,000 images and Recall@1 of 0.8."""
    made = small_release.publish(tmp_path, Recipe())
    report = releases.store(made.releases_uri, "report.json", manifests.encode_manifest(a_report()))
    counts = a_report().counts
    return releases.Release(made.releases_uri, replace(made.manifest, report_json=report, counts=counts))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (a_report(indexed=995), None),
        (a_report(indexed=980), r"20 images of release .* are gone \(1000 then, 980 now, 0 taken out\)"),
        (a_report(indexed=980, tombstoned=15), None),
        (a_report(right=0.76), None),
        (a_report(right=0.7), r"Recall@1 fell from 0\.800 to 0\.700"),
        (a_report(recall=0.85), r"recall@10 is 0\.850 with 2 of 4 lists, the gate wants 0\.900"),
    ],
)
def test_the_gate_compares_with_what_serves(
    current: releases.Release, found: ReleaseReport, expected: str | None
) -> None:
    new = replace(current.manifest, release_id="new", counts=found.counts)
    if expected is None:
        reindexing.check_gate(GateConfig(), found, new, current)
        return
    with pytest.raises(NamrError, match=f"release new is not published: {expected}"):
        reindexing.check_gate(GateConfig(), found, new, current)


def test_a_missing_place_is_told_before_any_work(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "releases").write_text("a file")
    with pytest.raises(NamrError, match="releases is not writable"):
        reindexing.reindex(config_of(tmp_path, model_folder))
    (tmp_path / "releases").unlink()
    with pytest.raises(NamrError, match="no saved model in"):
        reindexing.reindex(config_of(tmp_path, tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["min_recall_at_10", "max_lost_share", "max_recall_at_1_drop"])
def test_limits_of_the_gate_are_shares(name: str) -> None:
    with pytest.raises(ConfigError, match=f"gate.{name} is 1.5"):
        GateConfig(**{name: 1.5})
