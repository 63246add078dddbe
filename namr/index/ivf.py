"""FAISS indexes: train a template, build parts, merge parts into a segment, search segments.

A template is a trained, empty index. Everything built from it carries its hash: the SHA-256 over the bytes
of the index with its contents taken out, so that a foreign file is known from the file alone. Parts and
segments are plain FAISS files (`faiss.read_index` opens them); a segment can be merged again.

The law of this module: parts that are merged are, byte for byte, the one index over all vectors. FAISS alone
does not keep it, for three reasons that are dealt with here:

- the last bits of its matrix products depend on how many vectors are added at once and, with the kernels of
  some processors, on a vector's place among them: a vector on a border goes to another list, or gets another
  code. Here such close calls are decided pair by pair (`nearest.nearest`).
- its merges accept parts of other templates, duplicate ids, and ids that it shifts wrongly. Here ids are
  always explicit, templates are compared, and ids are reconciled after.
- ties come out in the order of insertion. Parts are merged in the order of their ids.

FAISS and fork don't go together: start processes by spawn. All is squared L2. Not covered: cosine (make the
vectors of unit length first), searching on GPUs, graph indexes, refining and re-ranking.
Legend: N vectors, D dimension, L lists, Q queries, K neighbours.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from namr.errors import ConfigError, ManifestError, ShapeError
from namr.index import index_files
from namr.index.index_files import Told, to_nobody
from namr.index.nearest import nearest
from namr.store import scratch

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A trained, empty index, as the bytes of a FAISS file."""

    key: str
    dim: int
    data: bytes = field(repr=False)

    @property
    def hash(self) -> str:
        """SHA-256 over the bytes; every index made from this template gives the same."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What a part or a segment holds, read from its file alone.

    `ids_sum` adds up a mixed form of every id, modulo 2^64: it doesn't depend on their order, and the
    sum of the parts' is the segment's. `imbalance` is 1 for lists of equal length and grows with the
    time that a search wastes in long lists. first_id and last_id are -1 where there is no vector.
    """

    key: str
    dim: int
    template_hash: str
    num_vectors: int
    first_id: int
    last_id: int
    ids_sum: int
    imbalance: float


def train_template(x: Floats, key: str, *, seed: int, num_threads: int, on_gpus: bool = False) -> Template:
    """Trains centroids and codes on x (n, D) float32, a sample of all vectors.

    More than 256 vectors a list are not used. The same x and seed give the same template, with any number of
    threads. on_gpus: the centroids are found by all GPUs that this process sees, which compute other last
    bits (written after FAISS's documentation, and not run on one); ConfigError where it sees none.
    """
    _check_vectors(x, "the training sample")
    parsed = index_files.parse_key(key, dim=x.shape[1])
    if len(x) < parsed.min_training_vectors:
        raise ShapeError(
            f"index key {key!r} is trained on {parsed.min_training_vectors} vectors or more, the sample has "
            f"{len(x)}: take fewer lists or Flat"
        )
    if parsed.num_lists == 0:
        index: Any = faiss.IndexIDMap(faiss.IndexFlatL2(x.shape[1]))
    else:
        index = faiss.index_factory(x.shape[1], parsed.of_faiss, faiss.METRIC_L2)
        clusterings = [index.cp]
        if parsed.codec == "PQ":
            index.do_polysemous_training = False  # renumbers codes for 15 s, for a search that is not offered
            # Codes of the vectors themselves need one table a query, not one a list: 3 to 5 times faster.
            index.by_residual = not key.endswith("fs")
            clusterings.append(index.pq.cp)
        for clustering in clusterings:
            clustering.seed = seed
            clustering.min_points_per_centroid = 1  # fewer than 39 is warned of by FAISS; planning sees to it
        if on_gpus:
            if faiss.get_num_gpus() < 1:
                raise ConfigError("FAISS sees no GPU in this process to train on; train on CPUs")
            assigning = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(x.shape[1]))
            index.clustering_index = assigning  # which it only points to
        faiss.omp_set_num_threads(num_threads)
        index.train(np.ascontiguousarray(x))
        index.clustering_index = None
    return Template(key=key, dim=x.shape[1], data=index_files.serialised(index))


