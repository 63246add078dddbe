"""One task of a build at a time: what it reads, what it remembers, and what it carries."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.data import shards
from namr.data.datasets import ShardEntry
from namr.embed.embeddings import EmbeddingFile
from namr.errors import ManifestError, ShapeError
from namr.index import ivf
from namr.release import build_steps, held_out
from namr.release.build_steps import (
    HeldOut,
    IndexFile,
    ItemsTask,
    MergeTask,
    PartTask,
    RowRange,
    SampleTask,
    SegmentTask,
    TrainTask,
    VectorSource,
)
from namr.store import item_files, manifests, storage, tables
from namr.store.manifests import StoredObject
from namr.store.storage import Range
from namr.store.tables import EmbeddingTable, SampleTable
from tests import small_release

DIM = 8
NUM_ROWS = {0: 60, 2: 40}
REFUSED = 1
DEAD = np.array([0, 1, 7, shards.make_id(1, 3), shards.make_id(2, 39)], np.int64)


def store_embeddings(root: str, number: int) -> EmbeddingFile:
    """Vectors of a shard as extraction writes them; the row REFUSED has none."""
    ids = shards.make_id(number, 0) + np.arange(NUM_ROWS[number])
    kept = np.flatnonzero(np.arange(len(ids)) != REFUSED)
    vectors = small_release.random_vectors(len(ids), DIM, seed=number)
    table = EmbeddingTable(
        ids=ids[kept],
        keys=[f"k{row}" for row in kept],
        labels=[None] * len(kept),
        embeddings=vectors.embeddings[kept],
        structures=vectors.structures[kept],
        refused_ids=ids[[REFUSED]],
        refused_keys=["k1"],
        refused_reasons=["truncated"],
    )
    stored = manifests.write_object(root, f"{number}.parquet", tables.encode_embeddings(table))
    return EmbeddingFile(
        number=number,
        stored=stored,
        num_embedded=len(kept),
        num_refused=1,
        embedding_dim=DIM,
        dtype="float32",
    )


@pytest.fixture
def files(tmp_path: Path) -> list[EmbeddingFile]:
    return [store_embeddings(str(tmp_path / "embeddings"), number) for number in NUM_ROWS]


@pytest.fixture
def source(tmp_path: Path) -> VectorSource:
    return VectorSource(embeddings_uri=str(tmp_path / "embeddings"), dead=DEAD, metric="l2")


@pytest.fixture
def template() -> ivf.Template:
    x = small_release.random_vectors(100, DIM, seed=5).embeddings
    return ivf.train_template(x, "IVF4,SQ8", seed=0, num_threads=1)


def live_ids(file: EmbeddingFile) -> list[int]:
    ids = shards.make_id(file.number, 0) + np.arange(NUM_ROWS[file.number])
    gone = {*DEAD.tolist(), shards.make_id(file.number, REFUSED)}
    return [each for each in ids.tolist() if each not in gone]


def test_a_task_carries_the_tombstones_of_its_own_shards_alone(
    files: list[EmbeddingFile], source: VectorSource
) -> None:
    assert source.of([files[0]]).dead.tolist() == [0, 1, 7]
    assert source.of([files[1], files[1]]).dead.tolist() == [shards.make_id(2, 39)]
    assert source.of(reversed(files)).dead.tolist() == [0, 1, 7, shards.make_id(2, 39)]
    assert source.of([]).dead.tolist() == []


@pytest.mark.parametrize("dead", [[], [3], [0, 1, 2, 3, 4, 5], [9, 12]])
def test_live_is_what_the_tombstones_leave(dead: list[int]) -> None:
    ids = np.array([5, 0, 3, 9, 3], np.int64)
    source = VectorSource(embeddings_uri="nowhere", dead=np.array(dead, np.int64), metric="l2")
    assert source.live(ids).tolist() == [each not in dead for each in ids.tolist()]


def test_the_template_sees_no_held_out_and_no_dead_image(
    files: list[EmbeddingFile], source: VectorSource, tmp_path: Path
) -> None:
    picks = [(file, np.arange(file.num_embedded)) for file in files]
    sampled = build_steps.sample(SampleTask(source, HeldOut(0.2, 5), picks, str(tmp_path)))
    sample = np.load(tmp_path / sampled.stored.name)
    blocks = [source.read(file, slice(None)) for file in files]
    x, ids = np.concatenate([x for x, _ in blocks]), np.concatenate([ids for _, ids in blocks])
    assert ids.tolist() == live_ids(files[0]) + live_ids(files[1])
    held = held_out.mask(ids, share=0.2, seed=5)
    assert 0 < held.sum() < len(ids)
    np.testing.assert_array_equal(sample, x[~held])
    assert sampled.num_rows == len(sample)


def test_a_template_is_trained_on_all_that_was_sampled_in_order(
    files: list[EmbeddingFile], source: VectorSource, tmp_path: Path
) -> None:
    sampled = [
        build_steps.sample(SampleTask(source, HeldOut(0.1, 5), [(file, np.arange(30))], str(tmp_path)))
        for file in files
    ]
    trained = build_steps.train(TrainTask(sampled, DIM, "IVF4,SQ8", 3, str(tmp_path)))
    x = np.concatenate([np.load(tmp_path / some.stored.name) for some in sampled])
    assert trained == ivf.train_template(x, "IVF4,SQ8", seed=3, num_threads=1)
    with pytest.raises(ShapeError, match="the sample has 0"):
        build_steps.train(TrainTask([], DIM, "IVF4,SQ8", 0, str(tmp_path)))
    damaged(tmp_path / sampled[1].stored.name)
    with pytest.raises(ManifestError, match="is damaged"):
        build_steps.train(TrainTask(sampled, DIM, "IVF4,SQ8", 3, str(tmp_path)))


@pytest.fixture
def task(
    files: list[EmbeddingFile], source: VectorSource, template: ivf.Template, tmp_path: Path
) -> PartTask:
    return PartTask(
        source, template, [RowRange(files[0], 10, 59), RowRange(files[1], 0, 5)], str(tmp_path), 3
    )


def unreadable(task: PartTask) -> PartTask:
    """The same where the embeddings are gone: it can only be answered from what is recorded."""
    return task._replace(source=replace(task.source, embeddings_uri="nowhere"))


def test_a_part_holds_the_live_rows_of_its_ranges(
    task: PartTask, files: list[EmbeddingFile], tmp_path: Path
) -> None:
    part = build_steps.build_part(task)
    # rows of a range count embedded rows, of which row 1 is none
    expected = [each for each in live_ids(files[0]) if each >= 11] + live_ids(files[1])[:5]
    assert part.info.num_vectors == len(expected)
    assert (part.info.first_id, part.info.last_id) == (expected[0], expected[-1])
    assert manifests.read_manifest(str(tmp_path / "part-00003.json"), IndexFile) == part


def test_a_part_that_was_built_is_not_built_again(task: PartTask) -> None:
    part = build_steps.build_part(task)
    assert build_steps.build_part(unreadable(task)) == part


def test_a_part_whose_file_is_gone_is_built_again(task: PartTask, tmp_path: Path) -> None:
    part = build_steps.build_part(task)
    (tmp_path / part.stored.name).unlink()
    with pytest.raises(ManifestError, match="is missing"):
        build_steps.build_part(unreadable(task))
    assert build_steps.build_part(task) == part
    assert (tmp_path / part.stored.name).is_file()


def merge_task(task: PartTask, parts: list[IndexFile], tmp_path: Path) -> MergeTask:
    return MergeTask(task.template, parts, str(tmp_path), str(tmp_path / "releases"))


def test_a_segment_is_merged_once_and_again_only_where_it_is_gone(task: PartTask, tmp_path: Path) -> None:
    merging = merge_task(task, [build_steps.build_part(task)], tmp_path)
    segment = build_steps.merge(merging)
    path = tmp_path / "releases" / segment.stored.name
    data = path.read_bytes()
    assert build_steps.merge(merging._replace(parts=[])) == segment
    path.unlink()
    assert build_steps.merge(merging) == segment
    assert path.read_bytes() == data


def test_the_only_part_of_a_segment_is_the_segment(task: PartTask, tmp_path: Path) -> None:
    root = str(tmp_path / "releases")
    part = build_steps.build_part(task)
    segment = build_steps.build_segment(SegmentTask(task, root))
    assert segment.info == part.info
    assert (tmp_path / "releases" / segment.stored.name).read_bytes() == (
        tmp_path / part.stored.name
    ).read_bytes()
    assert build_steps.build_segment(SegmentTask(unreadable(task), root)) == segment


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [damaged, removed])
def test_a_part_that_was_harmed_is_never_merged(
    harm: Callable[[Path], None], task: PartTask, tmp_path: Path
) -> None:
    part = build_steps.build_part(task)
    harm(tmp_path / part.stored.name)
    with pytest.raises(ManifestError, match="is missing or damaged; delete"):
        build_steps.merge(merge_task(task, [part], tmp_path))
    assert not storage.exists(str(tmp_path / "segment.json"))


def test_the_items_of_a_file_are_the_samples_that_have_a_row(tmp_path: Path) -> None:
    uri, num = str(tmp_path / "dataset"), 10
    entries = []
    for number in (0, 2):
        samples = SampleTable(
            ids=shards.make_id(number, 0) + np.arange(num),
            keys=[f"k{number}/{row}" for row in range(num)],
            labels=[None] * num,
            fields=["{}"] * num,
            offsets=np.arange(num),
            sizes=np.ones(num, np.int64),
        )
        index = manifests.write_object(uri, f"{number}.parquet", tables.encode_samples(samples))
        tar = StoredObject(f"{number}.tar", 1, "0" * 64)
        entries.append(ShardEntry(number=number, tar=tar, index=index, num_samples=num))
    rows = np.full(2 * num, -1, np.int32)
    rows[[3, 9, 10, 11, 18]] = [4, 0, 1, 2, 3]
    before = 64  # bytes of the table that are other shards'
    (tmp_path / "rows").write_bytes(bytes(before) + rows.tobytes() + b"more")
    span = Range(str(tmp_path / "rows"), before, before + rows.nbytes)
    root = str(tmp_path / "releases")
    stored = build_steps.store_items(ItemsTask(uri, entries, span, 5, root))
    file = item_files.decode(storage.read(storage.join(root, stored.name)))
    assert [file.key(row) for row in range(len(file))] == ["k0/3", "k0/9", "k2/0", "k2/1", "k2/8"]
    assert file.ids.tolist() == [3, 9, *(shards.make_id(2, row) for row in (0, 1, 8))]
