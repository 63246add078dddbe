"""Training on two nodes that really have a network between them: namespaces, veth pairs, a bridge."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from infra import network, services

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


BUCKET = "namr"


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


class Job:
    """`python <words>` submitted with `folder` as its working directory."""

    def __init__(self, two_nodes: TwoNodes, folder: Path, *words: str) -> None:
        self.log_path = folder.parent / f"{'-'.join(words[-1:]).replace('/', '-')}.log"
        ray = [str(services.SCRIPTS_PATH / "ray"), "job", "submit"]
        ray += ["--address", two_nodes.cluster.dashboard_url, "--working-dir", str(folder), "--", "python"]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen([*ray, *words], stdout=log, stderr=subprocess.STDOUT)

    def result(self, *, timeout_s: float) -> Any:
        """What the job printed as JSON after the word SAID; it has to succeed."""
        try:
            status = self.process.wait(timeout_s)
        finally:
            self.process.kill()
        log = self.log_path.read_text()
        assert status == 0, log[-6000:]
        return json.loads(next(line.partition("SAID ")[2] for line in log.splitlines() if "SAID " in line))


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
        print("SAID " + json.dumps(found), flush=True)

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
    found = Job(two_nodes, tmp_path / "job", "ddp.py", str(tmp_path)).result(timeout_s=240)
    assert {address for address, _, _ in found} == {node.host for node in two_nodes.nodes}
    assert [gradient for _, gradient, _ in found] == [[[1.5, 1.5, 1.5]]] * 2  # the mean of 1 and 2
    assert {backend for _, _, backend in found} == {"gloo"}


PACK_AND_FIT = """
import json, sys
from pathlib import Path
from namr import packing, training
from namr.learning import TrainingConfig
from namr.lessons import DataConfig
from namr.losses import LossConfig
from namr.model import ModelConfig
from namr.packing import PackingConfig
from namr.reading import LoaderConfig
from namr.sampling import PKConfig
from namr.workers import WorkersConfig

bucket, folder, run_name = sys.argv[1:]
packing.pack(PackingConfig(source="digits", dataset_uri=f"{bucket}/digits", shard_bytes=200_000))
fitted = training.fit(
    training.TrainJobConfig(
        run_name=run_name,
        storage_uri=f"{bucket}/runs",
        data=DataConfig(uri=f"{bucket}/digits", held_out_share=0.4),
        batch=PKConfig(classes_per_batch=4, samples_per_class=4, seed=1),
        model=ModelConfig(backbone="test_resnet", weights="none", embedding_dim=16, image_size_px=32),
        loss=LossConfig(base="contrastive"),
        training=TrainingConfig(num_steps=60, evaluation_interval=60, checkpoint_interval=10, seed=3),
        loader=LoaderConfig(num_workers=0, cache_folder=Path(folder) / "cache"),
        workers=WorkersConfig(num_workers=2),
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
    )
)
print("SAID " + json.dumps([fitted.model_digest, fitted.num_steps, fitted.validation]), flush=True)
"""


def names_in_store(two_nodes: TwoNodes, prefix: str) -> list[str]:
    with closing(two_nodes.store.client()) as client:
        listed = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [each["Key"] for each in listed.get("Contents", [])]


def test_a_node_that_dies_in_training_and_comes_back_changes_nothing(
    two_nodes: TwoNodes, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "fit.py").write_text(PACK_AND_FIT)
    arguments = ("fit.py", f"s3://{BUCKET}", str(tmp_path))
    undisturbed = Job(two_nodes, folder, *arguments, "undisturbed").result(timeout_s=300)

    job = Job(two_nodes, folder, *arguments, "disturbed")
    deadline = time.monotonic() + 200
    while not names_in_store(two_nodes, "runs/disturbed/step-"):
        assert job.process.poll() is None, job.log_path.read_text()[-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    two_nodes.cluster.programs[-1].kill()
    assert names_in_store(two_nodes, "runs/disturbed/result.json") == []
    two_nodes.cluster.add(two_nodes.nodes[1])
    assert job.result(timeout_s=300) == undisturbed
