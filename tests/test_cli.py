"""The words of the `namr` command, on real releases and a real registry."""

from dataclasses import replace
from pathlib import Path

import faiss
import pytest

from namr import cli
from namr.data import datasets
from namr.errors import ConfigError, ManifestError
from namr.model import model
from namr.model.model import ModelConfig
from namr.registry import registry
from namr.release import listing, old_embeddings, publication, releases, takedowns
from tests import small_release
from tests.nightly.test_description import released
from tests.small_release import Recipe


def test_releases_are_listed_and_rolled_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small_release.publish(tmp_path, Recipe(), release_id="first")
    uri = first.releases_uri
    second = small_release.renamed(first.manifest, "second", created="2026-11-02T02:00:00+00:00")
    publication.publish(uri, second, expected=releases.read_pointer(uri))
    cli.run(["releases", "list", "--releases-uri", uri])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["first", lines[0].split()[1]], ["*", "second"]]
    cli.run(["rollback", "--releases-uri", uri])
    assert capsys.readouterr().out.startswith("first is current and pinned: nothing is published until")
    cli.run(["rollback", "--releases-uri", uri, "--to", "second"])
    assert releases.current(uri).manifest.release_id == "second"


def test_what_no_release_needs_is_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = small_release.publish(tmp_path, Recipe(num_shards=1)).manifest
    uri = str(tmp_path / "releases")
    for name in ("second", "third"):
        publication.publish(uri, small_release.renamed(manifest, name), expected=releases.read_pointer(uri))
    leaked = releases.store(uri, "leaked.bin", b"12345")
    words = ["releases", "collect", "--releases-uri", uri, "--keep", "2"]
    cli.run([*words, "--dry-run"])
    assert capsys.readouterr().out == (
        "keeps first, second, third\nwould free 0 bytes: nothing; keeps 3 releases\n"
    )
    cli.run([*words, "--min-age-hours", "0", "--dry-run"])
    told = capsys.readouterr().out
    assert "would free" in told and "releases 1 (" in told and "objects 1 (5 bytes)" in told
    assert releases.is_there(uri, leaked)
    cli.run([*words, "--min-age-hours", "0"])
    assert capsys.readouterr().out == told.replace("would free", "freed")
    assert [each.release_id for each in listing.list_releases(uri).manifests] == ["second", "third"]
    assert not releases.is_there(uri, leaked)
    with pytest.raises(ConfigError, match="keep is 0"):
        cli.run([*words[:-1], "0"])


def test_a_pin_is_set_shown_and_lifted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = small_release.publish(tmp_path, Recipe(num_shards=1)).releases_uri
    cli.run(["releases", "pin", "--releases-uri", uri, "--reason", "an audit"])
    assert "first stays current" in capsys.readouterr().out
    cli.run(["releases", "list", "--releases-uri", uri])
    assert capsys.readouterr().out.splitlines()[-1].startswith("first is pinned since 20")
    cli.run(["releases", "unpin", "--releases-uri", uri])
    assert ": an audit; the next night may publish" in capsys.readouterr().out
    cli.run(["releases", "unpin", "--releases-uri", uri])
    assert capsys.readouterr().out == "first was not pinned; the next night may publish\n"


def test_a_damaged_manifest_is_listed_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = small_release.publish(tmp_path, Recipe(num_shards=1))
    second = small_release.renamed(first.manifest, "second")
    publication.publish(first.releases_uri, second, expected=releases.read_pointer(first.releases_uri))
    Path(first.releases_uri, "first", "manifest.json").write_text("{")
    cli.run(["releases", "list", "--releases-uri", first.releases_uri])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("* second")
    assert lines[1].startswith("! first") and "manifest.json is damaged" in lines[1]


def test_images_are_taken_down_by_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = small_release.publish(tmp_path, Recipe(num_shards=1)).manifest
    uri = str(tmp_path / "releases")
    cli.run(["takedown", "--releases-uri", uri, "--keys", "digit/3", "digit/7"])
    assert capsys.readouterr().out.startswith("2 images of ")
    assert takedowns.taken_down(uri, manifest.dataset_uri).tolist() == [3, 7]
    assert datasets.open_version(manifest.dataset_uri).version.tombstones == (3, 7)
    with pytest.raises(ConfigError, match="nothing was changed"):
        cli.run(["takedown", "--releases-uri", uri, "--keys", "digit/8", "nobody"])
    assert takedowns.taken_down(uri, manifest.dataset_uri).tolist() == [3, 7]


