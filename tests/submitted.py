"""A job as people submit it: `ray job submit`, with a folder as its working directory; and one to submit."""

import subprocess
from pathlib import Path

from infra import services


class Job:
    """`python <words>` submitted to a cluster."""

    def __init__(self, cluster: services.RayCluster, folder: Path, log_path: Path, *words: str) -> None:
        self._log_path = log_path
        ray = [str(services.SCRIPTS_PATH / "ray"), "job", "submit"]
        ray += ["--address", cluster.dashboard_url, "--working-dir", str(folder), "--", "python"]
        with log_path.open("wb") as log:
            self._process = subprocess.Popen([*ray, *words], stdout=log, stderr=subprocess.STDOUT)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def end(self, *, timeout_s: float) -> tuple[int, str]:
        """The status of the whole job, and its log."""
        try:
            status = self._process.wait(timeout_s)
        finally:
            self._process.kill()
        return status, self._log_path.read_text()

    def log(self, *, timeout_s: float) -> str:
        """The log of the whole job, which has to succeed."""
        status, log = self.end(timeout_s=timeout_s)
        assert status == 0, log[-6000:]
        return log


_SMALL_TRAINING = {
    "data.held-out-share": "0.4",
    "batch.classes-per-batch": "4",
    "batch.samples-per-class": "4",
    "seed": "1",
    "model.backbone": "test_resnet",
    "model.weights": "none",
    "model.embedding-dim": "16",
    "model.image-size-px": "32",
    "loss.base": "contrastive",
    "loader.num-workers": "0",
}
"""A network of seconds on 6 of the 10 digits, by flag."""


def small_training(*, num_steps: int, **others: str | list[str]) -> list[str]:
    """The words that train it, examined at its end alone; others: flags by name, with "__" for a dot."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in others.items()}
    steps = {"training.num-steps": str(num_steps), "training.evaluation-interval": str(num_steps)}
    values = _SMALL_TRAINING | steps | named
    words = ["jobs/train.py"]
    for name, value in values.items():
        words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return words
