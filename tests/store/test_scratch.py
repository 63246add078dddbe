"""Temporary files and folders: gone afterwards, gone after a kill, never taken from somebody who lives."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from namr.errors import ManifestError, StorageError
from namr.store import scratch, storage, tables


@pytest.fixture
def temporary_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the system's temporary folder is for this test, and for the processes it starts."""
    root = tmp_path / "system"
    root.mkdir()
    monkeypatch.setenv("TMPDIR", str(root))
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    return root


def everything_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_a_folder_is_there_and_then_gone_with_what_is_in_it(temporary_root: Path) -> None:
    with scratch.folder("part-") as folder, scratch.folder("part-") as other:
        assert folder != other and folder.name.startswith("part-")
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "c").write_text("c")
    assert everything_below(temporary_root) == [f"namr-{os.getuid()}"]


def test_a_temporary_beside_is_hidden_and_gone_unless_it_was_renamed(tmp_path: Path) -> None:
    with scratch.beside(tmp_path / "x") as file, scratch.folder_beside(tmp_path / "y") as folder:
        assert storage.list_names(str(tmp_path)) == []
        assert file.parent == folder.parent == tmp_path
    assert everything_below(tmp_path) == []
    with scratch.beside(tmp_path / "x") as file, scratch.folder_beside(tmp_path / "y") as folder:
        file.write_text("x")
        file.replace(tmp_path / "x")
        folder.rename(tmp_path / "y")
    assert everything_below(tmp_path) == ["x", "y"]
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "xy"] == [0o644, 0o755]


VICTIM = """
import sys, contextlib, time
from pathlib import Path
from namr.store import scratch
root = Path(sys.argv[1])
with contextlib.ExitStack() as stack:
    folder = stack.enter_context(scratch.folder("part-"))
    (folder / "half").write_text("half")
    for place in (root, root / "deep" / "er"):
        place.mkdir(parents=True, exist_ok=True)
        stack.enter_context(scratch.beside(place / "object")).write_text("half")
        (stack.enter_context(scratch.folder_beside(place / "columns")) / "half").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def victims(temporary_root: Path, tmp_path: Path) -> "Iterator[list[subprocess.Popen[str]]]":
    """Two processes in the middle of everything."""
    command = [sys.executable, "-c", VICTIM, str(tmp_path / "root")]
    environment = os.environ | {"TMPDIR": str(temporary_root)}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_is_gone_after_the_next_start_and_what_a_living_one_has_stays(
    victims: "list[subprocess.Popen[str]]", temporary_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    assert len(everything_below(root)) == 2 + 2 * 6
    victims[0].kill()
    victims[0].wait()
    storage.check_writable(str(root))
    with scratch.folder("next-"):
        pass
    assert len(everything_below(root)) == 2 + 6
    assert len(everything_below(temporary_root)) == 1 + 2
    victims[1].kill()
    victims[1].wait()
    storage.check_writable(str(root))
    with scratch.folder("next-"):
        pass
    assert everything_below(root) == ["deep", "deep/er"]
    assert everything_below(temporary_root) == [f"namr-{os.getuid()}"]


WRITER = """
import itertools, sys
from namr.store import storage
for number in itertools.count():
    storage.write(f"{sys.argv[1]}/{number % 7}", b"x" * 100_000)
    storage.write_if_absent(f"{sys.argv[1]}/deep/{number}", b"y" * 100_000)
    if number == 3:
        print("ready", flush=True)
"""


@pytest.mark.slow
def test_writers_killed_anywhere_leave_nothing_after_the_next_start(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(number * 0.003)
            process.kill()
    storage.check_writable(str(root))
    assert [name for name in everything_below(root) if Path(name).name.startswith(".")] == []


def test_what_another_machine_left_waits_a_day(tmp_path: Path) -> None:
    for age_h in (1, 25):
        path = tmp_path / f".namr-tmp-0a1b2c3d-{age_h}"
        path.write_text("half")
        os.utime(path, (time.time() - age_h * 3600,) * 2)
    scratch.sweep(tmp_path)
    assert everything_below(tmp_path) == [".namr-tmp-0a1b2c3d-1"]


def test_a_sweep_touches_nothing_else_and_goes_below_only_where_told(tmp_path: Path) -> None:
    with scratch.beside(tmp_path / "x") as held:
        name = held.name[:-1]
    (tmp_path / "deep").mkdir()
    for path in (tmp_path / ".hidden", tmp_path / f"{name}+", tmp_path / "deep" / f"{name}z"):
        path.write_text("kept")
    scratch.sweep(tmp_path)
    assert len(everything_below(tmp_path)) == 4
    scratch.sweep(tmp_path, below=True)
    assert len(everything_below(tmp_path)) == 3
    scratch.sweep(tmp_path / "missing")


def test_columns_that_were_being_written_go_when_the_next_are(tmp_path: Path) -> None:
    with scratch.folder_beside(tmp_path / "x") as folder:
        left = tmp_path / f"{folder.name[:-1]}+".replace("+", "z")
    left.mkdir()
    tables.write_columns(tmp_path / "columns", {"a": np.arange(3)})
    assert everything_below(tmp_path) == ["columns", "columns/a.npy"]


FILL = """
from namr.store import scratch
from namr.errors import StorageError
try:
    with scratch.folder("part-") as folder:
        (folder / "large").write_bytes(bytes(4 << 20))
except StorageError as error:
    print(error)
"""


def test_a_full_temporary_folder_is_named_with_what_to_do(temporary_root: Path) -> None:
    mount = f"mount -t tmpfs -o size=2m none '{temporary_root}'"
    in_private = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*in_private, mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    script = f"{mount} && exec '{sys.executable}' -c '{FILL}'"
    said = subprocess.run([*in_private, script], capture_output=True, text=True, check=True).stdout
    assert f"the temporary folder {temporary_root}/namr-0 is full" in said
    assert "No space left on device" in said and "set TMPDIR" in said


@pytest.mark.usefixtures("temporary_root")
def test_errors_of_the_block_that_have_other_reasons_come_as_they_are() -> None:
    for error in (OSError(errno.EIO, "of the block"), ManifestError("of the block")):
        with pytest.raises(type(error), match="of the block"), scratch.folder("part-"):
            raise error


def test_a_temporary_folder_that_cannot_be_used_is_named(temporary_root: Path) -> None:
    (temporary_root / f"namr-{os.getuid()}").write_text("")
    with pytest.raises(StorageError, match=r"namr-\d+ can't be used.*set TMPDIR"), scratch.folder("part-"):
        pass
