"""The Kubernetes manifests: no unknown field, the real jobs with their real flags, nothing left dangling.

KubeRay's resources are checked against its published schemas (beside the checkout, or NAMR_TEST_SCHEMAS),
read as closed: the API server drops unknown fields without a word, so that a typo has to fail here. Core
kinds are checked with kubernetes-validate.
"""

import copy
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from tests import commands

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "cluster").glob("*.yaml"))
SCHEMAS = Path(os.environ.get("NAMR_TEST_SCHEMAS", ROOT.parent / "shared" / "schemas"))
KUBERNETES_VERSION = "1.31"
"""The oldest that the manifests are written for."""
HOME_IN_IMAGE = "/opt/namr/"

Resource = dict[str, Any]


def resources() -> list[tuple[str, Resource]]:
    return [
        (f"{path.name}:{resource['kind']}", resource)
        for path in PATHS
        for resource in yaml.safe_load_all(path.read_text())
        if resource
    ]


RESOURCES = resources()
KUBERAY = [(name, resource) for name, resource in RESOURCES if resource["apiVersion"] == "ray.io/v1"]
CORE = [(name, resource) for name, resource in RESOURCES if resource["apiVersion"] != "ray.io/v1"]


def named(cases: list[tuple[str, Resource]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("resource", [case[1] for case in cases], ids=[case[0] for case in cases])


def close(schema: Any) -> Any:
    """The schema with every object closed that lists its properties and doesn't say otherwise."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: close(value) for key, value in schema.items()}
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    return closed


def kuberay_errors(resource: Resource) -> list[str]:
    path = SCHEMAS / f"{resource['kind'].lower()}-v1.json"
    if not path.is_file():
        pytest.skip(f"KubeRay's schema {path} is not there (set NAMR_TEST_SCHEMAS to a folder that has it)")
    validator = jsonschema.Draft202012Validator(close(json.loads(path.read_text())))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(resource)]


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a resource."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def containers() -> list[dict[str, Any]]:
    return [
        container
        for _, resource in RESOURCES
        for node in walk(resource)
        for container in node.get("containers", [])
        if isinstance(container, dict)
    ]


def job_commands() -> list[commands.Command]:
    """Every command line of the manifests that runs a job, with the image's paths made this checkout's."""
    lines = [
        (name, shlex.split(node["entrypoint"]))
        for name, resource in KUBERAY
        for node in walk(resource)
        if "entrypoint" in node
    ]
    lines += [
        (name, [*container.get("command", []), *container.get("args", [])])
        for name, resource in CORE
        for node in walk(resource)
        for container in node.get("containers", [])
    ]
    found = [
        commands.Command(name, tuple(word.removeprefix(HOME_IN_IMAGE) for word in words))
        for name, words in lines
    ]
    return [command for command in found if command.job()]


def test_all_that_is_promised_is_there() -> None:
    kinds = {resource["kind"] for _, resource in RESOURCES}
    assert kinds >= {"RayCluster", "RayJob", "RayCronJob", "CronJob", "Deployment", "Service", "ConfigMap"}


@named(KUBERAY)
def test_a_resource_of_kuberay_has_no_unknown_field(resource: Resource) -> None:
    assert kuberay_errors(resource) == []


@named(KUBERAY)
def test_a_typo_in_a_resource_of_kuberay_is_found(resource: Resource) -> None:
    wrong = copy.deepcopy(resource)
    group = next(node for node in walk(wrong) if "headGroupSpec" in node)
    group["headGroupSpec"]["template"]["spec"]["containers"][0]["resource"] = {}
    assert any("'resource' was unexpected" in error for error in kuberay_errors(wrong))


@named(CORE)
def test_a_core_resource_is_valid(resource: Resource) -> None:
    kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)


@named(CORE)
def test_a_typo_in_a_core_resource_is_found(resource: Resource) -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**resource, "sepc": {}}, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize(
    "command", job_commands(), ids=lambda command: f"{command.source}:{command.job()[0]}"
)
def test_a_manifest_runs_a_real_job_with_real_flags(command: commands.Command) -> None:
    commands.check_job(command)


def test_training_the_night_and_search_are_run() -> None:
    scripts = {found[0] for command in job_commands() if (found := command.job())}
    assert scripts >= {"jobs/train.py", "jobs/reindex.py", "jobs/compact.py", "jobs/serve.py"}


def test_a_night_leaves_the_compaction_to_the_schedule_that_has_it() -> None:
    by_name = {resource["metadata"]["name"]: str(resource) for _, resource in RESOURCES}
    assert "jobs/compact.py" in by_name["namr-compact"]
    assert "--no-compact" in by_name["namr-nightly"]
    assert "--no-compact" not in by_name["namr-nightly-own-cluster"]


def test_every_container_has_the_one_image_and_says_what_it_needs() -> None:
    image = re.search(r"-t (\S+) ", (ROOT / "cluster" / "Dockerfile").read_text())
    assert image is not None
    for container in containers():
        assert container["image"] == image[1]
        assert set(container["resources"]) == {"requests", "limits"}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_no_secret_is_written_down() -> None:
    secret = re.compile(r"KEY|SECRET|TOKEN|PASSWORD")
    for _, resource in RESOURCES:
        assert resource["kind"] != "Secret"
        for node in walk(resource):
            if secret.search(str(node.get("name", ""))):
                assert "secretKeyRef" in node["valueFrom"]


def test_what_a_pod_refers_to_is_there_or_told_in_the_readme() -> None:
    config_maps = {
        resource["metadata"]["name"] for _, resource in RESOURCES if resource["kind"] == "ConfigMap"
    }
    readme = (ROOT / "cluster" / "README.md").read_text()
    told = dict(re.findall(r"kubectl create secret generic (\S+)((?:.*\\\n)*.*)", readme))
    for container in containers():
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in config_maps
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert f"--from-literal={reference['key']}=" in told[reference["name"]]
    for _, resource in KUBERAY:
        for node in walk(resource):
            if "authOptions" in node:
                assert "--from-literal=auth_token=" in told[node["authOptions"]["secretName"]]


def test_ports_probes_and_selectors_of_the_search_service_agree() -> None:
    by_kind = {resource["kind"]: resource for _, resource in RESOURCES}
    pod = by_kind["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (
        by_kind["Deployment"]["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    )
    assert by_kind["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert all(port["targetPort"] in ports for port in by_kind["Service"]["spec"]["ports"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    assert str(ports["http"]) in container["command"]


def test_ray_is_the_version_that_the_jobs_are_tested_with() -> None:
    versions = {
        node["rayVersion"] for _, resource in KUBERAY for node in walk(resource) if "rayVersion" in node
    }
    assert versions == {ray.__version__}


def test_the_nights_cant_overlap_by_schedule() -> None:
    by_name = {
        resource["metadata"]["name"]: resource["spec"] for _, resource in RESOURCES if "spec" in resource
    }
    night, own_cluster = by_name["namr-nightly"], by_name["namr-nightly-own-cluster"]
    for each in (night, by_name["namr-compact"]):
        assert each["concurrencyPolicy"] == "Forbid"
        assert each["jobTemplate"]["spec"]["backoffLimit"] == 0
    assert own_cluster["jobTemplate"].get("backoffLimit", 0) == 0
    assert {night.get("suspend", False), own_cluster.get("suspend", False)} == {True, False}


def test_the_image_copies_what_is_there_and_what_its_context_has() -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    copied = {
        word for line in re.findall(r"^COPY (.+) \S+$", dockerfile, flags=re.M) for word in line.split()
    }
    ignored = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / word).exists() for word in copied)
    assert f"WORKDIR {HOME_IN_IMAGE.rstrip('/')}\n" in dockerfile
