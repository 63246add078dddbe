"""Files: links are followed, and what could keep a reader waiting is never opened."""

import os
import socket
from pathlib import Path

import pytest

from namr.data import files
from namr.data.leftovers import Tally
from namr.errors import ImageRefused, StorageError
from namr.store import storage


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")
    return root


def test_links_are_followed_and_what_is_no_file_is_counted_and_named(tmp_path: Path) -> None:
    root = touch(tmp_path / "in", "cat/1.jpg", "cat/.hidden.jpg", ".ipynb_checkpoints/cat/1.jpg")
    touch(tmp_path / "elsewhere", "2.jpg")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "3.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (root / "cat" / "round").symlink_to(root)
    (root / "cat" / "self").symlink_to("self")
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s.jpg"))
        passed_over = Tally()
        names = sorted(found.name for found in files.below(str(root), passed_over))
    assert names == ["cat/1.jpg", "cat/3.jpg", "cat/gone.jpg", "cat/self", "dog/2.jpg"]
    assert {each.kind: sorted(each.names) for each in passed_over.total()} == {
        "hidden": [".ipynb_checkpoints", "cat/.hidden.jpg"],
        "link to a folder above it": ["cat/round"],
        "fifo": ["pipe.jpg"],
        "socket": ["s.jpg"],
    }


def test_a_file_is_looked_at_before_it_is_opened(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    assert files.size_of(str(tmp_path / "a.jpg")) == 5
    assert files.size_of("s3://bucket/a.jpg") is None
    for location, reason in {
        f"{tmp_path}/pipe.jpg": "a fifo, not a file",
        f"{tmp_path}": "a folder, not a file",
        f"{tmp_path}/gone.jpg": "nothing is there",
        f"{tmp_path}/a.jpg/b.jpg": "nothing is there",
        f"{tmp_path}/{'x' * 5000}.jpg": "File name too long",
        "/dev/null": "a device, not a file",
        "a\0b.jpg": "its path holds a NUL",
        "caf\udce9.jpg": "its name is not UTF-8",
        "http://host/a.jpg": "unknown kind of URI",
        "s3://bucket": "not s3://bucket/key",
        f"s3://bucket/{'x' * 1025}": "not s3://bucket/key",
    }.items():
        with pytest.raises(ImageRefused, match=reason):
            files.size_of(location)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_told(tmp_path: Path) -> None:
    root = touch(tmp_path / "in", "a.jpg", "closed/b.jpg")
    (root / "a.jpg").chmod(0)
    (root / "closed").chmod(0)
    with pytest.raises(ImageRefused, match="may not be read"):
        files.size_of(str(root / "a.jpg"))
    with pytest.raises(StorageError, match="closed can't be listed: Permission denied"):
        list(files.below(str(root), Tally()))
    (root / "closed").chmod(0o755)


@pytest.mark.s3
def test_hidden_folders_of_a_bucket_are_counted_too(s3: str) -> None:
    for name in ("cat/1.jpg", "cat/.ipynb_checkpoints/1.jpg"):
        storage.write(f"{s3}/in/{name}", b"12345")
    passed_over = Tally()
    assert list(files.below(f"{s3}/in", passed_over)) == [("cat/1.jpg", 5)]
    assert [str(each) for each in passed_over.total()] == ["1 hidden (cat/.ipynb_checkpoints/1.jpg)"]
