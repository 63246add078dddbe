"""A compaction beside nights: what it publishes, whom it waits for, and what it leaves where it may not."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import compact
from namr import ray_connection
from namr.errors import ConfigError, Conflict, ManifestError
from namr.nightly import compacting, likeness, release_report
from namr.nightly.aging import AgingConfig
from namr.nightly.compacting import CompactConfig
from namr.release import compaction, listing, publication, releases, users
from namr.release.releases import Release
from namr.store import manifests, storage
from tests.nightly.test_measuring import night, without_pictures  # noqa: F401  (a fixture)
from tests.release.test_garbage import Held, assert_whole, collect, unnamed
from tests.small_nights import embeddings_of
from tests.small_release import NOW

PATIENT = AgingConfig(max_growth=99, max_recall_drop=1, max_imbalance_growth=99, max_error_growth=99)

pytestmark = pytest.mark.usefixtures("without_pictures", "quick")


class Free(Held):
    """A lease that is always to be had."""

    def __enter__(self) -> "Free":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray and leases; two segments are many."""
    monkeypatch.setattr(ray_connection, "connect", lambda: None)
    monkeypatch.setattr(
        ray_connection,
        "map_tasks",
        lambda function, arguments, **_: enumerate(map(function, arguments)),
    )
    monkeypatch.setattr(users, "write_alone", lambda *_, **__: Free())
    monkeypatch.setattr(users, "compact_alone", lambda _: Free())
    monkeypatch.setattr(compaction, "MOST_SEGMENTS", 2)
    monkeypatch.setattr(compacting, "_LOOK_AGAIN_S", 0.0)


def a_night(root: Path, num_rows: list[int]) -> Release:
    """Published."""
    uri = str(root / "releases")
    expected = releases.read_pointer(uri)
    _, measured = night(root, num_rows, releases.current(uri), aging=PATIENT)
    return publication.publish(uri, measured.manifest, expected=expected)


def config_of(root: Path, **more: Any) -> CompactConfig:
    return CompactConfig(releases_uri=str(root / "releases"), embeddings_uri=embeddings_of(root), **more)


def sizes(release: Release | None) -> list[int]:
    assert release is not None
    return [segment.num_entries for segment in release.manifest.segments]


@pytest.mark.slow
def test_what_is_worn_is_made_one_segment_and_keeps_all_that_is_known_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_night(tmp_path, [120])
    fit = compacting.compact(config_of(tmp_path))
    assert fit == (None, "nothing was compacted: of-version-1 is fit to be added to")
    before = a_night(tmp_path, [30])
    done = compacting.compact(config_of(tmp_path), clock=lambda: NOW)
    assert sizes(done.release) == [150]
    now, then = releases.open_release(str(tmp_path / "releases")).manifest, before.manifest
    assert done.release is not None and now == done.release.manifest
    assert now.release_id.startswith("20261101T020000Z-")
    assert (now.previous, now.compacts) == (then.release_id,) * 2
    kept = ("counts", "nprobe", "depth", "recall_at_10", "calibration", "template", "template_birth")
    for name in (*kept, "config_digest", "dataset_version", "model_digest", "tombstones"):
        assert getattr(now, name) == getattr(then, name)
    report = release_report.read(done.release)
    assert report.assessment == release_report.read(before).assessment
    assert (
        report.built
        == done.how
        == ("of-version-2 with 1 segments in place of 2: it has 2 segments; 100 images find the same in both")
    )
    assert now.report_html is not None and now.release_id in done.release.read(now.report_html).decode()
    publication.roll_back(str(tmp_path / "releases"), now=NOW)
    assert releases.open_release(str(tmp_path / "releases")).manifest.release_id == "of-version-1"

    publication.roll_back(str(tmp_path / "releases"), "of-version-2", now=NOW)
    root = tmp_path / "releases"
    monkeypatch.setattr(
        "sys.argv", ["compact.py", "--releases-uri", str(root), "--embeddings-uri", embeddings_of(tmp_path)]
    )
    compact.main()
    assert capsys.readouterr().out.startswith(
        "nothing was compacted: of-version-2 is pinned since 2026-11-01"
    )
    publication.unpin(str(root))
    compact.main()
    assert ": of-version-2 with 1 segments in place of 2: it has" in capsys.readouterr().out


