"""From embeddings to a segment: equal to the one index, reconciled by ids, and the same after a restart."""

from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from namr.data import datasets, shards
from namr.data.datasets import Dataset
from namr.embed import embeddings
from namr.errors import ConfigError, ManifestError, ShapeError
from namr.index import index_files, ivf
from namr.model import distances
from namr.release import build, build_steps, segments, vector_steps
from namr.release.build import BuildConfig, BuildReport
from namr.release.places import Places
from namr.release.vector_steps import Placed
from namr.store import item_files, manifests, storage, tables
from namr.store.manifests import StoredObject
from namr.store.storage import Range
from namr.store.tables import EmbeddingTable
from tests import small_release
from tests.small_release import NOW

MODEL = "a" * 64
DIM = 8
ROWS = [300, 1, 250, 49]
REFUSED = [3, (2 << 32) + 7]
DEAD = [4, 5, (2 << 32) + 7, (3 << 32) + 48]


def embed_all(dataset: Dataset, root: str, *, seed: int = 0) -> list[EmbeddingTable]:
    """Clustered vectors of all rows but the refused ones, written and published as extraction does."""
    files, written = [], []
    for entry in dataset.shards:
        samples = dataset.samples(entry)
        vectors = small_release.random_vectors(len(samples), DIM, seed=seed + entry.number)
        kept, refused = (np.flatnonzero(~np.isin(samples.ids, REFUSED)), np.isin(samples.ids, REFUSED))
        written.append(
            EmbeddingTable(
                ids=samples.ids[kept],
                keys=[samples.keys[row] for row in kept],
                labels=[samples.labels[row] for row in kept],
                embeddings=vectors.embeddings[kept].astype(np.float16),
                structures=vectors.structures[kept].astype(np.float16),
                refused_ids=samples.ids[refused],
                refused_keys=[samples.keys[row] for row in np.flatnonzero(refused)],
                refused_reasons=["truncated"] * int(refused.sum()),
            )
        )
        files.append(embeddings.write(root, MODEL, entry, written[-1]).file)
    embeddings.publish_set(root, MODEL, dataset, files)
    return written


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of four uneven shards, tombstones in it, and its embeddings."""
    root = tmp_path_factory.mktemp("gallery")
    before, entries, start = datasets.head(str(root / "dataset")), [], 0
    for number, num_rows in enumerate(ROWS):
        path = root / f"shard-{number}.tar"
        samples = [
            shards.Sample(
                key=f"digit/{row}", image=small_release.digit(row), extension="png", label=str(row % 7)
            )
            for row in range(start, start + num_rows)
        ]
        start += num_rows
        table = shards.write_shard(path, samples, number=number)
        stored = manifests.write_object(before.uri, f"shards/{path.name}", path)
        index = manifests.write_object(before.uri, f"shards/{number}.parquet", tables.encode_samples(table))
        entries.append(datasets.ShardEntry(number=number, tar=stored, index=index, num_samples=num_rows))
    dataset = datasets.publish_version(before, entries, now=NOW, tombstones=DEAD)
    embed_all(dataset, str(root / "embeddings"))
    return root


def built(gallery: Path, releases_uri: Path, **config: object) -> BuildReport:
    """The index of the gallery, by metric L2 unless config has another."""
    metric = config.pop("metric", "l2")
    return build.build(
        datasets.open_version(str(gallery / "dataset")),
        str(gallery / "embeddings"),
        str(releases_uri),
        BuildConfig(**config),
        model_digest=MODEL,
        metric=metric,
    )


def live_vectors(gallery: Path, metric: distances.Metric) -> tuple[ivf.Floats, ivf.Ids]:
    """What has to be in the index, computed here from the embeddings as they lie there."""
    dataset = datasets.open_version(str(gallery / "dataset"))
    stored = list(embeddings.iterate(embeddings.open_set(str(gallery / "embeddings"), MODEL, dataset)))
    ids = np.concatenate([table.ids for table in stored])
    x = np.concatenate([table.embeddings for table in stored]).astype(np.float32)
    keep = ~np.isin(ids, DEAD)
    return distances.for_search(torch.from_numpy(x[keep]), metric).numpy(), ids[keep]


def test_files_of_items_are_whole_shards_and_few_and_know_their_rows(
    gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_ITEMS_PER_FILE", 300)
    dataset = datasets.open_version(str(gallery / "dataset"))
    placed = Placed(
        shards=StoredObject("shards", 1, ""), rows=StoredObject("rows", 128 + 4 * 600, ""), num_rows=595
    )
    tasks = segments.items_tasks(
        dataset.uri, dataset.shards, (300, 0, 249, 48), placed=placed, releases_uri="/r"
    )
    assert [[entry.number for entry in task.entries] for task in tasks] == [[0, 1], [2, 3]]
    assert [task.rows for task in tasks] == [
        Range("/r/rows", 128, 128 + 4 * 301),
        Range("/r/rows", 128 + 4 * 301, 128 + 4 * 600),
    ]
    assert {task.num_rows for task in tasks} == {595}


def test_what_a_gpu_trained_lies_in_a_folder_of_its_own(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build on processors that goes on with it would not be the same again."""
    named: list[str] = []

    def note(*_: object, work_uri: str, **__: object) -> None:
        named.append(work_uri)
        raise InterruptedError

    monkeypatch.setattr(build.ray_connection, "connect", lambda: None)
    monkeypatch.setattr(build.ray_connection, "total_gpus", lambda: 1)
    monkeypatch.setattr(build.templates, "train", note)
    for use_gpu in (False, True, False, True):
        with pytest.raises(InterruptedError):
            built(gallery, tmp_path, index_key="IVF8,Flat", use_gpu=use_gpu)
    on_processors, on_gpus, *again = named
    assert again == [on_processors, on_gpus]
    assert on_processors != on_gpus


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("key", "metric", "num_parts"),
    [("auto", "l2", 4), ("IVF8,Flat", "cosine", 5), ("IVF8,SQ8", "l2", 1), ("IVF4,PQ8x4fs", "cosine", 7)],
)
def test_the_segment_is_the_one_index_over_all_live_vectors(
    key: str, metric: distances.Metric, num_parts: int, gallery: Path, tmp_path: Path
) -> None:
    releases_uri = tmp_path / "releases"
    report = built(gallery, releases_uri, index_key=key, num_parts=num_parts, metric=metric)
    x, ids = live_vectors(gallery, metric)
    assert report.num_parts == num_parts
    assert (report.counts.num_samples, report.counts.num_indexed) == (600, len(ids))
    assert (report.counts.num_refused, report.counts.num_tombstoned) == (1, 4)
    (segment,) = report.segments
    path = releases_uri / segment.file.name
    template = ivf.load_template((releases_uri / report.template.name).read_bytes())
    assert template.hash == report.template_hash
    ivf.build_part(template, [(x, ids)], tmp_path / "whole", num_threads=1)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert faiss.read_index(str(path)).ntotal == segment.num_entries == len(ids)
    if key == "auto":
        distance, nearest = ivf.open_index(path).search(x, 1, 1)
        np.testing.assert_array_equal(nearest[:, 0], ids)
        assert np.allclose(distance, 0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("rows_a_file", "rows_a_piece"), [(10**6, 10**6), (200, 1), (595, 301), (7, 300)])
