"""How the embeddings of a release lie, and how far that is from how those of the serving release lie.

A sample of each release is looked at, up to 2,000 images. Of one model the two can be compared axis by axis:
their **shift** is the squared distance of their means and of their standard deviations, as a share of the
variance over all axes in the serving release,

    sum_d (m_d - m'_d)^2 + (sd_d - sd'_d)^2  over  sum_d sd'_d^2

which is Frechet's distance of normal distributions whose axes are independent, without a unit: 1 where the
means lie apart as far as images lie from their mean. Two samples of N images of one distribution are about
3 / N apart. Another model has other axes; of that only what needs none is told: norms, how many axes are
flat, and the effective rank.

Not covered: NaN and infinity, which extraction and the build refuse, and whether new images lie farther from
the lists than those from before (`aging`).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr.measure import structure
from namr.search.searcher import Searcher

Floats = npt.NDArray[np.float32]

_MOST = 2000
_SEED = 0
_FLAT = 1e-6
"""of the mean variance of an axis"""


class Spread(NamedTuple):
    """How the embeddings of one release lie, as they are searched."""

    num_images: int
    """that were looked at"""
    mean_norm: float
    num_flat_axes: int
    """on which images don't differ: their variance is less than a millionth of the mean one"""
    effective_rank: float
    """see `measure.structure.effective_rank`"""


class Drift(NamedTuple):
    """Of two releases."""

    dim: int
    here: Spread
    then: Spread | None
    """of the release that serves; None where none does"""
    shift: float | None
    """None where none serves, or one of another model"""


def measured(draft: Searcher, serving: Searcher | None) -> Drift | None:
    """None where fewer than two images can be looked at."""
    here, then = _sample(draft), None if serving is None else _sample(serving)
    if len(here) < 2 or (then is not None and len(then) < 2):
        return None
    is_comparable = serving is not None and serving.manifest.model_digest == draft.manifest.model_digest
    return Drift(
        dim=here.shape[1],
        here=spread(here),
        then=None if then is None else spread(then),
        shift=shift(then, here) if then is not None and is_comparable else None,
    )


def spread(x: Floats) -> Spread:
    """Of embeddings (N, D)."""
    variances = x.var(axis=0, dtype=np.float64)
    return Spread(
        num_images=len(x),
        mean_norm=float(np.linalg.norm(x, axis=1).mean(dtype=np.float64)),
        num_flat_axes=int((variances <= _FLAT * variances.mean()).sum()),
        effective_rank=structure.effective_rank(x),
    )


def shift(then: Floats, here: Floats) -> float:
    """Of embeddings (N, D) and (M, D) of one model; infinite where those then were all one."""
    x, y = then.astype(np.float64), here.astype(np.float64)
    apart = ((x.mean(0) - y.mean(0)) ** 2 + (x.std(0) - y.std(0)) ** 2).sum()
    whole = x.var(0).sum()
    return float(apart / whole) if whole else float("inf") if apart else 0.0


def _sample(searcher: Searcher) -> Floats:
    ids = np.sort(searcher.items.draw_ids(_MOST, seed=_SEED))
    x: Floats = searcher.vectors.embeddings(ids).float().numpy()
    return x
