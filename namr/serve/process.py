"""One process that serves the current release over HTTP, and the next one when it is published.

Not covered: several processes; run several of these behind a proxy, they share the cache of their machine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from namr import checks
from namr.serve import server
from namr.serve.app import create_app
from namr.serve.follower import Follower
from namr.serve.limits import Limits


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What is served, and where."""

    releases_uri: str
    """folder or s3:// prefix of the releases; the current one is served, and the next when it is published"""
    release: str | None = None
    """serve this one for good, such as one that was prepared beside the current one; None follows"""
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
    """how often the pointer and what is taken down are read; at most 30, so that a take-down holds within a
    minute"""
    hold_release: bool = True
    """write beside the releases which one is open, so that no collection takes it; off where they are
    read-only"""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        checks.in_range(self, "poll_interval_s", above=0, at_most=30)
        checks.in_range(self, "cache_bytes", above=0)
        checks.in_range(self, "port", at_least=0, at_most=65535)

    def follower(self) -> Follower:
        """What opens the releases."""
        return Follower(
            self.releases_uri,
            model_folder=self.model_folder,
            tracking_uri=self.tracking_uri,
            cache_folder=self.cache_folder.expanduser(),
            cache_bytes=self.cache_bytes,
            holds=self.hold_release,
            release_id=self.release,
        )


def serve(config: ServeConfig, *, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished. `announce` gets the address."""
    follower = config.follower()
    try:
        _serve(config, follower, announce)
    finally:
        follower.end()


def _serve(config: ServeConfig, follower: Follower, announce: Callable[[str], None]) -> None:
    searcher = follower.first()
    app = create_app(
        searcher, follower=follower, poll_interval_s=config.poll_interval_s, limits=config.limits
    )
    with server.listen(config.host, config.port) as listening:
        shown = f"[{config.host}]" if ":" in config.host else config.host
        manifest = searcher.manifest
        announce(
            f"serving release {manifest.release_id} ({len(searcher.items)} items, model "
            f"{manifest.model_name} {manifest.model_version}) on http://{shown}:{listening.getsockname()[1]}"
        )
        server.make(app, header_timeout_s=config.limits.header_timeout_s).run(sockets=[listening])
