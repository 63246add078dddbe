"""Keys, and what FAISS files are known by: every kind that is offered, and those that are not."""

import functools
import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from namr import hashing
from namr.errors import ConfigError, ManifestError
from namr.index import index_files
from namr.index.index_files import IndexKey

DIM = 8
KEYS = ["Flat", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ2x8"]


@functools.cache
def empty(key: str) -> Any:
    """A trained index that holds nothing."""
    if key == "Flat":
        return faiss.IndexIDMap(faiss.IndexFlatL2(DIM))
    index: Any = faiss.index_factory(DIM, key)
    if "PQ" in key:
        index.do_polysemous_training = False  # 15 s for a search that is not offered
    index.train(np.random.default_rng(0).standard_normal((300, DIM)).astype(np.float32))
    return index


def made(key: str, num: int, *, first_id: int = 0) -> Any:
    """An index that plain FAISS made, of `num` vectors whose ids ascend by 3."""
    index = faiss.deserialize_index(faiss.serialize_index(empty(key)))
    x = np.random.default_rng(first_id).standard_normal((num, DIM)).astype(np.float32)
    index.add_with_ids(x, first_id + 3 * np.arange(num, dtype=np.int64))
    return index


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Flat", IndexKey("Flat", 0, "Flat", 32)),
        ("IVF16,Flat", IndexKey("IVF16,Flat", 16, "Flat", 32)),
        ("IVF1024,SQ8", IndexKey("IVF1024,SQ8", 1024, "SQ8", 8)),
        ("IVF4,PQ4x8", IndexKey("IVF4,PQ4x8", 4, "PQ", 4, 256)),
    ],
)
def test_a_key_has_its_parts(text: str, expected: IndexKey) -> None:
    assert index_files.parse_key(text, dim=DIM) == expected


def test_codebooks_need_256_vectors_and_lists_one_each() -> None:
    sizes = {key: index_files.parse_key(key, dim=DIM).min_training_vectors for key in KEYS}
    assert sizes == {"Flat": 0, "IVF4,Flat": 4, "IVF4,SQ8": 4, "IVF4,PQ2x8": 256}


@pytest.mark.parametrize("text", ["", "flat", "IVF0,Flat", "IVF04,Flat", "IVF4", "IVF4,Flat ", "IVF4,PQ3x8"])
def test_a_key_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not offered|don't divide the dimension 8"):
        index_files.parse_key(text, dim=DIM)


@pytest.mark.parametrize("key", KEYS)
def test_an_index_is_known_by_its_file(key: str, tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(index_files.serialised(made(key, 20)))
    for mmap in (False, True):
        index = index_files.open_file(path, mmap=mmap)
        assert index_files.key_of(index, "it") == key
        assert sorted(index_files.ids_of(index).tolist()) == list(range(0, 60, 3))
        assert index_files.ids_in(path).tolist() == index_files.ids_of(index).tolist()


@pytest.mark.parametrize(
    ("key", "expected"),
    [("HNSW8", "IndexHNSWFlat"), ("IVF4,SQ4", "IndexIVFScalarQuantizer"), ("IVF4,PQ2x5", "IndexIVFPQ")],
)
def test_an_index_that_namr_does_not_make_is_refused(key: str, expected: str) -> None:
    with pytest.raises(ManifestError, match=f"it is a {expected}; expected one of Flat"):
        index_files.key_of(faiss.index_factory(DIM, key), "it")


def test_another_metric_and_a_direct_map_are_refused() -> None:
    with pytest.raises(ManifestError, match="FAISS metric 0"):
        index_files.key_of(faiss.index_factory(DIM, "Flat", faiss.METRIC_INNER_PRODUCT), "it")
    index = made("IVF4,Flat", 5)
    index.set_direct_map_type(faiss.DirectMap.Hashtable)
    with pytest.raises(ManifestError, match="direct map"):
        index_files.key_of(index, "it")


def test_lists_that_are_found_by_a_graph_are_refused() -> None:
    with pytest.raises(ManifestError, match="it finds its lists by a IndexHNSWFlat; expected an IVF index"):
        index_files.key_of(faiss.index_factory(DIM, "IVF4_HNSW8,Flat"), "it")


@pytest.mark.parametrize("data", [b"", b"IxF2", b"no index at all"])
def test_a_file_that_is_no_index_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.faiss"
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"x\.faiss is no readable FAISS index"):
        index_files.open_file(path, mmap=False)


@pytest.mark.parametrize("key", KEYS)
def test_emptied_is_the_index_before_anything_was_added(key: str) -> None:
    index = made(key, 20)
    if key != "Flat":
        index.nprobe = 3
    assert index_files.emptied(index) == index_files.serialised(empty(key))
    assert index.ntotal == 20
    assert len(index_files.ids_of(index)) == 20
    assert getattr(index, "nprobe", 3) == 3


def test_the_sum_of_ids_is_the_same_in_any_order_and_in_pieces() -> None:
    ids = np.random.default_rng(0).integers(0, 1 << 53, 1000)
    whole = index_files.sum_of_ids(ids)
    assert index_files.sum_of_ids(ids[::-1].copy()) == whole
    pieces = index_files.sum_of_ids(ids[:300]) + index_files.sum_of_ids(ids[300:])
    assert pieces % 2**64 == whole
    assert index_files.sum_of_ids(np.empty(0, np.int64)) == 0
    one = hashing.mix(np.array([5 + hashing.GOLDEN], np.uint64))
    assert index_files.sum_of_ids(np.array([5], np.int64)) == int(one[0])


def test_sets_of_ids_with_one_plain_sum_are_told_apart() -> None:
    one, other = np.array([1, 4], np.int64), np.array([2, 3], np.int64)
    assert index_files.sum_of_ids(one) != index_files.sum_of_ids(other)


@pytest.mark.parametrize(("num_threads", "piece_bytes"), [(1, 1 << 20), (1, 1), (3, 100)])
@pytest.mark.parametrize("key", [key for key in KEYS if key != "Flat"])
def test_joined_lists_are_the_file_that_faiss_writes_of_the_whole(
    key: str, num_threads: int, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_files, "_PIECE_BYTES", piece_bytes)
    parts = [made(key, num, first_id=first) for num, first in ((20, 0), (0, 100), (7, 200))]
    whole = made(key, 0)
    for part in parts:
        copy = faiss.clone_index(part)
        whole.merge_from(copy, 0)
    frame = made(key, 0)
    frame.ntotal = 27
    path = tmp_path / "joined"
    lists, told = [part.invlists for part in parts], bytearray()
    with path.open("wb") as file:
        index_files.write_joined(file, frame, lists, num_threads=num_threads, told=told.extend)
    assert path.read_bytes() == bytes(told) == index_files.serialised(whole)


def test_a_write_that_stops_halfway_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, frame = made("IVF4,SQ8", 30), made("IVF4,SQ8", 0)
    frame.ntotal, pwrite = 30, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:5], at))
    with (tmp_path / "joined").open("wb") as file:
        index_files.write_joined(file, frame, [part.invlists])
    assert (tmp_path / "joined").read_bytes() == index_files.serialised(part)


def test_joining_into_an_index_that_holds_something_is_refused(tmp_path: Path) -> None:
    full = made("IVF4,Flat", 5)
    with (tmp_path / "x").open("wb") as file, pytest.raises(ManifestError, match="another layout"):
        index_files.write_joined(file, full, [full.invlists])
