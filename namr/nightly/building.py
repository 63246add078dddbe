"""What a night builds: as little as makes the next release of what is new.

    added    one more segment, of what came since the current release, and a list of what went
    whole    template and segment from all embeddings: another model, other settings, an aged template

Not covered: the building itself (`release.increment`, `release.build`), what comes of it (`measuring`), and
one segment in place of many (`compacting`).
"""

import functools
from typing import NamedTuple

from namr.data.datasets import Dataset
from namr.data.shards import make_id
from namr.model.distances import Metric
from namr.nightly import release_report
from namr.release import build, increment
from namr.release.build import BuildConfig, BuildReport
from namr.release.releases import Release
from namr.store.cache import Cache


class Made(NamedTuple):
    """What was built, and from what."""

    built: BuildReport
    how: str
    """what was built and why no less, in words"""
    kept: Release | None
    """the release whose template this one has too, and with it how far a search looks; None: all is new"""
    first_new_id: int | None = None
    """of the images that were added to it; None where none were"""


def make(
    dataset: Dataset,
    embeddings_uri: str,
    releases_uri: str,
    config: BuildConfig,
    *,
    model_digest: str,
    metric: Metric,
    current: Release | None,
    is_alike: bool,
    cache: Cache,
) -> Made:
    """Build what the next release lists, by adding to the current one where that can be done.

    is_alike: whether the current release has this model and these settings. cache: for what has to be read of
    a remote release. Raises what building raises.
    """
    whole = functools.partial(
        build.build, dataset, embeddings_uri, releases_uri, config, model_digest=model_digest, metric=metric
    )
    if current is None:
        return Made(whole(), "whole: there was no release", None)
    new = _obstacle(current, is_alike=is_alike) or increment.changes(dataset, current)
    if isinstance(new, str):
        return Made(whole(), f"whole: {new}", None)
    then = current.manifest.release_id
    return Made(
        increment.extend(current, new, dataset, embeddings_uri, config, cache=cache),
        f"added to {then}: {len(new.entries)} shards, and {len(new.tombstones)} images taken out",
        current,
        make_id(new.entries[0].number, 0) if new.entries else None,
    )


def _obstacle(current: Release, *, is_alike: bool) -> str | None:
    """Why nothing of the current release may be kept, in words."""
    if not is_alike:
        return f"{current.manifest.release_id} is of another model, or of other settings"
    aged = release_report.read(current).aged
    return f"with a new template, since {aged}" if aged else None
