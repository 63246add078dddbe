"""The night on real parts: embedded once, measured on held-out images, gated, published by one writer."""

import json
import pickle
import signal
import subprocess
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs import reindex
from namr.data import datasets
from namr.embed import extraction
from namr.embed.extraction import ExtractionConfig
from namr.errors import ConfigError, Conflict, NamrError, StorageError
from namr.model import model
from namr.model.model import ModelConfig
from namr.nightly import gate, reindexing
from namr.nightly.assessment import Assessment, AssessmentConfig, SideResult
from namr.nightly.gate import GateConfig
from namr.nightly.reindexing import ReindexConfig
from namr.nightly.release_report import ReleaseReport
from namr.release import compaction, listing, prepared, publication, releases, users
from namr.release.build import BuildConfig
from namr.release.prepared import SwitchConfig
from namr.release.releases import Counts, ReleaseManifest
from namr.store import manifests, storage
from namr.store.lease import Lease
from namr.store.manifests import Pointer
from tests import small_release
from tests.release.test_garbage import unnamed
from tests.small_release import NOW, Recipe


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


TTL_S = 1.0


@pytest.fixture
def quick_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the releases, as short as tests are."""

    def write_alone(root: str, *, what: str) -> Lease:
        return Lease.take(storage.join(root, "lease.json"), what=what, ttl_s=TTL_S, renew_s=TTL_S / 4)

    monkeypatch.setattr(users, "write_alone", write_alone)


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
def test_a_night_publishes_once_and_again_only_where_something_changed(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert manifest.release_id in page and "What the structure embedding says" in page
    assert page.count("data:image/") > 20
    assert first.report.embedded is not None and first.report.embedded.num_images == 240
    assert "images/s of one alone: read " in page
    again = reindexing.reindex(config, clock=lambda: NOW + timedelta(days=1))
    assert not again.is_new
    assert again.release.manifest == manifest
    assert again.report == first.report

    deeper = replace(config, assessment=AssessmentConfig(depth=30))
    changed = reindexing.reindex(deeper, clock=lambda: NOW + timedelta(days=1))
    assert changed.is_new
    assert changed.release.manifest.depth == 30
    assert changed.release.manifest.segments == manifest.segments
    publication.roll_back(config.releases_uri, now=NOW)
    held = reindexing.reindex(deeper)
    assert held.held is not None and held.release.manifest == manifest
    publication.unpin(config.releases_uri)

    datasets.tombstone(config.dataset_uri, ["digit/3", "digit/77"], now=NOW)
    night = reindexing.reindex(config, clock=lambda: NOW + timedelta(days=2))
    assert night.release.manifest.counts.num_indexed == 238
    assert night.release.manifest.previous == manifest.release_id
    assert night.release.manifest.segments == manifest.segments
    assert night.release.tombstones().tolist() == [3, (1 << 32) + 17]
    assert night.report.built == f"added to {manifest.release_id}: 0 shards, and 2 images taken out"
    assert night.extracted is not None and night.extracted.num_new == 0
    assert night.report.embedded is None
    assert night.compacted.endswith(f"{night.release.manifest.release_id} is fit to be added to")

    monkeypatch.setattr(compaction, "MOST_DEAD", 0.0)
    left = reindexing.reindex(replace(config, compact=False))
    assert (left.is_new, left.release, left.compacted) == (False, night.release, "nothing was compacted")
    compacted = reindexing.reindex(config)
    assert not compacted.is_new
    assert compacted.release.manifest.previous == night.release.manifest.release_id
    assert compacted.release.manifest.num_entries == 238
    assert compacted.compacted.endswith("2 of its 240 entries are dead; 100 images find the same in both")

    every = [key for table in datasets.open_version(config.dataset_uri).all_samples() for key in table.keys]
    datasets.tombstone(config.dataset_uri, every, now=NOW)
    with pytest.raises(ConfigError, match="no image that was embedded and not taken out"):
        reindexing.reindex(config)
    assert releases.current(config.releases_uri) == compacted.release


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local", "quick_lease")
def test_what_the_gate_stops_serves_nobody_and_of_two_nights_one_wins(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_release.make_dataset(tmp_path, Recipe(num_shards=2, rows_per_shard=60))
    strict = GateConfig(min_recall_at_10=1.0)
    one_list = AssessmentConfig(depth=20, target_recall=0.01)
    config = config_of(tmp_path, model_folder, gate=strict, assessment=one_list)
    expected = (
        r"is not published: recall@10 is 0\.\d+ with 1 of \d+ lists and depth 20, the gate wants 1\.000; of "
        r"points lost [1-9]\d*\.\d in lists that are not probed, 0\.0 in depth, 0\.0 in codes: raise"
    )
    with pytest.raises(NamrError, match=expected):
        reindexing.reindex(config, clock=lambda: NOW)
    assert releases.current(config.releases_uri) is None
    ((kept,), _) = listing.list_releases(config.releases_uri)
    assert kept.recall_at_10 < 1 and kept.forced is None

    good = config_of(tmp_path, model_folder)
    original = publication.publish

    def somebody_was_faster(
        root: str, manifest: ReleaseManifest, *, expected: Pointer | None
    ) -> releases.Release:
        with pytest.raises(
            Conflict, match=r"lease\.json is held by the night \(process .* since .* wait until"
        ):
            reindexing.reindex(good)
        original(root, small_release.renamed(manifest, "faster"), expected=expected)
        return original(root, manifest, expected=expected)

    with pytest.raises(ConfigError, match="force is empty"):
        replace(config, force=" ")
    meant = config_of(tmp_path, model_folder, gate=strict, assessment=one_list, force="a demonstration")
    forced = reindexing.reindex(replace(meant, releases_uri=str(tmp_path / "forced")), clock=lambda: NOW)
    said = forced.release.manifest.forced
    assert said is not None and said.reason == "a demonstration" and "recall@10 is 0." in said.objections

    monkeypatch.setattr(publication, "publish", somebody_was_faster)
    with pytest.raises(Conflict, match="somebody else"):
        reindexing.reindex(good, clock=lambda: NOW + timedelta(hours=1))
    assert releases.current(good.releases_uri).manifest.release_id == "faster"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local", "quick_lease")
def test_another_models_release_is_prepared_beside_nights_and_switched_to(
    tmp_path: Path, model_folder: Path
) -> None:
    small_release.make_dataset(tmp_path, Recipe(num_shards=2, rows_per_shard=60))
    config = config_of(tmp_path, model_folder, gate=GateConfig(max_recall_at_1_drop=1.0, max_rank_drop=1.0))
    first = reindexing.reindex(config, clock=lambda: NOW).release
    other = model.build(
        ModelConfig(
            backbone="test_resnet", weights="none", embedding_dim=8, structure_hidden_dim=8, image_size_px=32
        ),
        seed=1,
    )
    model.save(other, tmp_path / "other")
    of_other = replace(config, model=str(tmp_path / "other"))
    preparing = replace(of_other, prepare=True)
    with pytest.raises(ConfigError, match="nothing is forced while it is prepared"):
        replace(preparing, force="why not")
    with users.write_alone(config.releases_uri, what="the night"):  # it goes on meanwhile
        made = reindexing.reindex(preparing, clock=lambda: NOW + timedelta(hours=1))
        again = reindexing.reindex(preparing, clock=lambda: NOW + timedelta(hours=2))
    assert (made.is_new, again.is_new) == (True, False)
    assert again.release == made.release and made.release.manifest.is_prepared
    assert releases.current(config.releases_uri) == first
    datasets.tombstone(config.dataset_uri, ["digit/3"], now=NOW)
    reindexing.reindex(config, clock=lambda: NOW + timedelta(days=1))
    more = reindexing.reindex(preparing, clock=lambda: NOW + timedelta(days=1))
    assert more.report.built.startswith(
        f"added to {made.release.manifest.release_id}: 0 shards, and 1 images"
    )
    assert more.release.manifest.counts.num_indexed == 119

    name = more.release.manifest.release_id
    switched = prepared.switch(SwitchConfig(releases_uri=config.releases_uri, release=name), at=NOW)
    night = reindexing.reindex(of_other)
    assert (night.is_new, night.release.manifest) == (False, switched.manifest)

    one_list = AssessmentConfig(depth=20, target_recall=0.01)
    picky = replace(preparing, assessment=one_list, gate=GateConfig(min_recall_at_10=1.0))
    with pytest.raises(NamrError, match=r"recall@10 is 0\.\d+"):
        reindexing.reindex(picky, clock=lambda: NOW + timedelta(days=2))
    objections = prepared.newest_first(config.releases_uri)[0].manifest.objections
    assert objections is not None and "recall@10 is 0." in objections


def leave_the_lease_to_another(config: ReindexConfig) -> None:
    """As after a night slept for long: another one took its lease, and works."""
    uri = storage.join(config.releases_uri, "lease.json")
    storage.write(uri, storage.read(uri).replace(b'"holder": "', b'"holder": "a later night, not '))
    body = json.loads(storage.read(uri)) | {"token": "another", "fence": 2}
    storage.write(uri, json.dumps(body).encode())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local", "quick_lease")
def test_a_night_that_lost_its_lease_publishes_nothing_and_a_failed_collection_spoils_none(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_release.make_dataset(tmp_path, Recipe(num_shards=2, rows_per_shard=60))
    config = config_of(tmp_path, model_folder)
    check = gate.check

    def slept(*arguments: Any, **named: Any) -> None:
        check(*arguments, **named)
        leave_the_lease_to_another(config)
        time.sleep(2 * TTL_S)

    monkeypatch.setattr(gate, "check", slept)
    with pytest.raises(Conflict, match=r"is not held by the night .* any more: a later night, not the night"):
        reindexing.reindex(config, clock=lambda: NOW)
    assert releases.current(config.releases_uri) is None
    monkeypatch.setattr(gate, "check", check)
    listed = storage.list_entries

    def away(uri: str) -> list[storage.Entry]:
        raise StorageError(f"cannot list {uri}: the store is away")

    monkeypatch.setattr(storage, "list_entries", away)
    night = reindexing.reindex(config, clock=lambda: NOW)  # waits until the other has been silent for long
    assert night.is_new
    assert night.collected.startswith("the collection failed and is due again: StorageError: cannot list")
    monkeypatch.setattr(storage, "list_entries", listed)
    leaked = releases.store(config.releases_uri, "leaked.bin", b"123")
    unserved = storage.join(config.embeddings_uri, "0" * 64, "1.parquet")
    storage.write(unserved, b"of a model that nobody serves")
    embedded = storage.list_names(config.embeddings_uri)
    now = storage.now
    monkeypatch.setattr(storage, "now", lambda uri: now(uri) + 25 * 3600)
    again = reindexing.reindex(config, clock=lambda: NOW)
    assert not again.is_new
    assert again.collected.startswith("freed ")
    assert "objects 3 (" in again.collected and "files of work " in again.collected  # two are lost reports
    assert not releases.is_there(config.releases_uri, leaked)
    embedded.remove(f"{'0' * 64}/1.parquet")
    assert storage.list_names(config.embeddings_uri) == embedded
    assert unnamed(config.releases_uri) == set()


VICTIM = """
import os, pickle, signal, sys
from namr import ray_connection
from namr.nightly import gate, reindexing
from namr.release import users
from namr.store.lease import Lease
ttl_s = float(sys.argv[2])
ray_connection.connect = lambda *_: None
ray_connection.map_tasks = lambda function, arguments, **_: enumerate(map(function, arguments))
users.write_alone = lambda root, *, what: Lease.take(
    root + "/lease.json", what=what, ttl_s=ttl_s, renew_s=ttl_s / 4
)
gate.check = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
reindexing.reindex(pickle.loads(bytes.fromhex(sys.argv[1])))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local", "quick_lease")
def test_a_killed_night_is_taken_up_by_the_next_where_it_was(
    tmp_path: Path, model_folder: Path, python: str
) -> None:
    dataset = small_release.make_dataset(tmp_path, Recipe(num_shards=2, rows_per_shard=60))
    config = config_of(tmp_path, model_folder)
    extraction.extract(dataset, config.embeddings_uri, str(model_folder), config.extraction)
    command = [python, "-c", VICTIM, pickle.dumps(config).hex(), str(TTL_S)]
    killed = subprocess.run(command, check=False, capture_output=True, timeout=120, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert releases.current(config.releases_uri) is None
    made = {entry for entry in storage.list_entries(config.releases_uri) if "/" in entry.name}
    assert any(entry.name.endswith("segment.json") for entry in made)
    started = time.monotonic()
    night = reindexing.reindex(config, clock=lambda: NOW)
    assert night.is_new and time.monotonic() - started > TTL_S / 2
    left = set(storage.list_entries(config.releases_uri))
    again = {entry.name for entry in made - left}
    assert again == set(), "nothing that was made was made again"
    assert night.release.manifest.segments[0].file.name in {entry.name for entry in made}


def test_what_decides_a_release_is_in_its_digest(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path)
    build, assessment = config.build, config.assessment
    decisive = [
        config,
        replace(config, embeddings_uri=str(tmp_path / "other")),
        replace(config, build=replace(build, index_key="Flat")),
        replace(config, build=replace(build, seed=1)),
        replace(config, build=replace(build, num_held_out=31)),
        replace(config, build=replace(build, max_index_bytes=1 << 20)),
        replace(config, assessment=replace(assessment, depth=21)),
        replace(config, assessment=replace(assessment, target_recall=0.5)),
        replace(config, extraction=replace(config.extraction, compute_dtype="bfloat16")),
        replace(config, extraction=replace(config.extraction, storage_dtype="float32")),
    ]
    assert len({reindexing.config_digest(each) for each in decisive}) == len(decisive)
    alike = [
        config,
        replace(config, gate=GateConfig(max_lost_share=0.5)),
        replace(config, build=replace(build, num_parts=9, work_uri=str(tmp_path / "work"))),
        replace(config, extraction=ExtractionConfig(num_workers=2)),
        replace(config, notify_url="https://chat.example.com/a-secret"),
    ]
    assert len({reindexing.config_digest(each) for each in alike}) == 1


def test_a_night_over_a_pin_says_so_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = small_release.make_manifest(tmp_path, Recipe(num_shards=1))
    config = config_of(tmp_path, tmp_path / "no model")
    report = releases.store(config.releases_uri, "report.json", manifests.encode_manifest(a_report()))
    publication.publish(config.releases_uri, replace(manifest, report_json=report), expected=None)
    publication.pin(config.releases_uri, reason="cats answer for dogs", now=NOW)
    night = reindexing.reindex(config)
    assert night.held == (NOW.isoformat(), "cats answer for dogs")
    assert (night.is_new, night.extracted, night.report) == (False, None, a_report())
    assert night.release.manifest.release_id == "first"
    names = ("dataset", "embeddings", "releases")
    flags = [word for name in names for word in (f"--{name}-uri", str(tmp_path / name))]
    monkeypatch.setattr("sys.argv", ["reindex.py", *flags])
    reindex.main()
    said = "held: release first is pinned since 2026-11-01T02:00:00+00:00 (cats answer for dogs); nothing was"
    assert capsys.readouterr().out.startswith(said)
    publication.unpin(config.releases_uri)
    with pytest.raises(NamrError, match="no saved model in"):
        reindexing.reindex(config)


def a_report() -> ReleaseReport:
    sides = ("none", "scale", "query", "both")
    return ReleaseReport(
        counts=Counts(num_samples=40, num_indexed=40, num_refused=0, num_tombstoned=0),
        index_key="Flat",
        num_parts=1,
        imbalance=1.0,
        build_s=1.0,
        assessment=Assessment(
            num_queries=10,
            num_labelled=10,
            num_items=40,
            nprobe=1,
            num_lists=0,
            recall_at_10=1.0,
            recall_by_nprobe=((1, 1.0),),
            sides=tuple(SideResult(side=side, recall_at_1=0.8, recall_at_10=1, proved=1) for side in sides),
            depth=20,
            queries_per_s=1.0,
        ),
    )


def test_a_missing_place_is_told_before_any_work(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "releases").write_text("a file")
    with pytest.raises(NamrError, match="releases is not writable"):
        reindexing.reindex(config_of(tmp_path, model_folder))
    (tmp_path / "releases").unlink()
    with pytest.raises(NamrError, match="no saved model in"):
        reindexing.reindex(config_of(tmp_path, tmp_path / "nowhere"))
