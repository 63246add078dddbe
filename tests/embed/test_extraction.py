"""Every row of a shard comes out, interruptions change no byte, and bad models and images are told."""

import os
import select
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from namr.data import datasets, images, shards
from namr.data.datasets import Dataset
from namr.embed import embeddings, extraction, shard_table
from namr.embed.extraction import ExtractionConfig
from namr.errors import ConfigError, ImageRefused, ManifestError, ModelMismatch, ShapeError
from namr.model import model
from namr.model.model import ModelConfig, NamrModel
from namr.store import manifests, storage, tables
from tests import small_release
from tests.small_release import NOW, Recipe

NUM_ROWS = 21
BATCH = 8


@pytest.fixture(scope="module")
def net() -> NamrModel:
    config = ModelConfig(
        backbone="test_resnet", weights="none", embedding_dim=6, structure_hidden_dim=8, image_size_px=32
    )
    return model.build(config, seed=0).eval()


@pytest.fixture(scope="module")
def model_folder(net: NamrModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model.save(net, folder)
    return str(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_release.make_dataset(tmp_path, Recipe(num_shards=4, rows_per_shard=NUM_ROWS))


CONFIG = ExtractionConfig(batch_size_per_worker=BATCH, num_workers=2)


def add_shard(dataset: Dataset, tmp_path: Path, pictures: dict[str, bytes], *, erased: str = "") -> Dataset:
    """A further shard of these pictures; the one erased is emptied in the index."""
    before = datasets.head(dataset.uri)
    samples = [shards.Sample(key=key, image=data, extension="png") for key, data in pictures.items()]
    number = before.next_shard_number
    path = tmp_path / f"more-{number}.tar"
    table = shards.write_shard(path, samples, number=number)
    sizes = np.where(np.array(table.keys) == erased, 0, table.sizes)
    entry = datasets.ShardEntry(
        number=number,
        tar=manifests.write_object(dataset.uri, f"shards/{path.name}", path),
        index=manifests.write_object(
            dataset.uri, f"shards/more-{number}.parquet", tables.encode_samples(replace(table, sizes=sizes))
        ),
        num_samples=len(table),
    )
    return datasets.publish_version(before, [entry], now=NOW)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.parquet")}


def test_a_shard_comes_out_as_the_model_says(net: NamrModel, dataset: Dataset) -> None:
    config = replace(CONFIG, storage_dtype="float32")
    entry = dataset.shards[1]
    found, took = extraction.embed_shard(net, dataset, entry, config)
    pictures = [small_release.digit(NUM_ROWS + row) for row in range(NUM_ROWS)]
    pixels = np.stack([images.prepare(data, net.preprocessing) for data in pictures])
    x, s = model.embed(net, pixels, batch_size=BATCH, device="cpu")
    np.testing.assert_array_equal(found.embeddings, x)
    np.testing.assert_array_equal(found.structures, s)
    samples = dataset.samples(entry)
    assert found.ids.tolist() == samples.ids.tolist()
    assert (found.keys, found.labels) == (samples.keys, samples.labels)
    assert took.num_images == NUM_ROWS and 0 < took.model_s < took.seconds
    assert min(took.read_s, took.decode_s, took.waited_s) > 0 == took.write_s
    half = extraction.embed_shard(net, dataset, entry, CONFIG).table
    np.testing.assert_array_equal(half.embeddings, x.astype(np.float16))


def test_what_is_no_image_is_refused_with_its_reason(
    net: NamrModel, dataset: Dataset, tmp_path: Path
) -> None:
    good = small_release.digit(0)
    pictures = {"a": b"no image", "b": good, "c": good[:-40], "d": good, "e": good}
    more = add_shard(dataset, tmp_path, pictures, erased="d")
    entry = more.shards[-1]
    table = extraction.embed_shard(net, more, entry, CONFIG).table
    assert table.keys == ["b", "e"]
    reasons = dict(zip(table.refused_keys, table.refused_reasons, strict=True))
    assert reasons.keys() == {"a", "c", "d"}
    assert reasons["a"].startswith("not an image") and reasons["c"].startswith("damaged")
    assert reasons["d"] == shard_table.ERASED
    embeddings.write(str(tmp_path / "out"), "m", entry, table)


def test_tombstones_do_not_change_a_file(net: NamrModel, dataset: Dataset) -> None:
    entry = dataset.shards[0]
    before = extraction.embed_shard(net, dataset, entry, CONFIG).table
    dead = datasets.tombstone(dataset.uri, dataset.samples(entry).keys[:3], now=NOW)
    after = extraction.embed_shard(net, dead, entry, CONFIG).table
    assert tables.encode_embeddings(after) == tables.encode_embeddings(before)


def test_a_model_that_diverged_is_an_error_that_names_the_sample(net: NamrModel, dataset: Dataset) -> None:
    broken = model.build(net.config, seed=0).eval()
    with torch.no_grad():
        broken.heads.sample.bias.fill_(float("nan"))
    with pytest.raises(ShapeError, match=r"embedding of sample 'digit/0' is NaN .*8 of 8 in its batch"):
        extraction.embed_shard(broken, dataset, dataset.shards[0], CONFIG)


def test_what_the_model_ran_in_is_kept_with_what_it_made(
    net: NamrModel, dataset: Dataset, tmp_path: Path
) -> None:
    whole, lower = (
        extraction.embed_shard(net, dataset, dataset.shards[0], replace(CONFIG, compute_dtype=dtype)).table
        for dtype in ("float32", "bfloat16")
    )
    assert not np.array_equal(whole.embeddings, lower.embeddings)
    np.testing.assert_allclose(lower.embeddings, whole.embeddings, atol=0.1 * np.abs(whole.embeddings).max())
    root = str(tmp_path / "out")
    files = [embeddings.write(root, "m", dataset.shards[0], lower).file]
    assert files[0].compute_dtype == "bfloat16"
    files += [
        embeddings.write(root, "m", entry, extraction.embed_shard(net, dataset, entry, CONFIG).table).file
        for entry in dataset.shards[1:]
    ]
    with pytest.raises(ManifestError, match=r"are of 2 kinds.*'bfloat16'.*'float32'"):
        embeddings.publish_set(root, "m", dataset, files)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="compute_dtype is float16, which needs a GPU"):
            extraction.embed_shard(net, dataset, dataset.shards[0], replace(CONFIG, compute_dtype="float16"))


def test_the_model_is_verified_before_any_worker_starts(model_folder: str, tmp_path: Path) -> None:
    shipped = extraction.read_model(model_folder)
    assert extraction.read_model(model_folder, expected_digest=shipped.digest) == shipped
    with pytest.raises(ModelMismatch, match="expected eeee"):
        extraction.read_model(model_folder, expected_digest="e" * 64)
    for name, data in shipped.files.items():
        (tmp_path / name).write_bytes(data[:-5] + b"x" + data[-4:])
    with pytest.raises(ManifestError, match="damaged"):
        extraction.read_model(str(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size_per_worker": 0},
        {"batch_size_per_worker": 10**7},
        {"num_workers": 0},
        {"decode_tasks_per_worker": -1},
        {"max_bad_fraction": 1.5},
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ExtractionConfig(**wrong)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_dataset_is_embedded_once_and_then_what_is_new(
    model_folder: str, dataset: Dataset, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    first = extraction.extract(dataset, out, model_folder, CONFIG)
    assert (first.num_samples, first.num_embedded, first.num_refused) == (84, 84, 0)
    assert (first.num_new, first.num_new_files) == (84, 4)
    assert first.throughput.num_images == 84 and min(astuple(first.throughput)) > 0
    again = extraction.extract(dataset, out, model_folder, CONFIG)
    assert again.embedding_set == first.embedding_set
    assert again.num_new == again.throughput.num_images == 0
    tasks = replace(CONFIG, num_workers=1, decode_tasks_per_worker=2)
    extraction.extract(dataset, str(tmp_path / "by tasks"), model_folder, tasks)
    assert files_of(tmp_path / "by tasks") == files_of(tmp_path / "out")
    with pytest.raises(ConfigError, match="decode_tasks_per_worker is 2, and 4 workers leave no core of 2"):
        extraction.extract(dataset, str(tmp_path / "none"), model_folder, replace(tasks, num_workers=4))
    before = files_of(tmp_path / "out")
    more = add_shard(dataset, tmp_path, {"late": small_release.digit(5), "bad": b"no image"})
    with pytest.raises(ImageRefused, match=r"1 of 2 images, more than max_bad_fraction 0.01.*'bad' \(not an"):
        extraction.extract(more, out, model_folder, CONFIG)
    with pytest.raises(ManifestError, match="is missing"):
        embeddings.open_set(out, extraction.read_model(model_folder).digest, more)
    for other in ({"storage_dtype": "float32"}, {"compute_dtype": "bfloat16"}):
        with pytest.raises(ManifestError, match=r"is float16 made in float32, and this extraction would "):
            extraction.extract(more, out, model_folder, replace(CONFIG, **other))
    night = extraction.extract(more, out, model_folder, replace(CONFIG, max_bad_fraction=0.5))
    assert (night.num_samples, night.num_embedded, night.num_refused) == (86, 85, 1)
    assert [row.key for row in night.refused] == ["bad"]
    dead = datasets.tombstone(dataset.uri, ["bad"], now=NOW)
    assert extraction.extract(dead, out, model_folder, CONFIG).num_refused == 1
    assert before.items() <= files_of(tmp_path / "out").items()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_workers_error_is_raised_as_it_was_there(
    model_folder: str, dataset: Dataset, tmp_path: Path
) -> None:
    tar = Path(dataset.shard_uri(dataset.shards[2]))
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    out = str(tmp_path / "out")
    with pytest.raises(ManifestError, match="truncated"):
        extraction.extract(dataset, out, model_folder, CONFIG)
    tar.write_bytes(whole)
    assert extraction.extract(dataset, out, model_folder, CONFIG).num_embedded == 84


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.usefixtures("ray_local")
def test_everything_may_lie_on_s3(model_folder: str, dataset: Dataset, tmp_path: Path, s3: str) -> None:
    for name in storage.list_names(dataset.uri):
        storage.upload(Path(dataset.uri, name), storage.join(s3, "dataset", name))
    for name in (model.DESCRIPTION_FILE, model.WEIGHTS_FILE):
        storage.upload(Path(model_folder, name), storage.join(s3, "model", name))
    copy = datasets.open_version(storage.join(s3, "dataset"))
    remote = extraction.extract(copy, storage.join(s3, "out"), storage.join(s3, "model"), CONFIG)
    assert remote.num_embedded == 84
    extraction.extract(dataset, str(tmp_path / "out"), model_folder, CONFIG)
    local = files_of(tmp_path / "out")
    names = [file.stored.name for file in remote.embedding_set.files]
    assert {Path(name).name: storage.read(storage.join(s3, "out", name)) for name in names} == local


PROGRAM = """
import sys
from namr import ray_connection
from namr.data import datasets
from namr.embed import extraction
from tests.embed.test_extraction import ONE_BY_ONE
ray_connection.connect(None, num_cpus=2)
extraction.extract(datasets.open_version(sys.argv[1]), sys.argv[2], sys.argv[3], ONE_BY_ONE)
"""
ONE_BY_ONE = ExtractionConfig(num_workers=1, batch_size_per_worker=1)


def wait_for_the_end_of_all(mark: str) -> None:
    """Until no process is left that has inherited this environment variable."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if f"{mark}=1".encode() in (path / "environ").read_bytes().split(b"\0"):
                handle = os.pidfd_open(int(path.name))
                ended, _, _ = select.select([handle], [], [], 120)
                os.close(handle)
                assert ended, f"process {path.name} did not end with its driver"


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_local")
def test_killed_in_the_middle_and_resumed_gives_the_same_bytes(model_folder: str, tmp_path: Path) -> None:
    """A real kill -9 of a process that runs the extraction; its Ray ends with it."""
    dataset = small_release.make_dataset(tmp_path, Recipe(num_shards=6, rows_per_shard=120))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert extraction.extract(dataset, str(whole), model_folder, ONE_BY_ONE).num_new_files == 6
    mark = f"NAMR_TEST_{uuid.uuid4().hex}"
    words = [sys.executable, "-c", PROGRAM, dataset.uri, str(killed), model_folder]
    with subprocess.Popen(words, env={**os.environ, mark: "1"}) as process:
        try:
            while process.poll() is None and not files_of(killed):
                time.sleep(0.01)
        finally:
            process.kill()
    wait_for_the_end_of_all(mark)
    done = len(files_of(killed))
    assert 0 < done < 6
    assert extraction.extract(dataset, str(killed), model_folder, ONE_BY_ONE).num_new_files == 6 - done
    assert files_of(killed) == files_of(whole)
    assert len(files_of(whole)) == 6
