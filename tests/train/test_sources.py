"""One digest for the program of every worker; that ranks compare it is shown in test_culprits."""

import shutil
from pathlib import Path

import pytest
import torch

from namr.train import sources


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Another folder with the same namr."""
    folder = tmp_path / "namr"
    shutil.copytree(sources._NAMR, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_same_program_has_one_digest_wherever_it_lies(copied: Path) -> None:
    (copied / "train" / "notes.txt").write_text("no program")
    assert sources.digest(copied) == sources.digest()
    assert sources.difference(sources.digest(copied)) is None


def test_a_changed_line_or_another_torch_is_another_program(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (copied / "train" / "step.py").open("a") as file:
        file.write("\n")
    before, changed = sources.digest(), sources.digest(copied)
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert len({before, changed, sources.digest()}) == 3
    assert str(sources.difference(before)).startswith(
        "ranks [0] of 1 run another version of namr or of torch"
    )
