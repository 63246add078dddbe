"""Images are erased by one command: out of all that can be changed at once, with a receipt of the rest."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from namr.data import datasets, reading
from namr.data import erasing as of_shards
from namr.data.shards import Sample
from namr.embed import embeddings
from namr.embed import erasing as of_embeddings
from namr.errors import ConfigError, Conflict, ManifestError
from namr.nightly import reindexing
from namr.release import (
    compaction,
    erasing,
    increment,
    old_embeddings,
    publication,
    releases,
    takedowns,
    users,
)
from namr.release.erasing import EraseConfig, Erased
from namr.store import manifests, storage
from tests import searched, small_dataset, small_release
from tests.nightly.test_compacting import Free
from tests.nightly.test_reindexing import config_of, model_folder, quick_lease  # noqa: F401  (fixtures)
from tests.release.test_garbage import collect, unnamed
from tests.small_release import NOW, Recipe

MODELS = ("a" * 64, "b" * 64)
RECIPE = Recipe(num_shards=2, rows_per_shard=12, model_digest=MODELS[0])
ID = (1 << 32) + 3
WANTED = {
    "image": small_release.digit(15),
    "key": b"digit/15",
    "vector": small_release.random_vectors(12, 16, seed=1).embeddings[3].astype(np.float16).tobytes(),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, embeddings of two models, and a release; beside it a copy."""
    root = tmp_path_factory.mktemp("made") / "store"
    small_release.publish(root, RECIPE)
    dataset, uri = datasets.open_version(str(root / "dataset")), str(root / "embeddings")
    tables = small_release.embed(dataset, replace(RECIPE, flat_dtype=np.float16))
    for (entry, table), model in itertools.product(zip(dataset.shards, tables, strict=True), MODELS):
        embeddings.write(uri, model, entry, table)
    old_embeddings.use(uri, str(root / "releases"))
    for left in (*root.glob("work-*"), *root.glob("*.tar")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.copytree(root, root.with_name("copy"))
    return root


@pytest.fixture
def root(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It as it was made, and nobody at work there."""
    monkeypatch.setattr(users, "write_alone", lambda *_, **__: Free())
    monkeypatch.setattr(of_shards, "alone", lambda _: Free())
    return as_made(made)


def as_made(root: Path) -> Path:
    shutil.rmtree(root)
    return Path(shutil.copytree(root.with_name("copy"), root))


def erase(root: Path, *keys: str, **more: Any) -> list[Erased]:
    places = {f"{name}_uri": str(root / name) for name in ("dataset", "embeddings", "releases")}
    return erasing.erase(EraseConfig(keys=keys, **(places | more)), clock=lambda: NOW)


def contents(root: Path) -> dict[str, bytes]:
    dataset = datasets.open_version(str(root / "dataset"))
    return {s.key: s.image for entry in dataset.shards for s in reading.stream(dataset, entry)}


def vectors(root: Path) -> dict[int, bytes]:
    """Of one model, by id."""
    dataset = datasets.open_version(str(root / "dataset"))
    tables = [embeddings.verify(str(root / "embeddings"), MODELS[1], entry).table for entry in dataset.shards]
    return {
        each: table.embeddings[row].tobytes()
        for table in tables
        for row, each in enumerate(table.ids.tolist())
    }


def found_in(root: Path) -> set[str]:
    """What of the image is in the dataset or the embeddings."""
    return {*searched.traces(root / "dataset", WANTED), *searched.traces(root / "embeddings", WANTED)}


def test_what_has_it_still_are_releases_that_the_receipt_names(root: Path) -> None:
    images, of_images = contents(root), vectors(root)
    assert set(searched.traces(root, WANTED)) == set(WANTED)
    storage.write(str(root / "releases" / "building" / ("0" * 32) / "part-0.faiss"), b"part")
    storage.write(str(root / "releases" / "objects" / "x" / "leaked.bin"), b"of a build that was killed")
    (done,) = erase(root, "digit/15", "digit/3")
    left = searched.traces(root, WANTED)
    assert {name.split("/")[0] for names in left.values() for name in names} == {"releases"}
    assert contents(root) == {key: images[key] for key in images if key not in ("digit/15", "digit/3")}
    assert vectors(root) == {each: of_images[each] for each in of_images if each not in (3, ID)}
    assert takedowns.taken_down(str(root / "releases"), str(root / "dataset")).tolist() == [3, ID]
    receipt = done.receipt
    assert [each.ids for each in receipt.emptied] == [(3,), (ID,)] and len(receipt.keys) == 2
    assert len(receipt.embeddings) == 4 and (receipt.dataset_version, done.is_gone) == (3, False)
    assert [(each.what, each.until) for each in receipt.holding] == [
        ("release first", "when 7 more are published"),
        ("1 objects that no release lists, perhaps", f"by the first collection {AFTER}"),
        ("1 files of builds, perhaps", f"by the first collection {AFTER}"),
    ]
    said = done.in_words
    assert f"erasure {receipt.erasure_id} emptied 2 rows of {root}/dataset, in 2 shards and 4 files" in said
    assert "in the files of release first: goes when 7 more are published" in said
    assert said.endswith(f"the receipt is {root}/releases/erasures/{receipt.erasure_id}.json")


AFTER = "24 hours after they were written"


def test_asked_for_again_it_is_the_same_receipt_and_another_image_has_its_own(
    root: Path, tmp_path: Path
) -> None:
    (first,) = erase(root, "digit/15")
    (again,) = erase(root, "digit/15")
    assert again == first
    (tmp_path / "keys").write_text("digit/15\n\ndigit/16\n")
    both = erase(root, keys_file=tmp_path / "keys")
    assert [each.receipt.emptied[0].ids for each in both] == [(ID,), (ID + 1,)] and both[0] == first
    assert len(both[1].receipt.holding) == 1
    assert not {"digit/15", "digit/16"} & set(contents(root)) and len(contents(root)) == 22
    assert not found_in(root)


def test_no_segment_is_made_or_added_to_of_what_has_it(root: Path) -> None:
    release = releases.open_release(str(root / "releases"))
    erase(root, "digit/15")
    dataset = datasets.open_version(str(root / "dataset"))
    assert increment.changes(dataset, release) == (
        "images of version 1, which the current release has, were erased"
    )
    with pytest.raises(
        ManifestError, match="release first can't be made one segment: images that it has were"
    ):
        compaction.build(release, str(root / "embeddings"), work_uri=None)


def test_what_was_killed_before_the_embeddings_is_finished_by_the_next_erasure_of_the_shard(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(of_embeddings, "erase", dies)
        with pytest.raises(KeyboardInterrupt):
            erase(root, "digit/15")
    assert found_in(root) == set(WANTED)
    (other,) = erase(root, "digit/16")
    assert other.receipt.emptied[0].ids == (ID + 1,) and not found_in(root)
    (first,) = erase(root, "digit/15")
    assert first.receipt.emptied[0].ids == (ID,) and first.receipt.erasure_id != other.receipt.erasure_id


def test_a_key_that_nobody_knows_changes_nothing(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 of 2 keys are not in .*'nobody'; nothing was changed"):
        erase(root, "digit/15", "nobody")
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for more, said in (({}, "keys and keys_file are empty"), ({"keys_file": empty}, "one key a line")):
        with pytest.raises(ConfigError, match=said):
            erase(root, **more)
    for slip in ("embeddings_uri", "releases_uri"):
        with pytest.raises(
            ConfigError, match=rf"slip (is empty|has no releases).* check {slip}; nothing was"
        ):
            erase(root, "digit/15", **{slip: str(root / "slip")})
    with pytest.raises(ConfigError, match=r"keys_file .*nowhere can't be read"):
        erase(root, keys_file=Path("nowhere"))
    names = [str(path.relative_to(root)) for path in root.rglob("*") if not path.name.startswith(".")]
    as_before = root.with_name("copy")
    assert sorted(names) == sorted(
        str(path.relative_to(as_before)) for path in as_before.rglob("*") if not path.name.startswith(".")
    )


def test_of_a_foreign_tar_it_is_taken_down_and_the_rest_is_told(root: Path, tmp_path: Path) -> None:
    uri = str(root / "dataset")
    own = small_dataset.shard_of(str(tmp_path), tmp_path, 2, [Sample(key="f", image=b"f", extension="png")])
    index = manifests.write_object(uri, "2.parquet", (tmp_path / own.index.name).read_bytes())
    tar = manifests.describe_object(str(tmp_path / "2.tar"), tmp_path / "2.tar")
    datasets.publish_version(datasets.head(uri), [replace(own, tar=tar, index=index)], now=NOW)
    with pytest.raises(ConfigError, match=r"only indexes .*2\.tar, .* taken down and nothing was erased"):
        erase(root, "f", "digit/15")
    assert takedowns.taken_down(str(root / "releases"), uri).tolist() == [ID, 2 << 32]
    assert datasets.open_version(uri).version.emptied == () and storage.exists(tar.name)


def test_every_root_of_releases_that_uses_the_embeddings_has_a_receipt(root: Path) -> None:
    other, lost = str(root / "other"), str(root / "lost")
    for uri in (other, lost):
        old_embeddings.use(str(root / "embeddings"), uri)
    shutil.copytree(root / "releases", other)
    begun = str(root / "first night under way")
    old_embeddings.use(str(root / "embeddings"), begun)
    storage.write(storage.join(begun, "lease.json"), b"")
    done = erase(root, "digit/15")
    assert [each.releases_uri for each in done] == [str(root / "releases"), begun, other]
    assert [[of.what for of in each.receipt.holding] for each in done] == [
        ["release first"],
        [],
        ["release first"],
    ]
    assert takedowns.taken_down(other, str(root / "dataset")).tolist() == [ID]
    assert not Path(lost).exists()


@pytest.mark.slow  # until the lease is renewed
@pytest.mark.usefixtures("quick_lease")
def test_while_a_night_is_under_way_it_is_taken_down_and_no_more(made: Path) -> None:
    root = as_made(made)
    with (
        users.write_alone(str(root / "releases"), what="the night"),
        pytest.raises(Conflict, match=r"lease\.json is held by the night .* wait until it has ended"),
    ):
        erase(root, "digit/15")
    assert takedowns.taken_down(str(root / "releases"), str(root / "dataset")).tolist() == [ID]
    assert datasets.open_version(str(root / "dataset")).version.emptied == ()
    (done,) = erase(root, "digit/15")
    assert done.receipt.by == publication.operator()


WRITES = ("write", "write_if_absent", "upload_if_absent", "replace_if_match", "delete")
READS = ("read", "read_with_etag", "list_entries", "exists", "download")


@pytest.mark.parametrize(
    ("calls", "step"),
    [
        pytest.param(WRITES, 2, marks=pytest.mark.slow),
        pytest.param((*WRITES, *READS), 1, marks=pytest.mark.soak),
    ],
)
def test_killed_at_any_call_of_the_store_the_same_command_finishes(
    root: Path, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...], step: int
) -> None:
    images, left, of_store = contents(root), [0], {name: getattr(storage, name) for name in calls}

    def killed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return of_store[name](*arguments, **named)

        return call

    for num_calls in itertools.count(step=step):
        as_made(root)
        left[0] = num_calls
        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(storage, name, killed(name))
            try:
                erase(root, "digit/15", "digit/3")
                break
            except KeyboardInterrupt:
                pass
        assert {**images, **contents(root)} == images, "what is current is whole"
        if (root / "releases" / "erasures").exists():
            assert not found_in(root), "a receipt comes last"
        (done,) = erase(root, "digit/15", "digit/3")
        assert sum(len(each.ids) for each in done.receipt.emptied) == 2
        assert [each.what for each in done.receipt.holding] == ["release first"]
        assert len(contents(root)) == 22 and len(vectors(root)) == 22
        assert not found_in(root)
        assert len(storage.list_names(str(root / "dataset" / "shards"))) == 4
    assert num_calls > 15


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local", "quick_lease")
def test_after_a_night_and_a_collection_no_file_has_it_by_bytes_vector_or_key(
    tmp_path: Path,
    model_folder: Path,  # noqa: F811
) -> None:
    root = tmp_path / "store"
    root.mkdir()
    small_release.make_dataset(root, Recipe(num_shards=2, rows_per_shard=60))
    for left in root.glob("*.tar"):
        left.unlink()
    config = replace(config_of(root, model_folder), compact=False)
    uri = config.releases_uri
    first = reindexing.reindex(config, clock=lambda: NOW).release.manifest
    dataset = datasets.open_version(config.dataset_uri)
    tables = embeddings.iterate(embeddings.open_set(config.embeddings_uri, first.model_digest, dataset))
    vector = next(table for table in tables if 15 in table.ids).embeddings[15]
    wanted = {"image": WANTED["image"], "key": b"digit/15"} | {
        f"vector as {dtype.__name__}": vector.astype(dtype).tobytes() for dtype in (np.float16, np.float32)
    }
    assert set(searched.traces(root, wanted)) == set(wanted)

    (done,) = erase(root, "digit/15")
    assert [each.what.split()[-1] for each in done.receipt.holding] == [first.release_id, "perhaps"]
    night = reindexing.reindex(config, clock=lambda: NOW + timedelta(days=1))
    assert night.report.built == "whole: images of version 1, which the current release has, were erased"
    assert night.release.manifest.counts.num_indexed == 119
    of_first = {f"releases/{stored.name}" for stored in first.objects()}
    now = {f"releases/{stored.name}" for stored in night.release.manifest.objects()}
    found = searched.traces(root, wanted)
    assert set().union(*found.values()) & now == set() != set().union(*found.values()) & of_first
    assert "nothing is left of erasure" not in night.collected

    collected = collect(uri, keep=1)
    assert collected.gone == (done.receipt.erasure_id,)
    assert collected.in_words.endswith(f"; nothing is left of erasure {done.receipt.erasure_id}")
    assert searched.traces(root, wanted) == {}
    assert unnamed(uri) == {f"erasures/{done.receipt.erasure_id}{end}.json" for end in ("", "-gone")}
    (again,) = erase(root, "digit/15")
    assert again.is_gone and f"nothing in {uri} has them" in again.in_words
    assert releases.current(uri) == night.release and collect(uri, keep=1).gone == ()
