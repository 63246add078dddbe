"""Training on two nodes that really have a network between them: namespaces, veth pairs, a bridge."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from infra import network, services

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


class TwoNodes(NamedTuple):
    cluster: services.RayCluster
    store: services.ObjectStore
    addresses: tuple[str, str]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """A Ray with one node in each of two namespaces, and an S3 server on the bridge between them."""
    folder = tmp_path_factory.mktemp("two-nodes")
    with ExitStack() as exits:
        try:
            net = exits.enter_context(network.bridged_nodes(2))
        except network.Unavailable as reason:
            pytest.skip(str(reason))
        store = exits.enter_context(services.object_store(folder / "store", host=net.gateway))
        environment = {**store.environment, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        ray_nodes = [services.RayNode(host=node.address, prefix=node.prefix) for node in net.nodes]
        cluster = exits.enter_context(
            services.ray_cluster(folder / "ray", nodes=ray_nodes, environment=environment)
        )
        yield TwoNodes(cluster, store, (net.nodes[0].address, net.nodes[1].address))


def submit(two_nodes: TwoNodes, folder: Path, *words: str, timeout_s: float) -> str:
    """Run `python <words>` as a job with `folder` as its working directory; its log."""
    command = [
        *(str(services.SCRIPTS_PATH / "ray"), "job", "submit", "--address", two_nodes.cluster.dashboard_url),
        *("--working-dir", str(folder), "--", "python", *words),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


DDP_OVER_GLOO = """
import json, sys
import ray, ray.train, ray.train.torch, torch

def work(config):
    torch.manual_seed(0)
    model = ray.train.torch.prepare_model(torch.nn.Linear(3, 1, bias=False))
    rank = ray.train.get_context().get_world_rank()
    model(torch.full((1, 3), float(rank + 1))).sum().backward()
    gradient = model.module.weight.grad
    address = ray.util.get_node_ip_address()
    found = [None, None]
    torch.distributed.all_gather_object(found, (address, gradient.tolist(), torch.distributed.get_backend()))
    if rank == 0:
        print("FOUND " + json.dumps(found), flush=True)

ray.init()
ray.train.torch.TorchTrainer(
    work,
    scaling_config=ray.train.ScalingConfig(num_workers=2, placement_strategy="STRICT_SPREAD"),
    run_config=ray.train.RunConfig(name="gloo", storage_path=sys.argv[1]),
).fit()
"""


def test_gradients_are_averaged_over_a_network(two_nodes: TwoNodes, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "ddp.py").write_text(DDP_OVER_GLOO)
    log = submit(two_nodes, tmp_path / "job", "ddp.py", str(tmp_path), timeout_s=240)
    line = next(line for line in log.splitlines() if "FOUND " in line)
    found = json.loads(line.partition("FOUND ")[2])
    assert {address for address, _, _ in found} == set(two_nodes.addresses)
    assert [gradient for _, gradient, _ in found] == [[[1.5, 1.5, 1.5]]] * 2  # the mean of 1 and 2
    assert {backend for _, _, backend in found} == {"gloo"}
