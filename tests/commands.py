"""The commands that documents, docstrings and manifests tell people to run, found and parsed.

Used by tests only: what is told to people has to work with the parsers of the jobs as they are now.
"""

import ast
import dataclasses
import importlib.util
import re
import shlex
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from namr import config

ROOT = Path(__file__).parents[1]


class Command(NamedTuple):
    """A command line and where it is told."""

    source: str
    words: tuple[str, ...]

    def job(self) -> tuple[str, list[str]] | None:
        """(`jobs/train.py`, its arguments) of a command that runs a job: directly, by Ray, `namr submit`."""
        if self.words[1:2] == ("submit",) and self.words[0].endswith("namr"):
            return f"jobs/{self.words[2]}.py", list(self.words[3:])
        for at, word in enumerate(self.words):
            if re.fullmatch(r"jobs/\w+\.py", word):
                return word, [argument for argument in self.words[at + 1 :] if argument not in ("&", "&&")]
        return None


def split(source: str, text: str) -> Iterator[Command]:
    """The command of each line of `text`; lines that end in a backslash go on."""
    for line in text.replace("\\\n", " ").splitlines():
        stripped = line.strip().removeprefix("$ ")
        try:
            words = tuple(shlex.split(stripped, comments=True))
        except ValueError:  # prose with an apostrophe
            continue
        if words:
            yield Command(source, words)


def of_markdown(path: Path) -> Iterator[Command]:
    """The lines of the code blocks of a document, those of other languages than the shell left out."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), flags=re.M | re.S):
        if language in ("", "sh", "bash", "shell", "console"):
            yield from split(str(path.relative_to(ROOT)), block)


def of_docstring(path: Path) -> Iterator[Command]:
    """The indented lines of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text()), clean=True) or ""
    indented = "\n".join(line for line in docstring.splitlines() if line.startswith("    "))
    yield from split(str(path.relative_to(ROOT)), indented)


def of_toml(path: Path) -> Iterator[Command]:
    """The comment lines at the top of a config."""
    lines = [line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#")]
    yield from split(str(path.relative_to(ROOT)), "\n".join(lines))


def load_job(script: str) -> type[Any]:
    """The root dataclass that the job `script` (`jobs/train.py`) hands to config.load."""
    path = ROOT / script
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("config.load", "load"):
            job: type[Any] = getattr(_module(path), ast.unparse(node.args[0]))
            return job
    raise AssertionError(f"{script} never calls config.load(Job)")


def flags(job: type[Any], prefix: str = "") -> set[str]:
    """Every flag that config.load(job) knows, `--training.learning-rate` and `--no-` forms included."""
    found: set[str] = {"--config"}
    hints = typing.get_type_hints(job)
    for field in dataclasses.fields(job):
        name = field.name.replace("_", "-")
        options = [hints[field.name], *typing.get_args(hints[field.name])]
        nested = [option for option in options if dataclasses.is_dataclass(option)]
        for option in nested:
            found |= flags(typing.cast(type[Any], option), f"{prefix}{name}.")
        if not nested:
            found |= {f"--{prefix}{name}", f"--{prefix}no-{name}"}
    return found


def check_job(command: Command) -> None:
    """Parse a job's command with the job's own loader; where it has been cut with `...`, its flags only.

    AssertionError if the script isn't there, ConfigError if the loader refuses.
    """
    found = command.job()
    assert found is not None, f"{command}: runs no job"
    script, arguments = found
    assert (ROOT / script).is_file(), f"{command.source}: {script} is not there"
    job = load_job(script)
    if "..." in arguments:
        used = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert used <= flags(job), f"{command.source}: {script} has no {sorted(used - flags(job))}"
        return
    absolute = [
        str(ROOT / word) if before == "--config" else word
        for before, word in zip(["", *arguments], arguments, strict=False)
    ]
    config.load(job, absolute)


def _module(path: Path) -> ModuleType:
    name = f"jobs_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
