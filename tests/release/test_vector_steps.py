"""Vectors that are sorted in pieces and joined are those stored at once, in the order of the lists."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.embed.embeddings import EmbeddingFile
from namr.errors import ManifestError, ObjectMissing, ShapeError
from namr.index.index_files import sum_of_ids
from namr.release import places, segments, vector_steps
from namr.release.build_steps import VectorSource
from namr.release.releases import VectorFile
from namr.release.vector_steps import JoinTask, Piece, Placed, PlaceTask, ShardVectors, SortTask
from namr.store import storage, tables
from namr.store.manifests import StoredObject
from tests.release.test_build_steps import DEAD, DIM, NUM_ROWS, REFUSED, live_ids, store_embeddings

SHARDS = np.array(list(NUM_ROWS.items()), np.int64)


@pytest.fixture
def files(tmp_path: Path) -> list[EmbeddingFile]:
    return [store_embeddings(str(tmp_path / "embeddings"), number) for number in NUM_ROWS]


@pytest.fixture
def source(tmp_path: Path) -> VectorSource:
    return VectorSource(embeddings_uri=str(tmp_path / "embeddings"), dead=DEAD, metric="cosine")


@pytest.fixture
def in_order(files: list[EmbeddingFile]) -> np.ndarray:
    """All live ids in the order of some index."""
    ids = np.array(live_ids(files[0]) + live_ids(files[1]), np.int64)
    return np.random.default_rng(0).permutation(ids)


@pytest.fixture
def placed(in_order: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Placed:
    segment = tmp_path / "releases" / "segment"
    segment.parent.mkdir()
    segment.write_bytes(b"lists")
    monkeypatch.setattr(vector_steps.index_files, "ids_in", lambda _: in_order)
    stored = StoredObject("segment", 5, storage.sha256(b"lists"))
    return vector_steps.place(PlaceTask(stored, SHARDS, str(tmp_path), str(tmp_path / "releases")))


def sorted_pieces(
    files: list[EmbeddingFile], source: VectorSource, placed: Placed, work: Path, *, rows_per_file: int
) -> list[Piece]:
    """One piece a shard."""
    starts = places.starts_of(SHARDS)
    return [
        vector_steps.sort(
            SortTask(
                source.of([file]),
                [file],
                SHARDS[at : at + 1],
                placed.span(int(starts[at]), int(SHARDS[at, 1]), of=100, root_uri=str(work / "releases")),
                placed.num_rows,
                rows_per_file,
                str(work),
                at,
            )
        )
        for at, file in enumerate(files)
    ]


def join_tasks(pieces: list[Piece], work: Path, *, num_rows: int, rows_per_file: int) -> list[JoinTask]:
    return vector_steps.join_tasks(
        pieces,
        num_rows=num_rows,
        rows_per_file=rows_per_file,
        dim=DIM,
        work_uri=str(work),
        releases_uri=str(work / "releases"),
    )


def read(file: VectorFile, work: Path) -> np.ndarray:
    return np.load(work / "releases" / file.file.name)


def at_once(files: list[EmbeddingFile], source: VectorSource, in_order: np.ndarray) -> np.ndarray:
    """What has to be stored, from the tables as they are."""
    of_id = {}
    for file in files:
        data = storage.read(storage.join(source.embeddings_uri, file.stored.name))
        table = tables.decode_embeddings(data)
        x = table.embeddings / np.linalg.norm(table.embeddings, axis=1, keepdims=True)
        for item, *both in zip(table.ids.tolist(), x, table.structures, strict=True):
            of_id[item] = np.stack(both)
    return np.stack([of_id[item] for item in in_order.tolist()])


@pytest.mark.parametrize("rows_per_file", [1000, 95, 40, 1])
def test_pieces_that_are_joined_are_the_vectors_stored_at_once(
    files: list[EmbeddingFile],
    source: VectorSource,
    in_order: np.ndarray,
    placed: Placed,
    tmp_path: Path,
    rows_per_file: int,
) -> None:
    pieces = sorted_pieces(files, source, placed, tmp_path, rows_per_file=rows_per_file)
    tasks = join_tasks(pieces, tmp_path, num_rows=len(in_order), rows_per_file=rows_per_file)
    joined = [vector_steps.join(task) for task in tasks]
    assert [file.num_rows for file in joined[:-1]] == [rows_per_file] * (len(joined) - 1)
    assert sum(file.num_rows for file in joined) == placed.num_rows == len(in_order) == 95
    expected = at_once(files, source, in_order)
    stored = np.concatenate([read(file, tmp_path) for file in joined])
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored, expected, atol=1e-3)
    np.testing.assert_array_equal(stored[:, 1], expected[:, 1].astype(np.float16))
    assert min(piece.min_structure for piece in pieces) == stored[:, 1].min()


def test_a_piece_says_what_its_shards_brought(
    files: list[EmbeddingFile], source: VectorSource, placed: Placed, tmp_path: Path
) -> None:
    one, other = sorted_pieces(files, source, placed, tmp_path, rows_per_file=95)
    assert [len(each.shards) for each in (one, other)] == [1, 1]
    # the refused one of the first is tombstoned, and counted there
    assert one.shards == [ShardVectors(57, sum_of_ids(np.array(live_ids(files[0]))), 0)]
    assert other.shards == [ShardVectors(38, sum_of_ids(np.array(live_ids(files[1]))), 1)]
    assert one.bounds == [0, 57]


def test_places_are_the_order_of_the_segment_and_found_again(
    in_order: np.ndarray, placed: Placed, tmp_path: Path
) -> None:
    root = tmp_path / "releases"
    table = places.Places.open(root / placed.shards.name, root / placed.rows.name, num_rows=placed.num_rows)
    assert table.of(in_order).tolist() == list(range(95))
    gone = np.array([REFUSED, *DEAD])
    assert (table.of(gone) == -1).all()
    task = PlaceTask(StoredObject("gone", 1, "0" * 64), SHARDS, str(tmp_path), str(root))
    assert vector_steps.place(task) == placed
    (root / placed.rows.name).unlink()
    with pytest.raises(ManifestError, match="gone is missing or damaged"):
        vector_steps.place(task)


def test_a_file_that_was_joined_is_not_joined_again(
    files: list[EmbeddingFile], source: VectorSource, placed: Placed, tmp_path: Path
) -> None:
    pieces = sorted_pieces(files, source, placed, tmp_path, rows_per_file=50)
    tasks = join_tasks(pieces, tmp_path, num_rows=95, rows_per_file=50)
    first = [vector_steps.join(task) for task in tasks]
    for piece in pieces:
        (tmp_path / piece.stored.name).unlink()
    assert [vector_steps.join(task) for task in tasks] == first
    (tmp_path / "releases" / first[1].file.name).unlink()
    with pytest.raises(ObjectMissing):
        vector_steps.join(tasks[1])
    again = sorted_pieces(files, source, placed, tmp_path, rows_per_file=50)
    assert [piece.stored for piece in again] == [piece.stored for piece in pieces]
    assert vector_steps.join(tasks[1]) == first[1]
    assert read(first[1], tmp_path).shape == (45, 2, DIM)


def test_pieces_that_another_attempt_deleted_are_not_missed(
    files: list[EmbeddingFile],
    source: VectorSource,
    placed: Placed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It joined all files, and deleted the pieces, while this one was about to read them."""
    pieces = sorted_pieces(files, source, placed, tmp_path, rows_per_file=95)
    (task,) = join_tasks(pieces, tmp_path, num_rows=95, rows_per_file=95)
    read_ranges, others = storage.read_ranges, []

    def slower(ranges: list[storage.Range]) -> list[bytes]:
        monkeypatch.setattr(storage, "read_ranges", read_ranges)
        others.append(vector_steps.join(task))
        for piece in pieces:
            (tmp_path / piece.stored.name).unlink()
        return read_ranges(ranges)

    monkeypatch.setattr(storage, "read_ranges", slower)
    assert [vector_steps.join(task)] == others


