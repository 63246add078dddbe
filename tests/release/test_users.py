"""Who is at work on releases: one writer, and readers whose word counts for a day."""

from pathlib import Path

import pytest

from namr.errors import Conflict, ManifestError
from namr.release import users
from namr.store import storage


def held(uri: str) -> frozenset[str]:
    return users.held(uri, [each for each in storage.list_entries(uri) if each.name.startswith(users.FOLDER)])


@pytest.mark.slow  # until the first renews
def test_one_writes_and_a_second_is_told_who(tmp_path: Path) -> None:
    with (
        users.write_alone(str(tmp_path), what="the night of birds"),
        pytest.raises(Conflict, match=r"lease\.json is held by the night of birds \(process \d+ on "),
    ):
        users.write_alone(str(tmp_path), what="a collection")
    users.write_alone(str(tmp_path), what="a collection").release()


def test_a_hold_names_the_release_until_it_ends(tmp_path: Path) -> None:
    uri = str(tmp_path)
    one, other = users.Hold(uri), users.Hold(uri)
    assert held(uri) == set()
    one.renew("first")
    other.renew("second")
    assert held(uri) == {"first", "second"}
    one.renew("third")
    assert held(uri) == {"second", "third"}
    one.end()
    other.end()
    other.end()
    assert storage.list_names(uri) == []


def test_a_hold_is_written_again_after_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written, write = [0.0], [], storage.write

    def counted(uri: str, data: bytes) -> None:
        written.append(now[0])
        write(uri, data)

    monkeypatch.setattr(storage, "write", counted)
    hold = users.Hold(str(tmp_path), clock=lambda: now[0])
    for seconds in range(0, 1300, 20):
        now[0] = seconds
        hold.renew("first")
    assert written == [0, 600, 1200]


def test_a_hold_that_fails_inside_ends_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of the block"), users.holding(str(tmp_path), "first"):
        assert held(str(tmp_path)) == {"first"}
        raise ValueError("of the block")
    assert held(str(tmp_path)) == set()


def test_a_damaged_hold_is_told(tmp_path: Path) -> None:
    (tmp_path / "readers").mkdir()
    (tmp_path / "readers" / "x.json").write_text("{")
    with pytest.raises(ManifestError, match=r"x\.json is damaged"):
        held(str(tmp_path))
