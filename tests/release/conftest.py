"""Releases to test with: the objects of one that is not published, and three that were published in a row."""

from pathlib import Path

import pytest

from namr.data.shards import make_id
from namr.release import publication, releases
from namr.release.releases import ReleaseManifest
from namr.store import storage
from tests import small_release
from tests.small_release import Recipe


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReleaseManifest]:
    """The objects of one release, with refused, tombstoned and dead samples; not published."""
    root = tmp_path_factory.mktemp("stored")
    recipe = Recipe(
        index_key="IVF4,Flat",
        refused=[make_id(0, 3), make_id(2, 39)],
        tombstoned=[make_id(1, 0)],
        dead=[make_id(1, 7)],
        num_segments=2,
    )
    return root, small_release.make_manifest(root, recipe)


@pytest.fixture
def fresh(stored: tuple[Path, ReleaseManifest], tmp_path: Path) -> tuple[str, ReleaseManifest]:
    """A releases folder of this test's own that holds those objects, and nothing published."""
    root, manifest = stored
    for name in storage.list_names(str(root / "releases" / "objects")):
        target = tmp_path / "releases" / "objects" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(root / "releases" / "objects" / name)
    return str(tmp_path / "releases"), manifest


@pytest.fixture
def three(fresh: tuple[str, ReleaseManifest]) -> str:
    """The URI of releases named first, second and third, of one day each; the third is current."""
    uri, manifest = fresh
    for day, name in enumerate(["first", "second", "third"], start=1):
        dated = small_release.renamed(manifest, name, created=f"2026-11-0{day}T00:00:00+00:00")
        publication.publish(uri, dated, expected=releases.read_pointer(uri))
    return uri
