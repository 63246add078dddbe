"""Tracking URIs: which one holds, which are refused."""

from pathlib import Path

import pytest

from namr.errors import ConfigError
from namr.registry import tracking


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"])
def test_the_file_store_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"expected http\(s\)://host:port or sqlite:///path"):
        tracking.resolve(uri)


def test_the_tracking_uri_comes_from_the_argument_then_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.resolve(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.resolve(None) == "http://mlflow:5000"
    assert tracking.resolve("sqlite:///runs/m.db") == f"sqlite:///{tmp_path}/runs/m.db"
