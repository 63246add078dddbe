"""What training does when what it runs on fails: one job of three nodes, and one fault after the other.

    python -m tests.soak.faults --steps 20000

The nodes are network namespaces with a core each, the S3 server and the MLflow server are on the bridge
between them. The group is elastic, 1 to 3 workers. A fault waits until three workers train, happens, and is
over when they train on. At the end there is one MLflow run, and each step is there once. Then come the
shards: short jobs on a dataset of which one shard is gone, or cut off.

Not covered: the head's node (Ray itself ends with it), a network that loses a part of all packets.
"""

import argparse
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from infra import network, services
from infra.processes import Program, free_ports
from namr.registry import registry
from tests import submitted
from tests.soak import stack
from tests.submitted import Job

ROOT = Path(__file__).parents[2]
BUCKET = "namr"
_LOSS = "train/total"
_PATIENCE_S = 600.0


class Row(NamedTuple):
    """One line of the table."""

    component: str
    fault: str
    expected: str
    seen: str
    seconds: float
    """Until it had trained on, or until it was told."""


class Told(NamedTuple):
    """One step as MLflow has it."""

    at_s: float
    step: int
    num_workers: int


class Cluster:
    """Three nodes, S3 and MLflow, and what can happen to them."""

    def __init__(self, folder: Path, exits: ExitStack) -> None:
        self.folder, self._exits = folder, exits
        self.net = exits.enter_context(network.bridged_nodes(3))
        self._ports = free_ports(services.NUM_STORE_PORTS)
        self._of_store = exits.enter_context(ExitStack())
        self.store = self._of_store.enter_context(
            services.object_store(folder / "store", host=self.net.gateway, ports=self._ports)
        )
        self.store.create_bucket(BUCKET)
        self.mlflow = exits.enter_context(
            services.mlflow_server(folder / "mlflow", self.store, host=self.net.gateway)
        )
        environment = {
            **self.store.environment,
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": self.mlflow.tracking_uri,
        }
        self.nodes = [services.RayNode(host=node.address, prefix=node.prefix) for node in self.net.nodes]
        self.ray = exits.enter_context(
            services.ray_cluster(folder / "ray", nodes=self.nodes, environment=environment)
        )

    def job(self, name: str, *words: str) -> Job:
        return Job(self.ray, ROOT, self.folder / f"{name}.log", *words)

    def replace_last_node(self) -> None:
        """Start a node where the last one was."""
        self.ray.programs[-1].stop()
        self.ray.programs.pop()
        self.ray.add(self.nodes[-1])

    def leave_store(self) -> None:
        assert self.store.program is not None
        self.store.program.kill()

    def come_back_store(self) -> None:
        self._of_store.close()
        keys = {"access_key": self.store.access_key, "secret_key": self.store.secret_key}
        self.store = self._of_store.enter_context(
            services.object_store(self.folder / "store", host=self.net.gateway, ports=self._ports, **keys)
        )

    def node_id(self, address: str) -> str:
        with urllib.request.urlopen(f"{self.ray.dashboard_url}/nodes?view=summary", timeout=30) as answer:
            summary = json.load(answer)["data"]["summary"]
        (node_id,) = (
            str(node["raylet"]["nodeId"])
            for node in summary
            if node["ip"] == address and node["raylet"].get("state") == "ALIVE"
        )
        return node_id


class Watcher:
    """What MLflow has of a run, and when it was written."""

    def __init__(self, tracking_uri: str, run_name: str) -> None:
        self.runs, self._run_name = registry.connect(tracking_uri), run_name
        self._run_id: str | None = None

    def run_ids(self) -> list[str]:
        client = self.runs._client
        known = client.get_experiment_by_name("namr")
        found = client.search_runs([known.experiment_id]) if known else []
        return [run.info.run_id for run in found if run.info.run_name == self._run_name]

    def told(self) -> list[Told]:
        """In the order of the steps, which is that of the clock."""
        self._run_id = self._run_id or next(iter(self.run_ids()), None)
        if self._run_id is None:
            return []
        losses = self.runs._client.get_metric_history(self._run_id, _LOSS)
        workers = self.runs._client.get_metric_history(self._run_id, "train/num_workers")
        sizes = {each.step: int(each.value) for each in workers}
        return sorted(
            Told(each.timestamp / 1000, each.step, sizes[each.step]) for each in losses if each.step in sizes
        )

    def wait(self, job: Job, fits: Callable[[list[Told]], bool], what: str) -> list[Told]:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            told = self.told()
            if fits(told):
                return told
            if not job.is_running():
                raise AssertionError(f"the job ended before {what}:\n{job.end(timeout_s=1)[1][-5000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not happen within {_PATIENCE_S:g} s; last {told[-1:]}")
            time.sleep(1)