def test_a_row_without_vectors_stops_the_build(
    files: list[EmbeddingFile], source: VectorSource, placed: Placed, tmp_path: Path
) -> None:
    pieces = sorted_pieces(files, source, placed, tmp_path, rows_per_file=95)
    (task,) = join_tasks(pieces[:1], tmp_path, num_rows=95, rows_per_file=95)
    with pytest.raises(ManifestError, match=r"95 re-rank vectors belong in vectors-00000\.npy, 57 are there"):
        vector_steps.join(task)
    assert not (tmp_path / "vectors-00000.json").exists()


def test_ids_that_the_segment_lacks_are_left_out(
    files: list[EmbeddingFile], source: VectorSource, placed: Placed, tmp_path: Path
) -> None:
    alive = replace(source, dead=DEAD[1:])
    one, _ = sorted_pieces(files, alive, placed, tmp_path, rows_per_file=95)
    assert one.shards[0].ids_sum == sum_of_ids(np.array([0, *live_ids(files[0])]))
    assert one.bounds == [0, 57]


def test_values_beyond_float16_are_refused() -> None:
    x, s = np.full((1, 3), 2, np.float32), np.ones((1, 3), np.float32)
    stored = vector_steps.side_by_side(x, s, metric="l2", what="shard 3")
    assert (stored.dtype, stored.tolist()) == (np.float16, [[[2] * 3, [1] * 3]])
    with pytest.raises(ShapeError, match=r"shard 3: embeddings up to 1e\+06 don't fit float16"):
        vector_steps.side_by_side(1e6 * s, s, metric="l2", what="shard 3")
    with pytest.raises(ShapeError, match=r"shard 3: structures up to 1e\+06 don't fit float16"):
        vector_steps.side_by_side(x, 1e6 * s, metric="l2", what="shard 3")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([3], [(0, 1)]),
        ([9], [(0, 1)]),
        ([2, 3, 1, 9, 0, 5, 5], [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]),
    ],
)
def test_neighbouring_shards_make_a_piece_of_bounded_size(
    sizes: list[int], expected: list[tuple[int, int]]
) -> None:
    assert segments.groups(sizes, 5) == expected
