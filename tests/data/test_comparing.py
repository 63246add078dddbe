"""New, as it is there, changed: by what the sample index knows, or by the bytes."""

from pathlib import Path

import pytest

from namr import ray_connection
from namr.data import comparing, datasets
from namr.data.comparing import Compare
from namr.data.datasets import Dataset
from namr.data.offered import Offered, SourceImage
from namr.data.shards import Sample, make_id
from tests import small_dataset
from tests.small_dataset import LABELS


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Fourteen images, the seventh taken out; what would be tasks runs here."""
    monkeypatch.setattr(ray_connection, "connect", lambda: None)
    monkeypatch.setattr(ray_connection, "map_tasks", lambda run, tasks: enumerate(map(run, tasks)))
    return small_dataset.make_dataset(str(tmp_path / "set"), tmp_path)


def offered(folder: Path, changed: dict[int, bytes], labels: dict[int, str]) -> Offered:
    """All images of the dataset in files, some of them changed, and a new one."""
    folder.mkdir()
    found = []
    for number, label in enumerate([*LABELS, "fox"]):
        path = folder / f"{number}.png"
        path.write_bytes(changed.get(number, small_dataset.image(number)))
        found.append(
            SourceImage(
                key=f"k{number}",
                location=str(path),
                label=labels.get(number, label),
                num_bytes=path.stat().st_size,
            )
        )
    return Offered.of(found, source="s")


@pytest.mark.parametrize(
    ("compare", "expected"), [("size", ["k1", "k14", "k2"]), ("bytes", ["k1", "k12", "k14", "k2"])]
)
def test_other_sizes_and_labels_are_noticed_for_nothing_and_other_bytes_by_reading(
    dataset: Dataset, tmp_path: Path, compare: Compare, expected: list[str]
) -> None:
    other = bytearray(small_dataset.image(12))
    other[40] ^= 1
    changed = {1: b"shorter", 6: b"was taken out", 12: bytes(other)}
    new = offered(tmp_path / "in", changed, {2: "dog"})
    num_known = comparing.keep_new(new, dataset, compare)
    assert [image.key for image in new] == expected
    assert num_known == 15 - len(expected)
    had = [dataset.find([key])[key][0] for key in expected if key != "k14"]
    assert list(new.old_ids(expected)) == had


def test_a_file_that_is_gone_meanwhile_changed_nothing(dataset: Dataset, tmp_path: Path) -> None:
    new = offered(tmp_path / "in", {}, {})
    (tmp_path / "in" / "3.png").unlink()
    assert comparing.keep_new(new, dataset, "bytes") == 14


def test_an_image_that_was_replaced_is_compared_with_what_it_is_now(dataset: Dataset, tmp_path: Path) -> None:
    before = datasets.head(dataset.uri)
    samples = [Sample(key=key, image=b"now", extension="png", label="x") for key in ("k1", "k2")]
    again = small_dataset.shard_of(dataset.uri, tmp_path, 5, samples)
    dead = [small_dataset.id_of(1), small_dataset.id_of(2)]
    latest = datasets.publish_version(before, [again], now=small_dataset.NOW, tombstones=dead)
    new = offered(tmp_path / "in", {1: b"now"}, {1: "x", 2: "x"})
    assert comparing.keep_new(new, latest, "size") == 13
    assert [image.key for image in new] == ["k14", "k2"]
    assert list(new.old_ids(["k14", "k2"])) == [make_id(5, 1)]
