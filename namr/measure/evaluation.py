"""How well do embeddings find their own class: models compared on the labelled images of a dataset.

Compared are raw pixels, the untrained network, and models trained without the ranking loss, without
structure, with it. Who queries whom is a protocol of the field (`protocols`): every image all others, one
dataset another, or all images one of each class.

Not covered: the table that comes of it (`comparison`), the loss of an approximate index (`nightly.assessment`
measures it), images without a label (left out).
Legend: N images, D dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr import checks
from namr.data import datasets
from namr.data.datasets import Dataset
from namr.data.loading import LoaderConfig
from namr.errors import ConfigError
from namr.measure import metrics, protocols, validation, vectors
from namr.measure.comparison import Comparison as Comparison
from namr.measure.comparison import Row as Row
from namr.measure.protocols import Split
from namr.measure.vectors import Made, Reading, Vectors
from namr.model import model
from namr.model.distances import Metric
from namr.model.model import NamrModel, SearchDefaults
from namr.registry import references
from namr.store import scratch, storage

Labels = npt.NDArray[np.int64]


class Entry(NamedTuple):
    """One row to be: vectors of all images of the set, in the set's order."""

    name: str
    embeddings: Vectors
    """(N, D)"""
    structures: Vectors | None
    """(N, D), or None for what has no structure"""
    metric: Metric
    """What re-ranking multiplies: the distance that the embeddings were trained for."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is compared, and on which images."""

    dataset_uri: str
    """Dataset whose labelled images are searched; best of classes that no model was trained on."""
    dataset_version: int | None = None
    """Its version; none = the current one."""
    query_uri: str | None = None
    """Dataset whose labelled images query it, in its current version; none = its own images query."""
    gallery_draws: int = 0
    """0: each image queries all others. N: one image of each class, drawn at random, is the gallery and all
    others query it, N times (10 for VehicleID as vehicle re-identification reports it)."""
    models: tuple[str, ...]
    """The models, each as NAME=REFERENCE, a folder or models:/namr@candidate; NAME becomes the row's."""
    embeddings_uri: str | None = None
    """Read these models' stored embeddings from here; none = compute them now."""
    raw_pixels: bool = False
    """Add the row of the raw pixels, 32 x 32."""
    untrained: bool = False
    """Add the row of the first model's backbone before training."""
    whitened_by: str | None = None
    """Add the row of these features whitened, as training starts from them, by the images of this dataset:
    the one that was trained on. None = no such row."""
    with_nmi: bool = False
    """Cluster the embeddings too (k-means; slow for many classes)."""
    depth: int = 100
    """How many candidates are re-ranked."""
    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    """The K of Recall@K; 1 is always among them."""
    batch_size: int = 64
    """Images embedded at a time."""
    use_gpu: bool = False
    """Embed and measure on the first GPU."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How images are read."""
    report_uri: str | None = None
    """Folder for evaluation.json and evaluation.md; none = they are not written."""
    tracking_uri: str | None = None
    """MLflow, for registered models."""

    def __post_init__(self) -> None:
        checks.in_range(self, "depth", "batch_size", at_least=1)
        checks.in_range(self, "gallery_draws", at_least=0)
        if min(self.recall_at, default=0) < 1:
            raise ConfigError(f"recall_at is {self.recall_at}; expected numbers of 1 or more")
        if self.query_uri and self.gallery_draws:
            raise ConfigError(
                f"gallery_draws is {self.gallery_draws} and query_uri {self.query_uri}; with other images to "
                "query by nothing is drawn, leave one of them out"
            )
        if self.query_uri and storage.absolute(self.query_uri) == storage.absolute(self.dataset_uri):
            raise ConfigError(
                f"query_uri is the dataset {self.query_uri} itself, where each image would find itself; "
                "leave it out, and each queries all others"
            )
        for text in self.models:
            if not all(text.partition("=")):
                raise ConfigError(f"models has {text!r}; expected NAME=FOLDER or NAME=models:/<name>@<alias>")


