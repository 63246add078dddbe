"""What is opened is what the release lists."""

from dataclasses import replace
from pathlib import Path

import pytest

from namr.errors import ManifestError
from namr.release import releases
from namr.search import opening
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe


def test_index_vectors_and_items_are_those_of_the_release(tmp_path: Path) -> None:
    release = small_release.publish(tmp_path, Recipe(num_shards=2, rows_per_shard=30))
    opened = opening.opened(release, Cache(tmp_path / "cache", 10**9), num_threads=1)
    ids = opened.vectors.ids()
    assert opened.index.num_vectors == len(ids) == len(opened.items) == release.manifest.counts.num_indexed
    assert sorted(ids.tolist()) == [item.id for item in opened.items]


def test_an_index_of_another_release_is_damage(tmp_path: Path) -> None:
    small_release.publish(tmp_path, Recipe())
    release, cache = releases.open_release(str(tmp_path / "releases")), Cache(tmp_path / "cache", 10**9)
    wrong = replace(release, manifest=replace(release.manifest, template_hash="f" * 64))
    with pytest.raises(ManifestError, match="template ffffffffffff; its segments hold 120 in Flat"):
        opening.opened(wrong, cache, num_threads=1)
    other_kind = replace(release, manifest=replace(release.manifest, index_key="IVF4,SQ8"))
    with pytest.raises(ManifestError, match=r"in IVF4,SQ8, .*its segments hold 120 in Flat"):
        opening.opened(other_kind, cache, num_threads=1)
