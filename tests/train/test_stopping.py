"""How a run stands, and when its patience ends."""

import math

from namr.train.stopping import Standing


def test_the_best_score_is_kept_and_evaluations_since_then_are_counted() -> None:
    standing = Standing()
    for score in (0.3, 0.5, 0.5, 0.4):
        standing = standing.after(score)
    assert standing == Standing(0.5, 2)
    assert standing.after(0.6) == Standing(0.6, 0)


def test_a_score_that_is_no_number_is_no_better_one() -> None:
    assert Standing(0.5, 0).after(math.nan) == Standing(0.5, 1)


def test_patience_ends_after_so_many_evaluations_and_never_where_there_is_no_limit() -> None:
    standing = Standing(0.5, 2)
    assert standing.is_over(2) and standing.is_over(1)
    assert not standing.is_over(3) and not standing.is_over(None)
