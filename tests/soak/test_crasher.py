"""The crasher as it is run by hand: nothing is lost and nothing is there twice, whatever was killed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.acts import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.s3]


def crash(*flags: str, timeout_s: float) -> tuple[int, str]:
    """How many were killed, and what was told; everything has to have held."""
    command = [sys.executable, "-m", "tests.soak.crasher", *flags]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-8000:]
    found = re.match(r"(\d+) kills", done.stdout)
    assert found, done.stdout
    return int(found[1]), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_and_the_store_may_die_at_any_time() -> None:
    flags = ("--seed", "3", "--minutes", "0.25", "--every-s", "1", "--victims", "driver", "store")
    num, said = crash(*flags, timeout_s=880)
    assert num >= 2, said
    assert "| command | stage | all | driver |" in said


@pytest.mark.soak
@pytest.mark.timeout(8 * 3600)
def test_a_hundred_kills_in_every_stage_lose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--seed", "0", "--each", "100", "--minutes", "450", "--worlds", "3")
    num, said = crash(*flags, "--tally", str(tmp_path / "kills.jsonl"), timeout_s=7.9 * 3600)
    with capsys.disabled():
        print(said)
    assert num >= 100
    assert not re.search(r"^\| \w+ \| [\w ]+ \|  \|", said, re.MULTILINE), "no stage was left out"
