"""Over nights what is kept and followed is what a full comparison finds, and only what is new is compared."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.nightly import kept_truth, truth
from namr.nightly.kept_truth import Followed, Kept
from namr.release import build, increment
from namr.release.build import BuildConfig
from namr.release.releases import Release
from namr.search.exact import Exact
from namr.search.queries import Queries
from namr.search.searcher import Searcher
from namr.store.cache import Cache
from tests.small_nights import MODEL, a_night, as_release, embeddings_of

CONFIG = BuildConfig(index_key="IVF4,Flat", num_parts=1, num_held_out=20)
NEEDED = truth.K_OF_RECALL


def whole(root: Path, num_rows: list[int]) -> Release:
    uri = str(root / "releases")
    dataset = a_night(root, num_rows)
    built = build.build(dataset, embeddings_of(root), uri, CONFIG, model_digest=MODEL, metric="l2")
    return as_release(uri, built)


def added(root: Path, current: Release, num_rows: list[int], dead: list[int]) -> Release:
    dataset, cache = a_night(root, num_rows, dead=dead), Cache(root / "cache", 10**9)
    new = increment.changes(dataset, current)
    assert not isinstance(new, str)
    built = increment.extend(current, new, dataset, embeddings_of(root), CONFIG, cache=cache)
    return as_release(current.releases_uri, built)


def opened(root: Path, release: Release) -> Searcher:
    return Searcher.of(release, cache=Cache(root / "cache", 10**9), query_model=None)


def keeping(release: Release, kept: Kept) -> Release:
    stored = kept_truth.store(release.releases_uri, kept)
    return Release(release.releases_uri, replace(release.manifest, kept_truth=stored))


def measured_whole(root: Path, release: Release, ids: np.ndarray) -> Release:
    searcher = opened(root, release)
    return keeping(release, Kept(ids, truth.of_items(searcher, ids, shares=()).truth.of_all))


def assert_as_compared_with_everything(searcher: Searcher, ids: np.ndarray, followed: Followed) -> None:
    anew, held = truth.of_items(searcher, ids, shares=()), followed.held
    assert [item.id for item in held.items] == ids.tolist() == followed.kept.query_ids.tolist()
    for got, expected in zip(held.truth.of_all, anew.truth.of_all, strict=True):
        np.testing.assert_array_equal(got[:, :, :NEEDED], expected[:, :, :NEEDED])
    dead = ~searcher.items.are_known(held.truth.of_all.ids)
    assert (held.truth.of_all.ids[dead] == -1).all()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_is_kept_and_what_came_is_what_a_full_comparison_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = whole(tmp_path, [150, 50])
    every = np.array([item.id for item in opened(tmp_path, release).items])
    ids = every[::4]
    release = measured_whole(tmp_path, release, ids)
    compared: list[list[int]] = []
    neighbours = truth.neighbours

    def counted(searcher: Searcher, asked: Queries, **more: object) -> truth.Truth:
        assert asked.own_ids is not None
        compared.append(asked.own_ids.tolist())
        return neighbours(searcher, asked, **more)

    first = kept_truth.read(release).nearest.ids[:, 0]
    near = first[0, : NEEDED + 3]  # of one query more than may go
    nights = [([30], []), ([], [1, 2, 3]), ([20, 10], near.tolist()), ([25], [])]
    for number, (num_rows, dead) in enumerate(nights):
        release_before, release = release, added(tmp_path, release, num_rows, dead)
        searcher = opened(tmp_path, release)
        ids = ids[searcher.items.are_known(ids)]
        asked = np.append(ids, [item.id for item in searcher.items][-1]) if num_rows else ids
        with monkeypatch.context() as patch:
            patch.setattr(truth, "neighbours", counted)
            followed = kept_truth.follow(searcher, asked, release_before, cache=Cache(tmp_path, 10**9))
        assert_as_compared_with_everything(searcher, asked, followed)
        anew = compared[-1] if len(compared) > number else []
        if number == 2:
            assert 0 in anew and len(anew) < len(asked) / 2
        elif num_rows:
            assert anew == asked[-1:].tolist()
        else:
            compared.append([])  # nothing was
        release = keeping(release, followed.kept)
        ids = asked
    assert (kept_truth.read(release).nearest.ids >= 0).all()
    assert len(release.manifest.segments) == 4


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_of_a_release_that_was_not_added_to_or_kept_nothing_all_is_compared(tmp_path: Path) -> None:
    release = whole(tmp_path, [60])
    ids = np.arange(0, 60, 5)
    kept = measured_whole(tmp_path, release, ids)
    searcher = opened(tmp_path, kept)
    untrue = Exact(np.full((4, 12, truth.K), 7), np.zeros((4, 12, truth.K)))
    of_other_files = replace(kept.manifest, vectors=kept.manifest.vectors * 2)
    misled = keeping(Release(kept.releases_uri, of_other_files), Kept(ids, untrue))
    for before in (release, misled):
        followed = kept_truth.follow(searcher, ids, before, cache=Cache(tmp_path, 10**9))
        assert_as_compared_with_everything(searcher, ids, followed)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_of_few_images_all_are_kept_and_none_is_missed(tmp_path: Path) -> None:
    """Fewer than are kept of a query: whoever goes, nothing can be missing."""
    release = measured_whole(tmp_path, whole(tmp_path, [15]), np.arange(15))
    release_before, release = release, added(tmp_path, release, [2], [1, 2, 3, 4, 5, 6, 7])
    searcher, ids = opened(tmp_path, release), np.array([0, *range(8, 15)])
    followed = kept_truth.follow(searcher, ids, release_before, cache=Cache(tmp_path, 10**9))
    assert_as_compared_with_everything(searcher, ids, followed)
    assert (followed.held.truth.of_all.ids[:, :, 9:] == -1).all()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_a_release_keeps_is_one_of_its_objects(tmp_path: Path) -> None:
    release = measured_whole(tmp_path, whole(tmp_path, [40]), np.arange(0, 40, 3))
    stored = release.manifest.kept_truth
    assert stored is not None and stored in set(release.manifest.objects())
    read = kept_truth.read(release)
    again = kept_truth.store(release.releases_uri, read)
    assert again == stored
    assert read.query_ids.tolist() == list(range(0, 40, 3)) and read.nearest.ids.shape == (4, 14, truth.K)
