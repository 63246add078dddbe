"""Which tars of a folder are to be indexed, and what is wrong with them."""

from dataclasses import replace
from pathlib import Path

import pytest

from namr.data import datasets, foreign
from namr.data.datasets import Head
from namr.data.leftovers import Tally
from namr.data.shards import Sample
from namr.errors import ConfigError, ManifestError
from namr.store.manifests import StoredObject
from tests import small_dataset


@pytest.fixture
def before(tmp_path: Path) -> Head:
    """A dataset that lists one foreign tar of two images beside its own."""
    root, tars = str(tmp_path / "set"), tmp_path / "tars"
    small_dataset.make_dataset(root, tmp_path)
    tars.mkdir()
    samples = [Sample(key=f"f{n}", image=small_dataset.image(n), extension="png", label="a") for n in (0, 1)]
    number = datasets.head(root).next_shard_number
    entry = small_dataset.shard_of(root, tars, number, samples)
    tar = tars / f"{number}.tar"
    listed = replace(entry, tar=StoredObject(str(tar), tar.stat().st_size, entry.tar.sha256))
    datasets.publish_version(datasets.head(root), [listed], now=small_dataset.NOW)
    return datasets.head(root)


def test_only_tars_that_no_shard_is_are_to_be_indexed(before: Head, tmp_path: Path) -> None:
    tars, passed_over = tmp_path / "tars", Tally()
    (tars / "b.tar").write_bytes(b"x" * 1024)
    (tars / "readme.txt").write_text("none")
    found = foreign.plans(f"{foreign.PREFIX}{tars}", before, passed_over)
    assert [plan.foreign and plan.foreign.name for plan in found.plans] == [str(tars / "b.tar")]
    assert [plan.number for plan in found.plans] == [before.next_shard_number]
    assert found.num_known == 2
    assert [(each.kind, each.num) for each in passed_over.total()] == [(".txt", 1)]


def test_a_tar_that_changed_and_a_folder_without_any_are_errors(before: Head, tmp_path: Path) -> None:
    (tar,) = (tmp_path / "tars").glob("*.tar")
    with tar.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ManifestError, match="an indexed shard must not change"):
        foreign.plans(f"{foreign.PREFIX}{tmp_path / 'tars'}", before, Tally())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no \.tar files"):
        foreign.plans(f"{foreign.PREFIX}{tmp_path / 'empty'}", before, Tally())
    with pytest.raises(ConfigError, match="is not a folder"):
        foreign.plans(f"{foreign.PREFIX}{tmp_path / 'nowhere'}", before, Tally())


def test_a_key_that_the_dataset_has_is_refused(before: Head) -> None:
    assert before.dataset is not None
    with pytest.raises(ConfigError, match="is in the dataset already; nothing was published"):
        foreign.check_keys(before, before.dataset.shards[:1])
    with pytest.raises(ConfigError, match="a key is one image's identity"):
        foreign.check_keys(before, [before.dataset.shards[0]] * 2)
