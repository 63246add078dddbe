"""From a TOML file and flags to one typed, frozen job.

A job is a frozen dataclass made of the stages' config dataclasses. TOML tables and flags name the same
fields (`[training] learning_rate = 1e-4`, `--training.learning-rate 1e-4`); flags win. Nothing here knows
any stage.
"""

import contextlib
import dataclasses
import io
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
import tyro

from namr.errors import ConfigError, NamrError
from namr.secrets import without_secrets

T = TypeVar("T")
Scalar = str | int | float | bool


def load(job: type[T], argv: Sequence[str] | None = None, *, description: str = "") -> T:
    """The job that `--config file.toml` and the flags describe; else ConfigError, with what is near.

    argv: the arguments without the program's name; None takes those of this process. `--help` prints and
    exits. A job's class variable MOVED names fields that it had once, each with the one that took its place.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _check_text(words)
    path, flags = _split_config(words)
    from_file = _read_flags(path) if path else []
    _check_not_moved(getattr(job, "MOVED", {}), [*from_file, *flags])
    help_text = f"{description}\n\nFlags win over the TOML file that --config names.".strip()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(job, args=[*from_file, *flags], description=help_text)
    except SystemExit as stop:
        if not stop.code:
            raise
        where = f" (with {path})" if path else ""
        raise ConfigError(f"wrong configuration{where}: {_plain(said.getvalue())}") from None


def run(main: Callable[[], None]) -> None:
    """Run a job's main: a NamrError becomes one line on standard error and exit code 2."""
    try:
        main()
    except NamrError as error:
        print(without_secrets(f"{type(error).__name__}: {error}"), file=sys.stderr)
        sys.exit(2)


def to_flat(job: Any) -> dict[str, Scalar]:
    """Every field by its dotted name; what is no scalar as text. None is left out."""
    return dict(_flat(job, ""))


def to_toml(job: Any) -> str:
    """The resolved job as TOML that `--config` reads back."""
    return tomli_w.dumps(_table(job))


def _split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    for at, word in enumerate(argv):
        if word == "--config":
            if at + 1 == len(argv):
                raise ConfigError("--config lacks its file; expected --config FILE.toml")
            return Path(argv[at + 1]), argv[:at] + argv[at + 2 :]
        if word.startswith("--config="):
            return Path(word.partition("=")[2]), argv[:at] + argv[at + 1 :]
    return None, argv


def _check_not_moved(moved: Mapping[str, str], words: Sequence[str]) -> None:
    for word in words:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name in moved:
            raise ConfigError(f"{name} is no field any more; set {moved[name]}, which took its place")


def _check_text(words: Sequence[str]) -> None:
    """Refuse what no file name, URI or table of MLflow can hold."""
    for word in words:
        if "\0" in word or any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"the argument {word!a} is no text; expected UTF-8 without NUL")


def _read_flags(path: Path) -> list[str]:
    """A TOML file as the flags that would say the same."""
    try:
        return list(_flags_of(tomllib.loads(path.read_text()), ""))
    except RecursionError:
        raise ConfigError(f"--config {path}: nested too deep; expected [stage] tables with values") from None
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} can't be read as TOML: {error}") from error


def _flags_of(table: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in table.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, dict):
            yield from _flags_of(value, f"{flag}.")
        elif isinstance(value, bool):
            parts = flag.rpartition(".")
            yield f"--{flag}" if value else f"--{parts[0]}{parts[1]}no-{parts[2]}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *(str(item) for item in value))
        else:
            yield f"--{flag}={value}"


def _plain(boxed: str) -> str:
    """tyro's framed message as running text."""
    inside = re.sub(r"[╭╮╰╯│─]+|\x1b\[[0-9;]*m", " ", boxed)
    return re.sub(r"\s+", " ", inside).strip()


def _flat(job: Any, prefix: str) -> Iterator[tuple[str, Scalar]]:
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{prefix}{field.name}.")
        elif value is not None:
            yield f"{prefix}{field.name}", _scalar(value)


def _table(job: Any) -> dict[str, Any]:
    """As TOML can hold it: None left out, what is neither scalar nor list as text."""
    values = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    return {name: _value(value) for name, value in values.items() if value is not None}


def _value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _table(value)
    if isinstance(value, tuple | list):
        return [_value(item) for item in value]
    return _scalar(value)


def _scalar(value: Any) -> Scalar:
    """As it may be stored and shown: a URI without user and password, which the environment has."""
    if isinstance(value, int | float):  # of bool too
        return value
    return without_secrets(str(value))
