"""Extraction: a dataset version into embeddings, one file a shard, by a pool of Ray actors.

Each actor loads the model once, then streams whole shards through decoding threads into it, in batches of
one fixed size (the last one padded), and writes a file for each shard by exclusive create. So a run that was
killed anywhere goes on with the shards that are missing, two runs at once don't disturb each other, and on
CPU the files are the same bytes as those of a run that was never interrupted.

Every row of a shard comes out: embedded, or refused with a reason. Tombstones are not looked at, because the
file of a shard serves every dataset version that has the shard (`embeddings`). A model that returns NaN or
what the storage type can't hold is an error that names the sample, not a refusal.

Not covered: test-time augmentation, and models that don't fit one device.
"""

import logging
import pickle
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import ray
import torch

from namr import checks, progress, ray_connection
from namr.data import images, reading
from namr.data.datasets import Dataset, ShardEntry
from namr.data.images import Preprocessing
from namr.data.reading import StreamedSample
from namr.embed import embeddings
from namr.embed.embeddings import EmbeddingFile, EmbeddingSet
from namr.errors import ImageRefused, ModelMismatch, NamrError, ShapeError
from namr.model import model
from namr.model.model import NamrModel
from namr.store import scratch, storage
from namr.store.tables import EmbeddingTable

_CPUS_PER_WORKER = 0.5  # a whole one each would leave none for Ray Data's own tasks, and the run would hang
_MOST_TOLD = 10
_MOST_AT_ONCE = 8192  # three times as many pictures are in memory: 3.7 GB at 224 px, before the model
ERASED = "erased"
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """How to embed."""

    batch_size_per_worker: int = 64
    """images that go through the model at once; a file's last bits depend on it"""
    num_workers: int | None = None
    """actors; none named means one for each GPU, or for each core where there is no GPU"""
    decode_threads_per_worker: int = 4
    """threads that turn bytes into pixels, beside the model"""
    storage_dtype: Literal["float16", "float32"] = "float16"
    """of the stored vectors; all files of a dataset version must have the same"""
    max_bad_fraction: float = 0.01
    """the run fails if a larger share of the images is refused"""

    def __post_init__(self) -> None:
        checks.in_range(self, "batch_size_per_worker", at_least=1, at_most=_MOST_AT_ONCE)
        checks.in_range(self, "num_workers", "decode_threads_per_worker", at_least=1)
        checks.in_range(self, "max_bad_fraction", at_least=0, at_most=1)


class Refused(NamedTuple):
    """A row without an embedding, and why."""

    id: int
    key: str
    reason: str


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
    seconds: float
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
    (the files stay, no set is published), ShapeError for NaN embeddings, ManifestError for a damaged shard.
    """
    started = time.monotonic()
    root = storage.absolute(embeddings_uri)
    storage.check_writable(root)
    shipped = read_model(model_uri, expected_digest=expected_digest)
    known = embeddings.known_files(root, shipped.digest, dataset)
    to_do = [entry for entry in dataset.shards if entry.number not in known]
    done = _run(config, dataset, root, shipped, to_do) if to_do else []
    _check_refused(config, done)
    files = [*known.values(), *(shard.file for shard in done)]
    embedding_set = embeddings.publish_set(root, shipped.digest, dataset, files)
    new = [shard.file for shard in done if shard.is_new]
    return ExtractReport(
        embedding_set=embedding_set,
        num_samples=embedding_set.manifest.num_samples,
        num_embedded=embedding_set.manifest.num_embedded,
        num_refused=embedding_set.manifest.num_refused,
        num_new=sum(file.num_embedded + file.num_refused for file in new),
        num_new_files=len(new),
        seconds=time.monotonic() - started,
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


def embed_shard(
    net: NamrModel, dataset: Dataset, entry: ShardEntry, config: ExtractionConfig
) -> EmbeddingTable:
    """The embeddings of all rows of one shard; refused are images that don't decode, and erased rows."""
    batch_size, dtype = config.batch_size_per_worker, config.storage_dtype
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embedded: list[StreamedSample] = []
    refused = _erased(dataset, entry)
    batch: list[Pixels] = []
    vectors = [np.empty((2, 0, net.config.embedding_dim), np.float32)]
    with ThreadPoolExecutor(config.decode_threads_per_worker) as pool:
        for sample, pixels in _decoded(dataset, entry, net.preprocessing, pool, ahead=2 * batch_size):
            if isinstance(pixels, ImageRefused):
                refused.append(Refused(sample.id, sample.key, pixels.reason))
                continue
            embedded.append(sample._replace(image=b""))
            batch.append(pixels)
            if len(batch) == batch_size:
                vectors.append(
                    np.stack(model.embed(net, np.stack(batch), batch_size=batch_size, device=device))
                )
                batch.clear()
    if batch:
        vectors.append(np.stack(model.embed(net, np.stack(batch), batch_size=batch_size, device=device)))
    x, s = np.concatenate(vectors, axis=1)
    return EmbeddingTable(
        ids=np.array([sample.id for sample in embedded], np.int64),
        keys=[sample.key for sample in embedded],
        labels=[sample.label for sample in embedded],
        embeddings=_narrowed(x, dtype, embedded, "embedding"),
        structures=_narrowed(s, dtype, embedded, "structure"),
        refused_ids=np.array([row.id for row in refused], np.int64),
        refused_keys=[row.key for row in refused],
        refused_reasons=[row.reason for row in refused],
    )