@pytest.mark.slow
def test_nights_that_come_meanwhile_stay_and_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One while it builds, one that has the lease when it would publish, and a third that comes then."""
    a_night(tmp_path, [100])
    a_night(tmp_path, [20])
    build, waited = compaction.build, list[Release]()

    def long(*arguments: Any, **named: Any) -> Any:
        built = build(*arguments, **named)
        a_night(tmp_path, [10])
        return built

    def held_twice(*_: object, **__: object) -> Free:
        if len(waited) < 2:
            waited.append(a_night(tmp_path, [5]))
            raise Conflict("lease.json is held by the night")
        return Free()

    monkeypatch.setattr(compaction, "build", long)
    monkeypatch.setattr(users, "write_alone", held_twice)
    done = compacting.compact(config_of(tmp_path))
    assert sizes(done.release) == [120, 10, 5, 5]
    assert done.release is not None and done.release.manifest.previous == "of-version-5"
    assert done.how.startswith("of-version-5 with 4 segments in place of 5: it has 2 segments; 100 images")
    waited.clear()
    with pytest.raises(Conflict, match="is held by the night"):
        compacting.compact(config_of(tmp_path, max_wait_hours=0))
    assert releases.open_release(str(tmp_path / "releases")).manifest.release_id == "of-version-7"


@pytest.mark.slow
def test_nothing_is_published_where_the_answers_differ_or_people_had_other_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_night(tmp_path, [60])
    a_night(tmp_path, [20])
    uri, config = str(tmp_path / "releases"), config_of(tmp_path)

    def differs(*_: object) -> None:
        raise ManifestError("the answers differ")

    with monkeypatch.context() as patch:
        patch.setattr(likeness, "check", differs)
        said = compacting.attempt(config, clock=lambda: NOW)
    assert said == (None, "the compaction failed and is due again: ManifestError: the answers differ")
    check = likeness.check

    def then(act: Callable[[], object]) -> None:
        def checked(*searchers: Any) -> Any:
            asked = check(*searchers)
            act()
            return asked

        monkeypatch.setattr(likeness, "check", checked)

    then(lambda: publication.pin(uri, reason="an audit", now=NOW))
    with pytest.raises(Conflict, match=r"is not published: of-version-2 is pinned since .* \(an audit\)"):
        compacting.compact(config)
    publication.unpin(uri)
    then(lambda: publication.roll_back(uri, "of-version-1", now=NOW))
    with pytest.raises(Conflict, match="in vain: of-version-1 is current by now"):
        compacting.compact(config)
    assert releases.open_release(uri).manifest.release_id == "of-version-1"
    publication.roll_back(uri, "of-version-2", now=NOW)
    publication.unpin(uri)
    monkeypatch.setattr(likeness, "check", check)

    def told(**changes: Any) -> str:
        release = releases.open_release(uri, "of-version-2")
        report = replace(release_report.read(release), aged="recall@10 fell" if "aged" in changes else None)
        changed = replace(
            release.manifest,
            release_id=f"changed-{len(listing.list_releases(uri).manifests)}",
            report_json=releases.store(uri, "report.json", manifests.encode_manifest(report)),
            counts=replace(release.manifest.counts, **changes.get("counts", {})),
        )
        with monkeypatch.context() as patch:
            patch.setattr(publication, "verify", lambda *_: None)
            publication.publish(uri, changed, expected=releases.read_pointer(uri))
        return compacting.compact(config).how

    assert told(aged=True).endswith("whole, since its template has aged")
    assert told(counts={"num_indexed": 0, "num_tombstoned": 80}).endswith("has no image left")
    for wrong in ({"num_parts": 0}, {"max_wait_hours": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            config_of(tmp_path, **wrong)


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_a_collection_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_night(tmp_path, [60])
    a_night(tmp_path, [20])
    uri, copy = str(tmp_path / "releases"), tmp_path / "copy"
    config = replace(config_of(tmp_path), releases_uri=str(copy))
    writes = ("write", "write_if_absent", "upload_if_absent", "move_if_absent", "replace_if_match")
    left, calls = [0], {name: getattr(storage, name) for name in writes}

    def killed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return calls[name](*arguments, **named)

        return call

    for num_written in itertools.count(step=6):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(uri, copy)
        left[0] = num_written
        with monkeypatch.context() as patch:
            for name in writes:
                patch.setattr(storage, name, killed(name))
            try:
                compacting.compact(config)
                break
            except KeyboardInterrupt:
                assert_whole(str(copy))
        assert sizes(compacting.compact(config).release) == [80]
        shutil.rmtree(copy / "readers", ignore_errors=True)  # of those that were killed
        collect(str(copy), keep=1)
        assert unnamed(str(copy)) == set()
        assert_whole(str(copy))
    assert num_written > 10


@pytest.mark.slow  # until the lease is renewed
def test_a_second_compaction_is_told_who_compacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_night(tmp_path, [60])
    a_night(tmp_path, [20])
    monkeypatch.undo()
    monkeypatch.setattr(compaction, "MOST_SEGMENTS", 2)
    with (
        users.compact_alone(str(tmp_path / "releases")),
        pytest.raises(Conflict, match=r"compaction\.json is held by a compaction \(process \d+ on "),
    ):
        compacting.compact(config_of(tmp_path))
