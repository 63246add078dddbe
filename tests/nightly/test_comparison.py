"""Recall@1 of two releases, asked with the same images: by a loop, and where nothing can be asked."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.nightly import comparison
from namr.nightly.comparison import Compared
from namr.search.searcher import Searcher
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe


def searcher_of(root: Path, recipe: Recipe) -> Searcher:
    release = small_release.publish(root, recipe)
    return Searcher.of(release, cache=Cache(root / "cache", 10**9), query_model=None)


def by_loop(searcher: Searcher, keys: list[str]) -> float:
    items = list(searcher.items)
    x = searcher.vectors.embeddings(np.array([item.id for item in items])).double().numpy()
    right = 0
    for key in keys:
        at = next(row for row, item in enumerate(items) if item.key == key)
        squared = ((x - x[at]) ** 2).sum(axis=1)
        squared[at] = np.inf
        right += items[int(np.argmin(squared))].label == items[at].label
    return right / len(keys)


def test_both_are_asked_by_what_is_labelled_in_both(tmp_path: Path) -> None:
    serving = searcher_of(tmp_path / "one", Recipe(num_shards=2, structure_side="none"))
    draft = searcher_of(tmp_path / "two", Recipe(num_shards=3, structure_side="none", seed=1, dead=[5]))
    keys = [f"digit/{row}" for row in range(120)]
    shared = [f"digit/{row}" for row in range(80) if row % 10 != 9 and row != 5]
    found = comparison.compare(serving, draft, replace(draft.manifest, nprobe=9), keys)
    assert found == Compared(71, by_loop(serving, shared), pytest.approx(by_loop(draft, shared)))
    assert found.then != found.here
    assert comparison.compare(serving, draft, draft.manifest, ["digit/9", "digit/100", "unknown"]) is None
    assert comparison.compare(serving, serving, serving.manifest, keys[:3]) == Compared(
        3, *[by_loop(serving, keys[:3])] * 2
    )