def _decoded(
    dataset: Dataset, entry: ShardEntry, prep: Preprocessing, pool: ThreadPoolExecutor, *, ahead: int
) -> Iterator[tuple[StreamedSample, Pixels | ImageRefused]]:
    """The rows of a shard in order, as pixels (3, size, size) or refused; `ahead` rows are under way."""
    all_rows = replace(dataset, version=replace(dataset.version, tombstones=()))
    waiting: deque[tuple[StreamedSample, Future[Any]]] = deque()
    for sample in reading.stream(all_rows, entry):
        waiting.append((sample, pool.submit(_pixels, sample.image, prep)))
        if len(waiting) > ahead:
            first, pixels = waiting.popleft()
            yield first, pixels.result()
    yield from ((sample, pixels.result()) for sample, pixels in waiting)


def _pixels(data: bytes, prep: Preprocessing) -> Pixels | ImageRefused:
    try:
        return images.prepare(data, prep)
    except ImageRefused as refusal:
        return refusal


def _erased(dataset: Dataset, entry: ShardEntry) -> list[Refused]:
    """Rows that were emptied on purpose; they don't count as bad."""
    table = dataset.samples(entry)
    return [Refused(int(table.ids[row]), table.keys[row], ERASED) for row in np.flatnonzero(table.sizes == 0)]


def _narrowed(
    x: npt.NDArray[np.float32], dtype: str, samples: list[StreamedSample], what: str
) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        narrow = x.astype(dtype)
    sound = np.isfinite(narrow).all(axis=1)
    if not sound.all():
        row = int(np.argmin(sound))
        is_nan = np.isnan(x[row]).any()
        reason = "is NaN" if is_nan else f"reaches {np.abs(x[row]).max():g}, too large for {dtype}"
        raise ShapeError(
            f"the {what} of sample {samples[row].key!r} {reason} ({int((~sound).sum())} of {len(x)} in its "
            "shard): the model has diverged, or its scale was not folded; train again"
        )
    return narrow


class _Done(NamedTuple):
    """What a worker says of one shard."""

    file: EmbeddingFile
    is_new: bool
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
        is_new = not storage.exists(embeddings.embedding_uri(*where, entry.tar.sha256))
        if is_new:
            table = embed_shard(self._net, self._dataset, entry, self._config)
            file, table = embeddings.write(*where, entry, table)
        else:
            file, table = embeddings.verify(*where, entry)
        live = self._dataset.live(table.refused_ids).tolist()
        rows = zip(table.refused_ids.tolist(), table.refused_keys, table.refused_reasons, strict=True)
        bad = [Refused(*row) for row, is_live in zip(rows, live, strict=True) if is_live and row[2] != ERASED]
        return _Done(file, is_new, len(bad), bad[:_MOST_TOLD])


def _run(
    config: ExtractionConfig, dataset: Dataset, root_uri: str, shipped: ModelFiles, to_do: list[ShardEntry]
) -> list[_Done]:
    """What became of each shard; the first error that a worker had is raised."""
    ray_connection.connect()
    num_gpus = ray_connection.total_gpus()
    num_workers = min(len(to_do), config.num_workers or num_gpus or ray_connection.total_cpus())
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
