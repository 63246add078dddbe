"""The last step of a night, alone: what it says of a good collection, and of one that failed."""

from pathlib import Path

from namr.nightly import collection
from namr.release import releases, users
from namr.release.garbage import CollectionConfig
from tests import small_release
from tests.small_release import Recipe

CONFIG = CollectionConfig(keep=1, min_age_hours=0)


def test_what_was_freed_is_told(tmp_path: Path) -> None:
    release = small_release.publish(tmp_path, Recipe(num_shards=1))
    releases.store(release.releases_uri, "leaked.bin", b"12345")
    with users.write_alone(release.releases_uri, what="the night") as held:
        said = collection.collect(
            release.releases_uri, CONFIG, held=held, work_uri=None, embeddings_uri=str(tmp_path)
        )
    assert said == "freed 5 bytes: objects 1 (5 bytes); keeps 1 releases"


def test_why_nothing_was_freed_is_told(tmp_path: Path) -> None:
    release = small_release.publish(tmp_path, Recipe(num_shards=1))
    leaked = releases.store(release.releases_uri, "leaked.bin", b"12345")
    with users.write_alone(release.releases_uri, what="the night") as held:
        pass
    said = collection.collect(
        release.releases_uri, CONFIG, held=held, work_uri=None, embeddings_uri=str(tmp_path)
    )
    assert said.startswith("the collection failed and is due again: Conflict: ") and "was released by" in said
    assert releases.is_there(release.releases_uri, leaked)
