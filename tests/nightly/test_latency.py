"""Two releases are asked in turns, each as it is searched, and a slower one is seen."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from namr.nightly import latency
from namr.search.searcher import Searcher
from namr.search.stages import Neighbours, Plan
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe


def opened(root: Path, **recipe: object) -> Searcher:
    release = small_release.publish(root, Recipe(**recipe))
    return Searcher.of(release, cache=Cache(root / "cache", 10**9), query_model=None)


def test_each_is_asked_alone_in_turns_as_it_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, draft = opened(tmp_path / "one"), opened(tmp_path / "two", rows_per_shard=5)
    asked: list[tuple[Searcher, int, Plan]] = []
    neighbours = Searcher.neighbours

    def seen(self: Searcher, queries: object, plan: Plan) -> Neighbours:
        asked.append((self, len(queries.x), plan))
        time.sleep(0.002 if self is draft else 0)
        return neighbours(self, queries, plan)

    monkeypatch.setattr(Searcher, "neighbours", seen)
    found = latency.measured(draft, replace(draft.manifest, depth=17), serving)
    num = found.num_queries
    assert [who for who, _, _ in asked[:8]] == [serving] * 2 + [draft] * 4 + [serving] * 2
    assert {number for _, number, _ in asked} == {1} and len(asked) == 4 * num
    assert {plan.depth for who, _, plan in asked if who is draft} == {17}
    assert {plan.depth for who, _, plan in asked if who is serving} == {serving.manifest.depth}
    assert found.then is not None and found.here.p50_ms > 2
    assert 0 < found.then.p50_ms <= found.then.p95_ms

    asked.clear()
    alone = latency.measured(draft, draft.manifest, None)
    assert alone.then is None and len(asked) == 2 * num
