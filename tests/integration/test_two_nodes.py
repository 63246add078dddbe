"""Training on two nodes that really have a network between them: namespaces, veth pairs, a bridge."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from infra import network, services
from tests import submitted
from tests.submitted import Job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


BUCKET = "namr"
ROOT = Path(__file__).parents[2]


class TwoNodes(NamedTuple):
    cluster: services.RayCluster
    store: services.ObjectStore
    nodes: tuple[services.RayNode, services.RayNode]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """A Ray with one core in each of two namespaces, and an S3 server on the bridge between them."""
    folder = tmp_path_factory.mktemp("two-nodes")
    with ExitStack() as exits:
        try:
            net = exits.enter_context(network.bridged_nodes(2))
        except network.Unavailable as reason:
            pytest.skip(str(reason))
        store = exits.enter_context(services.object_store(folder / "store", host=net.gateway))
        environment = {**store.environment, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        first, second = (services.RayNode(host=node.address, prefix=node.prefix) for node in net.nodes)
        cluster = exits.enter_context(
            services.ray_cluster(folder / "ray", nodes=[first, second], environment=environment)
        )
        store.create_bucket(BUCKET)
        yield TwoNodes(cluster, store, (first, second))


def names_in_store(two_nodes: TwoNodes, prefix: str) -> list[str]:
    with closing(two_nodes.store.client()) as client:
        listed = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [each["Key"] for each in listed.get("Contents", [])]


def train(two_nodes: TwoNodes, folder: Path, run_name: str) -> Job:
    """60 steps on 6 of the 10 digits, 2 workers: one on each node, as a node has one core."""
    words = submitted.small_training(
        num_steps=60,
        run_name=run_name,
        storage_uri=f"s3://{BUCKET}/runs",
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        data__dataset_uri=f"s3://{BUCKET}/digits",
        training__checkpoint_interval="10",
        loader__cache_folder=str(folder / "cache"),
        workers__num_workers="2",
    )
    return Job(two_nodes.cluster, ROOT, folder / f"{run_name}.log", *words)


def result_of(two_nodes: TwoNodes, run_name: str) -> dict[str, Any]:
    with closing(two_nodes.store.client()) as client:
        stored = client.get_object(Bucket=BUCKET, Key=f"runs/{run_name}/result.json")["Body"].read()
    return {
        name: json.loads(stored)[name] for name in ("model_digest", "validation", "best_step", "num_steps")
    }


def test_a_node_that_dies_in_training_and_comes_back_changes_nothing(
    two_nodes: TwoNodes, tmp_path: Path
) -> None:
    pack = ("jobs/pack.py", "--source", "digits", "--dataset-uri", f"s3://{BUCKET}/digits")
    Job(two_nodes.cluster, ROOT, tmp_path / "pack.log", *pack).log(timeout_s=200)
    train(two_nodes, tmp_path, "undisturbed").log(timeout_s=300)

    job = train(two_nodes, tmp_path, "disturbed")
    deadline = time.monotonic() + 200
    while not names_in_store(two_nodes, "runs/disturbed/step-"):
        assert job.is_running(), job.log(timeout_s=1)
        assert time.monotonic() < deadline
        time.sleep(0.1)
    two_nodes.cluster.programs[-1].kill()
    assert names_in_store(two_nodes, "runs/disturbed/result.json") == []
    two_nodes.cluster.add(two_nodes.nodes[1])
    job.log(timeout_s=300)
    assert result_of(two_nodes, "disturbed") == result_of(two_nodes, "undisturbed")
