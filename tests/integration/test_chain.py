"""The whole system on S3, by `ray job submit`, on the stack that `make stack` starts: pack to search."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest

from infra import services
from namr.registry import registry
from namr.release import releases
from namr.store import storage
from tests import canaries

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.mlflow, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


class Stack(NamedTuple):
    cluster: services.RayCluster
    root_uri: str
    tracking_uri: str
    told: dict[str, str]
    """What each job said."""


@pytest.fixture
def stack(ray_stack: services.RayCluster, s3: str, mlflow_server: services.MlflowServer) -> Stack:
    return Stack(ray_stack, s3, mlflow_server.tracking_uri, {})


def submit(stack: Stack, job: str, *flags: str) -> str:
    """What `ray job submit --working-dir . -- python jobs/<job>.py ...` said; it has to end well."""
    words = [
        *(str(services.SCRIPTS_PATH / "ray"), "job", "submit", "--address", stack.cluster.dashboard_url),
        *("--working-dir", ".", "--", "python", f"jobs/{job}.py", *flags),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    stack.told[f"{len(stack.told)}: {job}"] = done.stdout + done.stderr
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_from_images_to_answers_on_s3(
    stack: Stack, object_store: services.ObjectStore, mlflow_server: services.MlflowServer, tmp_path: Path
) -> None:
    at = {
        name: storage.join(stack.root_uri, name)
        for name in ("train", "gallery", "runs", "embeddings", "releases")
    }
    for name, half in (("train", "first_half"), ("gallery", "second_half")):
        packing = ("--source", "digits", "--dataset-uri", at[name], "--classes", half)
        said = submit(
            stack, "pack", "--config", "jobs/configs/pack.toml", *packing, "--shard-bytes", "200000"
        )
        assert "5 classes" in said
    said = submit(
        stack, "train", "--config", "jobs/configs/train.toml", "--run-name", "chain",
        "--storage-uri", at["runs"],
        "--data.dataset-uri", at["train"], "--data.validation-uri", at["gallery"],
        "--model.backbone", "test_resnet", "--model.weights", "none", "--model.embedding-dim", "32",
        "--model.image-size-px", "32", "--batch.classes-per-batch", "5", "--training.num-steps", "8",
        "--training.evaluation-interval", "8", "--training.warmup-steps", "0", "--loader.num-workers", "0",
        "--workers.num-workers", "2", "--model-name", "chain",
    )  # fmt: skip
    assert "run chain is finished: chain 1 is step 8 of 8" in said
    registry.connect(stack.tracking_uri).promote("chain")
    places = ("--dataset-uri", at["gallery"], "--embeddings-uri", at["embeddings"])
    model = ("--model", "models:/chain@champion")
    said = submit(stack, "extract", "--config", "jobs/configs/extract.toml", *places, *model)
    assert "896 embedded, 0 refused" in said
    index = ("--releases-uri", at["releases"], "--build.index-key", "IVF8,SQ8")
    said = submit(stack, "build_index", "--config", "jobs/configs/build_index.toml", *places, *model, *index)
    assert "896 indexed" in said
    said = submit(
        stack, "evaluate", "--config", "jobs/configs/evaluate.toml", "--dataset-uri", at["gallery"],
        "--models", "chain=models:/chain@champion", "--embeddings-uri", at["embeddings"], "--no-raw-pixels",
        "--no-untrained",
    )  # fmt: skip
    assert "896 images of 5 classes" in said
    said = submit(stack, "reindex", "--config", "jobs/configs/reindex.toml", *places, *model, *index)
    assert "published release" in said
    assert "896 of 896 images (0 embedded now" in said
    manifest = releases.open_release(at["releases"]).manifest
    assert (manifest.model_name, manifest.model_version) == ("chain", "1")
    check_service(stack, at["releases"], tmp_path, manifest.release_id)
    secrets = {
        "the store's secret key": object_store.secret_key,
        "MLflow's password": canaries.MLFLOW_PASSWORD,
    }
    logs = [path / "session_latest" / "logs" for path in stack.cluster.session_paths]
    traces = canaries.traces(
        secrets, texts=stack.told, folders=[mlflow_server.folder, *logs], store=object_store
    )
    assert traces == []


def check_service(stack: Stack, releases_uri: str, folder: Path, release_id: str) -> None:
    """jobs/serve.py answers for an item of the release."""
    command = [sys.executable, "jobs/serve.py", "--config", "jobs/configs/serve.toml"]
    command += [
        "--releases-uri",
        releases_uri,
        "--port",
        "0",
        "--cache-folder",
        str(folder),
    ]
    command += ["--tracking-uri", stack.tracking_uri]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = line.split()[-1]
            item = json.load(urllib.request.urlopen(f"{address}/items?num=1", timeout=30))["items"][0]
            body = json.dumps({"key": item["key"], "k": 5}).encode()
            request = urllib.request.Request(
                f"{address}/search/key", body, {"Content-Type": "application/json"}
            )
            answer = json.load(urllib.request.urlopen(request, timeout=30))
        finally:
            process.terminate()
            process.wait(20)
    assert release_id in line
    assert len(json.dumps(answer)) > 100
