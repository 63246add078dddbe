"""The object store, the MLflow server and the Ray that namr runs beside, as context managers.

All of them are processes on free ports of `host` (127.0.0.1 unless said otherwise), with what they store
under a folder of the caller's, ended when the context ends. None of this is meant for production: there the
object store is a cloud's, and Ray runs on Kubernetes (cluster/).
"""

import http.client
import json
import secrets
import shutil
import sysconfig
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from infra.processes import Program, free_ports

REGION = "us-east-1"
NUM_STORE_PORTS = 9
SCRIPTS_PATH = Path(sysconfig.get_path("scripts"))
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # said on purpose: ray.init would otherwise write a token and ask for it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
}


@dataclass(frozen=True, kw_only=True)
class ObjectStore:
    """A running S3 server and the credentials that it was started with."""

    endpoint: str
    access_key: str
    secret_key: str
    program: Program | None = field(default=None, repr=False, compare=False)
    """None where it was started by somebody else"""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it, for namr.store, boto3 and pyarrow alike."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def client(self) -> Any:
        """A boto3 client of this store; the caller closes it."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(s3={"addressing_style": "path"}),
        )

    def create_bucket(self, name: str) -> str:
        """Make the bucket if it isn't there; its URI."""
        with closing(self.client()) as client:
            there = (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists)
            with suppress(*there):
                client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def delete_bucket(self, name: str) -> None:
        """Remove the bucket and all that is in it, and so free the volumes that it held."""
        with closing(self.client()) as client:
            client.delete_bucket(Bucket=name)


@dataclass(frozen=True, kw_only=True)
class MlflowServer:
    """A running MLflow server, and the folder with its database and log."""

    tracking_uri: str
    folder: Path
    program: Program | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class RayNode:
    """One node of a Ray to start; `prefix` comes before its command, say to run it in a network namespace."""

    num_cpus: float = 1
    num_gpus: int = 0
    host: str = "127.0.0.1"
    object_store_bytes: int = 200_000_000
    prefix: tuple[str, ...] = ()


