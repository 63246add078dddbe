"""The stages together, where the Searcher's own tests can't reach: an index that holds what it must not."""

from pathlib import Path

import numpy as np
import pytest

from namr.index import ivf
from namr.search import queries
from namr.search.rerank import go_on
from namr.search.stages import Plan, Stages
from tests.search.test_rerank import store

NONE = np.empty(0, np.int64)


@pytest.mark.parametrize("side", ["none", "query", "both", "scale"])
def test_an_answer_with_less_than_there_is_is_never_proved(tmp_path: Path, side: str) -> None:
    """Three of ten vectors of the index are so far out that no distance to them is finite."""
    rng = np.random.default_rng(0)
    x, s = rng.standard_normal((10, 4)).astype(np.float32), rng.uniform(0.5, 1.5, (10, 4))
    gallery = store(tmp_path, x, s, num_shards=1)
    indexed = x.copy()
    indexed[[2, 5, 6]] = 2e19
    template = ivf.train_template(x, "Flat", seed=0, num_threads=1)
    ivf.build_part(template, [(indexed, gallery.ids)], tmp_path / "index.faiss", num_threads=1)
    stages = Stages(ivf.open_index(tmp_path / "index.faiss"), gallery.vectors, gallery_min=0.5)
    asked = queries.given(x[:3], s[:3], dim=4, metric="l2")

    def search(k: int, num_items: int):
        plan = Plan(k=k, side=side, depth=10, nprobe=1, exact=False)
        return stages.search(asked, plan, hidden=NONE, num_items=num_items, stop=go_on)[0]

    answered = search(k=9, num_items=10)
    assert ((answered.ids >= 0).sum(axis=1) == 7).all()
    assert not answered.proved.any()
    assert search(k=9, num_items=7).proved.all()
