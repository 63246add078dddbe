"""The map of the house: which package stands above which, and which library comes in through which door.

A package imports only from packages below it in the list; inside a package there are no cycles. A library
that is not in DOORS or free to all is refused until somebody writes down whose it is. A change of the design
is a change of these tables.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

HOUSE = (  # from the top down; a module of namr/ itself is named by itself
    ("cli",),
    ("demo",),
    ("nightly",),
    ("plan", "reports", "serve", "train"),
    ("search",),
    ("measure", "release"),
    ("registry",),
    ("embed",),
    ("model",),
    ("data",),
    ("index",),
    ("store",),
    ("collectives", "ray_connection"),
    ("checks", "compiling", "config", "hashing", "progress", "sides"),
    ("errors", "secrets"),
)
"""Packages side by side in a row don't import each other."""

DOORS: dict[str, set[str]] = {
    "tyro": {"config"},
    "tomli_w": {"config"},
    "fsspec": {"store.buckets"},
    "s3fs": {"store.buckets"},
    "pyarrow": {"data.resampling", "store.tables", "store.item_files", "store.storage"},
    "torch.distributed": {"collectives"},
    "torchvision": {"data.sources"},
    "PIL": {"data.images", "data.resampling", "demo.photographs"},
    "pydantic": {"store.manifests"},
    "timm": {"model.backbones"},
    "safetensors": {"model.backbones", "model.model"},
    "pytorch_metric_learning": {"model.losses", "model.mining"},
    "sklearn": {"measure.metrics", "data.sources"},
    "scipy": {"data.benchmarks", "measure.metrics"},
    "faiss": {"index.ivf", "index.index_files"},
    "numba": {"compiling", "data.resampling", "search.kernel"},
    "llvmlite": {"data.resampling", "search.kernel"},
    "webdataset": {"data.shards"},
    "jinja2": {"measure.report"},
    "matplotlib": {"measure.report"},
    "mlflow": {"registry.registry", "registry.pyfunc", "registry.system_metrics"},
    "ray": {"ray_connection", "train.ray_group", "train.trials", "embed.extraction"},
    "fastapi": {"serve.app", "serve.routes"},
    "starlette": {"serve.app"},
    "uvicorn": {"serve.server"},
    "prometheus_client": {"serve.telemetry"},
    "httpx": {"nightly.notice", "serve.client"},
    "rich": {"progress", "demo.demo"},
}
FREE_LIBRARIES = {"numpy", "torch"}
WITHOUT_ARRAYS = {
    *("checks", "cli", "config", "errors", "progress", "secrets", "sides"),
    *("search.answers", "serve.client", "serve.guard", "serve.limits", "serve.server"),
    *("store.buckets", "store.cache", "store.folders", "store.lease", "store.ranged_gets", "store.scratch"),
}
"""Modules that even the free libraries are closed to."""
CLOSED = {
    "search.answers": {"checks", "errors", "sides"},
    "serve.client": {"errors", "search.answers"},
}
"""What a module may import of namr, where that is less than its place in the house allows."""

BY_NAME = ("importlib.import_module", "import_module", "__import__")

ROOT = Path(__file__).parents[1]
ROW_OF = {package: row for row, packages in enumerate(HOUSE) for package in packages}


class Import(NamedTuple):
    line: int
    name: str
    """Dotted, `torch.distributed` or `namr.store.storage`."""


def module_name(path: Path) -> str:
    """`store.storage` for namr/store/storage.py, `store` for its __init__."""
    parts = path.relative_to(ROOT / "namr").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "namr").rglob("*.py") if path != ROOT / "namr" / "__init__.py")


MODULES = {module_name(path) for path in modules()}


