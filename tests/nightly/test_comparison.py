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


def map_by_loop(searcher: Searcher, keys: list[str], counts: list[dict[str, int]]) -> float:
    """Of all neighbours in order, with R by whichever release has fewer."""
    items = list(searcher.items)
    x = searcher.vectors.embeddings(np.array([item.id for item in items])).double().numpy()
    scores = []
    for key in keys:
        at = next(row for row, item in enumerate(items) if item.key == key)
        squared = ((x - x[at]) ** 2).sum(axis=1)
        squared[at] = np.inf
        label, num_right, total = str(items[at].label), 0, 0.0
        r = min(20, *(of[label] - 1 for of in counts))
        for number, row in enumerate(np.argsort(squared, kind="stable")[:r], start=1):
            num_right += items[row].label == label
            total += num_right / number if items[row].label == label else 0
        scores.append(total / r)
    return float(np.mean(scores))


def test_both_are_asked_by_what_is_labelled_in_both(tmp_path: Path) -> None:
    serving = searcher_of(tmp_path / "one", Recipe(num_shards=2, structure_side="none"))
    draft = searcher_of(tmp_path / "two", Recipe(num_shards=3, structure_side="none", seed=1, dead=[5]))
    items = list(draft.items)
    shared = [f"digit/{row}" for row in range(80) if row % 10 != 9 and row != 5]
    found = comparison.compare(serving, draft, replace(draft.manifest, nprobe=9), items)
    assert found is not None
    recall_at_1, map_at_r = found
    assert recall_at_1 == (71, by_loop(serving, shared), pytest.approx(by_loop(draft, shared)))
    assert recall_at_1.then != recall_at_1.here
    counts = [searcher.items.label_counts() for searcher in (serving, draft)]
    expected = [map_by_loop(searcher, shared, counts) for searcher in (serving, draft)]
    assert map_at_r == (71, *map(pytest.approx, expected))
    assert 0 < expected[0] != expected[1] > 0
    not_in_both = [item for item in items if item.key in ("digit/9", "digit/100")]
    assert len(not_in_both) == 2
    assert comparison.compare(serving, draft, draft.manifest, not_in_both) is None
    first = list(serving.items)[:3]
    same = comparison.compare(serving, serving, serving.manifest, first)
    assert same is not None
    assert same.recall_at_1 == Compared(3, *[by_loop(serving, [item.key for item in first])] * 2)


def test_precision_is_counted_at_right_answers_up_to_r() -> None:
    right = np.array([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], np.bool_)
    scores = comparison.map_at_r(right, np.array([3, 2, 1, 3]))
    assert scores.tolist() == pytest.approx([(1 + 2 / 3) / 3, 1 / 4, 1, 0])


def test_an_image_alone_with_its_label_says_nothing_of_map_at_r(tmp_path: Path) -> None:
    few, more = (
        searcher_of(tmp_path / str(num), Recipe(num_shards=1, rows_per_shard=num)) for num in (10, 20)
    )
    assert few.items.label_counts() == {str(digit): 1 for digit in range(9)}
    found = comparison.compare(few, more, more.manifest, list(more.items)[:2])
    assert found is not None and found.recall_at_1.num_queries == 2
    assert found.map_at_r is None