def evaluate(config: EvaluationConfig) -> Comparison:
    """The table for `config.models` on the labelled images of a dataset, by the protocol that is asked for.

    ConfigError if no query has an image of its class to find; ManifestError if embeddings are asked for that
    were not extracted.
    """
    if config.report_uri:
        storage.check_writable(config.report_uri)
    sets = [datasets.open_version(config.dataset_uri, config.dataset_version)]
    if config.query_uri:
        sets.append(datasets.open_version(config.query_uri))
    labels: vectors.Names | None = None
    entries: list[Entry] = []
    for plan in _plans(config):
        parts = [plan.make(dataset) for dataset in sets]
        made = vectors.joined(parts)
        if labels is not None and not np.array_equal(labels, made.labels):
            raise ConfigError(
                f"{plan.name}: its embeddings are not of the same images as those of {entries[0].name} "
                "(images were refused in one of them); compare them without embeddings_uri"
            )
        labels = made.labels
        entries.append(Entry(plan.name, made.embeddings, made.structures, plan.metric))
        num_gallery = len(parts[0].labels)
    if labels is None:
        raise ConfigError("nothing to evaluate: name a model, or ask for raw_pixels")
    numbers = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    gallery, *queries = [f"{dataset.uri} version {dataset.version.version}" for dataset in sets]
    if queries:
        num_queries = len(numbers) - num_gallery
        splits = protocols.query_and_gallery(num_gallery=num_gallery, num_queries=num_queries)
        protocol = f"the {num_queries:,} images of {queries[0]} query them"
    elif config.gallery_draws:
        splits = protocols.one_a_class(numbers, num_draws=config.gallery_draws, seed=0)
        num_queries = len(splits[0].queries)
        protocol = f"drawn {config.gallery_draws} times, and each time the {num_queries:,} others query them"
    else:
        splits, protocol = None, Comparison.protocol
    comparison = compare(
        entries,
        numbers,
        set_name=gallery,
        depth=config.depth,
        with_nmi=config.with_nmi,
        splits=splits,
        protocol=protocol,
        recall_at=config.recall_at,
        device=_device(config),
    )
    if config.report_uri:
        storage.write(storage.join(config.report_uri, "evaluation.json"), comparison.to_json().encode())
        storage.write(storage.join(config.report_uri, "evaluation.md"), comparison.to_markdown().encode())
    return comparison


def compare(
    entries: Sequence[Entry],
    labels: Labels,
    *,
    set_name: str,
    depth: int = 100,
    with_nmi: bool = False,
    splits: Sequence[Split] | None = None,
    protocol: str = Comparison.protocol,
    recall_at: Sequence[int] = (1, 2, 4, 8),
    device: str = "cpu",
) -> Comparison:
    """The table for vectors that are at hand. labels: (N,) int64, the same for all entries.

    splits: who queries whom, told as `protocol`; None = every image all others.
    """
    splits = protocols.leave_one_out(len(labels)) if splits is None else splits
    if not protocols.has_a_match(splits, labels):
        raise ConfigError(
            f"{set_name}: {len(labels)} labelled images and no query with another image of its class to "
            "find; nothing to measure"
        )
    rows = []
    for entry in entries:
        ways = validation.ways(entry.metric)
        if entry.structures is None:
            ways = tuple(way for way in ways if way.structure_side == "none")
        results = validation.measure(
            entry.embeddings,
            entry.structures,
            labels,
            ways=ways,
            depth=depth,
            device=device,
            splits=splits,
            ks=recall_at,
        )
        by_column = {_column(way): results[way] for way in ways}
        nmi = metrics.nmi(entry.embeddings, labels, seed=0) if with_nmi else None
        rows.append(Row(name=entry.name, metric=entry.metric, by_column=by_column, nmi=nmi))
    searched = labels[splits[0].gallery]
    return Comparison(
        set_name=set_name,
        num_images=len(searched),
        num_classes=len(np.unique(searched)),
        depth=depth,
        rows=tuple(rows),
        protocol=protocol,
    )


class _Plan(NamedTuple):
    """How the vectors of one row are made, for any dataset."""

    name: str
    metric: Metric
    make: Callable[[Dataset], Made]


def _plans(config: EvaluationConfig) -> Iterator[_Plan]:
    loaded = [_load(text, config.tracking_uri) for text in config.models]
    reading = Reading(loader=config.loader, batch_size=config.batch_size, device=_device(config))
    if config.raw_pixels:
        yield _Plan("raw pixels", "l2", partial(vectors.of_raw_pixels, reading=reading))
    if loaded:
        first = loaded[0].model
        features = cache(partial(vectors.of_untrained, one=first, reading=reading))
        if config.untrained:
            yield _Plan("untrained", "cosine", features)
        if config.whitened_by:
            learnt_from = features(datasets.open_version(config.whitened_by))

            def whitened(dataset: Dataset) -> Made:
                return vectors.whitened(
                    features(dataset), learnt_from=learnt_from, dim=first.config.embedding_dim
                )

            yield _Plan("whitened, untrained", "cosine", whitened)
    for name, one, metric in loaded:
        if config.embeddings_uri:
            yield _Plan(name, metric, partial(vectors.stored, one=one, root_uri=config.embeddings_uri))
        else:
            yield _Plan(name, metric, partial(vectors.embedded, one=one, reading=reading))


def _device(config: EvaluationConfig) -> str:
    return "cuda" if config.use_gpu else "cpu"


class _Loaded(NamedTuple):
    name: str
    model: NamrModel
    metric: Metric


def _load(text: str, tracking_uri: str | None) -> _Loaded:
    name, _, reference = text.partition("=")
    with scratch.folder("model-") as folder:
        path = references.fetch(reference, folder=Path(folder), tracking_uri=tracking_uri).path
        one, description = model.load(path), model.describe(path)
    trained_for = description.extra.get(validation.TRAINED_FOR, description.search.metric)
    return _Loaded(name, one, "l2" if trained_for == "l2" else "cosine")


def _column(way: SearchDefaults) -> str:
    return way.metric if way.structure_side == "none" else way.structure_side
