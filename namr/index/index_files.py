"""FAISS indexes as keys and files: read a key, open a file, know what it holds, join the lists of several.

Only the kinds that namr makes are known: Flat with ids, and inverted lists with Flat, SQ8 or PQ codes, of
squared L2. Everything else is a ManifestError. The layout of a file is FAISS's own; what is written here is
compared byte for byte with what FAISS writes.

A fast-scan index (PQ<pieces>x4fs) lies in files as the plain PQ<pieces>x4 of the same codes, which FAISS
can merge; `packed` lays the codes out as the scan wants them, in memory.

Not covered: training, adding and searching (`ivf`).
"""

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from namr import hashing
from namr.errors import ConfigError, ManifestError
from namr.store import read_ahead

Ids = npt.NDArray[np.int64]
Piece = memoryview | bytes
Told = Callable[[Piece], object]
"""Who is told all bytes of a file, piece by piece in their order, as it is written: a digest of it, say"""

OFFERED = "Flat, IVF<lists>,Flat, IVF<lists>,SQ8, IVF<lists>,PQ<pieces>x4fs and IVF<lists>,PQ<bytes>x8"
MAX_PIECE_DIM = 15
"""of a product quantiser's piece, where a vector's code has to depend on it alone: FAISS encodes longer ones
by matrix products"""
_PIECE_BYTES = 1 << 20
"""of joined lists that are written at once; more where a list is longer"""
_QUERY_BY_QUERY = 11
"""of the ways to scan that IndexIVFPQFastScan numbers (faiss/IndexIVFFastScan.h)"""
_REFUSED = {
    "Panorama": "FAISS merges it without an error and loses the vectors",
    "fs": "namr merges fast-scan indexes of PQ<pieces>x4fs alone",
    "HNSW": "a graph can't be merged",
    "NSG": "a graph can't be merged",
    "FastScan": "namr keeps the plain 4-bit codes in files, and packs them when it opens one",
    "RFlat": "an index that refines its own results can't be merged, and namr re-ranks by itself",
}


class IndexKey(NamedTuple):
    """A parsed index key: num_lists is 0 for Flat, code_bytes is what one vector takes without its id."""

    text: str
    num_lists: int
    codec: str
    code_bytes: int
    num_centroids: int = 0
    """of each piece of a product quantiser"""

    @property
    def is_mapped(self) -> bool:
        """Whether a search leaves the codes where they are in the file."""
        return self.num_lists > 0 and not self.text.endswith("fs")

    @property
    def of_faiss(self) -> str:
        """The key that FAISS's factory makes the template from."""
        return self.text.removesuffix("fs")

    @property
    def min_training_vectors(self) -> int:
        """The fewest vectors that the template can be trained on."""
        return max(self.num_lists, self.num_centroids)


