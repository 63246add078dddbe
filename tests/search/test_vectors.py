"""Stored vectors by id, and files that are not what they should be."""

from pathlib import Path

import numpy as np
import pytest
import torch

from namr.errors import ManifestError
from namr.search.vectors import GalleryVectors, VectorPaths
from tests.search.test_rerank import make


def test_vectors_are_found_by_id_in_the_order_asked(tmp_path: Path) -> None:
    gallery = make(tmp_path)
    at = np.array([59, 0, 15, 14, 0, 31])
    np.testing.assert_array_equal(gallery.vectors.embeddings(gallery.ids[at]).numpy(), gallery.x[at])
    np.testing.assert_array_equal(gallery.vectors.structures(gallery.ids[at]).numpy(), gallery.s[at])
    assert gallery.vectors.embeddings(gallery.ids[:0]).shape == (0, 8)
    blocks = list(gallery.vectors.blocks())
    np.testing.assert_array_equal(np.concatenate([ids for ids, _, _ in blocks]), gallery.ids)
    np.testing.assert_array_equal(torch.cat([x for _, x, _ in blocks]).numpy(), gallery.x)


def test_an_id_of_no_shard_or_row_is_an_error(tmp_path: Path) -> None:
    vectors = make(tmp_path).vectors
    with pytest.raises(ManifestError, match=f"item {1 << 32} has no re-rank vector: shard 1 holds 0"):
        vectors.embeddings(np.array([1 << 32]))
    with pytest.raises(ManifestError, match="item 15 has no re-rank vector: shard 0 holds 15"):
        vectors.embeddings(np.array([3, 15]))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((3, 4), np.float32), "float32; expected"),
        (np.zeros((3, 5), np.float16), "expected \\(rows, 4\\)"),
        (np.zeros((3, 4), np.float16, order="F"), "expected"),
    ],
)
def test_a_file_of_other_vectors_is_refused(tmp_path: Path, stored: np.ndarray, message: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, stored)
    with pytest.raises(ManifestError, match=message):
        GalleryVectors({0: VectorPaths(path, path)}, dim=4)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((3, 4), np.float16))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ManifestError, match="its header says"):
        GalleryVectors({0: VectorPaths(path, path)}, dim=4)
    path.write_bytes(b"no numpy file")
    with pytest.raises(ManifestError, match=r"no \.npy file"):
        GalleryVectors({0: VectorPaths(path, path)}, dim=4)


def test_thousands_of_shards_need_no_open_files(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    gallery = make(tmp_path, num=300, num_shards=100)
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 10
    np.testing.assert_array_equal(gallery.vectors.embeddings(gallery.ids).numpy(), gallery.x)
