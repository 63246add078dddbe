"""From a releases' URI to searchers: the current release with its model, and what is taken down.

One that is named is served for good, without following: what was prepared, say, beside what is current.

While a release is open it is held, so that no collection takes it: a service that can't follow for days is
restarted with the release it knows. Where a service may not write, it says so once and serves on: a release
stays for a day after it was current.
"""

import logging
from contextlib import suppress
from pathlib import Path

from namr.errors import StorageError
from namr.model import model
from namr.model.model import NamrModel
from namr.registry import registry
from namr.release import releases, takedowns, users
from namr.release.releases import Release, ReleaseManifest
from namr.search.searcher import Ids, Searcher
from namr.store.cache import Cache

_log = logging.getLogger("namr.serve")


class Follower:
    """Opens the current release, and the model that it asks for."""

    def __init__(
        self, releases_uri: str, *, model_folder: Path | None, tracking_uri: str | None, cache_folder: Path,
        cache_bytes: int, holds: bool = True, release_id: str | None = None,
    ) -> None:  # fmt: skip
        """model_folder: of a saved model; None fetches the one that made the release from MLflow.

        holds: tell those who collect which release is open. release_id: None follows what is current.
        """
        self._releases_uri, self._model_folder = releases_uri, model_folder
        self._release_id = release_id
        self._hold = users.Hold(releases_uri) if holds else None
        self._has_told = False
        self._tracking_uri = tracking_uri
        self._cache = Cache(cache_folder / "objects", cache_bytes)
        self._models_folder = cache_folder / "models"

    def first(self) -> Searcher:
        """The release that is named, else the current one; ManifestError where there is none."""
        release = releases.open_release(self._releases_uri, self._release_id)
        self._held(release.manifest.release_id)
        return self._open(release, None)

    def successor(self, searcher: Searcher) -> Searcher | None:
        """The current release, None where the searcher has it open, or has the one that is named."""
        pointer = None if self._release_id else releases.read_pointer(self._releases_uri)
        self._held(searcher.manifest.release_id)
        if pointer is None or pointer.target == searcher.manifest.release_id:
            return None
        return self._open(releases.open_release(self._releases_uri, pointer.target), searcher)

    def end(self) -> None:
        """Nothing is held any more."""
        if self._hold:
            with suppress(StorageError):  # a day later it ends by itself
                self._hold.end()

    def taken_down(self, searcher: Searcher) -> Ids:
        """Ids that a searcher has to hide, ascending."""
        return takedowns.taken_down(self._releases_uri, searcher.manifest.dataset_uri)

    def _held(self, release_id: str) -> None:
        if self._hold:
            try:
                self._hold.renew(release_id)
            except StorageError as error:
                if not self._has_told:
                    _log.warning("can't hold release %s (%s); serving it all the same", release_id, error)
                self._has_told = True

    def _open(self, release: Release, before: Searcher | None) -> Searcher:
        same = before is not None and before.manifest.model_digest == release.manifest.model_digest
        query_model = before.model if before and same else self._load(release.manifest)
        opened = Searcher.of(release, cache=self._cache, query_model=query_model, num_threads=1)
        opened.hide(self.taken_down(opened))
        return opened

    def _load(self, manifest: ReleaseManifest) -> NamrModel:
        if self._model_folder:
            return model.load(self._model_folder)
        folder, _ = registry.connect(self._tracking_uri).fetch(
            manifest.model_name, version=manifest.model_version, folder=self._models_folder
        )
        return model.load(folder)
