"""Extraction: a dataset version into embeddings, one file a shard, by a pool of Ray actors.

Each actor loads the model once, then streams whole shards through those that decode into it (`decoding`), in
batches of one fixed size (the last one padded), and writes a file for each shard by exclusive create. So a
run that was killed anywhere goes on with the shards that are missing, two runs at once don't disturb each
other, and on CPU the files are the same bytes as those of a run that was never interrupted. Of a shard an
actor holds a few batches of pixels, and all vectors as they are stored: 2 KB an image at 512 dimensions in
float16, and some five times that while the file is written and read back.

Every row of a shard comes out: embedded, or refused with a reason. Tombstones are not looked at, because the
file of a shard serves every dataset version that has the shard (`embeddings`). A model that returns NaN or
what the storage type can't hold is an error that names the sample, not a refusal.

Not covered: test-time augmentation, and models that don't fit one device.
"""

import contextlib
import logging
import pickle
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import ray
import torch

from namr import checks, progress, ray_connection
from namr.data.datasets import Dataset, ShardEntry
from namr.embed import decoding, embeddings, throughput
from namr.embed.embeddings import EmbeddingFile, EmbeddingSet
from namr.embed.shard_table import ERASED, Refused, ShardTable
from namr.embed.throughput import Throughput
from namr.errors import ConfigError, ImageRefused, ManifestError, ModelMismatch, NamrError
from namr.model import model
from namr.model.model import ComputeDtype, NamrModel
from namr.store import scratch, storage
from namr.store.tables import EmbeddingTable

