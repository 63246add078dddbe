"""A table fills batch by batch, refused rows beside it; what is no number is an error with its sample."""

import numpy as np
import pytest

from namr.data.datasets import Dataset
from namr.data.reading import StreamedSample
from namr.embed.decoding import Batch
from namr.embed.shard_table import ShardTable
from namr.errors import ShapeError
from tests import small_release
from tests.small_release import Recipe

DIM = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_release.make_dataset(tmp_path_factory.mktemp("d"), Recipe(num_shards=1, rows_per_shard=5))


def a_table(dataset: Dataset, dtype: str = "float16") -> ShardTable:
    return ShardTable(dataset, dataset.shards[0], dim=DIM, storage_dtype=dtype)


def a_batch(*rows: int, refused: int | None = None) -> Batch:
    samples = [StreamedSample(row, f"k{row}", None, b"") for row in rows]
    bad = [] if refused is None else [(StreamedSample(refused, f"k{refused}", None, b""), "damaged")]
    return Batch(samples, np.zeros((len(rows), 3, 1, 1), np.uint8), bad)


def test_rows_are_stored_in_order_in_their_storage_type(dataset: Dataset) -> None:
    table = a_table(dataset)
    x = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float32)
    table.add(a_batch(0, 1), x[:2], -x[:2])
    table.add(a_batch(3, 4, refused=2), x[2:], -x[2:])
    made = table.finished(compute_dtype="bfloat16")
    assert made.ids.tolist() == [0, 1, 3, 4] and made.keys == ["k0", "k1", "k3", "k4"]
    np.testing.assert_array_equal(made.embeddings, x.astype(np.float16))
    np.testing.assert_array_equal(made.structures, -x.astype(np.float16))
    assert (made.refused_ids.tolist(), made.refused_keys, made.refused_reasons) == ([2], ["k2"], ["damaged"])
    assert made.compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (float("nan"), "float32", "is NaN"),
        (1e6, "float16", r"reaches 1e\+06, too large for float16"),
        (float("inf"), "float32", "reaches inf, too large for float32"),
    ],
)
@pytest.mark.parametrize("what", ["embedding", "structure"])
def test_what_is_no_number_is_an_error(
    dataset: Dataset, value: float, dtype: str, reason: str, what: str
) -> None:
    good, bad = np.ones((2, DIM), np.float32), np.ones((2, DIM), np.float32)
    bad[1, 2] = value
    vectors = (bad, good) if what == "embedding" else (good, bad)
    with pytest.raises(ShapeError, match=rf"the {what} of sample 'k4' {reason} \(1 of 2 in its batch\)"):
        a_table(dataset, dtype).add(a_batch(3, 4), *vectors)
