"""Protocols: who queries whom, and that the draws of one image a class are seeded and cover every class."""

import numpy as np
import pytest

from namr.measure import protocols

LABELS = np.array([2, 0, 1, 0, 2, 2, 5])


def test_leaving_one_out_every_row_asks_and_is_searched() -> None:
    (split,) = protocols.leave_one_out(3)
    assert split.queries.tolist() == split.gallery.tolist() == [0, 1, 2]


def test_the_queries_come_after_the_gallery() -> None:
    (split,) = protocols.query_and_gallery(num_gallery=3, num_queries=2)
    assert (split.queries.tolist(), split.gallery.tolist()) == ([3, 4], [0, 1, 2])


def test_each_draw_has_one_image_of_each_class_and_all_others_query() -> None:
    splits = protocols.one_a_class(LABELS, num_draws=20, seed=1)
    for queries, gallery in splits:
        assert sorted(LABELS[gallery]) == [0, 1, 2, 5]
        assert sorted([*queries, *gallery]) == list(range(7))
    assert {int(row) for _, gallery in splits for row in gallery} == set(range(7))  # every image in its turn
    again = protocols.one_a_class(LABELS, num_draws=2, seed=1)
    assert [split.gallery.tolist() for split in again] == [split.gallery.tolist() for split in splits[:2]]
    other = protocols.one_a_class(LABELS, num_draws=20, seed=2)
    assert [split.gallery.tolist() for split in other] != [split.gallery.tolist() for split in splits]


@pytest.mark.parametrize(
    ("splits", "labels", "expected"),
    [
        (protocols.leave_one_out(3), [2, 0, 1], False),
        (protocols.leave_one_out(4), [2, 0, 1, 0], True),
        (protocols.query_and_gallery(num_gallery=2, num_queries=2), [2, 2, 0, 0], False),
        (protocols.query_and_gallery(num_gallery=3, num_queries=1), [2, 0, 1, 0], True),
        (protocols.one_a_class(np.array([2, 0, 1]), num_draws=1, seed=0), [2, 0, 1], False),
        (protocols.one_a_class(np.array([2, 0, 2]), num_draws=1, seed=0), [2, 0, 2], True),
    ],
)
def test_whether_anybody_has_a_match(
    splits: tuple[protocols.Split, ...], labels: list[int], expected: bool
) -> None:
    assert protocols.has_a_match(splits, np.array(labels)) is expected
