"""Search in a release: the first stage finds candidates, the structure embeddings order them.

Distances in answers are distances, not their squares: the root of sum_k w_k (q_k - x_k)^2, where w is 1 for
side "none" and what `namr.distances` says for the others. For a model that is searched by cosine, q and x
have unit length, so a plain distance d is a cosine similarity of 1 - d^2 / 2.

An answer is **proved** when no other item of the release can belong to it: what it compares are the vectors
of the index (side "none") or the re-rank vectors (all others, and `exact`). That takes an exact first stage:
index key Flat, or IVF<n>,Flat with all lists probed. Items at the same distance may stand for each other.

Not covered: filters on labels or fields, and approximate search over several machines.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from namr.data import images
from namr.errors import ConfigError, ImageRefused, ManifestError, ModelMismatch, ShapeError
from namr.index import ivf
from namr.model import distances, model
from namr.model.distances import Side
from namr.model.model import NamrModel
from namr.release import releases
from namr.release.releases import Release
from namr.search import rerank
from namr.search.items import Items
from namr.search.rerank import GalleryVectors, Ranked, VectorPaths
from namr.store.cache import Cache

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Certainty = Literal["proved", "unproved"]

_SIDES = ("none", "query", "both", "scale")
_EMBED_ROWS = 32


class Found(NamedTuple):
    """Neighbours of Q queries as arrays; id -1 and distance inf where there are fewer than K."""

    ids: Ids
    """(Q, K)"""
    distances: Floats
    """(Q, K) ascending"""
    plain_distances: Floats
    """(Q, K) Euclidean, whatever the order is by"""
    proved: npt.NDArray[np.bool_]
    """(Q,)"""


@dataclass(frozen=True)
class Hit:
    """One neighbour."""

    id: int
    key: str
    label: str | None
    fields: dict[str, Any]
    distance: float
    """what the answer is ordered by"""
    plain_distance: float
    """Euclidean distance, without structure"""


@dataclass(frozen=True)
class Timings:
    """Milliseconds that the whole batch of queries took, stage by stage."""

    embed_ms: float
    first_stage_ms: float
    rerank_ms: float


@dataclass(frozen=True)
class Answer:
    """What is known of one query's neighbours, nearest first."""

    hits: list[Hit]
    certainty: Certainty
    side: Side
    release_id: str
    model_name: str
    model_version: str
    timings: Timings


class _Plan(NamedTuple):
    """A search's options, checked and with the release's own for those not given."""

    k: int
    side: Side
    depth: int
    nprobe: int
    exact: bool


