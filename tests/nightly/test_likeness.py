"""What is compacted is asked, and every kind of other answer is seen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.errors import ManifestError
from namr.nightly import likeness
from namr.release import arrays, releases
from namr.release.releases import Release
from namr.search.searcher import Searcher
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe


def searcher_of(root: Path, release: Release) -> Searcher:
    return Searcher.of(release, cache=Cache(root / "cache", 10**9), query_model=None, num_threads=1)


def searcher(root: Path, recipe: Recipe) -> Searcher:
    uri = str(root / "releases")
    manifest = small_release.make_manifest(root, recipe)
    return searcher_of(root, Release(uri, replace(manifest, depth=20, nprobe=2)))


@pytest.mark.parametrize("key", ["Flat", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ8x4fs"])
def test_many_segments_and_one_are_alike(tmp_path: Path, key: str) -> None:
    recipe = Recipe(num_shards=4, index_key=key)
    before = searcher(tmp_path / "before", replace(recipe, num_segments=5))
    after = searcher(tmp_path / "after", recipe)
    asked = likeness.check(before, after)
    assert (len(asked), len(np.unique(asked))) == (100, 100)


def test_another_answer_is_seen_whatever_makes_it(tmp_path: Path) -> None:
    recipe = Recipe(index_key="IVF4,Flat")
    before = searcher(tmp_path / "before", recipe)
    dead = arrays.encode_array(before.items.draw_ids(1, seed=1))
    uri = before.release.releases_uri
    hiding = replace(before.manifest, tombstones=releases.store(uri, "tombstones.npy", dead))
    without = searcher_of(tmp_path, Release(uri, hiding))
    for pair in ((before, without), (without, before)):
        with pytest.raises(ManifestError, match=r"answers otherwise than first: .* not published"):
            likeness.check(*pair)
    with pytest.raises(ManifestError, match=r"to \d+ of 100 images with other neighbours, item \d+ first"):
        likeness.check(before, searcher(tmp_path / "vectors", replace(recipe, seed=1)))
    renamed = small_release.table_of(before.release)
    renamed = replace(renamed, keys=[f"{key}?" for key in renamed.keys])
    other = replace(before.manifest, items=small_release.store_items(uri, renamed))
    with pytest.raises(ManifestError, match=r"item \d+ is another one; it is not published"):
        likeness.check(before, searcher_of(tmp_path, Release(uri, other)))
    (stored,) = before.manifest.vectors
    both = np.load(tmp_path / "before" / "releases" / stored.files[0].file.name)
    both[:, 1] *= 2
    np.save(tmp_path / "vectors.npy", both)
    heavier = replace(stored.files[0], file=releases.store(uri, "vectors.npy", tmp_path / "vectors.npy"))
    other = replace(before.manifest, vectors=(replace(stored, files=(heavier,)),))
    with pytest.raises(ManifestError, match="its images have other re-rank vectors"):
        likeness.check(before, searcher_of(tmp_path, Release(uri, other)))
