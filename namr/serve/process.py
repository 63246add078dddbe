"""One process that serves the current release over HTTP, and the next one when it is published.

A new release is opened beside the old one, with the model that it asks for, before it takes its place. Not
covered: several processes; run several of these behind a proxy, they share the cache of their machine.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from namr import checks
from namr.errors import ConfigError
from namr.model import model
from namr.model.model import NamrModel
from namr.registry import registry
from namr.release import releases
from namr.release.releases import ReleaseManifest
from namr.search.searcher import Searcher
from namr.serve.app import create_app
from namr.store.cache import Cache


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What is served, and where."""

    releases_uri: str
    """folder or s3:// prefix of the releases; the current one is served, and the next when it is published"""
    model_folder: Path | None = None
    """folder of a saved model; None fetches the version that made the release from MLflow"""
    tracking_uri: str | None = None
    """MLflow that has the model; None: MLFLOW_TRACKING_URI, else mlflow.db in the current folder"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 for all"""
    port: int = 8000
    """0 chooses a free one"""
    cache_folder: Path = Path("~/.cache/namr/serving")
    """local disk for fetched models and for the objects of remote releases"""
    cache_bytes: int = 50 << 30
    """limit of that cache"""
    poll_interval_s: float = 20.0
    """how often the pointer is read"""
    max_upload_bytes: int = 20 << 20
    """larger requests are refused before they are read"""

    def __post_init__(self) -> None:
        checks.in_range(self, "poll_interval_s", "max_upload_bytes", "cache_bytes", above=0)
        checks.in_range(self, "port", at_least=0, at_most=65535)


def serve(config: ServeConfig, *, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished. `announce` gets the address."""
    follow = _Follower(config)
    searcher = follow.first()
    app = create_app(
        searcher,
        successor=follow,
        poll_interval_s=config.poll_interval_s,
        max_upload_bytes=config.max_upload_bytes,
    )
    with _listen(config.host, config.port) as listening:
        shown = f"[{config.host}]" if ":" in config.host else config.host
        manifest = searcher.manifest
        announce(
            f"serving release {manifest.release_id} ({len(searcher.items)} items, model "
            f"{manifest.model_name} {manifest.model_version}) on http://{shown}:{listening.getsockname()[1]}"
        )
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
        )
        server.run(sockets=[listening])


class _Follower:
    """Opens the current release, and the model that it asks for."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        folder = config.cache_folder.expanduser()
        self._cache = Cache(folder / "objects", config.cache_bytes)
        self._models_folder = folder / "models"

    def first(self) -> Searcher:
        return self._open(releases.open_release(self._config.releases_uri), None)

    def __call__(self, searcher: Searcher) -> Searcher | None:
        pointer = releases.read_pointer(self._config.releases_uri)
        if pointer is None or pointer.target == searcher.manifest.release_id:
            return None
        return self._open(releases.open_release(self._config.releases_uri, pointer.target), searcher)

    def _open(self, release: releases.Release, before: Searcher | None) -> Searcher:
        same = before is not None and before.manifest.model_digest == release.manifest.model_digest
        query_model = before.model if before and same else self._load(release.manifest)
        return Searcher.of(release, cache=self._cache, query_model=query_model, num_threads=1)

    def _load(self, manifest: ReleaseManifest) -> NamrModel:
        if self._config.model_folder:
            return model.load(self._config.model_folder)
        folder, _ = registry.connect(self._config.tracking_uri).fetch(
            manifest.model_name, version=manifest.model_version, folder=self._models_folder
        )
        return model.load(folder)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {host} port {port}: {error.strerror}; choose another port, or 0 for a free one"
        ) from error
