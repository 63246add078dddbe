"""What is computed of each image once: put together over 1, 2 and 3 ranks, whole or refused, kept on disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from namr import collectives
from namr.data.sampling import slice_of_rank
from namr.errors import ShapeError
from namr.train import features
from namr.train.features import Computed
from tests.ranks import on_ranks

NUM, WIDTH = 13, 3
EXPECTED = np.arange(NUM * WIDTH, dtype=np.float32).reshape(NUM, WIDTH)


def computed(places: Sequence[int], *, block: int = 2) -> Iterator[Computed]:
    for start in range(0, len(places), block):
        some = np.array(places[start : start + block], np.int64)
        yield Computed(some, EXPECTED[some])


def of_this_rank(block: int) -> Iterator[Computed]:
    mine = slice_of_rank(NUM, rank=collectives.rank(), world_size=collectives.world_size())
    return computed(range(NUM)[mine], block=block)


def whole_and_cached(folder: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Blocks of another size on each rank; the rows, the cached rows, and how often they were computed."""
    times = [0]

    def compute() -> Iterator[Computed]:
        times[0] += 1
        return of_this_rank(1 + collectives.rank())

    path = Path(folder) / f"{collectives.world_size()}" / "features.npy"
    rows = features.whole(compute(), num_rows=NUM, width=WIDTH)
    for _ in range(2):
        kept = features.cached(path, compute, num_rows=NUM, width=WIDTH, writes=collectives.rank() == 0)
    return rows, np.array(kept), times[0]


@pytest.mark.slow
def test_every_rank_gets_all_rows_and_the_second_time_they_come_from_disk(tmp_path: Path) -> None:
    for ranks in on_ranks(whole_and_cached, str(tmp_path)).values():
        for rows, kept, num_computed in ranks:
            assert np.array_equal(rows, EXPECTED) and np.array_equal(kept, EXPECTED)
            assert num_computed == 2


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([*range(12)], "1 of 13 images were not computed exactly once, first 12"),
        ([*range(13), 5], "1 of 13 images were not computed exactly once, first 5"),
        ([], "13 of 13 images were not computed exactly once, first 0"),
    ],
)
@pytest.mark.parametrize("block", [1, 100])
def test_rows_that_did_not_come_once_are_counted(places: list[int], said: str, block: int) -> None:
    with pytest.raises(ShapeError, match=said):
        features.whole(computed(places, block=block), num_rows=NUM, width=WIDTH)


def test_a_cache_that_was_not_completed_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "features.npy"
    with pytest.raises(ShapeError, match="1 of 13"):
        features.cached(path, lambda: computed(range(12)), num_rows=NUM, width=WIDTH, writes=True)
    assert list(path.parent.iterdir()) == []


def test_a_cache_of_another_shape_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", EXPECTED[:, :2])
    with pytest.raises(ShapeError, match=r"features.npy holds \(13, 2\), expected \(13, 3\); delete it"):
        features.cached(
            tmp_path / "features.npy", lambda: computed(range(13)), num_rows=NUM, width=WIDTH, writes=True
        )
