"""Whether a release that compacts another answers as that one does, asked with some of their own images.

What a search orders are the candidates of its first stage, by their stored vectors. So both releases are
asked for candidates, as far as they look, and have to find the same, with the same vectors, keys and labels.
Only those may differ that lie as far as the last one: of codes many are equally far, and a sum in another
order has other last bits.

Not covered: whether the answers are good (`assessment`).
Legend: Q queries, M candidates of a query.
"""

import numpy as np
import numpy.typing as npt

from namr.data.shards import among
from namr.errors import ManifestError
from namr.search import first_stage, queries
from namr.search.first_stage import Candidates
from namr.search.searcher import Searcher

_NUM_ASKED = 100
_MARGIN = 1e-3
"""of the last candidate's squared distance"""

Ids = npt.NDArray[np.int64]


def check(before: Searcher, after: Searcher) -> Ids:
    """The ids of the images of `before` that asked; ManifestError where the answers differ."""
    asked = before.items.draw_ids(_NUM_ASKED, seed=0)
    one, other = _candidates(before, asked), _candidates(after, asked)
    differing = [row for row in range(len(asked)) if _lacks(one, other, row) or _lacks(other, one, row)]
    found = np.unique(one.ids[one.ids >= 0])
    what = f"release {after.manifest.release_id} answers otherwise than {before.manifest.release_id}"
    if differing:
        raise ManifestError(
            f"{what}: to {len(differing)} of {len(asked)} images with other neighbours, item "
            f"{asked[differing[0]]} first; it is not published"
        )
    for each in found.tolist():
        if before.items.by_id(each) != after.items.by_id(each):
            raise ManifestError(f"{what}: item {each} is another one; it is not published")
    for here, there in zip(before.vectors.both(found), after.vectors.both(found), strict=True):
        if not here.equal(there):
            raise ManifestError(f"{what}: its images have other re-rank vectors; it is not published")
    return asked


def _candidates(searcher: Searcher, asked: Ids) -> Candidates:
    """(Q, M) of each image, as it is searched with."""
    manifest = searcher.manifest
    return first_stage.candidates(
        searcher.index,
        queries.stored(asked, searcher.vectors).x,
        manifest.depth,
        nprobe=manifest.nprobe,
        hidden=searcher.hidden,
        own_ids=asked,
    )


def _lacks(one: Candidates, other: Candidates, row: int) -> bool:
    """Whether a candidate of the one that is surely nearer than its last is none of the other's."""
    last = one.squared[row, -1]
    near = one.ids[row, one.squared[row] < last - _MARGIN * last if np.isfinite(last) else one.ids[row] >= 0]
    return not among(near, np.sort(other.ids[row])).all()