def imports_of(source: str) -> Iterator[Import]:
    """Every import of a source, in functions and under TYPE_CHECKING too; each use of torch.distributed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                yield Import(node.lineno, "." * node.level + module)
            elif module in ("namr", "torch") or module.removeprefix("namr.") in PACKAGES:
                for alias in node.names:
                    yield Import(node.lineno, f"{module}.{alias.name}")
            else:
                yield Import(node.lineno, module)
        elif (
            isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ):
            yield Import(node.lineno, "torch.distributed")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            yield Import(node.lineno, "an import by name: " + ast.unparse(node))


PACKAGES = {module.partition(".")[0] for module in MODULES if "." in module}


def library(name: str) -> str:
    """The name under which DOORS keeps the library that `name` belongs to."""
    return "torch.distributed" if name.startswith("torch.distributed") else name.split(".")[0]


def objection(module: str, name: str) -> str | None:
    """Why `module` of namr may not import `name`; None when it may."""
    root, _, other = name.partition(".")
    if root == "namr":
        return _objection_to_ours(module, other)
    if root in sys.stdlib_module_names:
        return None
    door = library(name)
    if door in DOORS:
        return None if module in DOORS[door] else f"imports {name}, whose door is {sorted(DOORS[door])}"
    if door in FREE_LIBRARIES:
        return f"imports {name}, and does without" if module in WITHOUT_ARRAYS else None
    return f"imports {name}, which has no door"


def _objection_to_ours(module: str, other: str) -> str | None:
    if other not in MODULES or other in PACKAGES:
        return f"imports namr.{other}, which is no module; import the module by its name"
    if module in CLOSED and other not in CLOSED[module]:
        return f"imports namr.{other}; it may import {sorted(CLOSED[module])} only"
    here, there = module.partition(".")[0], other.partition(".")[0]
    if here == there or ROW_OF[here] < ROW_OF[there]:
        return None
    return f"of {here} imports namr.{other}, which stands beside or above it"


def objections(module: str, source: str) -> list[str]:
    if module.partition(".")[0] not in ROW_OF:
        return [f"namr/{module} has no place in the house: give it one in HOUSE at the top of this test"]
    return [
        f"namr.{module}:{each.line} {why}"
        for each in imports_of(source)
        if (why := objection(module, each.name)) is not None
    ]


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_a_module_imports_from_packages_below_and_through_doors_only(path: Path) -> None:
    assert objections(module_name(path), path.read_text()) == []


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_inside_a_package_there_is_no_cycle(package: str) -> None:
    graph = {
        module_name(path): {
            each.name.removeprefix("namr.")
            for each in imports_of(path.read_text())
            if each.name.startswith(f"namr.{package}.")
        }
        for path in modules()
        if module_name(path).startswith(f"{package}.")
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_the_face_of_a_package_tells_its_station_and_does_no_work(package: str) -> None:
    tree = ast.parse((ROOT / "namr" / package / "__init__.py").read_text())
    assert len(ast.get_docstring(tree) or "") > 100
    assert len(tree.body) == 1


def test_the_tables_name_nothing_twice_and_nothing_that_is_gone() -> None:
    named = [package for packages in HOUSE for package in packages]
    assert len(named) == len(set(named))
    assert set(named) == {module.partition(".")[0] for module in MODULES}
    assert {module for doors in DOORS.values() for module in doors} <= MODULES
    assert WITHOUT_ARRAYS | set(CLOSED) <= MODULES


def test_every_door_is_used() -> None:
    used = {
        (library(each.name), module_name(path)) for path in modules() for each in imports_of(path.read_text())
    }
    assert {(door, module) for door, owners in DOORS.items() for module in owners} - used == set()


def test_importing_the_package_does_no_work() -> None:
    statements = ast.parse((ROOT / "namr" / "__init__.py").read_text()).body
    assert all(isinstance(statement, ast.Expr | ast.Assign) for statement in statements)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_a_job_imports_namr_and_the_standard_library_only(path: Path) -> None:
    roots = {each.name.split(".")[0] for each in imports_of(path.read_text())}
    assert roots - set(sys.stdlib_module_names) <= {"namr"}


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_a_module_has_tests_of_its_name(path: Path) -> None:
    name = module_name(path)
    if path.name == "__init__.py" or name in TESTED_WITH:
        return
    folder = ROOT / "tests" / path.relative_to(ROOT / "namr").parent
    assert (folder / f"test_{path.stem}.py").is_file(), f"tests/{name.replace('.', '/')}: no such test"


TESTED_WITH: dict[str, str] = {
    "serve.follower": "serve/test_live.py runs it under a service",
    "sides": "words only, which search/test_answers.py and all searches use",
    "store.folders": "store/test_storage.py runs every test on both kinds of store",
    "store.buckets": "store/test_storage.py runs every test on both kinds of store",
}
"""Modules that another module's tests cover, each with the reason."""


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("store.storage", "from namr.data import datasets", "stands beside or above it"),
        (
            "store.storage",
            "def f():\n    import namr.search.searcher",
            "storage:2 of store imports namr.search",
        ),
        ("store.storage", "if TYPE_CHECKING:\n    from namr import cli", "imports namr.cli"),
        ("store.storage", "from namr import data", "is no module"),
        ("serve.app", "from namr.train.job import fit", "of serve imports namr.train.job"),
        ("store.storage", "from . import tables", "imports ., which has no door"),
        ("store.storage", "import ray", "imports ray, whose door is"),
        ("measure.metrics", "from sklearn.cluster import KMeans\nimport sklearn, faiss", "imports faiss"),
        ("measure.metrics", "import torch\ntorch.distributed.barrier()", "imports torch.distributed"),
        ("measure.metrics", "from torch import distributed", "imports torch.distributed"),
        ("measure.metrics", "import torch.distributed as dist", "imports torch.distributed"),
        ("measure.metrics", "import importlib\nimportlib.import_module('ray')", "an import by name"),
        ("measure.metrics", "import attrs", "imports attrs, which has no door"),
        ("config", "import numpy", "imports numpy, and does without"),
        ("serve.client", "from namr import config", "may import ['errors', 'search.answers'] only"),
        ("utils", "", "has no place in the house"),
    ],
)
def test_what_the_rules_forbid_is_found(module: str, source: str, expected: str) -> None:
    assert any(expected in each for each in objections(module, source))


def test_what_the_rules_allow_is_allowed() -> None:
    source = (
        "import os, torch\nfrom namr import errors\nfrom namr.store.storage import read\n"
        "from namr.measure import report\nfrom torch import nn\nimport numpy as np"
    )
    assert objections("measure.metrics", source) == []