def parse_key(text: str, *, dim: int) -> IndexKey:
    """The parts of an index key such as `IVF1024,SQ8`; ConfigError for one that is not offered."""
    if text == "Flat":
        return IndexKey(text, 0, "Flat", 4 * dim)
    matched = re.fullmatch(r"IVF([1-9]\d*),(Flat|SQ8|PQ([1-9]\d*)x(8|4fs))", text)
    if matched is None:
        reason = _refusal_of(text) or "namr has no such index"
        raise ConfigError(f"index key {text!r} is not offered: {reason}; choose one of {OFFERED}")
    lists, codec = int(matched[1]), matched[2]
    if matched[3] is None:
        return IndexKey(text, lists, codec, 4 * dim if codec == "Flat" else dim)
    pieces = int(matched[3])
    if dim % pieces:
        raise ConfigError(f"index key {text!r}: {pieces} pieces don't divide the dimension {dim}")
    if matched[4] == "8":
        return IndexKey(text, lists, "PQ", pieces, 256)
    if pieces % 2 or dim // pieces > MAX_PIECE_DIM:
        raise ConfigError(
            f"index key {text!r}: {pieces} pieces of {dim // pieces} dimensions; expected an even number of "
            f"them, each of {MAX_PIECE_DIM} or fewer"
        )
    return IndexKey(text, lists, "PQ", pieces // 2, 16)


def _refusal_of(name: str) -> str | None:
    """Why namr has no index of this key or class."""
    return next((why for word, why in _REFUSED.items() if word in name), None)


def open_file(path: Path, *, mmap: bool, for_search: bool = False) -> Any:
    """An index, with its codes and ids left on disk (mmap) or read; ManifestError if it can't be read.

    Without for_search the tables of an IVF-PQ index are not computed, which take longer than a merge.
    """
    flags = faiss.IO_FLAG_MMAP_IFC if mmap else 0
    if not for_search:
        flags |= faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise ManifestError(f"{path} is no readable FAISS index: {first_line(error)}") from error


def first_line(error: RuntimeError) -> str:
    """What FAISS said, without the place in its source."""
    return str(error).strip().splitlines()[-1]


def key_of(index: Any, what: str) -> str:
    """The key of an index, from what it is; ManifestError for one that namr doesn't make.

    Only what this names is merged: FAISS merges some of the others without an error, and wrongly.
    """
    if index.metric_type != faiss.METRIC_L2:
        raise ManifestError(f"{what} has FAISS metric {index.metric_type}; namr's indexes are all squared L2")
    if type(index) is faiss.IndexIDMap and type(faiss.downcast_index(index.index)) is faiss.IndexFlatL2:
        return "Flat"
    codec = None
    if type(index) is faiss.IndexIVFFlat:
        codec = "Flat"
    elif type(index) is faiss.IndexIVFScalarQuantizer:
        codec = "SQ8" if index.sq.qtype == faiss.ScalarQuantizer.QT_8bit else None
    elif type(index) is faiss.IndexIVFPQ:
        codec = {8: f"PQ{index.pq.M}x8", 4: f"PQ{index.pq.M}x4fs"}.get(index.pq.nbits)
    if codec is None:
        name = type(index).__name__
        reason = _refusal_of(name)
        raise ManifestError(f"{what} is a {name}; expected one of {OFFERED}{f': {reason}' if reason else ''}")
    quantizer = faiss.downcast_index(index.quantizer)
    if type(quantizer) not in (faiss.IndexFlat, faiss.IndexFlatL2):
        raise ManifestError(
            f"{what} finds its lists by a {type(quantizer).__name__}; expected an IVF index with plain "
            "centroids, as namr trains them: build it again from namr's template"
        )
    if index.direct_map.type != faiss.DirectMap.NoMap:  # type: ignore[attr-defined]
        raise ManifestError(f"{what} has a direct map, which FAISS can't merge: build it without")
    return f"IVF{index.nlist},{codec}"


def packed(index: Any) -> tuple[Any, Any]:
    """What searches `index`: itself, or for 4-bit codes the fast-scan index over the same, in memory.

    The second is for queries so few that they share hardly a list: the same memory, scanned query by query in
    place of list by list. Of entries whose codes are as far as the last one it may find others.
    """
    pq: Any = getattr(index, "pq", None)
    if pq is None or pq.nbits != 4:
        return index, index
    by_list = faiss.IndexIVFPQFastScan(index)
    by_query: Any = faiss.IndexIVFPQFastScan(index.quantizer, index.d, index.nlist, pq.M, pq.nbits)
    by_query.pq, by_query.by_residual, by_query.implem = pq, index.by_residual, _QUERY_BY_QUERY
    by_query.replace_invlists(by_list.invlists, False)
    by_query.is_trained, by_query.ntotal = True, index.ntotal
    return by_list, by_query


def list_sizes(index: Any) -> Ids:
    """(L,) how many entries each list of an IVF index holds."""
    lists = index.invlists
    return np.array([lists.list_size(number) for number in range(lists.nlist)], np.int64)


def serialised(index: Any) -> bytes:
    """The bytes that FAISS writes of an index."""
    data: npt.NDArray[np.uint8] = faiss.serialize_index(index)
    return data.tobytes()


def emptied(index: Any) -> bytes:
    """The bytes of this index with its contents taken out: its template. The index itself stays as it is."""
    if isinstance(index, faiss.IndexIDMap):
        return serialised(faiss.IndexIDMap(faiss.IndexFlatL2(index.d)))
    num_vectors, nprobe, lists, owned = index.ntotal, index.nprobe, index.invlists, index.own_invlists
    nothing = faiss.ArrayInvertedLists(index.nlist, index.code_size)  # named: it has to outlive the call
    index.own_invlists = False
    index.replace_invlists(nothing, False)
    index.ntotal, index.nprobe = 0, 1
    try:
        return serialised(index)
    finally:
        index.replace_invlists(lists, False)
        index.own_invlists, index.ntotal, index.nprobe = owned, num_vectors, nprobe


def _list_of(lists: Any, number: int, code_size: int) -> tuple[npt.NDArray[np.uint8], Ids]:
    """Codes (n * code_size,) and ids (n,) of one list, as views of its memory."""
    size = lists.list_size(number)
    if size == 0:
        return np.empty(0, np.uint8), np.empty(0, np.int64)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), size * code_size)
    return codes, faiss.rev_swig_ptr(lists.get_ids(number), size)


def ids_of(index: Any) -> Ids:
    """All ids (n,), in the order in which they lie."""
    if isinstance(index, faiss.IndexIDMap):
        ids: Ids = faiss.vector_to_array(index.id_map)
        return ids
    lists = index.invlists
    sizes = [lists.list_size(number) for number in range(index.nlist)]
    of_lists = [faiss.rev_swig_ptr(lists.get_ids(number), size) for number, size in enumerate(sizes) if size]
    return np.concatenate([np.empty(0, np.int64), *of_lists])


def ids_in(path: Path) -> Ids:
    """All ids (n,) in the index file at path, in the order in which they lie: list after list."""
    return ids_of(open_file(path, mmap=True))


