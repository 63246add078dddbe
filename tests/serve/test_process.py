"""The process that serves: its configuration, its one line, its end."""

import os
import re
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from namr import config
from namr.errors import ConfigError
from namr.serve.process import ServeConfig
from tests import small_release
from tests.serve.test_app import upload

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a release that a real model made, and the folder of the model."""
    root = tmp_path_factory.mktemp("served")
    return root, small_release.publish_with_model(root)


def test_a_config_that_is_wrong_names_its_field() -> None:
    for wrong in ({"port": 70000}, {"poll_interval_s": 0}, {"poll_interval_s": 31}, {"cache_bytes": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ServeConfig(releases_uri="somewhere", **wrong)


def job(*flags: str) -> subprocess.Popen[str]:
    command = [".venv/bin/python" if Path(ROOT, ".venv").exists() else "python", "jobs/serve.py", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )


@pytest.mark.slow
def test_the_job_serves_until_it_is_told_to_stop(published: tuple[Path, Path]) -> None:
    root, folder = published
    flags = [f"--releases-uri={root / 'releases'}", f"--model-folder={folder}"]
    process = job("--config", "jobs/configs/serve.toml", *flags, "--port=0", f"--cache-folder={root / 'c'}")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(
            r"serving release first \(80 items, model digits 1\) on (http://127\.0\.0\.1:\d+)\n", line
        )
        assert found, line + process.stderr.read()
        with httpx.Client(base_url=found[1], timeout=30) as client:
            assert upload(client, small_release.digit(5)).json()["hits"][0]["key"] == "digit/5"
            taken = job(*flags, f"--port={found[1].rpartition(':')[2]}")
            said = taken.communicate(timeout=120)[1]
            assert taken.returncode == 2
            assert "ConfigError: can't listen on 127.0.0.1 port" in said
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode in (0, -signal.SIGTERM), err
        assert "Traceback" not in err
    finally:
        process.kill()


@pytest.mark.slow
def test_the_job_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    process = job(f"--releases-uri={tmp_path}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.fullmatch(r"ManifestError: .* has no current release: .*\n", err), err


def test_wrong_flags_are_named() -> None:
    for flags, message in (
        (["--releases-ury=x"], "releases-ur"),
        (["--releases-uri=x", "--port=http"], "port"),
        ([], "releases-uri"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.load(ServeConfig, flags)
