"""Where MLflow is: its tracking URI, whether anybody answers there, what may be shown of it, what is noise.

Not covered: talking to it (`registry`).
"""

import logging
import os
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from namr.errors import ConfigError, StorageError
from namr.secrets import without_secrets

_TIMEOUT_S = 5.0
# Read by MLflow at each request; whoever set them already is right.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # the folder that a job runs in is not the model's project
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would tell the address with its password
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",  # half a minute: a server that restarts is waited for
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def resolve(given: str | None) -> str:
    """`given`, else MLFLOW_TRACKING_URI, else SQLite in the current folder; SQLite paths made absolute."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().resolve()}"
    if "://" not in uri or uri.startswith("file:"):
        raise ConfigError(
            f"tracking_uri is {uri!r}; expected http(s)://host:port or sqlite:///path/mlflow.db"
        )
    return uri


def check_reachable(uri: str) -> None:
    """Ask a server's port first: MLflow itself would try for minutes."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise StorageError(
            f"no MLflow server answers at {without_secrets(uri)}: {error}; check tracking_uri "
            "(MLFLOW_TRACKING_URI) and that the server runs"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of MLflow's first import and of a new database."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow.store.db.utils")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def set_environment() -> None:
    """What MLflow reads of this process's environment, where nobody has set it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
