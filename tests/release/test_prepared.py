"""What was prepared is never current until people switch to it, and stays while it may be wanted."""

from dataclasses import replace

import pytest

from namr.data import datasets
from namr.errors import ConfigError, Conflict
from namr.release import doomed, prepared, publication, releases, users
from namr.release.prepared import SwitchConfig
from namr.release.releases import ReleaseManifest
from tests import small_release
from tests.release.test_garbage import Held, collect, ids, is_there, publish
from tests.small_release import NOW


@pytest.fixture(autouse=True)
def without_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free(Held):
        def __enter__(self) -> "Free":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(users, "write_alone", lambda *_, **__: Free())


def prepare(uri: str, manifest: ReleaseManifest, name: str, **changes: object) -> ReleaseManifest:
    """The manifest under another name, with a page of its own."""
    page = releases.store(uri, "report.html", name.encode())
    made = replace(small_release.renamed(manifest, name), report_html=page, is_prepared=True, **changes)
    publication.keep(uri, made)
    return made


def switch(uri: str, name: str, force: str | None = None) -> releases.Release:
    return prepared.switch(SwitchConfig(releases_uri=uri, release=name, force=force), at=NOW)


def test_a_switch_publishes_it_as_a_release_of_today(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    publish(uri, manifest, "a")
    made = prepare(uri, manifest, "next", model_digest="f" * 64)
    publish(uri, manifest, "b")
    assert [each.manifest for each in prepared.newest_first(uri)] == [made]
    now = switch(uri, "next").manifest
    assert releases.open_release(uri).manifest == now
    assert (now.previous, now.model_digest, now.is_prepared, now.forced) == ("b", "f" * 64, False, None)
    assert list(now.objects()) == list(made.objects())
    assert publication.roll_back(uri, now=NOW).manifest.release_id == "b"
    with pytest.raises(Conflict, match="is pinned since"):
        switch(uri, "next")
    with pytest.raises(ConfigError, match="release a was not prepared"):
        switch(uri, "a")


def test_what_the_gate_refused_or_newer_images_would_lose_is_forced_with_a_reason(
    fresh: tuple[str, ReleaseManifest],
) -> None:
    uri, manifest = fresh
    prepare(uri, manifest, "refused", objections="recall@10 is 0.5")
    publish(uri, manifest, "a")
    with pytest.raises(ConfigError, match=r"refused is not published: recall@10 is 0\.5; say why by --force"):
        switch(uri, "refused")
    with pytest.raises(ConfigError, match="force is empty"):
        switch(uri, "refused", force=" ")
    said = switch(uri, "refused", force="a demonstration").manifest.forced
    assert said is not None and (said.reason, said.objections) == ("a demonstration", "recall@10 is 0.5")

    prepare(uri, manifest, "behind")
    later = datasets.publish_version(datasets.head(manifest.dataset_uri), [], now=NOW)
    publish(uri, replace(manifest, dataset_version=later.version.version), "b")
    with pytest.raises(
        ConfigError, match=r"it has version 1 of its dataset, and b, which is current, has vers"
    ):
        switch(uri, "behind")
    assert releases.open_release(uri).manifest.release_id == "b"


def test_the_newest_of_each_model_stays_until_many_were_published_after_it(
    fresh: tuple[str, ReleaseManifest],
) -> None:
    uri, manifest = fresh

    def dated(day: int) -> ReleaseManifest:
        return replace(manifest, created=f"2026-11-0{day}T00:00:00+00:00")

    publish(uri, dated(1), "a")
    first = prepare(uri, dated(2), "first", model_digest="f" * 64)
    second = prepare(uri, dated(3), "second", model_digest="f" * 64)
    prepare(uri, dated(3), "of-another", model_digest="e" * 64)
    publish(uri, dated(4), "b")
    assert collect(uri, keep=2).kept == ("a", "b", "of-another", "second")
    assert first.report_html and not is_there(uri, first.report_html.name)
    assert second.report_html and is_there(uri, second.report_html.name)
    publish(uri, dated(5), "c")
    assert collect(uri, keep=2).kept == ("b", "c")
    assert ids(uri) == ["b", "c"]


def test_what_a_collection_is_about_to_delete_is_not_kept(fresh: tuple[str, ReleaseManifest]) -> None:
    uri, manifest = fresh
    doomed.add(uri, [manifest.template.name], now=0)
    with pytest.raises(Conflict, match=r"release next is not kept: a collection is about to delete"):
        prepare(uri, manifest, "next")
    assert prepared.newest_first(uri) == []