def load_template(data: bytes) -> Template:
    """A template from its stored bytes; ManifestError where they are not one."""
    try:
        index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    except RuntimeError as error:
        raise ManifestError(f"this is no FAISS template: {index_files.first_line(error)}") from error
    key = index_files.key_of(index, "the template")
    if index.ntotal != 0 or not index.is_trained:
        raise ManifestError(f"not a template: it holds {index.ntotal} vectors, trained: {index.is_trained}")
    return Template(key=key, dim=index.d, data=data)


def build_part(
    template: Template,
    blocks: Iterable[tuple[Floats, Ids]],
    path: Path,
    *,
    num_threads: int,
    told: Told = to_nobody,
) -> IndexInfo:
    """Writes an index over the blocks' vectors (n, D) and ids (n,) to path, and says what it holds.

    Ids ascend through all blocks (ShapeError otherwise). No block at all gives an empty part.
    """
    index = faiss.deserialize_index(np.frombuffer(template.data, np.uint8))
    faiss.omp_set_num_threads(num_threads)
    num_vectors, ids_sum, last_id = 0, 0, -1
    for x, ids in blocks:
        _check_block(x, ids, dim=template.dim, last_id=last_id)
        if len(ids):
            _add(index, np.ascontiguousarray(x), ids)
            last_id = int(ids[-1])
        num_vectors, ids_sum = num_vectors + len(ids), (ids_sum + index_files.sum_of_ids(ids)) % 2**64
    with scratch.beside(path) as temporary:
        index_files.write(index, template.data, temporary, told=told)
        built = inspect(temporary)
        if (built.num_vectors, built.ids_sum) != (num_vectors, ids_sum):
            raise ManifestError(f"{path}: {num_vectors} vectors went in, {built.num_vectors} others came out")
        temporary.replace(path)
    return built


def inspect(path: Path) -> IndexInfo:
    """What the part or segment at path holds; ManifestError for what namr can't merge, or a damaged file."""
    index = index_files.open_file(path, mmap=True)
    key = index_files.key_of(index, str(path))
    ids = np.sort(index_files.ids_of(index))
    if len(ids) != index.ntotal:
        raise ManifestError(f"{path} says it holds {index.ntotal} vectors and has ids of {len(ids)}")
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ManifestError(f"{path} holds {len(twice)} ids twice, {int(twice[0])} among them")
    return IndexInfo(
        key=key,
        dim=index.d,
        template_hash=hashlib.sha256(index_files.emptied(index)).hexdigest(),
        num_vectors=len(ids),
        first_id=int(ids[0]) if len(ids) else -1,
        last_id=int(ids[-1]) if len(ids) else -1,
        ids_sum=index_files.sum_of_ids(ids),
        imbalance=float(index.invlists.imbalance_factor()) if len(ids) and key != "Flat" else 1.0,
    )


def merge_parts(
    template: Template,
    part_paths: Sequence[Path],
    out_path: Path,
    *,
    num_threads: int = 1,
    told: Told = to_nobody,
) -> IndexInfo:
    """Merges parts of one template into the segment out_path, and reconciles what came out with what went in.

    Equal to one index over all vectors. The memory needed is that of the ids; codes go from memory-mapped
    parts straight into the file, which is told as it is written (Flat, meant for few, is merged in memory).
    Empty parts are welcome. ManifestError: a part of another template, one that is no IVF or Flat index
    of squared L2, one with a direct map, or ids that lie in two parts.
    """
    infos = [(inspect(path), path) for path in part_paths]
    for info, path in infos:
        if (info.key, info.dim) != (template.key, template.dim):
            raise ManifestError(
                f"{path} is {info.key!r} of dimension {info.dim}, "
                f"the template is {template.key!r} of dimension {template.dim}"
            )
        if info.template_hash != template.hash:
            raise ManifestError(
                f"{path} was built from template {info.template_hash[:12]}, not from {template.hash[:12]}: "
                "its lists mean something else; build it again"
            )
    filled = sorted((pair for pair in infos if pair[0].num_vectors), key=lambda pair: pair[0].first_id)
    for (before, before_path), (after, after_path) in itertools.pairwise(filled):
        if after.first_id <= before.last_id:
            raise ManifestError(
                f"ids of {before_path} ({before.first_id} to {before.last_id}) and {after_path} "
                f"({after.first_id} to {after.last_id}) overlap: a part holds a range of ids of its own"
            )
    went_in = sum(info.num_vectors for info, _ in infos), sum(info.ids_sum for info, _ in infos) % 2**64
    with scratch.beside(out_path) as temporary:
        paths = [path for _, path in filled]
        index_files.write_merged(template.data, paths, temporary, num_threads=num_threads, told=told)
        merged = inspect(temporary)
        if (merged.num_vectors, merged.ids_sum) != went_in or merged.template_hash != template.hash:
            raise ManifestError(
                f"merging {len(infos)} parts into {out_path} gave {merged.num_vectors} vectors where "
                f"{went_in[0]} went in, or other ids"
            )
        temporary.replace(out_path)
    return merged


