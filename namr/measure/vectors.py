"""The vectors of a dataset's labelled images: a model's, embedded now or stored before, and simpler ones.

Not covered: what is measured with them (`evaluation`), images without a label (left out).
Legend: N live and labelled images by ascending id, D dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from namr.data import loading, sample_index
from namr.data.datasets import Dataset
from namr.data.images import Preprocessing
from namr.data.loading import Batch, LoaderConfig
from namr.embed import embeddings
from namr.errors import ConfigError
from namr.model import model, whitening
from namr.model.model import NamrModel

Vectors = npt.NDArray[np.float32]
Names = npt.NDArray[np.str_]

RAW_SIZE_PX = 32


@dataclass(frozen=True)
class Made:
    """The vectors of one dataset, or of several one after the other."""

    embeddings: Vectors
    """(N, D)"""
    structures: Vectors | None
    """(N, D), or None for what has no structure"""
    labels: Names
    """(N,) what the images are labelled as"""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How images are read and embedded."""

    loader: LoaderConfig
    batch_size: int
    device: str


def stored(dataset: Dataset, one: NamrModel, root_uri: str) -> Made:
    """As extraction stored them below `root_uri`; ManifestError if it didn't."""
    xs, ss, names = [], [], []
    for table in embeddings.iterate(embeddings.open_set(root_uri, model.digest(one), dataset)):
        kept = dataset.live(table.ids) & np.array([label is not None for label in table.labels], bool)
        xs.append(table.embeddings[kept].astype(np.float32))
        ss.append(table.structures[kept].astype(np.float32))
        names += [label for label, keep in zip(table.labels, kept, strict=True) if keep]
    structures = np.concatenate(ss) if one.config.structure_range else None
    return Made(np.concatenate(xs), structures, np.array(names, np.str_))


def embedded(dataset: Dataset, one: NamrModel, reading: Reading) -> Made:
    """By the model, now."""
    xs, ss, numbers = [], [], []
    for batch in _batches(dataset, one.preprocessing, reading):
        pixels = batch.pixels.numpy()
        x, s = model.embed(one, pixels, batch_size=reading.batch_size, device=reading.device)
        xs.append(x)
        ss.append(s)
        numbers.append(batch.labels.numpy())
    labels = _labels(dataset, numbers, reading)
    structures = np.concatenate(ss) if one.config.structure_range else None
    return Made(np.concatenate(xs), structures, labels)


def of_untrained(dataset: Dataset, one: NamrModel, reading: Reading) -> Made:
    """The features of this model's backbone before it was trained."""
    fresh = model.build(one.config, seed=0).eval().to(reading.device)
    fresh.preprocessing = one.preprocessing  # an earlier model's pixels may be others than a new one's
    features, numbers = [], []
    with torch.inference_mode():
        for batch in _batches(dataset, fresh.preprocessing, reading):
            features.append(fresh.features(batch.pixels.to(reading.device)).float().cpu().numpy())
            numbers.append(batch.labels.numpy())
    labels = _labels(dataset, numbers, reading)
    return Made(np.concatenate(features), None, labels)


def whitened(features: Made, *, learnt_from: Made, dim: int) -> Made:
    """Features as training starts from them: whitened to `dim` axes by those of the images to learn from."""
    start = whitening.whitening(learnt_from.embeddings, dim=dim, power=whitening.POWER)
    return replace(features, embeddings=whitening.applied(start, features.embeddings))


def of_raw_pixels(dataset: Dataset, reading: Reading) -> Made:
    """The pixels themselves, of squares of 32 x 32, each value 0 to 1."""
    prep = Preprocessing(
        size_px=RAW_SIZE_PX, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", fit="squash"
    )
    pixels, numbers = [], []
    for batch in _batches(dataset, prep, reading):
        pixels.append(batch.pixels.flatten(1).float().numpy() / 255)
        numbers.append(batch.labels.numpy())
    labels = _labels(dataset, numbers, reading)
    return Made(np.concatenate(pixels), None, labels)


def joined(parts: Sequence[Made]) -> Made:
    """One after the other; all by one maker."""
    structures = [part.structures for part in parts if part.structures is not None]
    return Made(
        np.concatenate([part.embeddings for part in parts]),
        np.concatenate(structures) if structures else None,
        np.concatenate([part.labels for part in parts]),
    )


def _batches(dataset: Dataset, prep: Preprocessing, reading: Reading) -> "DataLoader[Batch]":
    return loading.make_evaluation_loader(
        dataset,
        reading.loader,
        batch_size_per_worker=reading.batch_size,
        rank=0,
        world_size=1,
        prep=prep,
    )


def _labels(dataset: Dataset, numbers: Sequence[npt.NDArray[np.int64]], reading: Reading) -> Names:
    if not numbers:
        raise ConfigError(f"{dataset.uri}: no image has a label; evaluation needs labels, pack them along")
    names = sample_index.build(dataset, reading.loader.cache_folder).class_names
    return np.array(names, np.str_)[np.concatenate(numbers)]
