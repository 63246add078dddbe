"""The map of the house: which module stands on which floor, and which library comes in through which door.

A module imports only from floors below its own, so no cycle is possible. A library that is not in DOORS or
free to all is refused until somebody writes down whose it is. A change of the design is a change of these
tables.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

FLOORS: dict[int, set[str]] = {
    # nothing of ours below
    0: {"errors", "config", "buckets", "folders"},
    # bytes, tables, arrays, processes
    1: {"storage", "tables", "collectives", "distances", "sampling", "images", "backbones"}
    | {"heads", "tracking", "index_files", "held_out", "progress"},
    # one thing each: a manifest, a model, a loss, an index, a shard
    2: {"manifests", "model", "losses", "metrics", "ranking", "ivf", "shards", "items", "report"}
    | {"ranges"},
    # what is stored and has versions; learning without a cluster
    3: {"datasets", "embedding_files", "releases", "pyfunc", "planning", "sources", "sample_index"}
    | {"features", "learning", "validation"},
    # how stored things are read, found and registered
    4: {"reading", "embeddings", "build_tasks", "receipts", "registry", "search", "telemetry", "engine"},
    # what pipelines are made of
    5: {"lessons", "workers", "references", "assessment", "service", "client"},
    6: {"teaching", "release_report"},
    # the pipelines
    7: {"packing", "training", "extraction", "indexing", "evaluation", "serving"},
    # pipelines in a row: the night, and the whole chain
    8: {"reindexing", "recipes"},
    9: {"demo"},
    10: {"cli"},
}
FREE_TO_ALL_FLOORS = {"errors"}  # it imports nothing itself

DOORS: dict[str, set[str]] = {
    "tyro": {"config"},
    "fsspec": {"buckets"},
    "s3fs": {"buckets"},
    "pyarrow": {"tables", "storage"},
    "torch.distributed": {"collectives"},
    "torchvision": {"sources"},
    "PIL": {"images"},
    "pydantic": {"manifests"},
    "timm": {"backbones"},
    "safetensors": {"backbones", "model"},
    "pytorch_metric_learning": {"losses"},
    "sklearn": {"metrics", "sources"},
    "faiss": {"ivf", "index_files"},
    "webdataset": {"shards"},
    "jinja2": {"report"},
    "matplotlib": {"report"},
    "mlflow": {"registry", "pyfunc"},
    "ray": {"engine", "workers", "extraction"},
    "fastapi": {"service"},
    "starlette": {"service"},
    "uvicorn": {"serving"},
    "prometheus_client": {"telemetry"},
    "httpx": {"client"},
    "rich": {"progress", "demo"},
}
FREE_LIBRARIES = {"numpy", "torch"}  # above floor 0
CLOSED = {"client": {"errors"}}  # what a module may import of namr, where that is less than its floor allows

BY_NAME = ("importlib.import_module", "import_module", "__import__")

ROOT = Path(__file__).parents[1]
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}


class Import(NamedTuple):
    line: int
    name: str
    """Dotted, `torch.distributed` or `namr.storage`."""


def imports_of(source: str) -> Iterator[Import]:
    """Every import of a source, in functions and under TYPE_CHECKING too; each use of torch.distributed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield Import(node.lineno, "." * node.level + (node.module or ""))
            elif node.module in ("namr", "torch"):
                for alias in node.names:
                    yield Import(node.lineno, f"{node.module}.{alias.name}")
            else:
                yield Import(node.lineno, node.module or "")
        elif (
            isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ):
            yield Import(node.lineno, "torch.distributed")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            yield Import(node.lineno, "an import by name: " + ast.unparse(node))


def library(name: str) -> str:
    """The name under which DOORS keeps the library that `name` belongs to."""
    return "torch.distributed" if name.startswith("torch.distributed") else name.split(".")[0]


