"""How well do embeddings find their own class: a table with the gain of each stage told apart.

Rows are what is compared (raw pixels, the untrained network, models trained without the ranking loss,
without structure, with it), columns the ways of searching (plain L2, plain cosine, re-ranked by scale, query
and both). Every image queries all others of the set; Recall@1 depends on the size of that gallery, so the
table says which set it is and how many images it has.

Not covered: the loss of an approximate index (`nightly.assessment` measures it), images without a label
(left out).
Legend: N images, D dimension.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from namr import checks
from namr.data import datasets, loading
from namr.data.datasets import Dataset
from namr.data.images import Preprocessing
from namr.data.loading import LoaderConfig
from namr.embed import embeddings
from namr.errors import ConfigError
from namr.measure import metrics, validation
from namr.measure.metrics import RetrievalMetrics
from namr.model import model
from namr.model.distances import Metric
from namr.model.model import NamrModel, SearchDefaults
from namr.registry import references
from namr.store import scratch, storage

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

RAW_SIZE_PX = 32
COLUMNS = ("l2", "cosine", "scale", "query", "both")


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
class Row:
    """The metrics of one entry, by column; columns that it can't fill are absent."""

    name: str
    metric: Metric
    by_column: dict[str, RetrievalMetrics]
    nmi: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows on one set."""

    set_name: str
    num_images: int
    num_classes: int
    depth: int
    """How many candidates are re-ranked."""
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The row of that name; ConfigError if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise ConfigError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    @property
    def title(self) -> str:
        """Which set, how large."""
        return (
            f"{self.set_name}: {self.num_images:,} images of {self.num_classes:,} classes; each queries all "
            f"others; re-ranked: the first {self.depth}, by the distance trained for"
        )

    def ways_table(self) -> list[list[str]]:
        """Recall@1 / MAP@R in per cent by way of searching, the header first."""
        table = [["Recall@1 / MAP@R (%)", "trained for", *COLUMNS]]
        cells = ([_cell(row.by_column.get(name)) for name in COLUMNS] for row in self.rows)
        return table + [[row.name, row.metric, *of_row] for row, of_row in zip(self.rows, cells, strict=True)]

    def details_table(self) -> list[list[str]]:
        """All metrics in per cent for plain search by the distance trained for, the header first."""
        ks = sorted(self.rows[0].by_column["l2"].recall_at_k) if self.rows else []
        table = [["plain (%)", *(f"Recall@{k}" for k in ks), "MAP@R", "R-precision", "NMI"]]
        for row in self.rows:
            plain = row.by_column[row.metric]
            numbers = [*(plain.recall_at_k[k] for k in ks), plain.map_at_r, plain.r_precision]
            nmi = "" if row.nmi is None else f"{100 * row.nmi:.1f}"
            table.append([row.name, *(f"{100 * number:.1f}" for number in numbers), nmi])
        return table

    def to_markdown(self) -> str:
        """Both tables, under the title."""
        tables = (_markdown(table) for table in (self.ways_table(), self.details_table()))
        return "\n\n".join([self.title, *tables]) + "\n"

    def to_json(self) -> str:
        """Everything but the scores of single queries, as JSON text."""
        return json.dumps(asdict(self, dict_factory=_averages), indent=1)


def _averages(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if not isinstance(value, np.ndarray)}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is compared, and on which images."""

    dataset_uri: str
    """Dataset whose labelled images are the set; best of classes that no model was trained on."""
    dataset_version: int | None = None
    """Its version; none = the current one."""
    models: tuple[str, ...]
    """The models, each as NAME=REFERENCE, a folder or models:/namr@candidate; NAME becomes the row's."""
    embeddings_uri: str | None = None
    """Read these models' stored embeddings from here; none = compute them now."""
    raw_pixels: bool = False
    """Add the row of the raw pixels, 32 x 32."""
    untrained: bool = False
    """Add the row of the first model's backbone before training."""
    with_nmi: bool = False
    """Cluster the embeddings too (k-means; slow for many classes)."""
    depth: int = 100
    """How many candidates are re-ranked."""
    batch_size: int = 64
    """Images embedded at a time."""
    use_gpu: bool = False
    """Embed on the first GPU."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How images are read."""
    report_uri: str | None = None
    """Folder for evaluation.json and evaluation.md; none = they are not written."""
    tracking_uri: str | None = None
    """MLflow, for registered models."""

    def __post_init__(self) -> None:
        checks.in_range(self, "depth", "batch_size", at_least=1)
        for text in self.models:
            if not all(text.partition("=")):
                raise ConfigError(f"models has {text!r}; expected NAME=FOLDER or NAME=models:/<name>@<alias>")


def evaluate(config: EvaluationConfig) -> Comparison:
    """The table for `config.models` on the labelled images of a dataset.

    ConfigError if no class has two labelled images; ManifestError if embeddings are asked for that were not
    extracted.
    """
    if config.report_uri:
        storage.check_writable(config.report_uri)
    dataset = datasets.open_version(config.dataset_uri, config.dataset_version)
    labels: Labels | None = None
    entries: list[Entry] = []
    for entry, labels_of_entry in _entries(config, dataset):
        if labels is not None and not np.array_equal(labels, labels_of_entry):
            raise ConfigError(
                f"{entry.name}: its embeddings are not of the same images as those of {entries[0].name} "
                "(images were refused in one of them); compare them without embeddings_uri"
            )
        labels = labels_of_entry
        entries.append(entry)
    if labels is None:
        raise ConfigError("nothing to evaluate: name a model, or ask for raw_pixels")
    set_name = f"{dataset.uri} version {dataset.version.version}"
    comparison = compare(entries, labels, set_name=set_name, depth=config.depth, with_nmi=config.with_nmi)
    if config.report_uri:
        storage.write(storage.join(config.report_uri, "evaluation.json"), comparison.to_json().encode())
        storage.write(storage.join(config.report_uri, "evaluation.md"), comparison.to_markdown().encode())
    return comparison


