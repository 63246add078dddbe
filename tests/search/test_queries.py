"""What may be asked by vectors, and what is refused and why."""

from pathlib import Path

import numpy as np
import pytest

from namr.errors import ManifestError, ShapeError
from namr.search import queries
from namr.search.queries import Queries
from tests.search.test_rerank import make

BAD = np.full((2, 16), np.nan)
ONES = np.ones((2, 16))


def test_embeddings_are_made_as_they_are_searched() -> None:
    plain = queries.given(3 * ONES, ONES, dim=16, metric="l2")
    np.testing.assert_array_equal(plain.x, 3 * ONES)
    assert plain.own_ids is None
    unit = queries.given(3 * ONES, None, dim=16, metric="cosine")
    np.testing.assert_allclose(unit.x, ONES / 4, rtol=1e-6)
    assert unit.s is None
    assert not queries.given(0 * ONES, None, dim=16, metric="cosine").x.any()


@pytest.mark.parametrize(
    ("embeddings", "structures", "message"),
    [
        (np.ones((2, 3)), None, r"embeddings are \(2, 3\); the release wants \(Q, 16\)"),
        (np.ones(16), None, r"embeddings are \(16,\)"),
        (None, None, r"embeddings are \(\)"),
        (np.ones((0, 16)), None, "an empty batch"),
        (BAD, None, "embeddings: row 0 holds NaN"),
        (np.stack([ONES[0], BAD[0]]), None, "embeddings: row 1 holds NaN"),
        (np.full((2, 16), 1e39), None, "row 0 holds NaN or infinity"),
        (
            np.stack([ONES[0], 1e19 * ONES[0]]),
            None,
            r"row 1 holds a value of size 1e\+19; the largest .* 1e\+14",
        ),
        (-1e15 * ONES, None, r"row 0 holds a value of size 1e\+15"),
        (ONES, BAD, "structures: row 0 holds NaN"),
        (ONES, 1e6 * ONES, r"structures: row 0 holds a value of size 1e\+06; the largest .* is 65504"),
        (ONES, 0 * ONES, "structures hold 0; weights have to be above 0"),
        (ONES, ONES[:1], "1 structures for 2 embeddings"),
    ],
)
def test_vectors_that_cannot_be_compared_are_refused(
    embeddings: np.ndarray, structures: np.ndarray | None, message: str
) -> None:
    with np.errstate(over="ignore"), pytest.raises(ShapeError, match=message):
        queries.given(embeddings, structures, dim=16, metric="l2")


def test_items_of_the_gallery_are_asked_by_their_stored_vectors(tmp_path: Path) -> None:
    gallery = make(tmp_path)
    asked = queries.stored(gallery.ids[[4, 50]], gallery.vectors)
    np.testing.assert_array_equal(asked.x, gallery.x[[4, 50]].astype(np.float32))
    np.testing.assert_array_equal(asked.s, gallery.s[[4, 50]].astype(np.float32))
    assert asked.own_ids.tolist() == gallery.ids[[4, 50]].tolist()
    with pytest.raises(ManifestError, match="has no re-rank vector"):
        queries.stored(np.array([1 << 40]), gallery.vectors)


def test_some_rows_of_queries_keep_what_belongs_to_them() -> None:
    x, ids = np.arange(12.0).reshape(4, 3), np.arange(4)
    some = Queries(x, x + 1, ids).rows(slice(1, 3))
    assert some.x.tolist() == x[1:3].tolist() and some.s.tolist() == (x[1:3] + 1).tolist()
    assert some.own_ids.tolist() == [1, 2]
    assert Queries(x, None, None).rows(slice(0, 1))[1:] == (None, None)
