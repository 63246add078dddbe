"""Recall that is lost for one reason is told as lost for that one."""

from pathlib import Path

import numpy as np
import pytest

from namr.nightly import recall_loss, truth
from namr.nightly.assessment import Effort
from namr.nightly.recall_loss import RecallLoss
from namr.search.searcher import Searcher
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe


@pytest.mark.parametrize(
    ("index_key", "effort", "largest"),
    [
        ("IVF8,Flat", Effort(1, 100), "lists"),
        ("IVF8,PQ2x4fs", Effort(8, 12), "depth"),
        ("Flat", Effort(1, 10), None),
    ],
)
def test_each_reason_is_told_apart_and_they_sum_to_what_is_lost(
    index_key: str, effort: Effort, largest: str | None, tmp_path: Path
) -> None:
    release = small_release.publish(tmp_path, Recipe(index_key=index_key))
    searcher = Searcher.of(release, cache=Cache(tmp_path / "cache", 10**9), query_model=None)
    held = truth.of_items(searcher, np.arange(0, 40, 2), shares=())
    true = held.truth.of_all.of("none")[:, :10]
    lost = recall_loss.told_apart(searcher, held.asked, true, effort)
    assert min(lost) >= 0
    if largest is None:
        assert lost == (0, 0, 0)
        return
    assert getattr(lost, largest) == max(lost) > 0.02
    assert [each for name, each in lost._asdict().items() if name != largest] == pytest.approx([0, 0])


def test_codes_hide_what_no_depth_within_sixteen_times_brings_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall_loss, "MOST_DEEPER", 1)
    release = small_release.publish(tmp_path, Recipe(index_key="IVF8,PQ2x4fs"))
    searcher = Searcher.of(release, cache=Cache(tmp_path / "cache", 10**9), query_model=None)
    held = truth.of_items(searcher, np.arange(0, 40, 2), shares=())
    lost = recall_loss.told_apart(searcher, held.asked, held.truth.of_all.of("none")[:, :10], Effort(8, 12))
    assert lost.lists == lost.depth == 0 < lost.codes


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (RecallLoss(0.1, 0.02, 0.0), "10.0 in lists that are not probed, 2.0 in depth, 0.0 in codes: raise"),
        (RecallLoss(0.0, 0.2, 0.1), "20.0 in depth, 10.0 in codes: compare more candidates"),
        (RecallLoss(-0.01, 0.0, 0.1), "take another build.index_key"),
    ],
)
def test_words_tell_all_three_and_what_to_do_about_the_largest(lost: RecallLoss, words: str) -> None:
    assert words in lost.in_words
