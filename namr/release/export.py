"""One file that plain FAISS reads, of a release with any number of segments.

Not covered: its vectors and items, which FAISS has no place for.
"""

from pathlib import Path

import numpy as np

from namr.data import shards
from namr.errors import ConfigError, ManifestError
from namr.index import ivf
from namr.release import takedowns
from namr.release.releases import Release
from namr.store import scratch, storage


def export(release: Release, out_path: Path) -> ivf.IndexInfo:
    """Write the release as one file that plain FAISS reads, and say what it holds.

    Refused (ConfigError) while it holds what nobody may find, dead entries or images that were taken down
    since, because plain FAISS would find them; and where there is no folder for the file.
    """
    manifest = release.manifest
    hidden = takedowns.taken_down(release.releases_uri, manifest.dataset_uri)
    hidden = np.union1d(hidden, release.tombstones())
    num_hidden = sum(int(shards.among(hidden, file.ids).sum()) for file in release.items())
    if num_hidden:
        raise ConfigError(
            f"release {manifest.release_id} hides {num_hidden} dead entries that plain FAISS would find; "
            "run a full build, which leaves them out, and export that"
        )
    if not out_path.parent.is_dir() or out_path.is_dir():
        raise ConfigError(f"can't write {out_path}: expected the path of a file in a folder that exists")
    scratch.sweep(out_path.parent)
    with scratch.folder_beside(out_path) as folder:
        paths = []
        for at, segment in enumerate(manifest.segments):
            path = Path(folder, f"{at}.faiss")
            storage.download(storage.join(release.releases_uri, segment.file.name), path)
            if storage.sha256_of_file(path) != segment.file.sha256:
                raise ManifestError(
                    f"{segment.file.name} of release {manifest.release_id} is damaged; restore it"
                )
            paths.append(path)
        if len(paths) == 1:
            paths[0].replace(out_path)
            return ivf.inspect(out_path)
        return ivf.merge_parts(ivf.load_template(release.read(manifest.template)), paths, out_path)