class Index:
    """One or more segments of one template, searched as one index. Made by `open_index`."""

    def __init__(self, index: Any, kept: Sequence[Any], *, template_hash: str, num_threads: int) -> None:
        self._index, self._for_few = index_files.packed(index)
        self._kept = index, kept  # memory which FAISS only points to
        self._num_threads = num_threads
        self.template_hash = template_hash
        self.key = index_files.key_of(index, "the index")
        self.dim = int(index.d)
        self.num_vectors = int(index.ntotal)
        self.num_lists = int(index.nlist) if self.key != "Flat" else 0
        self._how = functools.lru_cache(maxsize=64)(index_files.how_to_search)

    @property
    def is_compressed(self) -> bool:
        """Whether its distances are those of codes, so that candidates are worth refining."""
        return not self.key.endswith("Flat")

    @property
    def imbalance(self) -> float:
        """1 for lists of equal length; a search takes about that many times as long."""
        return float(self._index.invlists.imbalance_factor()) if self.num_lists and self.num_vectors else 1.0

    @property
    def list_sizes(self) -> Ids:
        """(L,) entries of each list; none for Flat."""
        return index_files.list_sizes(self._index) if self.num_lists else np.empty(0, np.int64)

    def squared_to_centre(self, x: Floats) -> Floats:
        """(n,) squared distances of vectors (n, D) to the nearest centre of a list; 0 where there is none."""
        if not self.num_lists:
            return np.zeros(len(x), np.float32)
        return np.asarray(self._index.quantizer.search(np.ascontiguousarray(x), 1)[0][:, 0], np.float32)

    def search(self, queries: Floats, k: int, nprobe: int = 1, *, allowed: Any = None) -> tuple[Floats, Ids]:
        """Squared L2 distances (Q, k) float32, ascending, and ids (Q, k) of the nearest among nprobe lists.

        allowed: a selector of ids (`index_files`); no others are found, None: all are. Where fewer than k
        vectors were found the row is filled up with distance inf and id -1. nprobe above the number of lists
        means all lists, and Flat has none to choose from.
        """
        _check_vectors(queries, "queries", dim=self.dim)
        if k < 1 or nprobe < 1:
            raise ConfigError(f"k and nprobe have to be at least 1, got k={k} and nprobe={nprobe}")
        faiss.omp_set_num_threads(self._num_threads)
        queries, nprobe = np.ascontiguousarray(queries), min(nprobe, self.num_lists)
        index = self._for_few if len(queries) * nprobe < self.num_lists else self._index
        how = self._how(nprobe) if allowed is None else index_files.how_to_search(nprobe, allowed)
        distances, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        outputs = faiss.swig_ptr(distances), faiss.swig_ptr(ids)
        # Not `search`: other libraries import faiss.contrib.torch_utils, whose own takes no params.
        index.search_c(len(queries), faiss.swig_ptr(queries), k, *outputs, how)
        if ids[:, -1].min(initial=0) < 0:
            distances[ids < 0] = np.inf
        return distances, ids


