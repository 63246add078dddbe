"""All releases of a folder, whatever became of them.

Not covered: which of them nobody needs (`garbage`).
"""

from typing import NamedTuple

from namr.errors import ConfigError, ManifestError, NamrError
from namr.release import releases
from namr.release.releases import ReleaseManifest
from namr.store import storage


class Listing(NamedTuple):
    """What a folder of releases holds."""

    manifests: list[ReleaseManifest]
    """oldest first"""
    damaged: dict[str, NamrError]
    """by the name of the folder, those whose manifest can't be read, and why"""


def list_releases(releases_uri: str) -> Listing:
    """All releases; those that lost the race for the pointer are among them."""
    listing = Listing([], {})
    for name in storage.list_names(releases_uri):
        release_id, _, rest = name.partition("/")
        if rest != "manifest.json":
            continue
        try:
            listing.manifests.append(releases.open_release(releases_uri, release_id).manifest)
        except (ManifestError, ConfigError) as error:
            listing.damaged[release_id] = error
    listing.manifests.sort(key=lambda manifest: (manifest.created, manifest.release_id))
    return listing
