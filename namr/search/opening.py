"""From the objects of a release to what a search works on: index, vectors and items, checked against it.

Not covered: searching (`searcher`), and what is taken down.
"""

from dataclasses import dataclass

from namr.errors import ManifestError
from namr.index import ivf
from namr.release.releases import Release
from namr.search.items import Items
from namr.search.vectors import GalleryVectors
from namr.store import item_files
from namr.store.cache import Cache


@dataclass(frozen=True)
class Opened:
    """The parts of a release, mapped into memory."""

    index: ivf.Index
    vectors: GalleryVectors
    items: Items


def opened(release: Release, cache: Cache, *, num_threads: int) -> Opened:
    """Open a release; what lies remotely is fetched side by side first. num_threads: of one search.

    ManifestError for objects that are damaged or not what the manifest says.
    """
    manifest = release.manifest
    segments = [segment.file for segment in manifest.segments]
    vectors = [stored for each in manifest.vectors for stored in each.objects()]
    release.fetch([*segments, *vectors, *manifest.items], cache)
    index = ivf.open_index([release.path(stored, cache) for stored in segments], num_threads=num_threads)
    _check_index(index, release)
    paths = [release.path(each.file, cache) for each in manifest.vector_files]
    return Opened(
        index,
        GalleryVectors(paths, release.places(cache), dim=manifest.embedding_dim, num_threads=num_threads),
        Items([item_files.open_file(release.path(stored, cache)) for stored in manifest.items]),
    )


def _check_index(index: ivf.Index, release: Release) -> None:
    manifest = release.manifest
    said = (manifest.index_key, manifest.embedding_dim, manifest.template_hash)
    num_entries = manifest.num_entries
    if (index.key, index.dim, index.template_hash) != said or index.num_vectors != num_entries:
        raise ManifestError(
            f"release {manifest.release_id} lists {num_entries} vectors in {said[0]}, dimension {said[1]}, "
            f"template {said[2][:12]}; its segments hold {index.num_vectors} in {index.key}, dimension "
            f"{index.dim}, template {index.template_hash[:12]}: build the release anew"
        )