def http_status(url: str) -> int | None:
    """The status that `url` answers with, None when nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, http.client.HTTPException):
        return None


@contextmanager
def object_store(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    access_key: str | None = None,
    secret_key: str | None = None,
    ports: Sequence[int] | None = None,
) -> Iterator[ObjectStore]:
    """SeaweedFS with its data under `folder`; keys are made up unless given.

    ports: the nine that it listens on, the first for S3; for one that is started again where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store_ports = list(ports or free_ports(NUM_STORE_PORTS))
    s3_port = store_ports[0]
    store = ObjectStore(
        endpoint=f"http://{host}:{s3_port}",
        access_key=access_key or secrets.token_hex(10),
        secret_key=secret_key or secrets.token_hex(20),
    )
    names = ("s3", "master", "volume", "filer", "admin")
    command = [
        str(SCRIPTS_PATH / "weed"),
        "mini",
        f"-dir={folder}",
        f"-ip={host}",
        f"-ip.bind={host}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-admin.ui=false",
        "-webdav=false",
        "-master.telemetry=false",
        # Each bucket takes a volume of its own, of at most free disk / this size in all; 1 GiB unless said.
        "-master.volumeSizeLimitMB=64",
        *(f"-{name}.port={port}" for name, port in zip(names, store_ports, strict=False)),
        *(f"-{name}.port.grpc={port}" for name, port in zip(names[:4], store_ports[5:], strict=True)),
    ]
    with Program(
        "the object store (weed mini)",
        command,
        log_path=folder / "weed.log",
        environment={"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key},
        folder=folder,
    ) as program:
        # Without a signature a ready server says 403; before that it refuses the connection or says 503.
        program.wait_until(lambda: http_status(store.endpoint) in (200, 403), timeout_s=60)
        yield replace(store, program=program)


@contextmanager
def mlflow_server(
    folder: Path, store: ObjectStore | None = None, *, bucket: str = "mlflow", host: str = "127.0.0.1"
) -> Iterator[MlflowServer]:
    """MLflow on SQLite under `folder`; artifacts in `store`'s bucket (made here), or in `folder` without one.

    Clients need no S3 credentials: the server passes artifacts through.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    artifacts = f"{store.create_bucket(bucket)}/artifacts" if store else str(folder / "artifacts")
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    if store:
        environment |= {**store.environment, "MLFLOW_S3_ENDPOINT_URL": store.endpoint}
    command = [
        *(str(SCRIPTS_PATH / "mlflow"), "server", "--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", artifacts),
    ]
    with Program(
        "the MLflow server", command, log_path=folder / "mlflow.log", environment=environment, folder=folder
    ) as program:
        tracking_uri = f"http://{host}:{port}"
        program.wait_until(lambda: http_status(f"{tracking_uri}/health") == 200, timeout_s=120)
        yield MlflowServer(tracking_uri=tracking_uri, folder=folder, program=program)


def ray_node_ports(dashboard_url: str) -> set[int]:
    """The ports of the raylets that the dashboard counts as alive; empty while it does not answer."""
    try:
        with urllib.request.urlopen(f"{dashboard_url}/nodes?view=summary", timeout=5) as answer:
            raylets = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
    except (OSError, http.client.HTTPException, ValueError):
        return set()
    return {int(raylet["nodeManagerPort"]) for raylet in raylets if raylet.get("state") == "ALIVE"}


class RayCluster:
    """A running Ray: `address` for ray.init and RAY_ADDRESS, `dashboard_url` for `ray job submit`.

    Made by `ray_cluster`. Nodes can be added, and killed as a power cut would.
    """

    def __init__(self, head: RayNode, *, folder: Path, environment: Mapping[str, str]) -> None:
        gcs_port, dashboard_port = free_ports(2)
        self.address = f"{head.host}:{gcs_port}"
        self.dashboard_url = f"http://{head.host}:{dashboard_port}"
        self._folder = folder
        path = f"{SCRIPTS_PATH}:/usr/local/bin:/usr/bin:/bin:/usr/sbin"  # `python` is this environment's
        self._environment = {"PATH": path, **RAY_ENVIRONMENT, **environment}
        self._head_options = [
            *("--head", f"--port={gcs_port}", "--include-dashboard=true"),
            *(f"--dashboard-host={head.host}", f"--dashboard-port={dashboard_port}"),
            f"--ray-client-server-port={free_ports(1)[0]}",
        ]
        self.programs: list[Program] = []
        """One per node, the head first."""
        self.session_paths: list[Path] = []
        """Where each node keeps its logs and sockets."""

    def add(self, node: RayNode) -> Program:
        """Start one more node and wait until it is counted; the first one is the head."""
        names = (
            *("node-manager-port", "object-manager-port", "metrics-export-port"),
            *("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
        )
        ports = free_ports(len(names))
        joining = [f"--address={self.address}", "--include-log-monitor=false"]
        # A node that shares the folder of another's session removes job files that the other still uses.
        session_path = Path(tempfile.mkdtemp(prefix="namr-ray-", dir="/tmp"))
        self.session_paths.append(session_path)
        command = [
            *(*node.prefix, str(SCRIPTS_PATH / "ray"), "start", "--block", "--disable-usage-stats"),
            f"--node-ip-address={node.host}",
            f"--temp-dir={session_path}",
            f"--num-cpus={node.num_cpus:g}",
            f"--num-gpus={node.num_gpus}",
            f"--object-store-memory={node.object_store_bytes}",
            *(f"--{name}={port}" for name, port in zip(names, ports, strict=True)),
            *(joining if self.programs else self._head_options),
        ]
        number = len(self.programs)
        log_path = self._folder / f"ray-{number}.log"
        program = Program(f"node {number} of Ray", command, log_path=log_path, environment=self._environment)
        self.programs.append(program)
        program.wait_until(lambda: ports[0] in ray_node_ports(self.dashboard_url), timeout_s=120)
        return program

    def stop(self) -> None:
        """End all nodes, the head last."""
        for program in reversed(self.programs):
            program.stop()
        for session_path in self.session_paths:
            shutil.rmtree(session_path, ignore_errors=True)


@contextmanager
def ray_cluster(
    folder: Path, *, nodes: Sequence[RayNode], environment: Mapping[str, str] | None = None
) -> Iterator[RayCluster]:
    """A Ray of `nodes`, the first its head with dashboard and job API.

    `environment` reaches every job and worker (say AWS_* and MLFLOW_TRACKING_URI). Logs of `ray start` go to
    `folder`. Each node's session lies in a short-named temporary folder of its own, as its unix sockets may
    not have more than 107 characters, and is removed at the end.
    """
    cluster = RayCluster(nodes[0], folder=folder, environment=environment or {})
    try:
        for node in nodes:
            cluster.add(node)
        yield cluster
    finally:
        cluster.stop()
