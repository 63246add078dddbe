"""Constants are found, kept and refused by their files."""

from dataclasses import replace
from pathlib import Path

import pytest

from namr.errors import ConfigError, ManifestError
from namr.plan import constants


def test_without_a_file_those_that_come_with_namr_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = constants.find(None)
    assert known.source == "those that come with namr"
    assert known.constants.machine and known.constants.num_vectors >= 20_000
    assert {"Flat", "SQ8", "PQ"} == set(known.constants.codes)


def test_a_calibration_of_this_folder_is_used_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = replace(constants.find(None).constants, machine="mine")
    constants.write(constants.DEFAULT_PATH, mine)
    assert constants.find(None) == (mine, "namr-plan.json")
    constants.write(Path("other.json"), replace(mine, machine="other"))
    assert constants.find(Path("other.json")).constants.machine == "other"


def test_a_file_that_is_missing_or_none_of_ours_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: there is no such file; with --calibrate"):
        constants.find(tmp_path / "nowhere.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"x\.json is not a namr-plan-constants"):
        constants.find(tmp_path / "x.json")
    for path in (tmp_path, tmp_path / "no folder" / "x.json"):
        with pytest.raises(ConfigError, match="can't be written"):
            constants.check_writable(path)
