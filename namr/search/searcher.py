"""Search in a release: the first stage finds candidates, the structure embeddings order them.

Distances in answers are distances, not their squares: the root of sum_k w_k (q_k - x_k)^2, where w is 1 for
side "none" and what `model.distances` says for the others. For a model that is searched by cosine, q and x
have unit length, so a plain distance d is a cosine similarity of 1 - d^2 / 2.

An answer is **proved** when no other item of the release can belong to it: what it compares are the stored
vectors, or for side "none" those of an index that isn't compressed. That takes an exact first stage: index
key Flat, or IVF<n>,Flat with all lists probed. It is **calibrated** when held-out queries say so, see
`release.calibrated`. Items at the same distance may stand for each other.

Not covered: what a filter may say (`filters`), and approximate search over several machines.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from namr.data import images
from namr.errors import ConfigError, ImageRefused, ManifestError, ModelMismatch, ShapeError
from namr.model import model
from namr.model.model import NamrModel
from namr.release import releases, takedowns
from namr.release.releases import Release
from namr.search import filters, opening, queries, stages
from namr.search.answers import Answer, Hit, ReleaseInfo, SearchOptions, Timings
from namr.search.items import Items
from namr.search.opening import Opened
from namr.search.queries import Queries
from namr.search.rerank import Stop, go_on
from namr.search.stages import Neighbours, Plan, Stages
from namr.sides import Side
from namr.store.cache import Cache

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_EMBED_ROWS = 32
_BATCH = 256
_DEFAULTS = SearchOptions()


class _Shown(NamedTuple):
    """What may be found; a search takes it once, so that it sees one state from its beginning to its end."""

    items: Items
    hidden: Ids
    """of the index, ascending"""


class Searcher:
    """A release open for searching. Safe to use from several threads at once."""

    def __init__(
        self,
        release: Release,
        opened: Opened,
        *,
        dead: Ids,
        query_model: NamrModel | None,
        device: str,
    ) -> None:
        self.release, self.manifest = release, release.manifest
        self.model = query_model
        self.index, self.vectors, self._dead = opened.index, opened.vectors, dead
        self._stages = Stages(
            opened.index,
            opened.vectors,
            gallery_min=self.manifest.gallery_min_structure,
            calibration=self.manifest.calibration,
        )
        self._all_items, self._shown = opened.items, _Shown(opened.items.without(dead), dead)
        self.taken_down = np.empty(0, np.int64)
        self._device = device
        self._embedding = threading.Lock()  # the model takes all cores, or the device, by itself

    @property
    def items(self) -> Items:
        """What can be found."""
        return self._shown.items

    @property
    def hidden(self) -> Ids:
        """Ids of the index that can't be found, ascending."""
        return self._shown.hidden

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
        one search: None = torch's. What is taken down by now is hidden; see `hide` for what is later. Raises
        ModelMismatch for a model that the release was not made with.
        """
        release = releases.open_release(releases_uri, release_id)
        query_model = model.load(model_folder) if model_folder else None
        searcher = cls.of(
            release, cache=cache, query_model=query_model, num_threads=num_threads, device=device
        )
        searcher.hide(takedowns.taken_down(release.releases_uri, release.manifest.dataset_uri))
        return searcher

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
        """`open` of a release and a model that are at hand already; nothing is hidden."""
        if query_model is not None:
            _check_model(query_model, release)
        opened = opening.opened(release, cache, num_threads=num_threads or torch.get_num_threads())
        return cls(release, opened, dead=release.tombstones(), query_model=query_model, device=device)

    def hide(self, taken_down: Ids) -> None:
        """From now on none of these ids is found, shown or counted; in place of those hidden before.

        Ids of other images are welcome. Searches under way end with what they began with.
        """
        self.taken_down, hidden = taken_down, np.union1d(self._dead, taken_down)
        self._shown = _Shown(self._all_items.without(hidden), hidden)

    def info(self) -> ReleaseInfo:
        """What is being searched."""
        manifest = self.manifest
        return ReleaseInfo(
            release_id=manifest.release_id,
            created=manifest.created,
            model_name=manifest.model_name,
            model_version=manifest.model_version,
            model_digest=manifest.model_digest,
            dataset_uri=manifest.dataset_uri,
            dataset_version=manifest.dataset_version,
            index_key=manifest.index_key,
            metric=manifest.metric,
            structure_side=manifest.structure_side,
            embedding_dim=manifest.embedding_dim,
            num_items=len(self.items),
            nprobe=manifest.nprobe,
            depth=manifest.depth,
            recall_at_10=manifest.recall_at_10,
            takes_images=self.model is not None,
            calibrated_rate=manifest.calibration.adaptive_rate if manifest.calibration else None,
        )

    def search(
        self,
        *,
        images: Sequence[bytes] | None = None,
        embeddings: Floats | None = None,
        structures: Floats | None = None,
        keys: Sequence[str] | None = None,
        options: SearchOptions = _DEFAULTS,
        stop: Stop = go_on,
        admit: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """The nearest items of each query; give images, or embeddings (with structures), or keys.

        images: encoded pictures; the item of a picture that is in the gallery is found like any other.
        embeddings, structures (Q, D): as the model returns them. keys: items of the gallery, which are left
        out of their own answer. stop: see `search_arrays`. admit: called with how many items the filter lets
        through before anything is compared; what it raises ends the search. Raises ImageRefused for bytes
        that are no picture, ConfigError for an unknown key or a filter that is none, and what `search_arrays`
        raises.
        """
        given = {"images": images, "embeddings": embeddings, "keys": keys}
        names = [name for name, it in given.items() if it is not None]
        if len(names) != 1:
            raise ConfigError(
                f"a search takes one of {', '.join(given)}; got {' and '.join(names) or 'none'}"
            )
        plan, shown = stages.plan_of(options, self.manifest), self._shown
        filtering = time.perf_counter()
        allowed = self._allowed(options, shown.items)
        if admit is not None and allowed is not None:
            admit(len(allowed))
        began = time.perf_counter()
        own_ids = None if keys is None else self._ids_of(keys, shown.items)
        if images is not None:
            embeddings, structures = self.embed(images, stop=stop)
        embedded_ms = (time.perf_counter() - began) * 1e3
        asked = (
            queries.stored(own_ids, self.vectors)
            if own_ids is not None
            else self._given(embeddings, structures)
        )
        neighbours, timings = self._stages.search(
            asked, plan, hidden=shown.hidden, num_items=len(shown.items), allowed=allowed, stop=stop
        )
        filtered_ms = (began - filtering) * 1e3 if allowed is not None else 0.0
        timings = replace(timings, embed_ms=embedded_ms, filter_ms=filtered_ms)
        return [
            self._answer(neighbours, row, shown.items, plan.side, timings)
            for row in range(len(neighbours.ids))
        ]

    def search_arrays(
        self,
        embeddings: Floats,
        structures: Floats | None = None,
        *,
        options: SearchOptions = _DEFAULTS,
        stop: Stop = go_on,
    ) -> Neighbours:
        """`search` by embeddings for large batches: arrays out, no items.

        stop is called between stages and blocks of work, and what it raises ends the search. Raises
        ShapeError for another dimension, NaN, infinity or values whose squares overflow float32, for an empty
        batch, and for sides "query" and "both" without structures; ManifestError for damaged vectors.
        """
        shown, asked = self._shown, self._given(embeddings, structures)
        return self._stages.search(
            asked,
            stages.plan_of(options, self.manifest),
            hidden=shown.hidden,
            num_items=len(shown.items),
            allowed=self._allowed(options, shown.items),
            stop=stop,
        )[0]

    def neighbours(self, asked: Queries, plan: Plan, *, allowed: Ids | None = None) -> Neighbours:
        """`search_arrays` of queries and a plan that are made, at least one, in batches as they are served.

        allowed: ids, ascending, that the search may find, none of them hidden; None: all.
        """
        shown = self._shown
        found = [
            self._stages.search(
                asked.rows(slice(start, start + _BATCH)),
                plan,
                hidden=shown.hidden,
                num_items=len(shown.items),
                allowed=allowed,
                stop=go_on,
            )[0]
            for start in range(0, len(asked.x), _BATCH)
        ]
        return Neighbours(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def embed(self, pictures: Sequence[bytes], *, stop: Stop = go_on) -> tuple[Floats, Floats]:
        """Embeddings and structures (Q, D) of encoded pictures, by the release's model."""
        if self.model is None:
            raise ConfigError(
                "this searcher has no model, so it can't embed images: open it with model_folder"
            )
        if not pictures:
            raise ShapeError("no images to search with: expected at least one")
        pixels = []
        for number, data in enumerate(pictures):
            stop()
            try:
                pixels.append(images.prepare(data, self.model.preprocessing))
            except ImageRefused as error:
                if len(pictures) == 1:
                    raise
                raise ImageRefused(f"number {number} of {len(pictures)}: {error.reason}") from error
        batch_size = min(len(pixels), _EMBED_ROWS)
        with self._embedding:
            stop()
            return model.embed(self.model, np.stack(pixels), batch_size=batch_size, device=self._device)

    def _given(self, embeddings: Floats | None, structures: Floats | None) -> Queries:
        manifest = self.manifest
        return queries.given(embeddings, structures, dim=manifest.embedding_dim, metric=manifest.metric)

    def _allowed(self, options: SearchOptions, items: Items) -> Ids | None:
        """Ids of the items that the filter lets through, ascending; None where there is no filter."""
        if options.filter is None:
            return None
        return items.matching(filters.parse(options.filter, items.kinds))

    def _ids_of(self, keys: Sequence[str], items: Items) -> Ids:
        if not keys:
            raise ShapeError("no keys to search with: expected at least one")
        ids = []
        for key in keys:
            item = items.by_key(key)
            if item is None:
                raise ConfigError(
                    f"key {key!r} is not in release {self.manifest.release_id}: it was never packed, was "
                    "refused or taken out"
                )
            ids.append(item.id)
        return np.array(ids, np.int64)

    def _answer(self, neighbours: Neighbours, row: int, items: Items, side: Side, timings: Timings) -> Answer:
        hits = []
        num = int((neighbours.ids[row] >= 0).sum())
        for at in range(num):
            item = items.by_id(int(neighbours.ids[row, at]))
            if item is None:
                raise ManifestError(
                    f"id {neighbours.ids[row, at]} is in the index and no item; build the release anew"
                )
            hits.append(
                Hit(
                    item.id,
                    item.key,
                    item.label,
                    item.fields,
                    float(neighbours.distances[row, at]),
                    float(neighbours.plain_distances[row, at]),
                )
            )
        manifest = self.manifest
        return Answer(
            hits=tuple(hits),
            certainty=neighbours.certainty(row),
            depth=int(neighbours.depths[row]),
            side=side,
            release_id=manifest.release_id,
            model_name=manifest.model_name,
            model_version=manifest.model_version,
            timings=timings,
        )


def _check_model(query_model: NamrModel, release: Release) -> None:
    manifest, actual = release.manifest, model.digest(query_model)
    if actual != manifest.model_digest:
        raise ModelMismatch(
            f"release {manifest.release_id} was made by model {manifest.model_name} version "
            f"{manifest.model_version} with digest {manifest.model_digest}, the model that is loaded has "
            f"{actual}: their embeddings can't be compared; load that version"
        )
