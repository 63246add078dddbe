"""What the project promises of itself: told commands work, jobs are short, the library prints nothing."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from infra import stack
from namr import cli, config
from tests import commands

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[ci]*/README.md")])
JOBS = sorted((ROOT / "jobs").glob("*.py"))
CONFIGS = sorted((ROOT / "jobs" / "configs").rglob("*.toml"))
COMMANDS = [
    *(command for path in DOCUMENTS for command in commands.of_markdown(path)),
    *(command for path in JOBS for command in commands.of_docstring(path)),
    *(command for path in CONFIGS for command in commands.of_toml(path)),
]
JOB_COMMANDS = [command for command in COMMANDS if command.job()]

MOST_LINES = 350
MOST_TEST_LINES = 500
LONGER_FILES = {}
"""Files with more lines than that, each with the reason why it has one subject all the same."""
MOST_BYTES = 600_000
MAY_PRINT = {"cli", "demo"}
"""Modules that talk to a terminal. Elsewhere the caller says where to: print(..., file=...)."""
SERVERS = {"serve"}
"""Jobs that never end, and so are started and not submitted."""


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("command", JOB_COMMANDS, ids=lambda command: f"{command.source}:{command.job()[0]}")
def test_a_command_that_is_told_parses_with_its_job(command: commands.Command) -> None:
    commands.check_job(command)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_is_part_of_a_command_that_is_told(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert any(name in command.words for command in JOB_COMMANDS)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_short_and_says_how_it_is_submitted(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < 60
    told = [command for command in commands.of_docstring(path) if command.job()]
    assert any(command.words[:3] == ("ray", "job", "submit") or path.stem in SERVERS for command in told)
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For | ast.While)]
    assert loops == []


def test_every_target_of_make_that_is_told_exists() -> None:
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    told = {
        word
        for command in COMMANDS
        if command.words[0] == "make"
        for word in command.words[1:]
        if re.fullmatch(r"[a-z-]+", word) and not word.startswith(("-", "bench-"))
    }
    helped = set(re.findall(r"echo 'make ([a-z-]+)", (ROOT / "Makefile").read_text()))
    assert told | helped <= rules


def made(*words: str) -> list[commands.Command]:
    """What make would run."""
    ran = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return list(commands.split("Makefile", ran.stdout))


def test_every_command_of_namr_that_is_told_parses() -> None:
    told = [*COMMANDS, *made("demo", "DATA=some photos", "SERVE=0"), *made("demo")]
    told = [command for command in told if re.search(r"(^|/)namr$", command.words[0]) and not command.job()]
    assert len(told) >= 2
    for command in told:
        known = [each for each in cli._COMMANDS if command.words[1 : len(each.words) + 1] == each.words]
        assert known, f"{command.source}: {' '.join(command.words)} is no command of namr"
        if "..." not in command.words:
            config.load(known[0].kind, command.words[len(known[0].words) + 1 :])


def test_every_module_that_is_told_to_run_exists() -> None:
    told = {
        command.words[at + 2]
        for command in COMMANDS
        for at, word in enumerate(command.words[:-2])
        if re.search(r"python[\d.]*$", word) and command.words[at + 1] == "-m"
    }
    own = {name for name in told if name.split(".")[0] in ("namr", "tests", "infra", "jobs")}
    assert [name for name in own if not (ROOT / (name.replace(".", "/") + ".py")).is_file()] == []


def test_every_command_of_the_stack_that_is_told_parses() -> None:
    for command in COMMANDS:
        if "infra.stack" in command.words:
            stack.parse(list(command.words[command.words.index("infra.stack") + 1 :]))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text()
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if not re.match(r"[a-z]+:", link)}
    scripts = set(re.findall(r"\b(?:jobs|namr|infra|tests|cluster)/[\w/.-]+\.(?:py|toml|yaml)\b", text))
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [script for script in scripts if not (ROOT / script).exists()]
    assert missing == []


def test_every_test_that_a_document_names_exists() -> None:
    told = {
        name for path in DOCUMENTS for name in re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", path.read_text())
    }
    there = {
        name for name in told if re.search(rf"^def {name.partition('::')[2]}\(", source_of(name), flags=re.M)
    }
    assert told - there == set()
    assert len(told) > 30


def source_of(test: str) -> str:
    """Of the file of a test, empty where there is none."""
    path = ROOT / test.partition("::")[0]
    return path.read_text() if path.is_file() else ""


def test_the_library_prints_nothing() -> None:
    prints = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "namr").rglob("*.py")
        if path.stem not in MAY_PRINT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        if all(keyword.arg != "file" for keyword in node.keywords)
    ]
    assert prints == []


def test_a_file_has_one_subject_and_is_not_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in tracked()
        if path.suffix == ".py"
    }
    limits = {name: MOST_TEST_LINES if name.startswith("tests/") else MOST_LINES for name in lengths}
    assert {name for name in lengths if lengths[name] > limits[name]} <= set(LONGER_FILES)


def test_nothing_of_a_developers_machine_is_in_the_sources() -> None:
    private = re.compile(rb"(?<![\w.])/(?:work|home|root|Users)/(?!ray/\.cache)\w")
    found = [str(path.relative_to(ROOT)) for path in tracked() if private.search(path.read_bytes())]
    assert found == []


def test_no_data_and_no_weights_are_in_the_sources() -> None:
    big = [
        str(path.relative_to(ROOT))
        for path in tracked()
        if path.stat().st_size > MOST_BYTES and path.name != "uv.lock"
    ]
    binary = {".tar", ".parquet", ".npy", ".safetensors", ".pt", ".faiss", ".index", ".db"}
    assert big + [str(path.relative_to(ROOT)) for path in tracked() if path.suffix in binary] == []


def test_a_wrong_flag_in_a_document_is_found() -> None:
    for script in sorted(path.name for path in JOBS):
        (command,) = commands.split(
            "a document", f"ray job submit -- python jobs/{script} --no-such-flag 1 ..."
        )
        with pytest.raises(AssertionError, match="has no"):
            commands.check_job(command)


def test_commands_are_found_in_code_blocks_over_several_lines(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text(
        "It's prose.\n```bash\n$ ray job submit -- \\\n  python jobs/a.py --x '1 2'  # why\n```\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "ROOT", tmp_path)
        (command,) = commands.of_markdown(document)
    assert command.job() == ("jobs/a.py", ["--x", "1 2"])
