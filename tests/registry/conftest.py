"""One MLflow on SQLite and one saved model for all tests of the registry: each takes seconds to make."""

from pathlib import Path

import pytest

from namr.registry import registry
from namr.registry.registry import Registry
from tests.small_model import save_model


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return registry.connect(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/new/mlflow.db")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)
