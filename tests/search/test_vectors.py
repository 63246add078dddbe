"""Stored vectors by id, and files that are not what they should be."""

from pathlib import Path

import numpy as np
import pytest
import torch

from namr.errors import ManifestError
from namr.release.places import Places
from namr.search.vectors import GalleryVectors
from tests.search.test_rerank import make, store


@pytest.mark.parametrize("num_files", [1, 2, 7, 60])
@pytest.mark.parametrize("num_shards", [1, 4, 60])
def test_vectors_are_found_by_id_in_the_order_asked(tmp_path: Path, num_files: int, num_shards: int) -> None:
    gallery = make(tmp_path, num_files=num_files, num_shards=num_shards)
    at = np.array([59, 0, 15, 14, 0, 31])
    np.testing.assert_array_equal(gallery.vectors.embeddings(gallery.ids[at]).numpy(), gallery.x[at])
    np.testing.assert_array_equal(gallery.vectors.structures(gallery.ids[at]).numpy(), gallery.s[at])
    x, s = gallery.vectors.both(gallery.ids[at])
    np.testing.assert_array_equal(x.numpy(), gallery.x[at])
    np.testing.assert_array_equal(s.numpy(), gallery.s[at])
    assert gallery.vectors.embeddings(gallery.ids[:0]).shape == (0, 8)
    assert [each.shape for each in gallery.vectors.both(gallery.ids[:0])] == [(0, 8), (0, 8)]


@pytest.mark.parametrize("num_files", [1, 3])
def test_blocks_are_all_rows_as_they_lie(tmp_path: Path, num_files: int) -> None:
    gallery = make(tmp_path, num_files=num_files)
    blocks = list(gallery.vectors.blocks())
    ids = np.concatenate([ids for ids, _, _ in blocks])
    lying = np.concatenate([np.load(tmp_path / f"vectors-{number}.npy") for number in range(num_files)])
    np.testing.assert_array_equal(np.sort(ids), gallery.ids)
    for at, kind in ((0, gallery.x), (1, gallery.s)):
        together = torch.cat([block[1 + at] for block in blocks]).numpy()
        np.testing.assert_array_equal(together, lying[:, at])
        np.testing.assert_array_equal(together[np.argsort(ids)], kind)
    for first_row in (0, 1, len(ids) // 2, len(ids) - 1, len(ids)):
        later = list(gallery.vectors.blocks(num_rows=2, first_row=first_row))
        np.testing.assert_array_equal([each for block in later for each in block.ids], ids[first_row:])


def test_an_id_of_no_shard_or_row_is_an_error(tmp_path: Path) -> None:
    gallery = store(tmp_path, np.ones((60, 4)), np.ones((60, 4)), num_shards=4, lacking=[7])
    for item_id in (7, 15, 1 << 32, 99 << 32, -1):
        for read in (gallery.vectors.embeddings, gallery.vectors.structures, gallery.vectors.both):
            with pytest.raises(
                ManifestError, match=f"item {item_id} has no re-rank vector; build the release"
            ):
                read(np.array([3, item_id]))


def test_a_row_that_no_file_has_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 2, 4), np.float16))
    places = Places(np.array([[0, 3]]), np.array([0, 1, 2], np.int32))
    vectors = GalleryVectors([tmp_path / "x.npy"], places, dim=4)
    assert vectors.embeddings(np.array([0, 1])).shape == (2, 4)
    with pytest.raises(ManifestError, match="item 2 has no re-rank vector"):
        vectors.embeddings(np.array([0, 2]))


def test_no_vector_at_all_is_no_file() -> None:
    vectors = GalleryVectors([], Places(np.array([[0, 2]]), np.array([-1, -1], np.int32)), dim=4)
    assert list(vectors.blocks()) == []
    assert vectors.embeddings(np.empty(0, np.int64)).shape == (0, 4)
    with pytest.raises(ManifestError, match="item 1 has no re-rank vector"):
        vectors.embeddings(np.array([1]))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((3, 2, 4), np.float32), "float32; expected"),
        (np.zeros((3, 2, 5), np.float16), "expected \\(any, 2, 4\\)"),
        (np.zeros((3, 8), np.float16), "expected \\(any, 2, 4\\)"),
        (np.zeros((3, 2, 4), np.float16, order="F"), "expected"),
    ],
)
def test_a_file_of_other_vectors_is_refused(tmp_path: Path, stored: np.ndarray, message: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, stored)
    with pytest.raises(ManifestError, match=message):
        GalleryVectors([path], Places(np.array([[0, 3]]), np.arange(3)), dim=4)


def test_thousands_of_shards_are_few_maps_and_open_files(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    gallery = make(tmp_path, num=300, num_shards=100)
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 10
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) == 2
    np.testing.assert_array_equal(gallery.vectors.embeddings(gallery.ids).numpy(), gallery.x)