def open_index(paths: Path | Sequence[Path], *, mmap: bool = True, num_threads: int = 1) -> Index:
    """Opens a segment, or several in the order of their ids, for searching.

    mmap leaves the codes on disk, in the page cache; without it, and those of a fast-scan index always, they
    are read into memory. One segment is the fast case: several are as exact, at up to twice the time.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    if not paths:
        raise ConfigError("no segment to open: a release has at least one")
    indexes = [index_files.open_file(path, mmap=mmap, for_search=True) for path in paths]
    keys = [index_files.key_of(index, str(path)) for path, index in zip(paths, indexes, strict=True)]
    hashes = [hashlib.sha256(index_files.emptied(index)).hexdigest() for index in indexes]
    for path, other in zip(paths, hashes, strict=True):
        if other != hashes[0]:
            raise ManifestError(f"{path} is of template {other[:12]}, {paths[0]} of {hashes[0][:12]}")
    if len(indexes) == 1:
        return Index(indexes[0], [], template_hash=hashes[0], num_threads=num_threads)
    if not index_files.parse_key(keys[0], dim=indexes[0].d).is_mapped:
        whole: Any = index_files.open_file(paths[0], mmap=False, for_search=True)
        for path in paths[1:]:
            whole.merge_from(index_files.open_file(path, mmap=False), 0)
        return Index(whole, [], template_hash=hashes[0], num_threads=num_threads)
    pointers = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
    for index in indexes:
        pointers.push_back(index.invlists)
    stacked = faiss.HStackInvertedLists(pointers.size(), pointers.data())
    whole = faiss.deserialize_index(np.frombuffer(index_files.emptied(indexes[0]), np.uint8))
    whole.replace_invlists(stacked, False)
    whole.ntotal = sum(int(index.ntotal) for index in indexes)
    return Index(whole, [*indexes, stacked], template_hash=hashes[0], num_threads=num_threads)


def _check_vectors(x: Floats, what: str, *, dim: int | None = None) -> None:
    if x.ndim != 2 or x.dtype != np.float32 or (dim is not None and x.shape[1] != dim):
        wanted = f"(n, {dim})" if dim is not None else "(n, D)"
        raise ShapeError(f"{what}: expected {wanted} float32, got {x.shape} {x.dtype}")
    if not math.isfinite(np.vdot(x, x)) and not np.isfinite(x).all():  # large ones overflow the first
        raise ShapeError(f"{what}: row {int(np.argmin(np.isfinite(x).all(axis=1)))} holds NaN or infinity")


def _check_block(x: Floats, ids: Ids, *, dim: int, last_id: int) -> None:
    _check_vectors(x, "a block of vectors", dim=dim)
    if ids.shape != (len(x),) or ids.dtype != np.int64:
        raise ShapeError(f"ids of a block: expected ({len(x)},) int64, got {ids.shape} {ids.dtype}")
    if len(ids) and (ids[0] <= last_id or (np.diff(ids) <= 0).any()):
        raise ShapeError(f"ids have to ascend: after {last_id} came {ids[:5].tolist()}...")


def _add(index: Any, x: Floats, ids: Ids) -> None:
    """Adds vectors as FAISS does, but each in a list, and with a code, that depend on it alone."""
    if isinstance(index, faiss.IndexIDMap):
        index.add_with_ids(x, ids)
        return
    centroids = np.asarray(index.quantizer.reconstruct_n(0, index.nlist))
    lists = nearest(x, centroids)
    pq: Any = getattr(index, "pq", None)
    if pq is not None and pq.dsub > index_files.MAX_PIECE_DIM:
        pieces = (x - centroids[lists]).reshape(len(x), pq.M, pq.dsub)
        of_pieces = faiss.vector_to_array(pq.centroids).reshape(pq.M, -1, pq.dsub)
        codes = [nearest(pieces[:, m], of_pieces[m]).astype(np.uint8) for m in range(pq.M)]
        places = lists.astype("<i8").view(np.uint8).reshape(len(x), 8)[:, : index.coarse_code_size()]
        index.add_sa_codes(np.concatenate([places, np.stack(codes, axis=1)], axis=1), ids)
    else:
        index.add_core(len(x), faiss.swig_ptr(x), faiss.swig_ptr(ids), faiss.swig_ptr(lists))