class Searcher:
    """A release open for searching. Safe to use from several threads at once."""

    def __init__(
        self,
        release: Release,
        *,
        index: ivf.Index,
        vectors: GalleryVectors,
        items: Items,
        dead: Ids,
        query_model: NamrModel | None,
        device: str,
    ) -> None:
        self.release, self.manifest = release, release.manifest
        self.model = query_model
        self.items = items
        self._index, self._vectors, self._dead = index, vectors, dead
        self._device = device
        self._embedding = threading.Lock()  # the model takes all cores, or the device, by itself

    @property
    def num_lists(self) -> int:
        """Lists that `nprobe` can choose from; 0 where every item is looked at."""
        return self._index.num_lists

    @classmethod
    def open(
        cls,
        releases_uri: str,
        *,
        cache: Cache,
        model_folder: Path | None = None,
        release_id: str | None = None,
        num_threads: int | None = None,
        device: str = "cpu",
    ) -> "Searcher":
        """Open a release, the current one if release_id is None.

        Objects of a remote release are kept in `cache`; those of a local one are used where they are. The
        index is mapped into memory, not read. Without a model, queries are vectors and keys. num_threads of
        one search: None = torch's. Raises ModelMismatch for a model that the release was not made with.
        """
        release = releases.open_release(releases_uri, release_id)
        query_model = model.load(model_folder) if model_folder else None
        return cls.of(release, cache=cache, query_model=query_model, num_threads=num_threads, device=device)

    @classmethod
    def of(
        cls,
        release: Release,
        *,
        cache: Cache,
        query_model: NamrModel | None,
        num_threads: int | None = None,
        device: str = "cpu",
    ) -> "Searcher":
        """`open` of a release and a model that are at hand already."""
        manifest = release.manifest
        if query_model is not None:
            _check_model(query_model, release)
        index = ivf.open_index(
            [release.path(segment.file, cache) for segment in manifest.segments],
            num_threads=num_threads or torch.get_num_threads(),
        )
        _check_index(index, release)
        paths = {
            shard.number: VectorPaths(
                release.path(shard.embedding, cache), release.path(shard.structure, cache)
            )
            for shard in manifest.vectors
            if shard.num_rows
        }
        return cls(
            release,
            index=index,
            vectors=GalleryVectors(paths, dim=manifest.embedding_dim),
            items=Items(release.items()),
            dead=release.tombstones(),
            query_model=query_model,
            device=device,
        )

    def search(
        self,
        *,
        images: Sequence[bytes] | None = None,
        embeddings: Floats | None = None,
        structures: Floats | None = None,
        keys: Sequence[str] | None = None,
        k: int = 10,
        side: Side | None = None,
        depth: int | None = None,
        nprobe: int | None = None,
        exact: bool = False,
    ) -> list[Answer]:
        """The k nearest items of each query; give images, or embeddings (with structures), or keys.

        images: encoded pictures; the item of a picture that is in the gallery is found like any other.
        embeddings, structures (Q, D): as the model returns them. keys: items of the gallery, which are left
        out of their own answer. The other arguments are those of `search_arrays`. Raises ImageRefused for
        bytes that are no picture, ConfigError for an unknown key.
        """
        given = {"images": images, "embeddings": embeddings, "keys": keys}
        names = [name for name, it in given.items() if it is not None]
        if len(names) != 1:
            raise ConfigError(
                f"a search takes one of {', '.join(given)}; got {' and '.join(names) or 'none'}"
            )
        plan = self._plan(k=k, side=side, depth=depth, nprobe=nprobe, exact=exact)
        began = time.perf_counter()
        own_ids = None if keys is None else self._ids_of(keys)
        if images is not None:
            embeddings, structures = self.embed(images)
        embedded_ms = (time.perf_counter() - began) * 1e3
        if own_ids is None:
            q, s_q = self._queries(embeddings, structures)
        else:
            q, s_q = self._vectors.embeddings(own_ids).float(), self._vectors.structures(own_ids).float()
        found, timings = self._search(q, s_q, plan, own_ids=own_ids)
        timings = replace(timings, embed_ms=embedded_ms)
        return [self._answer(found, row, plan.side, timings) for row in range(len(found.ids))]

    def search_arrays(
        self,
        embeddings: Floats,
        structures: Floats | None = None,
        *,
        k: int = 10,
        side: Side | None = None,
        depth: int | None = None,
        nprobe: int | None = None,
        exact: bool = False,
    ) -> Found:
        """`search` by embeddings for large batches: arrays out, no items.

        side: "none" orders by plain distance; "query", "both" and "scale" re-rank the first `depth` (at least
        k); None is what the release recommends, as for depth and nprobe. "query" and "both" need structures.
        exact: compare with every item, in one stage; for small galleries. Raises ShapeError for another
        dimension, NaN or infinity, an empty batch; ConfigError for k, depth or nprobe below 1.
        """
        plan = self._plan(k=k, side=side, depth=depth, nprobe=nprobe, exact=exact)
        return self._search(*self._queries(embeddings, structures), plan, own_ids=None)[0]

    def embed(self, pictures: Sequence[bytes]) -> tuple[Floats, Floats]:
        """Embeddings and structures (Q, D) of encoded pictures, by the release's model."""
        if self.model is None:
            raise ConfigError(
                "this searcher has no model, so it can't embed images: open it with model_folder"
            )
        if not pictures:
            raise ShapeError("no images to search with: expected at least one")
        pixels = []
        for number, data in enumerate(pictures):
            try:
                pixels.append(images.prepare(data, self.model.preprocessing))
            except ImageRefused as error:
                if len(pictures) == 1:
                    raise
                raise ImageRefused(f"number {number} of {len(pictures)}: {error.reason}") from error
        batch_size = min(len(pixels), _EMBED_ROWS)
        with self._embedding:
            return model.embed(self.model, np.stack(pixels), batch_size=batch_size, device=self._device)

    def _queries(self, embeddings: Floats | None, structures: Floats | None) -> tuple[Tensor, Tensor | None]:
        """As they are searched with: (Q, D) float32, of unit length for cosine."""
        x = _checked("embeddings", embeddings, self.manifest.embedding_dim)
        s = None
        if structures is not None:
            s = _checked("structures", structures, self.manifest.embedding_dim)
            if s.shape != x.shape:
                raise ShapeError(f"{len(s)} structures for {len(x)} embeddings; expected one each")
            if (s <= 0).any():
                raise ShapeError(f"structures hold {float(s.min()):g}; weights have to be above 0")
        return distances.for_search(x, self.manifest.metric), s

    def _plan(
        self, *, k: int, side: Side | None, depth: int | None, nprobe: int | None, exact: bool
    ) -> _Plan:
        own = self.manifest
        plan = _Plan(
            k=k,
            side=own.structure_side if side is None else side,
            depth=own.depth if depth is None else depth,
            nprobe=own.nprobe if nprobe is None else nprobe,
            exact=exact,
        )
        for name, value in (("k", plan.k), ("depth", plan.depth), ("nprobe", plan.nprobe)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        if plan.side not in _SIDES:
            raise ConfigError(f"side is {side!r}; expected one of {', '.join(_SIDES)}")
        return plan

    def _search(
        self, q: Tensor, s_q: Tensor | None, plan: _Plan, *, own_ids: Ids | None
    ) -> tuple[Found, Timings]:
        if plan.side in ("query", "both") and s_q is None:
            raise ShapeError(
                f"side {plan.side!r} needs structures with the embeddings; or ask for side 'none' or 'scale'"
            )
        began = time.perf_counter()
        if plan.exact:
            ranked = rerank.nearest_exact(
                q, s_q, self._vectors, k=plan.k, side=plan.side, hidden=self._dead, own_ids=own_ids
            )
            timings = Timings(0.0, (time.perf_counter() - began) * 1e3, 0.0)
            return _found(ranked, np.ones(len(q), np.bool_)), timings
        num = plan.k if plan.side == "none" else max(plan.k, plan.depth)
        first = self._first_stage(q.numpy(), num, nprobe=plan.nprobe, own_ids=own_ids)
        between = time.perf_counter()
        proved = np.full(len(q), self._is_exact(plan.nprobe))
        ranked = first
        if plan.side != "none":
            ranked = rerank.rerank(q, s_q, first.ids, self._vectors, k=plan.k, side=plan.side)
            proved &= rerank.is_proved(
                ranked.squared[:, -1],
                first.squared[:, -1],
                q,
                s_q,
                side=plan.side,
                gallery_min=self.manifest.gallery_min_structure,
            )
        ended = time.perf_counter()
        return _found(ranked, proved), Timings(0.0, (between - began) * 1e3, (ended - between) * 1e3)

    def _first_stage(self, q: Floats, num: int, *, nprobe: int, own_ids: Ids | None) -> Ranked:
        """(Q, num) nearest live entries, without each query's own item; deeper until there are enough."""
        hides = own_ids is not None or len(self._dead)
        total = max(1, self._index.num_vectors)
        depth = num + (own_ids is not None) + min(num, len(self._dead))
        while True:
            squared, ids = self._index.search(q, min(depth, total), nprobe)
            if not hides:
                break
            hidden = ids < 0
            if len(self._dead):
                hidden |= self._dead[np.searchsorted(self._dead, ids).clip(max=len(self._dead) - 1)] == ids
            if own_ids is not None:
                hidden |= ids == own_ids[:, None]
            enough = ((~hidden).sum(axis=1) >= num) | (ids < 0).any(axis=1)
            squared[hidden], ids[hidden] = np.inf, -1
            if depth >= total or enough.all():
                break
            depth *= 2
        order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), squared), axis=-1)[:, :num]
        squared, ids = np.take_along_axis(squared, order, 1), np.take_along_axis(ids, order, 1)
        short = ((0, 0), (0, num - ids.shape[1]))
        ids = np.pad(ids, short, constant_values=-1)
        wide = np.pad(squared.astype(np.float64), short, constant_values=np.inf)
        return Ranked(ids, wide, wide)

    def _is_exact(self, nprobe: int) -> bool:
        return self._index.key.endswith("Flat") and nprobe >= self._index.num_lists

    def _ids_of(self, keys: Sequence[str]) -> Ids:
        if not keys:
            raise ShapeError("no keys to search with: expected at least one")
        ids = []
        for key in keys:
            item = self.items.by_key(key)
            if item is None:
                raise ConfigError(
                    f"key {key!r} is not in release {self.manifest.release_id}: it was never packed, was "
                    "refused or taken out"
                )
            ids.append(item.id)
        return np.array(ids, np.int64)

    def _answer(self, found: Found, row: int, side: Side, timings: Timings) -> Answer:
        hits = []
        num = int((found.ids[row] >= 0).sum())
        for at in range(num):
            item = self.items.by_id(int(found.ids[row, at]))
            if item is None:
                raise ManifestError(
                    f"id {found.ids[row, at]} is in the index and no item; build the release anew"
                )
            hits.append(
                Hit(
                    item.id,
                    item.key,
                    item.label,
                    item.fields,
                    float(found.distances[row, at]),
                    float(found.plain_distances[row, at]),
                )
            )
        manifest = self.manifest
        return Answer(
            hits=hits,
            certainty="proved" if found.proved[row] else "unproved",
            side=side,
            release_id=manifest.release_id,
            model_name=manifest.model_name,
            model_version=manifest.model_version,
            timings=timings,
        )


