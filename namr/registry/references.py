"""One way to say which model: `models:/namr@champion`, `models:/namr/3`, or the folder of a saved model.

The first two are MLflow's own notation for its registry; a folder may be local or s3://.
"""

import re
from pathlib import Path
from typing import NamedTuple

from namr.errors import ConfigError, ObjectMissing
from namr.model import model
from namr.registry import registry
from namr.store import storage

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


class FoundModel(NamedTuple):
    """A saved model on this machine, and what to call it."""

    path: Path
    name: str
    version: str
    """of the registry; "none" for a folder"""


def fetch(reference: str, *, folder: Path, tracking_uri: str | None = None) -> FoundModel:
    """Bring a model to this machine, below `folder` unless it is a local folder already.

    Raises ConfigError for what is no reference, ObjectMissing where there is no such model, version or file.
    """
    if not reference.startswith("models:"):
        return FoundModel(_saved(reference, folder), reference.rstrip("/").rpartition("/")[2], "none")
    registered = _REGISTERED.fullmatch(reference)
    if registered is None:
        raise ConfigError(
            f"model {reference!r}: expected models:/<name>@<alias>, models:/<name>/<version> or a folder"
        )
    path, version = registry.connect(tracking_uri).fetch(
        registered["name"], alias=registered["alias"], version=registered["version"], folder=folder
    )
    return FoundModel(path, version.name, version.version)


def _saved(uri: str, folder: Path) -> Path:
    if storage.is_local(uri):
        path = Path(uri)
        if not (path / model.DESCRIPTION_FILE).is_file():
            raise ObjectMissing(f"no saved model in {path}: {model.DESCRIPTION_FILE} is not there")
        return path
    target = folder / storage.sha256(uri.encode())[:16]
    for name in (model.WEIGHTS_FILE, model.DESCRIPTION_FILE):
        storage.download(storage.join(uri, name), target / name)
    return target