_CPUS_PER_WORKER = 0.5  # a whole one each would leave none for Ray Data's own tasks, and the run would hang
_MOST_TOLD = 10
_MOST_AT_ONCE = 8192  # three times as many pictures are in memory: 3.7 GB at 224 px, before the model


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """How to embed."""

    batch_size_per_worker: int = 64
    """images that go through the model at once; a file's last bits depend on it"""
    num_workers: int | None = None
    """actors; none named means one for each GPU, or for each core where there is no GPU"""
    decode_threads_per_worker: int = 4
    """threads that turn bytes into pixels, beside the model"""
    decode_tasks_per_worker: int = 0
    """Ray tasks, of one core each and on any node, that do so in the threads' place: for GPUs whose own nodes
    have too few cores to feed them; 0 leaves it to the threads"""
    storage_dtype: Literal["float16", "float32"] = "float16"
    """of the stored vectors; all files of a dataset version must have the same"""
    compute_dtype: ComputeDtype = "float32"
    """that the model runs in; float16 and bfloat16 are for GPUs, which are faster in them (a CPU refuses
    float16); all files of a dataset version must have the same"""
    max_bad_fraction: float = 0.01
    """the run fails if a larger share of the images is refused"""

    def __post_init__(self) -> None:
        checks.in_range(self, "batch_size_per_worker", at_least=1, at_most=_MOST_AT_ONCE)
        checks.in_range(self, "num_workers", "decode_threads_per_worker", at_least=1)
        checks.in_range(self, "decode_tasks_per_worker", at_least=0, at_most=1024)
        checks.in_range(self, "max_bad_fraction", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What a run found and did."""

    embedding_set: EmbeddingSet
    num_samples: int
    """of the dataset version: embedded + refused"""
    num_embedded: int
    num_refused: int
    num_new: int
    """samples of shards that this run read; the others were embedded before"""
    num_new_files: int
    throughput: Throughput
    """of the shards that this run embedded"""
    refused: tuple[Refused, ...]
    """of the shards that this run looked at, the first few"""


class ModelFiles(NamedTuple):
    """A saved model as it travels to the workers."""

    digest: str
    files: Mapping[str, bytes]


def extract(
    dataset: Dataset,
    embeddings_uri: str,
    model_uri: str,
    config: ExtractionConfig,
    *,
    expected_digest: str | None = None,
) -> ExtractReport:
    """Embed every shard of a dataset version that this model has not embedded yet.

    embeddings_uri: root of all embeddings. model_uri: the folder of a saved model, local to this process or
    s3://. Raises ModelMismatch if it is not the one of expected_digest, ImageRefused above max_bad_fraction
    (the files stay, no set is published), ShapeError for NaN embeddings, ManifestError for a damaged shard
    and for files of another kind that are there already.
    """
    started = time.monotonic()
    root = storage.absolute(embeddings_uri)
    storage.check_writable(root)
    shipped = read_model(model_uri, expected_digest=expected_digest)
    known = embeddings.known_files(root, shipped.digest, dataset)
    to_do = [entry for entry in dataset.shards if entry.number not in known]
    done: list[_Done] = []
    if to_do:
        _check_alike(config, known.values())
        done = _run(config, dataset, root, shipped, to_do)
    _check_refused(config, done)
    files = [*known.values(), *(shard.file for shard in done)]
    embedding_set = embeddings.publish_set(root, shipped.digest, dataset, files)
    new = [shard.file for shard in done if shard.took]
    return ExtractReport(
        embedding_set=embedding_set,
        num_samples=embedding_set.manifest.num_samples,
        num_embedded=embedding_set.manifest.num_embedded,
        num_refused=embedding_set.manifest.num_refused,
        num_new=sum(file.num_embedded + file.num_refused for file in new),
        num_new_files=len(new),
        throughput=throughput.total(
            (shard.took for shard in done if shard.took), seconds=time.monotonic() - started
        ),
        refused=tuple(row for shard in done for row in shard.bad)[:_MOST_TOLD],
    )


def read_model(model_uri: str, *, expected_digest: str | None = None) -> ModelFiles:
    """The files of a saved model, verified here once before any worker starts."""
    uri = storage.absolute(model_uri)
    names = (model.DESCRIPTION_FILE, model.WEIGHTS_FILE)
    files = {name: storage.read(storage.join(uri, name)) for name in names}
    digest = model.digest(_load(files))
    if expected_digest not in (None, digest):
        raise ModelMismatch(f"{uri} holds model {digest[:12]}, expected {expected_digest}: check the URI")
    return ModelFiles(digest, files)


class Embedded(NamedTuple):
    """What the model made of one shard, and what that took."""

    table: EmbeddingTable
    took: Throughput


def embed_shard(net: NamrModel, dataset: Dataset, entry: ShardEntry, config: ExtractionConfig) -> Embedded:
    """The embeddings of all rows of one shard; refused are images that don't decode, and erased rows."""
    begun, clock, model_s = time.perf_counter(), decoding.Clock(), 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and config.compute_dtype == "float16":
        raise ConfigError(
            "extraction.compute_dtype is float16, which needs a GPU; here is none: take bfloat16"
        )
    table = ShardTable(dataset, entry, dim=net.config.embedding_dim, storage_dtype=config.storage_dtype)
    batches = decoding.batches(
        dataset,
        entry,
        net.preprocessing,
        batch_size=config.batch_size_per_worker,
        num_threads=config.decode_threads_per_worker,
        num_tasks=config.decode_tasks_per_worker,
        clock=clock,
    )
    with contextlib.closing(batches):
        for batch in batches:
            start = time.perf_counter()
            x, s = model.embed(
                net,
                batch.pixels,
                batch_size=config.batch_size_per_worker,
                device=device,
                compute_dtype=config.compute_dtype,
            )
            model_s += time.perf_counter() - start
            table.add(batch, x, s)
    seconds = time.perf_counter() - begun
    took = Throughput(
        num_images=entry.num_samples,
        read_s=clock.read_s,
        decode_s=clock.decode_s,
        model_s=model_s,
        write_s=0.0,
        waited_s=seconds - model_s,
        seconds=seconds,
    )
    return Embedded(table.finished(compute_dtype=config.compute_dtype), took)


class _Done(NamedTuple):
    """What a worker says of one shard."""

    file: EmbeddingFile
    took: Throughput | None
    """None where the file was there"""
    num_bad: int
    bad: list[Refused]
    """the first few"""


class _Worker:
    """The actor: one model, any number of shards."""

    def __init__(self, config: ExtractionConfig, dataset: Dataset, root_uri: str, shipped: Any) -> None:
        self._config, self._dataset, self._root_uri, self._shipped = config, dataset, root_uri, shipped
        self._entries = {entry.number: entry for entry in dataset.shards}
        self._net: NamrModel | None = None  # loaded by the first call: what __init__ raises, Ray tries again

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        """What became of one shard; an error of ours is a result, because Ray would lose what it is."""
        try:
            return {"done": pickle.dumps(self._shard(self._entries[int(row["number"])]))}
        except NamrError as error:
            return {"done": pickle.dumps(error)}

    def _shard(self, entry: ShardEntry) -> _Done:
        shipped: ModelFiles = ray.get(self._shipped)
        if self._net is None:
            torch.set_num_threads(1)
            self._net = _load(shipped.files)
            if model.digest(self._net) != shipped.digest:
                raise ModelMismatch(f"a worker loaded another model than {shipped.digest[:12]}; run again")
        where = self._root_uri, shipped.digest
        took = None
        if storage.exists(embeddings.embedding_uri(*where, entry.tar.sha256)):
            file, table = embeddings.verify(*where, entry)
            _check_alike(self._config, [file])
        else:
            table, took = embed_shard(self._net, self._dataset, entry, self._config)
            begun = time.perf_counter()
            file, table = embeddings.write(*where, entry, table)
            took = replace(took, write_s=time.perf_counter() - begun)
        live = self._dataset.live(table.refused_ids).tolist()
        rows = zip(table.refused_ids.tolist(), table.refused_keys, table.refused_reasons, strict=True)
        bad = [Refused(*row) for row, is_live in zip(rows, live, strict=True) if is_live and row[2] != ERASED]
        return _Done(file, took, len(bad), bad[:_MOST_TOLD])


def _run(
    config: ExtractionConfig, dataset: Dataset, root_uri: str, shipped: ModelFiles, to_do: list[ShardEntry]
) -> list[_Done]:
    """What became of each shard; the first error that a worker had is raised."""
    ray_connection.connect()
    num_gpus = ray_connection.total_gpus()
    num_workers = min(len(to_do), config.num_workers or num_gpus or ray_connection.total_cpus())
    _check_cores_are_left(config, num_workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # its own log keeps what it says of each run
            handler.setLevel(logging.ERROR)
    rows = ray.data.from_items([{"number": entry.number} for entry in to_do], override_num_blocks=len(to_do))
    results = rows.map(
        cast(Any, _Worker),
        fn_constructor_args=(config, dataset, root_uri, ray.put(shipped)),
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=_CPUS_PER_WORKER,
        num_gpus=1 if num_gpus else 0,
    )
    done: list[_Done] = []
    with progress.shown("embedding shards", len(to_do)) as show:
        for row in results.iter_rows():
            result: _Done | NamrError = pickle.loads(row["done"])
            if isinstance(result, NamrError):
                raise result
            done.append(result)
            show(len(done), f"{sum(shard.file.num_embedded for shard in done)} images")
    return done


def _check_alike(config: ExtractionConfig, known: Iterable[EmbeddingFile]) -> None:
    """What would be refused when all is done is refused before more is added to it."""
    wanted = (config.storage_dtype, config.compute_dtype)
    for file in known:
        if (file.dtype, file.compute_dtype) != wanted:
            raise ManifestError(
                f"{file.stored.name} is {file.dtype} made in {file.compute_dtype}, and this extraction would "
                f"add {wanted[0]} made in {wanted[1]}; a set has one kind: set storage_dtype and "
                "compute_dtype as they were, or extract into a root of its own"
            )


def _check_cores_are_left(config: ExtractionConfig, num_workers: int) -> None:
    """Tasks that decode would wait for ever where the workers, which wait for them, hold all cores."""
    num_cpus = ray_connection.total_cpus()
    if config.decode_tasks_per_worker and num_cpus - _CPUS_PER_WORKER * num_workers < 1:
        raise ConfigError(
            f"extraction.decode_tasks_per_worker is {config.decode_tasks_per_worker}, and {num_workers} "
            f"workers leave no core of {num_cpus} to such tasks; expected fewer workers, or 0: threads decode"
        )


def _load(files: Mapping[str, bytes]) -> NamrModel:
    with scratch.folder("model-") as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        return model.load(Path(folder))


def _check_refused(config: ExtractionConfig, done: list[_Done]) -> None:
    num_bad = sum(shard.num_bad for shard in done)
    num_all = sum(shard.file.num_embedded + shard.file.num_refused for shard in done)
    if num_bad > config.max_bad_fraction * num_all:
        told = [f"{row.key!r} ({row.reason})" for shard in done for row in shard.bad][:3]
        raise ImageRefused(
            f"{num_bad} of {num_all} images, more than max_bad_fraction {config.max_bad_fraction} allows; "
            f"the first are {', '.join(told)}. The other embeddings are kept: tombstone these, or allow more"
        )