class Fault(NamedTuple):
    component: str
    name: str
    expected: str
    happen: Callable[[Cluster], None]
    """Returns when the fault is over, or the thing is gone."""
    num_workers: int
    """How many train when it is over."""
    restore: Callable[[Cluster], None] | None = None


def _worker_of(program: Program) -> int:
    raylet = stack._raylet(program)
    return next(pid for pid in stack._children(raylet) if "RayTrainWorker" in stack._title(pid))


def _kill_worker(cluster: Cluster) -> None:
    os.kill(_worker_of(cluster.ray.programs[1]), signal.SIGKILL)


def _kill_raylet(cluster: Cluster) -> None:
    os.kill(stack._raylet(cluster.ray.programs[-1]), signal.SIGKILL)


def _announce_end_of_node(cluster: Cluster) -> None:
    node_id = cluster.node_id(cluster.nodes[-1].host)
    subprocess.run(
        [
            *(str(services.SCRIPTS_PATH / "ray"), "drain-node", "--address", cluster.ray.address),
            *("--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", "spot", "--deadline-remaining-seconds", "90"),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, **services.RAY_ENVIRONMENT},
        timeout=120,
    )


def _no_more_memory(cluster: Cluster) -> None:
    pid = _worker_of(cluster.ray.programs[1])
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used, used))


def _unplug(cluster: Cluster) -> None:
    node = cluster.net.nodes[-1]
    node.unplug()
    time.sleep(30)
    node.plug()


def _without_store(cluster: Cluster) -> None:
    cluster.leave_store()
    time.sleep(10)
    cluster.come_back_store()


def _without_mlflow(cluster: Cluster) -> None:
    pids = cluster.mlflow.program.pids() if cluster.mlflow.program else []
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(60)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


FAULTS = {
    "mlflow": Fault("MLflow", "hangs for 60 s", "no step waits", _without_mlflow, 3),
    "worker": Fault("worker", "kill -9", "goes on from the last checkpoint, with three", _kill_worker, 3),
    "memory": Fault("worker", "gets no more memory", "fails, and is replaced", _no_more_memory, 3),
    "store": Fault("S3", "gone for 10 s", "waits, no worker is replaced", _without_store, 3),
    "link": Fault(
        "node's link", "down for 30 s", "goes on with two: Ray counts the node as lost",
        _unplug, 2, Cluster.replace_last_node,
    ),
    "raylet": Fault(
        "node", "kill -9 of its raylet", "goes on with two", _kill_raylet, 2, Cluster.replace_last_node
    ),
    "preemption": Fault(
        "node", "announced to be taken away in 90 s", "a checkpoint at once, goes on with two",
        _announce_end_of_node, 2, Cluster.replace_last_node,
    ),
}  # fmt: skip


def flags(cluster: Cluster, run_name: str, *, steps: int, dataset: str, workers: str = "1 3") -> list[str]:
    return submitted.small_training(
        num_steps=steps,
        run_name=run_name,
        storage_uri=f"s3://{BUCKET}/runs",
        tracking_uri=cluster.mlflow.tracking_uri,
        data__dataset_uri=f"s3://{BUCKET}/{dataset}",
        training__checkpoint_interval="100",
        loader__cache_folder=str(cluster.folder / "cache" / run_name),
        workers__num_workers=workers.split(),
        workers__max_failures="20",
        workers__resize_interval_s="15",
        workers__wait_s="240",
    )


