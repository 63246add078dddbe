"""The whitened start: what it does to features, and what it refuses."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from namr.errors import ShapeError
from namr.model import whitening
from namr.model.whitening import Whitening

Floats = npt.NDArray[np.float32]


def features(num: int = 400, *, width: int = 12, rank: int | None = None, seed: int = 0) -> Floats:
    """Correlated, with a large common offset, as a pre-trained backbone's are; of a lower rank if asked."""
    rng = np.random.default_rng(seed)
    inner = rank or width
    mixed = rng.normal(size=(num, inner)) * np.geomspace(5, 0.1, inner) @ rng.normal(size=(inner, width))
    return (mixed + 20).astype(np.float32)


def embedded(x: Floats, start: Whitening) -> npt.NDArray[np.float64]:
    return x.astype(np.float64) @ start.weight.astype(np.float64).T + start.bias


def test_the_embeddings_are_centred_and_uncorrelated() -> None:
    x = features()
    found = embedded(x, whitening.whitening(x, dim=6, power=0.25))
    covariance = np.cov(found.T)
    assert np.abs(found.mean(axis=0)).max() < 1e-4 * np.abs(found).max()
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-4 * covariance.max()


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
def test_each_axis_has_its_variance_to_the_power_that_was_asked_for(power: float) -> None:
    x = features()
    largest = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64)))[::-1][:6]
    variances = embedded(x, whitening.whitening(x, dim=6, power=power)).var(axis=0, ddof=1)
    expected = largest ** (1 - 2 * power)
    assert variances / variances[0] == pytest.approx(expected / expected[0], rel=1e-3)


def test_two_points_by_hand() -> None:
    start = whitening.whitening(np.array([[1, 0], [3, 0]], np.float32), dim=1, power=0.5)
    # one axis along the first feature; root mean square 1 / sqrt(6) over two weights
    assert start.weight == pytest.approx(np.array([[np.sqrt(2 / 6), 0]]), abs=1e-7)
    assert start.bias == pytest.approx(np.array([-2 * np.sqrt(2 / 6)]), abs=1e-6)


def test_weights_are_as_large_as_those_of_a_random_start() -> None:
    start = whitening.whitening(features(width=300, num=900), dim=64, power=0.25)
    torch.manual_seed(0)
    random = nn.Linear(300, 64).weight.detach().numpy()
    assert np.sqrt(np.mean(start.weight**2)) == pytest.approx(np.sqrt(np.mean(random**2)), rel=0.02)


def test_an_untrained_head_ranks_as_the_whitened_features_do() -> None:
    x = features(num=80)
    layer = nn.Linear(12, 5)
    whitening.start_from(layer, whitening.whitening(x, dim=5, power=0.5))
    with torch.no_grad():
        found = torch.cdist(layer(torch.from_numpy(x)).double(), layer(torch.from_numpy(x)).double())
    values, vectors = np.linalg.eigh(np.cov(x.T.astype(np.float64)))
    reference = (x - x.mean(axis=0)).astype(np.float64) @ (vectors / np.sqrt(values))[:, ::-1][:, :5]
    expected = torch.cdist(torch.from_numpy(reference), torch.from_numpy(reference))
    assert torch.equal(found.argsort(dim=1)[:, :10], expected.argsort(dim=1)[:, :10])


def test_axes_beyond_the_rank_of_the_features_start_at_zero() -> None:
    x = features(rank=4)
    start = whitening.whitening(x, dim=8, power=0.5)
    assert (start.weight[4:] == 0).all()
    assert (np.abs(start.weight[:4]).max(axis=1) > 0).all()
    few = whitening.whitening(x[:3], dim=8, power=0.25)
    assert (np.abs(few.weight).max(axis=1) > 0).sum() == 2


def test_more_axes_than_features_start_at_zero_too() -> None:
    start = whitening.whitening(features(width=3), dim=5, power=0.25)
    assert start.weight.shape == (5, 3)
    assert (start.weight[3:] == 0).all()


def test_the_order_of_the_images_and_mirrored_features_change_nothing_of_substance() -> None:
    x = features()
    start = whitening.whitening(x, dim=6, power=0.25)
    again = whitening.whitening(x[::-1].copy(), dim=6, power=0.25)
    assert again.weight == pytest.approx(start.weight, abs=1e-5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((5, 3), 7, np.float32), "the same for all"),
        (np.zeros((5, 3), np.float32), "the same for all"),
        (np.array([[1, 2], [np.nan, 2], [3, 4]], np.float32), "features of image 1 hold NaN"),
        (np.array([[1, 2], [3, np.inf]], np.float32), "features of image 1 hold NaN or infinity"),
        (np.ones((1, 3), np.float32), "two images or more"),
        (np.ones(3, np.float32), "two images or more"),
    ],
)
def test_features_that_can_not_be_whitened_are_refused(x: Floats, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        whitening.whitening(x, dim=2, power=0.25)