def compare(
    entries: Sequence[Entry], labels: Labels, *, set_name: str, depth: int = 100, with_nmi: bool = False
) -> Comparison:
    """The table for vectors that are at hand. labels: (N,) int64, the same for all entries."""
    if not len(labels) or np.bincount(labels).max() < 2:
        raise ConfigError(
            f"{set_name}: {len(labels)} labelled images and no class with two of them; nothing to measure"
        )
    rows = []
    for entry in entries:
        ways = validation.ways(entry.metric)
        if entry.structures is None:
            ways = tuple(way for way in ways if way.structure_side == "none")
        results = validation.measure(entry.embeddings, entry.structures, labels, ways=ways, depth=depth)
        by_column = {_column(way): results[way] for way in ways}
        nmi = metrics.nmi(entry.embeddings, labels, seed=0) if with_nmi else None
        rows.append(Row(name=entry.name, metric=entry.metric, by_column=by_column, nmi=nmi))
    return Comparison(
        set_name=set_name,
        num_images=len(labels),
        num_classes=len(np.unique(labels)),
        depth=depth,
        rows=tuple(rows),
    )


def _entries(config: EvaluationConfig, dataset: Dataset) -> Iterator[tuple[Entry, Labels]]:
    loaded = [_load(text, config.tracking_uri) for text in config.models]
    if config.raw_pixels:
        yield _raw_pixels(config, dataset)
    if config.untrained and loaded:
        yield _untrained(config, dataset, loaded[0].model)
    for name, one, metric in loaded:
        if config.embeddings_uri:
            x, s, labels = _stored(config.embeddings_uri, dataset, model.digest(one))
        else:
            x, s, labels = _embedded(config, dataset, one)
        yield Entry(name, x, s if one.config.structure_range else None, metric), labels


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


def _stored(root_uri: str, dataset: Dataset, digest: str) -> tuple[Vectors, Vectors, Labels]:
    """Of live and labelled images, by id."""
    xs, ss, names = [], [], []
    for table in embeddings.iterate(embeddings.open_set(root_uri, digest, dataset)):
        kept = dataset.live(table.ids) & np.array([label is not None for label in table.labels], bool)
        xs.append(table.embeddings[kept].astype(np.float32))
        ss.append(table.structures[kept].astype(np.float32))
        names += [label for label, keep in zip(table.labels, kept, strict=True) if keep]
    labels = np.unique(np.array(names, np.str_), return_inverse=True)[1].astype(np.int64)
    return np.concatenate(xs), np.concatenate(ss), labels


def _embedded(config: EvaluationConfig, dataset: Dataset, one: NamrModel) -> tuple[Vectors, Vectors, Labels]:
    device = "cuda" if config.use_gpu else "cpu"
    xs, ss, labels = [], [], []
    for batch in _batches(config, dataset, one.preprocessing):
        x, s = model.embed(one, batch.pixels.numpy(), batch_size=config.batch_size, device=device)
        xs.append(x)
        ss.append(s)
        labels.append(batch.labels.numpy())
    _check_any(labels, dataset)
    return np.concatenate(xs), np.concatenate(ss), np.concatenate(labels)


def _untrained(config: EvaluationConfig, dataset: Dataset, one: NamrModel) -> tuple[Entry, Labels]:
    fresh = model.build(one.config, seed=0).eval().to("cuda" if config.use_gpu else "cpu")
    features, labels = [], []
    with torch.inference_mode():
        for batch in _batches(config, dataset, fresh.preprocessing):
            pixels = batch.pixels.to(next(fresh.parameters()).device)
            features.append(fresh.features(pixels).float().cpu().numpy())
            labels.append(batch.labels.numpy())
    _check_any(labels, dataset)
    return Entry("untrained", np.concatenate(features), None, "cosine"), np.concatenate(labels)


def _raw_pixels(config: EvaluationConfig, dataset: Dataset) -> tuple[Entry, Labels]:
    prep = Preprocessing(
        size_px=RAW_SIZE_PX, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", fit="squash"
    )
    pixels, labels = [], []
    for batch in _batches(config, dataset, prep):
        pixels.append(batch.pixels.flatten(1).float().numpy() / 255)
        labels.append(batch.labels.numpy())
    _check_any(labels, dataset)
    return Entry("raw pixels", np.concatenate(pixels), None, "l2"), np.concatenate(labels)


def _batches(
    config: EvaluationConfig, dataset: Dataset, prep: Preprocessing
) -> "torch.utils.data.DataLoader[loading.Batch]":
    return loading.make_evaluation_loader(
        dataset,
        config.loader,
        batch_size_per_worker=config.batch_size,
        rank=0,
        world_size=1,
        prep=prep,
    )


def _check_any(batches: Sequence[Labels], dataset: Dataset) -> None:
    if not batches:
        raise ConfigError(f"{dataset.uri}: no image has a label; evaluation needs labels, pack them along")


def _column(way: SearchDefaults) -> str:
    return way.metric if way.structure_side == "none" else way.structure_side


def _cell(cell: RetrievalMetrics | None) -> str:
    return "" if cell is None else f"{100 * cell.recall_at_1:.1f} / {100 * cell.map_at_r:.2f}"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    header, *rows = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
