"""Where the sample head starts from: a whitening of the backbone's features, as weights and bias.

    x = W f + b,   W = g (V_D diag((w + e)^-p))',   b = -W mu

mu is the mean of the features, w and V the eigenvalues and eigenvectors of their covariance, of which the D
leading are kept. With power p = 0 x is their projection (PCA), with 1/2 every axis has the same variance; 1/4
lies between and keeps most of what a pre-trained backbone knows. The gain g gives W the root mean square that
a linear layer's own random start has, 1 / sqrt(3 F), so that learning rates mean what they mean there.

Such a start has no large common offset, which makes cosine meaningless, and its neighbours are at least those
of the features themselves; a random start throws both away.

These are ordinary weights: nothing has to be saved, folded or versioned. Axes along which the features don't
vary (fewer images or a lower rank than D) start at zero. Not covered: whose features (`train.loop`).

Legend: N images, F features, D embedding dimension.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from namr.errors import ShapeError

Floats = npt.NDArray[np.float32]

POWER = 0.25
_LEAST_SHARE = 1e-6
"""e, of the mean eigenvalue; axes whose eigenvalue is below it are noise and start at zero"""


class Whitening(NamedTuple):
    """A linear map from features to embeddings."""

    weight: Floats
    """W (D, F)"""
    bias: Floats
    """b (D,)"""


def whitening(features: Floats, *, dim: int, power: float) -> Whitening:
    """The whitening of features (N, F) to `dim` axes, in float64 and then rounded.

    The sign of each axis is that which makes its largest weight positive, so the same features give the same
    weights whatever an eigensolver chooses. ShapeError, naming the row, for features that are NaN or
    infinite; for fewer than two rows; for features that are the same for all images.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ShapeError(f"features to whiten are {features.shape}; expected two images or more, (N, F)")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ShapeError(
            f"features of image {int(np.argmin(finite))} hold NaN or infinity: the backbone's weights are "
            "damaged, or its numbers overflow; check weights"
        )
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    values, vectors = np.linalg.eigh(x.T @ x / (len(x) - 1))
    kept = min(dim, x.shape[1])
    values, vectors = values[::-1][:kept].clip(min=0), vectors[:, ::-1][:, :kept]
    least = _LEAST_SHARE * values.sum() / x.shape[1]
    scale_of_features = np.abs(features).max(initial=0.0)
    if values[0] <= (scale_of_features * np.finfo(np.float32).eps) ** 2:
        raise ShapeError(
            f"features of {len(x)} images are the same for all of them: the backbone tells nothing; "
            "check weights"
        )
    gains = np.where(values > least, (values + least) ** -power, 0.0)
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(kept)])
    weight = np.zeros((dim, x.shape[1]))
    weight[:kept] = (vectors * signs * gains).T
    weight *= 1 / np.sqrt(3 * x.shape[1]) / np.sqrt(np.mean(weight**2))
    return Whitening(weight.astype(np.float32), (-weight @ mean).astype(np.float32))


def applied(start: Whitening, features: Floats) -> Floats:
    """Embeddings (N, D) of features (N, F)."""
    embeddings: Floats = features @ start.weight.T + start.bias
    return embeddings


def start_from(layer: nn.Linear, start: Whitening) -> None:
    """Give a linear layer these weights."""
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(start.weight))
        layer.bias.copy_(torch.from_numpy(start.bias))
