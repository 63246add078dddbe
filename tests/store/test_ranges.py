"""Near ranges are read as one, and everyone gets exactly the bytes asked for."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namr.errors import StorageError
from namr.store import ranges, storage
from namr.store.storage import Range

DATA = {"a": bytes(range(256)) * 400, "b": bytes(reversed(range(256))) * 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranges")
    for name, data in DATA.items():
        (folder / name).write_bytes(data)
    return folder


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 51_000), st.integers(0, 200)), max_size=40))
def test_the_bytes_are_those_of_each_range(folder: Path, wanted: list[tuple[str, int, int]]) -> None:
    asked = [Range(str(folder / name), start, start + size) for name, start, size in wanted]
    assert ranges.read_near(asked) == [DATA[name][start : start + size] for name, start, size in wanted]


@pytest.mark.parametrize(
    ("starts", "gap", "most", "expected"),
    [
        ([0, 100, 210], 9, 1000, [(0, 200), (210, 310)]),
        ([210, 0, 100], 9, 1000, [(0, 200), (210, 310)]),
        ([0, 100, 210], 10, 1000, [(0, 310)]),
        ([0, 50, 60], 0, 1000, [(0, 160)]),
        ([0, 100, 200], 99, 200, [(0, 200), (200, 300)]),
    ],
)
def test_ranges_are_joined_over_gaps_up_to_a_limit(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts: list[int],
    gap: int,
    most: int,
    expected: list[tuple[int, int]],
) -> None:
    monkeypatch.setattr(ranges, "LOCAL_GAP_BYTES", gap)
    monkeypatch.setattr(ranges, "MAX_JOINED_BYTES", most)
    asked: list[Range] = []
    read_ranges = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", lambda some: asked.extend(some) or read_ranges(some))
    ranges.read_near([Range(str(folder / "a"), start, start + 100) for start in starts])
    assert [(some.start, some.stop) for some in asked] == expected


def test_a_range_past_the_end_is_a_named_error(folder: Path) -> None:
    with pytest.raises(StorageError, match="shorter than its index says"):
        ranges.read_near([Range(str(folder / "a"), 102_390, 102_410)])


@pytest.mark.s3
def test_local_and_remote_ranges_come_in_one_call(s3: str, folder: Path) -> None:
    storage.write(f"{s3}/b", DATA["b"])
    asked = [Range(f"{s3}/b", 5, 9), Range(str(folder / "a"), 1, 3), Range(f"{s3}/b", 0, 2)]
    assert ranges.read_near(asked) == [DATA["b"][5:9], DATA["a"][1:3], DATA["b"][0:2]]
