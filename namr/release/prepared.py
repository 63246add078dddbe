"""Releases that are made beside the current one, most often by another model, to be switched to later.

    <releases>/<release id>/manifest.json      with is_prepared: whole, measured, judged, and never current

Who prepares takes no lease, so that nights go on; a service can serve such a release by its name. The newest
of each model stays, with its objects and embeddings, until many others were published after it (`garbage`).

A switch publishes what was prepared as a release of that day: it says what it follows, so that one can roll
back to what served. Not covered: making one (the night does, `nightly.reindexing`).
"""

from dataclasses import dataclass, replace
from datetime import datetime

from namr.errors import ConfigError
from namr.release import listing, publication, releases, users
from namr.release.releases import Release, ReleaseManifest
from namr.store import storage


@dataclass(frozen=True, kw_only=True)
class SwitchConfig:
    """Switch to a release that was prepared (jobs/reindex.py --prepare): publish it as a release of today.

    Nights follow the model's alias: give it to the model of that release too (`namr promote`).
    """

    releases_uri: str
    """the folder or s3:// prefix of the releases"""
    release: str
    """the release that was prepared"""
    force: str | None = None
    """why to publish it although the gate had objections, or the current release has newer images"""


def newest_first(releases_uri: str) -> list[Release]:
    """All that are prepared, of whatever models."""
    root = storage.absolute(releases_uri)
    known = listing.list_releases(root).manifests
    return [Release(root, each) for each in reversed(known) if each.is_prepared]


def switch(config: SwitchConfig, *, at: datetime) -> Release:
    """Make what was prepared current, under an id of its own; returns that release.

    Raises ConfigError where something stands against it and nobody says why it is meant, and for what was not
    prepared; Conflict while a night is under way, over a pin, and as `publication.publish` does. What is
    current stays so then.
    """
    release, force = releases.open_release(config.releases_uri, config.release), config.force
    with users.write_alone(release.releases_uri, what="a switch"):
        expected = releases.read_pointer(release.releases_uri)
        current = releases.open_release(release.releases_uri, expected.target) if expected else None
        objections = _objections(release.manifest, current.manifest if current else None)
        if objections and force is None:
            raise ConfigError(
                f"release {config.release} is not published: {objections}; say why by --force, if it is meant"
            )
        made = replace(
            release.manifest,
            release_id=publication.new_id(at),
            created=at.isoformat(timespec="seconds"),
            is_prepared=False,
            objections=None,
            forced=publication.forced(force, objections) if objections and force is not None else None,
        )
        return publication.publish(release.releases_uri, made, expected=expected)


def _objections(manifest: ReleaseManifest, current: ReleaseManifest | None) -> str:
    """What stands against a switch, in words; empty where nothing does."""
    if not manifest.is_prepared:
        raise ConfigError(
            f"release {manifest.release_id} was not prepared (jobs/reindex.py --prepare); to go back to one "
            "that was current use `namr rollback`"
        )
    said = [manifest.objections] if manifest.objections else []
    is_of_same = current is not None and current.dataset_uri == manifest.dataset_uri
    if current and is_of_same and current.dataset_version > manifest.dataset_version:
        said.append(
            f"it has version {manifest.dataset_version} of its dataset, and {current.release_id}, which is "
            f"current, has version {current.dataset_version}: prepare again, which adds what is new"
        )
    return "; ".join(said)