def test_images_are_erased_by_key_with_a_receipt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = small_release.publish(tmp_path, Recipe(num_shards=1)).manifest
    uri = str(tmp_path / "releases")
    words = ["erase", "--dataset-uri", manifest.dataset_uri, "--releases-uri", uri]
    words += ["--embeddings-uri", str(tmp_path / "embeddings")]
    old_embeddings.use(str(tmp_path / "embeddings"), uri)
    cli.run([*words, "--keys", "digit/3", "digit/7", "--collection.keep", "2"])
    said = capsys.readouterr().out.splitlines()
    assert (
        "emptied 2 rows of " in said[0]
        and said[1] == "  in the files of release first: goes when 2 more are published"
    )
    assert Path(said[-1].removeprefix("  the receipt is ")).is_file()
    with pytest.raises(ConfigError, match="keys and keys_file are empty"):
        cli.run(words)


def test_a_release_is_shown_and_held_against_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = released(tmp_path, Recipe(num_shards=1), built="whole: there was no release")
    uri = first.releases_uri
    publication.publish(uri, first.manifest, expected=None)
    with pytest.raises(ConfigError, match="first follows no release; name the one to compare it with"):
        cli.run(["releases", "diff", "--releases-uri", uri])
    second = replace(small_release.renamed(first.manifest, "second"), depth=60)
    publication.publish(uri, second, expected=releases.read_pointer(uri))
    cli.run(["releases", "show", "--releases-uri", uri])
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["release"].strip() == "second" and lines["follows"].strip() == "first"
    cli.run(["releases", "diff", "--releases-uri", uri])
    said = capsys.readouterr().out
    assert said.startswith("first -> second") and "depth 50\n  + side both" in said


def test_a_release_is_exported_as_plain_faiss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = small_release.publish(tmp_path, Recipe())
    out = tmp_path / "index.faiss"
    cli.run(["releases", "export", "--releases-uri", release.releases_uri, "--out", str(out)])
    assert faiss.read_index(str(out)).ntotal == release.manifest.counts.num_indexed
    assert f"{release.manifest.counts.num_indexed} vectors" in capsys.readouterr().out


def test_an_index_is_planned_with_numbers_as_people_write_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--num-vectors", "1e9", "--dim", "256", "--memory-gb-per-node", "64", "--recall-at-10", "0.95"]
    cli.run(["plan", *words])
    said = capsys.readouterr().out
    assert "IVF65536,PQ32x4fs" in said and "Constants: those that come with namr" in said
    with pytest.raises(ConfigError, match="no such file"):
        cli.run(["plan", *words, "--constants", "nowhere.json"])
    with pytest.raises(ConfigError, match="can't be written"):
        cli.run(["plan", *words, "--calibrate", "--constants", "no folder/x.json"])


@pytest.mark.slow
def test_the_candidate_is_promoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    net = model.build(
        ModelConfig(backbone="test_resnet", weights="none", embedding_dim=4, structure_hidden_dim=4), seed=0
    )
    model.save(net, tmp_path / "model")
    runs = registry.connect(uri)
    run_id = runs.create_run("tests", run_name="one")
    runs.register(tmp_path / "model", name="photos", run_id=run_id)
    cli.run(["promote", "--model-name", "photos", "--tracking-uri", uri])
    assert capsys.readouterr().out == "photos 1 is the champion\n"
    assert registry.connect(uri).version("photos", alias="champion").version == "1"


@pytest.mark.parametrize(
    ("words", "error", "expected"),
    [
        (
            ["relases"],
            ConfigError,
            "'relases' is no command of namr; expected one of: demo, erase, plan, promote",
        ),
        (
            ["releases"],
            ConfigError,
            "releases collect, releases diff, releases export, releases list, releases pin",
        ),
        (["submit", "fly"], ConfigError, "namr submit fly: expected one of build_index, compact, evaluate"),
        (["submit"], ConfigError, "expected one of build_index"),
        (["rollback", "--releases-uri", "nowhere"], ConfigError, "no current release"),
        (["releases", "collect", "--releases-uri", "nowhere"], ConfigError, "there is nothing to collect"),
        (
            ["releases", "export", "--releases-uri", "nowhere", "--out", "x"],
            ManifestError,
            "no current release",
        ),
        (["releases", "pin", "--releases-uri", "x"], ConfigError, "reason"),
        (["plan", "--num-vectors", "nan", "--dim", "8"], ConfigError, "num_vectors is nan; expected 1 to"),
        (["plan", "--num-vectors", "many", "--dim", "8"], ConfigError, "num-vectors"),
        (["rollback", "--release-uri", "x"], ConfigError, "Perhaps you meant|required"),
    ],
)
def test_a_wrong_word_is_one_clear_error(
    words: list[str], error: type[Exception], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(error, match=expected):
        cli.run(words)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["--help"])
    assert "namr rollback" in capsys.readouterr().out
