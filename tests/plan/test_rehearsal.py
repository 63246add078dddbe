"""A rehearsal builds what a release holds, by the steps of a build."""

from pathlib import Path

import numpy as np

from namr.index import ivf
from namr.plan import rehearsal


def test_a_rehearsal_builds_an_index_and_its_vectors(tmp_path: Path) -> None:
    made = rehearsal.prepare(tmp_path, num_vectors=600, dim=8, rows_per_shard=400)
    assert [file.num_embedded for file in made.files] == [400, 200]
    built = rehearsal.build_index(made, "IVF16,PQ4x4fs", num_parts=2)
    assert set(built.seconds) == {"sample", "train", "parts", "merge"}
    assert all(seconds > 0 for seconds in built.seconds.values())
    index = ivf.open_index(built.index_path)
    assert (index.key, index.num_vectors) == ("IVF16,PQ4x4fs", 600)
    sides = rehearsal.store_sides(made, built.segment)
    ids = np.array([0, 399, 1 << 32, (1 << 32) + 199])
    drawn = [rehearsal.draw(size, 8, seed=seed) for size, seed in ((400, 1), (200, 2))]
    expected = np.stack([drawn[0][0], drawn[0][399], drawn[1][0], drawn[1][199]])
    np.testing.assert_array_equal(sides.vectors.embeddings(ids).numpy(), expected.astype(np.float16))
    assert sides.items_bytes > 600 * 20 and sides.vectors_s > 0 and sides.items_s > 0


def test_drawn_vectors_are_the_same_for_the_same_seed_and_near_each_other() -> None:
    x = rehearsal.draw(500, 16, seed=3)
    np.testing.assert_array_equal(x, rehearsal.draw(500, 16, seed=3))
    assert not np.array_equal(x, rehearsal.draw(500, 16, seed=4))
    assert 0.5 < np.linalg.norm(x[:250] - x[250:], axis=1).mean() < 2
