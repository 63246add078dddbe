"""The releases of a folder: by age, and a damaged one hides no other."""

from pathlib import Path

from namr.release import listing


def test_a_folder_without_releases_has_none(tmp_path: Path) -> None:
    assert listing.list_releases(str(tmp_path)) == ([], {})


def test_releases_are_listed_by_age_and_a_damaged_one_hides_no_other(three: str) -> None:
    Path(three, "second", "manifest.json").write_text('{"format": "namr-release"')
    Path(three, "a folder").mkdir()
    Path(three, "a folder", "manifest.json").write_text("{}")
    of_all = listing.list_releases(three)
    assert [manifest.release_id for manifest in of_all.manifests] == ["first", "third"]
    assert set(of_all.damaged) == {"second", "a folder"}
    assert "manifest.json is damaged" in str(of_all.damaged["second"])
