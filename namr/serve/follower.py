"""From a releases' URI to searchers: the current release with its model, and what is taken down."""

from pathlib import Path

from namr.model import model
from namr.model.model import NamrModel
from namr.registry import registry
from namr.release import releases, takedowns
from namr.release.releases import Release, ReleaseManifest
from namr.search.searcher import Ids, Searcher
from namr.store.cache import Cache


class Follower:
    """Opens the current release, and the model that it asks for."""

    def __init__(
        self, releases_uri: str, *, model_folder: Path | None, tracking_uri: str | None, cache_folder: Path,
        cache_bytes: int,
    ) -> None:  # fmt: skip
        """model_folder: of a saved model; None fetches the one that made the release from MLflow."""
        self._releases_uri, self._model_folder = releases_uri, model_folder
        self._tracking_uri = tracking_uri
        self._cache = Cache(cache_folder / "objects", cache_bytes)
        self._models_folder = cache_folder / "models"

    def first(self) -> Searcher:
        """The current release; ManifestError where there is none."""
        return self._open(releases.open_release(self._releases_uri), None)

    def successor(self, searcher: Searcher) -> Searcher | None:
        """The current release, None where it is the one that the searcher has open."""
        pointer = releases.read_pointer(self._releases_uri)
        if pointer is None or pointer.target == searcher.manifest.release_id:
            return None
        return self._open(releases.open_release(self._releases_uri, pointer.target), searcher)

    def taken_down(self, searcher: Searcher) -> Ids:
        """Ids that a searcher has to hide, ascending."""
        return takedowns.taken_down(self._releases_uri, searcher.manifest.dataset_uri)

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
