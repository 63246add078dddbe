"""Making a release that nights have added to one segment again, while nights go on adding to it.

    build     one segment of all that is live in a release, from the same template: long, and beside nights
    rebased   the release that is current by then, with that segment in place of those it was made of

Nights only ever add behind what is there, so that a release which follows another lists its segments, vectors
and items first. What came since stays as it is; what was taken out since is dead in the new segment too.

Not covered: who may publish it when, and whether it answers as before (`nightly.compacting`).
"""

from dataclasses import replace

import numpy as np

from namr.data import datasets
from namr.errors import Conflict, ManifestError
from namr.release import build as whole
from namr.release import releases, templates
from namr.release.build import BuildConfig, BuildReport
from namr.release.releases import Release, ReleaseManifest

MOST_SEGMENTS = 8
MOST_DEAD = 0.1
"""of the entries; with more a search looks at too much that nobody may find"""


def worn(release: Release) -> str | None:
    """Why a release is to be made one segment again, in words; None while it is fit to be added to."""
    manifest, dead = release.manifest, len(release.tombstones())
    if len(manifest.segments) >= MOST_SEGMENTS:
        return f"it has {len(manifest.segments)} segments"
    if dead > MOST_DEAD * manifest.num_entries:
        return f"{dead} of its {manifest.num_entries} entries are dead"
    return None


def build(
    release: Release, embeddings_uri: str, *, num_parts: int = BuildConfig.num_parts, work_uri: str | None
) -> BuildReport:
    """One segment of what is live in a release, with its vectors and items, all stored beside the release's.

    It is, byte for byte, what the release would be if it had been built at once from its template. Raises
    what `build.build` raises, and ManifestError where the embeddings aren't those of the release.
    """
    manifest = release.manifest
    dataset = datasets.open_version(manifest.dataset_uri, manifest.dataset_version)
    if dataset.digest != manifest.dataset_digest:
        raise ManifestError(
            f"release {manifest.release_id} can't be made one segment: images that it has were erased; the "
            "next night builds the release whole"
        )
    built = whole.build(
        dataset,
        embeddings_uri,
        release.releases_uri,
        BuildConfig(index_key=manifest.index_key, num_parts=num_parts, work_uri=work_uri),
        model_digest=manifest.model_digest,
        metric=manifest.metric,
        template=templates.of_release(release),
    )
    if built.counts != manifest.counts:
        raise ManifestError(
            f"release {manifest.release_id} has {manifest.counts.in_words}; from {embeddings_uri} came "
            f"{built.counts.in_words}: it was made of other embeddings, name those"
        )
    return built


def rebased(current: Release, old: Release, compacted: BuildReport) -> ReleaseManifest:
    """The current release with `compacted`, which was built of `old`, in place of all that old lists.

    It is a draft of what answers as the current release; its tombstones are stored. Conflict where that was
    not made by adding to the old one.
    """
    now, then, gone = current.manifest, old.manifest, old.tombstones()
    dead = np.setdiff1d(current.tombstones(), gone, assume_unique=True)
    if not _begins_with(now, then) or len(current.tombstones()) - len(dead) != len(gone):
        raise Conflict(
            f"release {then.release_id} was made one segment in vain: {now.release_id} is current by now and "
            "was not made by adding to it; nothing was published, and what was built is collected"
        )
    return replace(
        now,
        segments=(*compacted.segments, *now.segments[len(then.segments) :]),
        vectors=(*compacted.vectors, *now.vectors[len(then.vectors) :]),
        items=(*compacted.items, *now.items[len(then.items) :]),
        tombstones=releases.store_tombstones(current.releases_uri, dead),
        compacts=now.release_id,
    )


def _begins_with(now: ReleaseManifest, then: ReleaseManifest) -> bool:
    """Whether one lists all that the other lists, and then more."""
    return (
        now.template == then.template
        and now.segments[: len(then.segments)] == then.segments
        and now.vectors[: len(then.vectors)] == then.vectors
        and now.items[: len(then.items)] == then.items
    )
