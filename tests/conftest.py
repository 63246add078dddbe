"""Fixtures that several test modules share: real servers, a real Ray, a browser, the shared images.

Servers are started once per session and only when a test asks for them.
"""

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import services
from tests import canaries

ROOT = Path(__file__).parents[1]

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # before numpy and torch are loaded: the test machine has two cores
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("RAY_ADDRESS", None)
# Functions of a test module that run in Ray's workers or in spawned processes are imported there by name.
os.environ["PYTHONPATH"] = str(ROOT)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.ObjectStore]:
    """A SeaweedFS of its own; AWS_* of the test process point to it for the rest of the session."""
    folder = tmp_path_factory.mktemp("object-store")
    with services.object_store(folder) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        yield store


@pytest.fixture
def s3(object_store: services.ObjectStore) -> Iterator[str]:
    """The URI of a bucket that is empty and this test's alone."""
    name = f"test-{uuid.uuid4().hex}"
    yield object_store.create_bucket(name)
    object_store.delete_bucket(name)


@pytest.fixture(scope="session")
def mlflow_server(
    object_store: services.ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[services.MlflowServer]:
    """A real MLflow server with its artifacts on S3; `.tracking_uri`."""
    with services.mlflow_server(tmp_path_factory.mktemp("mlflow"), object_store) as server:
        yield server


@pytest.fixture(scope="session")
def ray_local(object_store: services.ObjectStore) -> Iterator[None]:
    """This process connected to a Ray of its own, through namr's one way to reach Ray.

    The object store comes first: Ray's workers inherit this environment, and with it the way to the store.
    """
    from namr import ray_connection

    assert os.environ["AWS_ENDPOINT_URL"] == object_store.endpoint
    ray_connection.connect(None, num_cpus=2)
    yield
    ray_connection.disconnect()


@pytest.fixture(scope="session")
def ray_stack(
    object_store: services.ObjectStore,
    mlflow_server: services.MlflowServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[services.RayCluster]:
    """A two-node Ray as `make stack` starts it, for `ray job submit`; its jobs reach store and MLflow.

    The test process stays outside of it, so that it can live beside ray_local.
    """
    address = mlflow_server.tracking_uri.replace("://", f"://people:{canaries.MLFLOW_PASSWORD}@")
    environment = {**object_store.environment, "MLFLOW_TRACKING_URI": address}
    nodes = [services.RayNode(), services.RayNode()]
    with services.ray_cluster(
        tmp_path_factory.mktemp("ray"), nodes=nodes, environment=environment
    ) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real image sets, or a skip where the machine has none."""
    folder = Path(os.environ.get("NAMR_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real images: {folder} is not there (set NAMR_TEST_DATA to a folder that has them)")
    return folder


@pytest.fixture(scope="session")
def shared_weights(shared_data: Path) -> Path:
    """The folder with pre-trained weights beside the real image sets, or a skip."""
    folder = shared_data.parent / "weights"
    if not folder.is_dir():
        pytest.skip(f"pre-trained weights: {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium for browser tests, or a skip where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on PATH (.ci/run installs it; by hand: apt-get install chromium)")


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter of this environment, for tests that start programs."""
    return sys.executable
