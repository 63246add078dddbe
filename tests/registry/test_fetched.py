"""A folder that several processes want: fetched once, whole for all, and done again after a kill."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from namr.errors import StorageError
from namr.registry import fetched

NAMES = ("weights", "description")


def fetch(partial: Path) -> Path:
    folder = partial / "namr"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f"whole {name}")
    return folder


def assert_whole(target: Path) -> None:
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        name: f"whole {name}" for name in NAMES
    }
    assert not target.with_name(f".{target.name}.partial").exists()


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model-1"
    fetched.folder(target, fetch, names=NAMES)
    fetched.folder(target, lambda _: pytest.fail("fetched again"), names=NAMES)
    assert_whole(target)


def test_a_folder_that_lacks_a_file_is_fetched_anew(tmp_path: Path) -> None:
    fetched.folder(tmp_path / "model-1", fetch, names=NAMES)
    (tmp_path / "model-1" / "weights").unlink()
    fetched.folder(tmp_path / "model-1", fetch, names=NAMES)
    assert_whole(tmp_path / "model-1")


def test_of_several_at_once_one_fetches_and_all_get_it_whole(tmp_path: Path) -> None:
    target, begun, others = tmp_path / "model-1", threading.Event(), 4
    waiting = threading.Barrier(others + 1)

    def slowly(partial: Path) -> Path:
        assert not begun.is_set(), "fetched twice"
        begun.set()
        waiting.wait(30)  # until all others are about to ask for it
        return fetch(partial)

    def ask(first: bool) -> None:
        if not first:
            begun.wait(30)
            waiting.wait(30)
        fetched.folder(target, slowly, names=NAMES)
        assert_whole(target)

    threads = [threading.Thread(target=ask, args=(number == 0,)) for number in range(others + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert begun.is_set()
    assert_whole(target)


KILLED = """
import os, sys
from pathlib import Path
from namr.registry import fetched

def fetch(partial):
    (partial / "namr").mkdir()
    (partial / "namr" / "weights").write_text("half")
    os.kill(os.getpid(), 9)

fetched.folder(Path(sys.argv[1]), fetch, names=("weights", "description"))
"""


def test_after_a_kill_in_the_middle_the_next_one_completes_it(tmp_path: Path) -> None:
    target = tmp_path / "model-1"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], timeout=60, env=dict(os.environ))
    assert killed.returncode == -9 and not target.exists()
    fetched.folder(target, fetch, names=NAMES)
    assert_whole(target)


def test_a_fetch_that_fails_leaves_nothing_that_the_next_one_minds(tmp_path: Path) -> None:
    def fails(partial: Path) -> Path:
        (partial / "weights").write_text("half")
        raise StorageError("the store is away")

    with pytest.raises(StorageError, match="is away"):
        fetched.folder(tmp_path / "model-1", fails, names=NAMES)
    fetched.folder(tmp_path / "model-1", fetch, names=NAMES)
    assert_whole(tmp_path / "model-1")