def _found(ranked: Ranked, proved: npt.NDArray[np.bool_]) -> Found:
    return Found(
        ids=ranked.ids,
        distances=np.sqrt(ranked.squared).astype(np.float32),
        plain_distances=np.sqrt(ranked.plain_squared).astype(np.float32),
        proved=proved,
    )


def _checked(name: str, given: Floats | None, dim: int) -> Tensor:
    array = np.asarray(given, np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise ShapeError(f"{name} are {array.shape}; the release wants (Q, {dim})")
    if not len(array):
        raise ShapeError(f"{name} are {array.shape}: an empty batch; expected at least one query")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise ShapeError(f"{name}: row {int(np.argmin(finite))} holds NaN or infinity")
    return torch.from_numpy(np.ascontiguousarray(array))


def _check_model(query_model: NamrModel, release: Release) -> None:
    manifest, actual = release.manifest, model.digest(query_model)
    if actual != manifest.model_digest:
        raise ModelMismatch(
            f"release {manifest.release_id} was made by model {manifest.model_name} version "
            f"{manifest.model_version} with digest {manifest.model_digest}, the model that is loaded has "
            f"{actual}: their embeddings can't be compared; load that version"
        )


def _check_index(index: ivf.Index, release: Release) -> None:
    manifest = release.manifest
    said = (manifest.index_key, manifest.embedding_dim, manifest.template_hash)
    num_entries = sum(segment.num_entries for segment in manifest.segments)
    if (index.key, index.dim, index.template_hash) != said or index.num_vectors != num_entries:
        raise ManifestError(
            f"release {manifest.release_id} lists {num_entries} vectors in {said[0]}, dimension {said[1]}, "
            f"template {said[2][:12]}; its segments hold {index.num_vectors} in {index.key}, dimension "
            f"{index.dim}, template {index.template_hash[:12]}: build the release anew"
        )