@pytest.mark.parametrize("key", ["Flat", "IVF8,SQ8"])
def test_vectors_and_items_are_those_of_live_samples(
    key: str,
    rows_a_file: int,
    rows_a_piece: int,
    gallery: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vector_steps, "FILE_BYTES", 4 * DIM * rows_a_file)
    monkeypatch.setattr(vector_steps, "PIECE_BYTES", 4 * DIM * rows_a_piece)
    report = built(gallery, tmp_path, index_key=key, metric="cosine")
    x, ids = live_vectors(gallery, "cosine")
    (stored,) = report.vectors
    assert [of.num_rows for of in stored.files] == [
        min(rows_a_file, len(ids) - first) for first in range(0, len(ids), rows_a_file)
    ]
    both = np.concatenate([np.load(tmp_path / of.file.name) for of in stored.files])
    in_order = index_files.ids_in(tmp_path / report.segments[0].file.name)
    np.testing.assert_array_equal(both[:, 0], x[np.searchsorted(ids, in_order)].astype(np.float16))
    table = Places.open(tmp_path / stored.shards.name, tmp_path / stored.rows.name, num_rows=len(ids))
    np.testing.assert_array_equal(table.of(in_order), np.arange(len(ids)))
    assert table.shards.tolist() == [[number, size] for number, size in enumerate(ROWS)]
    assert (table.of(np.array(REFUSED + DEAD)) == -1).all()
    assert 0.5 <= stored.min_structure == both[:, 1].min() < 1
    work = next((tmp_path / "building").iterdir())
    assert not [path for path in work.glob("vectors-*") if path.suffix != ".json"]
    (of_items,) = report.items
    items = item_files.open_file(tmp_path / of_items.name)
    assert items.ids.tolist() == ids.tolist()
    samples = [report.dataset.samples(entry) for entry in report.dataset.shards]
    key_of = {i: key for table in samples for i, key in zip(table.ids.tolist(), table.keys, strict=True)}
    assert [items.key(row) for row in range(len(ids))] == [key_of[i] for i in ids.tolist()]
    assert {items.label(row) for row in range(len(ids))} == set("0123456")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_build_that_was_killed_goes_on_to_the_same_release(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = built(gallery, tmp_path / "whole")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(segments, "_check_ids", dies)
        with pytest.raises(KeyboardInterrupt):
            built(gallery, tmp_path / "killed")
    work = next((tmp_path / "killed" / "building").iterdir())
    (work / "segment.json").unlink()
    (work / "part-00002.json").unlink()
    (work / "vectors-00000.json").unlink()
    untouched = {path: path.stat().st_mtime_ns for path in work.glob("part-00001*")}
    resumed = built(gallery, tmp_path / "killed")
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert replace(resumed, seconds=0.0) == replace(whole, seconds=0.0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_other_embeddings_of_the_same_model_and_dataset_make_another_segment(
    gallery: Path, tmp_path: Path
) -> None:
    """An earlier build lies in the same work folder: nothing of it may be taken for this one's."""
    embed_all(datasets.open_version(str(gallery / "dataset")), str(tmp_path / "other" / "embeddings"), seed=9)
    (tmp_path / "other" / "dataset").symlink_to(gallery / "dataset")
    first = built(gallery, tmp_path / "releases")
    second = built(tmp_path / "other", tmp_path / "releases")
    alone = built(tmp_path / "other", tmp_path / "alone")
    assert second.vectors != first.vectors
    assert second.segments != first.segments
    assert replace(second, seconds=0.0) == replace(alone, seconds=0.0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_part_that_lost_vectors_stops_the_build(gallery: Path, tmp_path: Path) -> None:
    report = built(gallery, tmp_path)
    work = next((tmp_path / "building").iterdir())
    segment = manifests.read_manifest(str(work / "segment.json"), build_steps.IndexFile)
    lossy = replace(segment, info=replace(segment.info, num_vectors=segment.info.num_vectors - 1))
    storage.write(str(work / "segment.json"), manifests.encode_manifest(lossy))
    with pytest.raises(ManifestError, match=f"holds {report.counts.num_indexed - 1} vectors"):
        built(gallery, tmp_path)
    swapped = replace(segment, info=replace(segment.info, ids_sum=segment.info.ids_sum ^ 1))
    storage.write(str(work / "segment.json"), manifests.encode_manifest(swapped))
    with pytest.raises(ManifestError, match="or their ids differ"):
        built(gallery, tmp_path)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_cannot_be_built_is_told(gallery: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is missing, so there is no namr-embeddings here"):
        build.build(
            datasets.open_version(str(gallery / "dataset")),
            str(tmp_path / "elsewhere"),
            str(tmp_path),
            BuildConfig(),
            model_digest=MODEL,
            metric="l2",
        )
    with pytest.raises(ConfigError, match="HNSW32' is not offered"):
        built(gallery, tmp_path, index_key="HNSW32")
    with pytest.raises(ShapeError, match="trained on 4096 vectors or more, the sample has"):
        built(gallery, tmp_path, index_key="IVF4096,Flat")


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.usefixtures("ray_local")
def test_a_build_on_s3_is_the_same(gallery: Path, tmp_path: Path, s3: str) -> None:
    for part in ("dataset", "embeddings"):
        for name in storage.list_names(str(gallery / part)):
            storage.upload(gallery / part / name, storage.join(s3, part, name))
    local = built(gallery, tmp_path, index_key="IVF8,SQ8")
    remote = build.build(
        datasets.open_version(storage.join(s3, "dataset")),
        storage.join(s3, "embeddings"),
        storage.join(s3, "releases"),
        BuildConfig(index_key="IVF8,SQ8"),
        model_digest=MODEL,
        metric="l2",
    )
    assert replace(remote, dataset=local.dataset, seconds=local.seconds) == local
    (segment,) = remote.segments
    data = storage.read(storage.join(s3, "releases", segment.file.name))
    assert data == (tmp_path / segment.file.name).read_bytes()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("seed", -1, "seed is -1; expected 0 to 2147483647"),
        ("seed", 1 << 31, "seed is 2147483648"),
        ("num_held_out", 0, "num_held_out is 0; expected 1 or more"),
        ("num_parts", 0, "num_parts is 0"),
        ("max_index_bytes", 0, "max_index_bytes is 0"),
    ],
)
def test_a_config_that_no_build_could_follow_is_told_before_any_work(
    field: str, value: int, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        BuildConfig(**{field: value})
