"""Recall under filters of every share, of an index that is probed in part and of one that is compressed."""

from pathlib import Path

import numpy as np
import pytest

from namr.nightly import selectivity, truth
from namr.nightly.selectivity import FilteredResult
from namr.search import queries, stages
from namr.search.queries import Queries
from namr.search.searcher import Searcher
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe

K = 10


def opened(root: Path, index_key: str) -> tuple[Searcher, Queries]:
    recipe = Recipe(num_shards=8, rows_per_shard=200, index_key=index_key, dead=[5, 6])
    release = small_release.publish(root, recipe)
    searcher = Searcher.of(release, cache=Cache(root / "cache", 1 << 30), query_model=None)
    ids = np.array([item.id for item in searcher.items][::25], np.int64)
    return searcher, queries.stored(ids, searcher.vectors)


def results(searcher: Searcher, asked: Queries, *, nprobe: int, depth: int) -> tuple[FilteredResult, ...]:
    true = truth.neighbours(searcher, asked, k=K, shares=truth.SHARES).of_shares
    return selectivity.measured(searcher, asked, true, k=K, nprobe=nprobe, depth=depth)


@pytest.mark.parametrize("index_key", ["IVF32,Flat", "IVF32,PQ8x4fs"])
def test_no_filter_takes_recall_away(tmp_path: Path, index_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few that are allowed are not compared one by one here: the index itself has to find them."""
    monkeypatch.setattr(stages, "_FEW_ALLOWED", 0)
    searcher, asked = opened(tmp_path, index_key)
    plan = stages.Plan(k=K, side="none", depth=50, nprobe=1, exact=False)
    plain = searcher.neighbours(asked, plan)
    recall = truth.recall(plain.ids, truth.neighbours(searcher, asked, k=K).of_all.of("none"))
    assert recall < 1
    under_filters = results(searcher, asked, nprobe=1, depth=50)
    assert [result.share for result in under_filters][:3] == [0.5, 0.1, 0.01]
    assert all(result.recall_at_10 >= recall for result in under_filters)


def test_what_few_let_through_is_exact_and_as_many_as_are_said(tmp_path: Path) -> None:
    searcher, asked = opened(tmp_path, "IVF32,Flat")
    under_filters = results(searcher, asked, nprobe=1, depth=50)
    assert {result.recall_at_10 for result in under_filters} == {1.0}
    ids = np.array([item.id for item in searcher.items], np.int64)
    assert [result.num_items for result in under_filters] == [
        num for share in truth.SHARES if (num := int(truth.is_in_share(ids, share).sum()))
    ]
    assert all(result.queries_per_s > 0 for result in under_filters)


def test_recall_counts_each_true_neighbour_once_and_what_is_missing_never() -> None:
    true = np.array([[1, 2, 3], [4, -1, -1]])
    assert truth.recall(np.array([[3, 9, 1], [-1, -1, -1]]), true) == 0.5
    assert truth.recall(np.full((1, 3), -1), np.full((1, 3), -1)) == 1.0
