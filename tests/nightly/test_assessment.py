"""What is measured, against loops over the vectors themselves."""

from pathlib import Path

import numpy as np
import pytest

from namr.data.shards import make_id
from namr.errors import ConfigError
from namr.nightly import assessment, truth
from namr.nightly.assessment import AssessmentConfig
from namr.search.searcher import Searcher
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe, ids_of

NUM_SHARDS, ROWS, DIM = 3, 40, 16


def searcher_of(root: Path, index_key: str) -> Searcher:
    recipe = Recipe(num_shards=NUM_SHARDS, rows_per_shard=ROWS, dim=DIM, index_key=index_key)
    release = small_release.publish(root, recipe)
    return Searcher.of(release, cache=Cache(root / "cache", 1 << 30), query_model=None)


@pytest.fixture(scope="module")
def with_lists(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return searcher_of(tmp_path_factory.mktemp("lists"), "IVF8,Flat")


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return searcher_of(tmp_path_factory.mktemp("flat"), "Flat")


KEYS = [f"digit/{row}" for row in range(0, NUM_SHARDS * ROWS, 3)]


def test_about_as_many_items_query_as_were_asked_for_from_every_shard(flat: Searcher) -> None:
    ids = assessment.held_out_ids(flat, 24, seed=0)
    assert 10 <= len(ids) <= 40
    assert set((ids >> 32).tolist()) == {0, 1, 2}
    assert assessment.held_out_ids(flat, 24, seed=0).tolist() == ids.tolist() == sorted(ids)
    assert assessment.held_out_ids(flat, 24, seed=1).tolist() != ids.tolist()
    assert set(assessment.held_out_ids(flat, 12, seed=0)) < set(ids)


def test_what_was_taken_out_queries_no_more(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, "Flat")
    gone = assessment.held_out_ids(searcher, 24, seed=0)[::2]
    searcher.hide(gone)
    assert not set(assessment.held_out_ids(searcher, 24, seed=0)) & set(gone)
    assert not set(assessment.some_since(searcher, 0)) & set(gone)


def test_of_what_is_new_a_twentieth_queries_and_few_where_there_are_few(
    flat: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert assessment.some_since(flat, make_id(2, 0)).tolist() == [make_id(2, row) for row in range(ROWS)]
    assert len(assessment.some_since(flat, make_id(1, 0))) == 50
    monkeypatch.setattr(assessment, "_FEWEST_NEW", 1)
    spread = [make_id(1, 0), make_id(1, 20), make_id(2, 0), make_id(2, 20)]
    assert assessment.some_since(flat, make_id(1, 0)).tolist() == spread
    monkeypatch.setattr(assessment, "_MOST_NEW", 2)
    assert assessment.some_since(flat, make_id(1, 0)).tolist() == spread[::2]
    assert assessment.some_since(flat, make_id(3, 0)).tolist() == []


def test_where_none_is_held_out_some_query_all_the_same(flat: Searcher, monkeypatch) -> None:
    nobody = lambda ids, **_: np.zeros(len(ids), np.bool_)  # noqa: E731
    monkeypatch.setattr(assessment.held_out, "mask", nobody)
    assert assessment.held_out_ids(flat, 3, seed=0).tolist() == [0, 1, 2]


def test_as_few_lists_are_probed_as_reach_the_target(with_lists: Searcher) -> None:
    whole = assessment.assess(
        with_lists,
        truth.of_items(with_lists, ids_of(with_lists, KEYS)),
        AssessmentConfig(target_recall=1.0, depth=50),
    )
    assert {1, 2, 4} < {nprobe for nprobe, _ in whole.recall_by_nprobe}
    recalls = [recall for _, recall in whole.recall_by_nprobe]
    assert recalls == sorted(recalls)
    assert recalls[-1] == whole.recall_at_10 == 1.0
    assert recalls[0] < 1.0
    less = assessment.assess(
        with_lists,
        truth.of_items(with_lists, ids_of(with_lists, KEYS)),
        AssessmentConfig(target_recall=recalls[0], depth=50),
    )
    assert (less.nprobe, less.recall_at_10) == (1, recalls[0])
    assert less.probed == "1 of 8 lists"


def test_a_compressed_index_is_looked_at_deeper_until_it_finds_enough(tmp_path: Path) -> None:
    """Codes of 2 bits an axis and ten candidates find less than wanted in all lists."""
    searcher = searcher_of(tmp_path, "IVF8,PQ2x4fs")
    config = AssessmentConfig(target_recall=0.97, depth=10)
    assessed = assessment.assess(searcher, truth.of_items(searcher, ids_of(searcher, KEYS)), config)
    assert assessed.depth > 10 and assessed.recall_at_10 >= 0.97
    assert (assessed.nprobe, assessed.recall_at_10) in assessed.recall_by_nprobe
    again = assessment.assess(
        searcher,
        truth.of_items(searcher, ids_of(searcher, KEYS)),
        AssessmentConfig(target_recall=0.97, depth=assessed.depth),
    )
    assert (again.nprobe, again.recall_at_10) == (assessed.nprobe, assessed.recall_at_10)


def test_without_lists_everything_is_compared(flat: Searcher) -> None:
    assessed = assessment.assess(flat, truth.of_items(flat, ids_of(flat, KEYS)), AssessmentConfig(depth=50))
    assert (assessed.nprobe, assessed.num_lists, assessed.recall_at_10) == (1, 0, 1.0)
    assert assessed.probed == "all images compared"
    assert assessed.result("none").recall_at_10 == 1.0
    assert assessed.result("none").proved == 1.0


def test_re_ranking_everything_is_exact_and_a_few_candidates_are_not(flat: Searcher) -> None:
    deep = assessment.assess(
        flat, truth.of_items(flat, ids_of(flat, KEYS)), AssessmentConfig(depth=NUM_SHARDS * ROWS)
    )
    shallow = assessment.assess(flat, truth.of_items(flat, ids_of(flat, KEYS)), AssessmentConfig(depth=10))
    assert {side.recall_at_10 for side in deep.sides} == {1.0}
    assert shallow.result("both").recall_at_10 < 1.0
    assert (deep.depth, shallow.depth) == (120, 10)


def test_recall_at_1_is_that_of_labelled_queries_and_never_finds_itself(flat: Searcher) -> None:
    items = small_release.table_of(flat.release)
    x = (
        np.concatenate(
            [small_release.random_vectors(ROWS, DIM, seed=number).embeddings for number in range(NUM_SHARDS)]
        )
        .astype(np.float16)
        .astype(np.float64)
    )
    right, num_labelled = 0, 0
    for key in KEYS:
        at = items.keys.index(key)
        if items.labels[at] is None or items.labels.count(items.labels[at]) < 2:
            continue
        squared = ((x - x[at]) ** 2).sum(axis=1)
        squared[at] = np.inf
        num_labelled += 1
        right += items.labels[int(np.argmin(squared))] == items.labels[at]
    assessed = assessment.assess(flat, truth.of_items(flat, ids_of(flat, KEYS)), AssessmentConfig())
    assert assessed.num_labelled == num_labelled < assessed.num_queries == len(KEYS)
    assert assessed.result("none").recall_at_1 == right / num_labelled


def test_images_without_labels_have_no_recall_at_1(flat: Searcher) -> None:
    unlabelled = [f"digit/{row}" for row in range(9, 120, 10)]
    assessed = assessment.assess(flat, truth.of_items(flat, ids_of(flat, unlabelled)), AssessmentConfig())
    assert assessed.num_labelled == 0
    assert {side.recall_at_1 for side in assessed.sides} == {None}


def test_nothing_to_query_with_is_told(flat: Searcher) -> None:
    with pytest.raises(ConfigError, match="no held-out items to query with"):
        assessment.assess(flat, truth.of_items(flat, ids_of(flat, [])), AssessmentConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [("depth", 0), ("target_recall", 0.0), ("target_recall", 1.1), ("target_recall", np.nan)],
)
def test_a_config_out_of_range_names_its_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        AssessmentConfig(**{field: value})