def endure(cluster: Cluster, names: list[str], *, steps: int) -> list[Row]:
    """One job under all these faults."""
    job = cluster.job("train", *flags(cluster, "endures", steps=steps, dataset="digits"))
    watcher, rows = Watcher(cluster.mlflow.tracking_uri, "endures"), list[Row]()
    for name in names:
        fault = FAULTS[name]
        _say(f"{name}: waiting for three workers and a checkpoint")
        before = watcher.wait(job, lambda told: [each.num_workers for each in told[-5:]] == [3] * 5, name)
        began = time.time()
        _say(f"{name}: happens after step {before[-1].step}")
        fault.happen(cluster)
        last = watcher.told()[-1].step

        def trains_on(told: list[Told], last: int = last, fault: Fault = fault) -> bool:
            return bool(told) and told[-1].step >= last + 50 and told[-1].num_workers == fault.num_workers

        told = watcher.wait(job, trains_on, f"trains on after {name}")
        rows.append(_row(fault, told, began))
        _say(str(rows[-1]))
        if fault.restore:
            began = time.time()
            fault.restore(cluster)
            told = watcher.wait(job, lambda told: told[-1].num_workers == 3, f"grows again after {name}")
            again = Fault("node", "comes back", "goes on with three", fault.happen, 3)
            rows.append(_row(again, told, began))
            _say(str(rows[-1]))
    log = job.log(timeout_s=3600)
    steps_told = [each.step for each in watcher.told()]
    assert len(watcher.run_ids()) == 1, watcher.run_ids()
    assert steps_told == list(range(10, steps + 1, 10)), "a step is missing, or is there twice"
    _say(f"finished: {log.splitlines()[-1] if log else ''}")
    return rows


def _row(fault: Fault, told: list[Told], began: float) -> Row:
    """The longest time between two steps since the fault is how long it did not get on."""
    since = [began, *(each.at_s for each in told if each.at_s > began)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(since)]
    sizes = list(dict.fromkeys(each.num_workers for each in told if each.at_s > began))
    return Row(fault.component, fault.name, fault.expected, f"workers {sizes}", max(gaps, default=0.0))


def lose_shards(cluster: Cluster) -> list[Row]:
    """A shard that is gone, or is shorter than it was: told by name, and nothing is trained without it."""
    rows = []
    for fault in ("missing", "truncated"):
        pack = ("jobs/pack.py", "--source", "digits", "--dataset-uri", f"s3://{BUCKET}/{fault}")
        cluster.job(f"pack-{fault}", *pack).log(timeout_s=600)
        with closing(cluster.store.client()) as client:
            listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{fault}/")["Contents"]
            key = next(each["Key"] for each in listed if each["Key"].endswith(".tar"))
            if fault == "missing":
                client.delete_object(Bucket=BUCKET, Key=key)
            else:
                whole = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
                client.put_object(Bucket=BUCKET, Key=key, Body=whole[: len(whole) // 2])
        began = time.time()
        words = flags(cluster, fault, steps=200, dataset=fault, workers="1")
        words = [word.replace("max-failures=20", "max-failures=0") for word in words]
        status, log = cluster.job(fault, *words).end(timeout_s=900)
        errors = [line for line in log.splitlines() if re.search(r"Error: |failed: ", line)]
        _say(log[-1500:])
        assert status != 0 and any(key in line for line in errors), errors
        seen = next(line for line in errors if key in line)
        rows.append(Row("shard", fault, "ends, and names it", seen[:200], time.time() - began))
    return rows


def table(rows: list[Row]) -> str:
    head = "| component | fault | expected | seen | s until it trained on |\n| --- | --- | --- | --- | --- |"
    lines = [f"| {r.component} | {r.fault} | {r.expected} | {r.seen} | {r.seconds:.0f} |" for r in rows]
    return "\n".join([head, *lines])


def _say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def run(names: list[str], *, steps: int, shards: bool, folder: Path) -> list[Row]:
    with ExitStack() as exits:
        cluster = Cluster(folder, exits)
        pack = ("jobs/pack.py", "--source", "digits", "--dataset-uri", f"s3://{BUCKET}/digits")
        cluster.job("pack", *pack).log(timeout_s=600)
        rows = endure(cluster, names, steps=steps) if names else []
        return rows + (lose_shards(cluster) if shards else [])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--only", nargs="*", choices=[*FAULTS, "shards"], default=[*FAULTS, "shards"])
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="namr-faults-"))
    _say(f"in {folder}")
    names = [name for name in options.only if name != "shards"]
    print(table(run(names, steps=options.steps, shards="shards" in options.only, folder=folder)))


if __name__ == "__main__":
    main()