def sum_of_ids(ids: Ids) -> int:
    """Sum of splitmix64 of every id, modulo 2^64: tells sets of ids apart, in any order and in any pieces."""
    with np.errstate(over="ignore"):
        return int(hashing.mix(ids.astype(np.uint64) + np.uint64(hashing.GOLDEN)).sum(dtype=np.uint64))


def to_nobody(_: Piece) -> None:
    """Where nobody is `Told`."""


def write(index: Any, empty: bytes, path: Path, *, told: Told = to_nobody) -> None:
    """The file of an index, whose file without contents is `empty`: as the merge of it alone would be."""
    if isinstance(index, faiss.IndexIDMap):
        faiss.write_index(index, str(path))
        with path.open("rb") as written:
            while data := written.read(_PIECE_BYTES):
                told(data)
        return
    whole = faiss.deserialize_index(np.frombuffer(empty, np.uint8))
    whole.ntotal = index.ntotal
    with path.open("wb") as file:
        write_joined(file, whole, [index.invlists], told=told)


def write_merged(
    empty: bytes, paths: Sequence[Path], out_path: Path, *, num_threads: int = 1, told: Told = to_nobody
) -> None:
    """The file of an index, from that of the same without contents and the files to be merged, in order."""
    whole = faiss.deserialize_index(np.frombuffer(empty, np.uint8))
    if isinstance(whole, faiss.IndexIDMap):
        for path in paths:
            whole.merge_from(open_file(path, mmap=False), 0)
        write(whole, empty, out_path, told=told)
        return
    parts = [open_file(path, mmap=True) for path in paths]
    whole.ntotal = sum(int(part.ntotal) for part in parts)
    with out_path.open("wb") as file:
        lists = [part.invlists for part in parts]
        write_joined(file, whole, lists, num_threads=num_threads, told=told)


def write_joined(
    file: BinaryIO,
    whole: Any,
    parts: Sequence[Any],
    *,
    num_threads: int = 1,
    told: Told = to_nobody,
) -> None:
    """A FAISS file of `whole` (empty, but with the final count) and of the parts' lists, joined list by list.

    An IVF file ends with its lists: "ilar", number of lists, code size, "full", the sizes, and for each
    list its codes and its ids (faiss/impl/index_write.cpp, write_InvertedLists). An empty index is
    written as "sprs" with no sizes: this tail is replaced. Each thread writes ranges of lists at their place.
    """
    data, num_lists, code_size = serialised(whole), int(whole.nlist), int(whole.code_size)
    counts = np.array([num_lists, code_size], np.uint64).tobytes()
    tail = b"ilar" + counts + b"sprs" + np.uint64(0).tobytes()
    if not data.endswith(tail):
        raise ManifestError(f"FAISS {faiss.__version__} writes IVF files in another layout: merge with 1.15")
    of_parts = [[part.list_size(number) for number in range(num_lists)] for part in parts]
    sizes = np.array(of_parts, np.int64).reshape(len(parts), num_lists).sum(axis=0)
    head = data[: -len(tail)] + b"ilar" + counts + b"full" + np.uint64(num_lists).tobytes()
    head += sizes.astype(np.uint64).tobytes()
    file.write(head)
    file.flush()
    ends = file.tell() + np.cumsum(sizes) * (code_size + 8)
    cuts = np.unique(np.searchsorted(ends, np.arange(file.tell(), ends[-1], _PIECE_BYTES)))
    ranges = list(itertools.pairwise([*cuts.tolist(), num_lists]))
    write = functools.partial(_write_lists, file.fileno(), parts, ends.tolist(), code_size)
    written: Iterator[Piece] = map(write, ranges)
    if num_threads > 1:
        written = read_ahead.in_order(write, ranges, num_threads=num_threads)
    told(head)
    for piece in written:
        told(piece)


def _write_lists(
    handle: int, parts: Sequence[Any], ends: Sequence[int], code_size: int, lists: tuple[int, int]
) -> memoryview:
    """Writes the joined lists start (included) to stop (excluded), and says what it wrote.

    ends: where each list ends in the file.
    """
    pieces = []
    for number in range(*lists):
        of_parts = [_list_of(part, number, code_size) for part in parts]
        pieces += [codes for codes, _ in of_parts]
        pieces += [ids.view(np.uint8) for _, ids in of_parts]
    joined = np.concatenate(pieces).data
    left, at = joined, ends[lists[1] - 1] - len(joined)
    while len(left):
        num_written = os.pwrite(handle, left, at)
        left, at = left[num_written:], at + num_written
    return joined


def selector(ids: npt.NDArray[np.int64]) -> Any:
    """FAISS's selector of ids (n,), which it copies; one serves any number of searches."""
    return faiss.IDSelectorBatch(np.ascontiguousarray(ids))


def how_to_search(nprobe: int, allowed: Any = None) -> Any:
    """FAISS's parameters of a search: how many lists it looks at (0: there are none), a selector of ids."""
    how: Any = faiss.SearchParametersIVF() if nprobe else faiss.SearchParameters()
    if nprobe:
        how.nprobe = nprobe
    if allowed is not None:
        how.sel = allowed
    return how
