"""A release as one file: what plain FAISS finds in it, and when it would find too much."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from namr.data.shards import make_id
from namr.errors import ConfigError
from namr.release import export, publication, takedowns
from namr.release.releases import ReleaseManifest
from tests import small_release
from tests.small_release import Recipe


@pytest.mark.parametrize("num_segments", [1, 3])
@pytest.mark.parametrize("key", ["Flat", "IVF4,Flat"])
def test_an_exported_file_is_one_that_plain_faiss_searches_alike(
    tmp_path: Path, key: str, num_segments: int
) -> None:
    release = small_release.publish(tmp_path, Recipe(index_key=key, num_segments=num_segments))
    info = export.export(release, tmp_path / "whole.faiss")
    assert info.num_vectors == 120
    index = faiss.read_index(str(tmp_path / "whole.faiss"))
    x = np.concatenate([small_release.random_vectors(40, 16, seed=n).embeddings for n in range(3)])
    _, ids = index.search(x, 1)
    assert ids[:, 0].tolist() == [make_id(row // 40, row % 40) for row in range(120)]
    assert [path.name for path in tmp_path.glob(".export-*")] == []


def test_dead_entries_are_not_exported(fresh: tuple[str, ReleaseManifest], tmp_path: Path) -> None:
    uri, manifest = fresh
    release = publication.publish(uri, manifest, expected=None)
    with pytest.raises(ConfigError, match="hides 1 dead entries"):
        export.export(release, tmp_path / "whole.faiss")


def test_what_was_taken_down_since_is_not_exported(tmp_path: Path) -> None:
    release = small_release.publish(tmp_path, Recipe(num_shards=1))
    takedowns.take_down(release.releases_uri, release.manifest.dataset_uri, [5, make_id(7, 7)])
    with pytest.raises(ConfigError, match="hides 1 dead entries"):
        export.export(release, tmp_path / "whole.faiss")


def test_an_export_needs_a_folder_and_the_name_of_a_file(tmp_path: Path) -> None:
    release = small_release.publish(tmp_path, Recipe(num_shards=1))
    for path in (tmp_path / "no" / "such" / "x.faiss", tmp_path):
        with pytest.raises(ConfigError, match=r"can't write .*a file in a folder that exists"):
            export.export(release, path)