def objection(module: str, name: str) -> str | None:
    """Why `module` of namr may not import `name`; None when it may."""
    package, _, rest = name.partition(".")
    if package == "namr":
        other = rest.split(".")[0]
        if not other:
            return "imports the package itself; import the module"
        if other not in FLOOR_OF:
            return f"imports namr.{other}, which has no floor"
        if module in CLOSED and other not in CLOSED[module]:
            return f"imports namr.{other}; it may import {sorted(CLOSED[module])} only"
        if other in FREE_TO_ALL_FLOORS:
            return None
        if FLOOR_OF[other] >= FLOOR_OF[module]:
            return f"on floor {FLOOR_OF[module]} imports namr.{other} of floor {FLOOR_OF[other]}"
        return None
    if package in sys.stdlib_module_names:
        return None
    door = library(name)
    if door in DOORS:
        return None if module in DOORS[door] else f"imports {name}, whose door is {sorted(DOORS[door])}"
    if door in FREE_LIBRARIES:
        return None if FLOOR_OF[module] > 0 else f"on floor 0 imports {name}"
    return f"imports {name}, which has no door"


def objections(module: str, source: str) -> list[str]:
    if module not in FLOOR_OF:
        return [f"namr/{module}.py has no floor: give it one in the table at the top of this test"]
    return [
        f"namr/{module}.py:{found.line} {why}"
        for found in imports_of(source)
        if (why := objection(module, found.name)) is not None
    ]


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "namr").rglob("*.py") if path.name != "__init__.py")


def test_the_package_is_flat() -> None:
    assert [path for path in modules() if path.parent != ROOT / "namr"] == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_imports_from_lower_floors_and_through_doors_only(path: Path) -> None:
    assert objections(path.stem, path.read_text()) == []


def test_the_table_has_no_module_twice_and_none_that_is_gone() -> None:
    named = [module for modules in FLOORS.values() for module in modules]
    assert len(named) == len(set(named))
    assert set(named) - {path.stem for path in modules()} == set()
    assert {module for doors in DOORS.values() for module in doors} <= set(named)


def test_every_door_is_used() -> None:
    used = {(library(found.name), path.stem) for path in modules() for found in imports_of(path.read_text())}
    assert {(door, module) for door, owners in DOORS.items() for module in owners} - used == set()


def test_importing_the_package_does_no_work() -> None:
    statements = ast.parse((ROOT / "namr" / "__init__.py").read_text()).body
    assert all(isinstance(statement, ast.Expr | ast.Assign) for statement in statements)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_a_job_imports_namr_and_the_standard_library_only(path: Path) -> None:
    packages = {found.name.split(".")[0] for found in imports_of(path.read_text())}
    assert packages - set(sys.stdlib_module_names) <= {"namr"}


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("storage", "from namr import datasets", "floor 1 imports namr.datasets of floor 3"),
        ("storage", "from namr.tables import decode", "floor 1 imports namr.tables of floor 1"),
        ("storage", "def f():\n    import namr.search", "storage.py:2 on floor 1 imports namr.search"),
        ("storage", "if TYPE_CHECKING:\n    from namr import cli", "imports namr.cli"),
        ("storage", "from . import tables", "imports ., which has no door"),
        ("storage", "import ray", "imports ray, whose door is"),
        ("metrics", "from sklearn.cluster import KMeans\nimport sklearn, faiss", "imports faiss"),
        ("metrics", "import torch\ntorch.distributed.barrier()", "imports torch.distributed"),
        ("metrics", "from torch import distributed", "imports torch.distributed"),
        ("metrics", "import torch.distributed as dist", "imports torch.distributed"),
        ("metrics", "import importlib\nimportlib.import_module('ray')", "an import by name"),
        ("metrics", "import attrs", "imports attrs, which has no door"),
        ("config", "import numpy", "on floor 0 imports numpy"),
        ("client", "from namr import config", "may import ['errors'] only"),
        ("utils", "", "has no floor"),
    ],
)
def test_what_the_rules_forbid_is_found(module: str, source: str, expected: str) -> None:
    assert any(expected in found for found in objections(module, source))


def test_what_the_rules_allow_is_allowed() -> None:
    source = "import os, torch\nfrom namr import errors, storage\nfrom torch import nn\nimport numpy as np"
    assert objections("metrics", source) == []
