"""`namr demo` as a person runs it: the chain, again with the search page until Ctrl-C, on photographs."""

import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from infra import services

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NAMR = str(services.SCRIPTS_PATH / "namr")


def answers(url: str) -> bytes:
    """What an address says, waiting half a minute for a server that is starting."""
    for _ in range(60):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return bytes(answer.read())
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} does not answer")


def said_line(log_path: Path, pattern: str, process: subprocess.Popen[bytes]) -> str:
    """The first group of a pattern, once it stands in a log."""
    for _ in range(600):
        text = re.sub(r"\s+", " ", log_path.read_text())
        if found := re.search(pattern, text):
            return found[1]
        assert process.poll() is None, text[-3000:]
        time.sleep(0.5)
    raise AssertionError(f"{pattern!r} was not said in 300 s: {log_path.read_text()[-3000:]}")


def test_the_demo_runs_goes_on_serves_and_ends(tmp_path: Path) -> None:
    command = [NAMR, "demo", "--folder", str(tmp_path), "--num-steps", "10"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    first = subprocess.run(
        [*command, "--no-serve"], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    said = re.sub(r"\s+", " ", first.stdout)
    for wanted in (
        "230 classes to learn from, 207 never seen; 2622 images packed now",
        "and the champion",
        "1242 images in 4 merged parts of IVF16,Flat",
        "recall@10",
    ):
        assert wanted in said
    assert "flatter" not in said  # of 230 classes 46 are spared for validation
    for row in ("raw pixels", "untrained", "lambda 0", "NAMR"):
        assert row in (tmp_path / "photographs" / "report.html").read_text()

    log_path = tmp_path / "second.log"
    with log_path.open("wb") as log:
        second = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        page = said_line(log_path, r"search page: .*? on ?(http://[\d.:]+)", second)
        mlflow = said_line(log_path, r"MLflow UI: (http://[\d.:]+)", second)
        assert b"<title>" in answers(page)
        assert b'"key"' in answers(f"{page}/items?num=1")
        assert b"MLflow" in answers(mlflow)
        text = re.sub(r"\s+", " ", log_path.read_text())
        assert "0 images packed now" in text
        assert "(was there)" in text
    finally:
        second.send_signal(signal.SIGINT)
        code = second.wait(60)
    assert code == 0, log_path.read_text()[-3000:]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(mlflow, timeout=5)


@pytest.mark.soak
def test_the_demo_takes_a_folder_of_photographs(
    tmp_path: Path, shared_data: Path, shared_weights: Path
) -> None:
    for split, num_classes in (("train", 22), ("test", 8)):
        for of_class in sorted((shared_data / "grocery81" / split).iterdir())[:num_classes]:
            photographs = tmp_path / "photos" / split / of_class.name
            photographs.mkdir(parents=True)
            for picture in sorted(of_class.iterdir())[:6]:
                shutil.copyfile(picture, photographs / picture.name)
    weights = shared_weights / "tf_efficientnet_lite0.safetensors"
    command = [NAMR, "demo", "--data", str(tmp_path / "photos"), "--folder", str(tmp_path / "out")]
    ran = subprocess.run(
        [*command, "--weights", str(weights), "--num-steps", "20", "--no-serve"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    said = re.sub(r"\s+", " ", ran.stdout)
    for wanted in (
        "22 classes to learn from, 8 never seen",
        "48 images in 4 merged parts of Flat",
        "compared",
    ):
        assert wanted in said
    assert "flatter" not in said
    (report,) = (tmp_path / "out").glob("*/report.html")
    for row in ("raw pixels", "untrained", "lambda 0", "NAMR"):
        assert row in report.read_text()
