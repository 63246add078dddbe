"""A release in words, and how it differs from another."""

from dataclasses import replace
from pathlib import Path

from namr.nightly import description
from namr.nightly.comparison import Compared
from namr.nightly.drift import Drift, Spread
from namr.nightly.latency import Latencies, Latency
from namr.release import releases
from namr.release.releases import Forced, Release
from namr.reports.beside import SelfSearched
from namr.store import manifests
from tests import small_release
from tests.nightly.test_reindexing import a_report
from tests.small_release import Recipe


def released(root: Path, recipe: Recipe, **report: object) -> Release:
    manifest = small_release.make_manifest(root, recipe)
    data = manifests.encode_manifest(replace(a_report(), **report))
    stored = releases.store(str(root / "releases"), "report.json", data)
    return Release(str(root / "releases"), replace(manifest, report_json=stored))


def test_a_release_is_told_by_what_it_is_made_of_and_what_was_measured(tmp_path: Path) -> None:
    recipe = Recipe(num_segments=2, dead=[4], index_key="IVF4,Flat")
    told = description.facts(
        released(tmp_path, recipe, built="whole: why", aged="it grew", effective_rank=7.25)
    )
    assert told["images"] == "120 samples: 119 indexed, 0 refused, 1 tombstoned"
    assert (told["segments"], told["dead entries"]) == ("60 + 60", "1")
    assert (told["built"], told["template has aged"]) == ("whole: why", "it grew")
    assert (told["recall@10"], told["Recall@1, both"], told["effective rank"]) == ("1.000", "0.800", "7.2")
    assert "latency" not in told and "MAP@R, then and now" not in told
    lies = Spread(num_images=100, mean_norm=2.0, num_flat_axes=1, effective_rank=7.25)
    measured = {
        "map_at_r": Compared(9, 0.5, 0.25),
        "drift": Drift(16, lies, lies, 0.125),
        "latency": Latencies(30, Latency(1.5, 2.0), Latency(1.25, 3.0)),
    }
    more = description.facts(released(tmp_path / "more", recipe, **measured))
    assert more["MAP@R, then and now"] == "0.500, 0.250 of the same 9 images"
    assert more["embeddings"] == "mean norm 2, 1 flat axes"
    assert more["shift"].startswith("0.1250, ")
    assert (more["latency"], more["latency then"]) == ("1.50 ms (median), 2.00 ms (95 %)", "1.25 ms, 3.00 ms")
    assert told["follows"].startswith("none") and "forced" not in told


def test_what_its_images_found_of_each_other_is_told_and_where_the_tables_lie(tmp_path: Path) -> None:
    searched = SelfSearched(num_asked=4096, num_pairs=5, num_groups=3, limit=0.1, num_suspects=7)
    release = released(tmp_path, Recipe(num_shards=1), searched=searched)
    told = description.facts(release)
    assert told["near-duplicates"] == "5 pairs of 3 groups" and told["label suspects"] == "7"
    assert told["looked for by"] == "4,096 images"
    stored = releases.store(release.releases_uri, "near-duplicates.parquet", b"a table")
    listed = Release(release.releases_uri, replace(release.manifest, tables={"near-duplicates": stored}))
    where = description.places(listed)
    assert list(where) == ["page", "table near-duplicates"]
    assert Path(where["table near-duplicates"]).read_bytes() == b"a table"


def test_what_differs_is_told_with_the_bytes_that_are_not_shared(tmp_path: Path) -> None:
    one = released(tmp_path, Recipe(num_shards=1), built="whole: why")
    forced = Forced(by="somebody", reason="a test", objections="recall")
    other = Release(one.releases_uri, replace(one.manifest, forced=forced, depth=60))
    found = description.differences(one, other)
    assert found == {
        "searched by": (
            "side both, all images compared, depth 50",
            "side both, all images compared, depth 60",
        ),
        "forced": ("-", "by somebody: a test (recall)"),
        "not shared": ("-", "0.0 MB in 0 objects"),
    }
