"""What a model is trained on and what it is examined on: batches of classes, and classes kept unseen.

The unseen classes are those of a validation dataset, or a share of the training dataset's own classes that
is held out. Held-out images are searched among images of trained classes as well: alone they are a gallery so
small that it ranks models, and lambdas, in another order than a large one does.

With a frozen backbone and no augmentation an image's features never change: they are computed once over all
ranks, kept on local disk, and batches and examinations are made of them.

Not covered: the steps (`step`), what the numbers of an examination mean (`measure.validation`).
Legend: C classes, N images of an examination, D dimension, F features.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from namr import checks
from namr.data import loading, sample_index, sampling
from namr.data.datasets import Dataset
from namr.data.images import AugmentConfig
from namr.data.loading import LoaderConfig
from namr.data.sample_index import SampleIndex
from namr.data.sampling import PKConfig, slice_of_rank
from namr.data.shards import row_of, shard_of
from namr.errors import ConfigError
from namr.measure import validation
from namr.measure.protocols import Split
from namr.model import distances
from namr.model.model import NamrModel, SearchDefaults, backbone_digest
from namr.train import features
from namr.train.features import Computed, Values

_BLOCK_ROWS = 64
_OTHERS = 2
"""Images of trained classes that are searched for each held-out one, where there are so many."""
_MOST_MEAN_ROWS = 2048

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images to train on, and the classes to be examined on."""

    dataset_uri: str
    """Dataset to train on; only its labelled images count."""
    dataset_version: int | None = None
    """Its version; none = the current one when the run begins."""
    validation_uri: str | None = None
    """Dataset of other classes for validation; none = hold out some of the training dataset's classes."""
    held_out_share: float = 0.2
    """The share of classes to hold out where there is no validation dataset; at least 2 are."""
    held_out_images: int | None = None
    """Hold out fewer classes than that share where they have more than about so many images: an examination
    embeds three times as many, and steps wait for it. 10,000 tell differences of a point. None: no limit."""

    def __post_init__(self) -> None:
        checks.in_range(self, "held_out_share", above=0, below=1, place="data")
        checks.in_range(self, "held_out_images", at_least=1, place="data")

    def share_of(self, num_images: int) -> float:
        """The share of classes to hold out of a dataset with so many labelled images."""
        return min(self.held_out_share, (self.held_out_images or num_images) / num_images)


class _Labelled:
    """One dataset, the index of its labelled images, and their features if they are cached."""

    def __init__(self, dataset: Dataset, loader: LoaderConfig) -> None:
        self.dataset, self.loader = dataset, loader
        self.index: SampleIndex = sample_index.build(dataset, loader.cache_folder)
        if self.index.num_classes == 0:
            raise ConfigError(
                f"{dataset.uri} version {dataset.version.version}: none of {dataset.num_live} images has a "
                "label; training and validation need labels, pack them along"
            )
        self.features: Values | None = None

    def cache_features(self, model: NamrModel, *, rank: int, world_size: int, writes: bool) -> None:
        """Compute the features of all labelled images, or map what is on disk already."""
        name = f"{backbone_digest(model)[:24]}-{self.dataset.digest[:24]}.npy"
        self.features = features.cached(
            self.loader.cache_folder.expanduser() / "features" / name,
            lambda: self.compute_features(model, rank=rank, world_size=world_size),
            num_rows=len(self.index.labelled_ids),
            width=model.heads.sample.in_features,
            writes=writes,
        )

    def compute_features(
        self, model: NamrModel, *, rank: int, world_size: int, ids: Ints | None = None
    ) -> Iterator[Computed]:
        """The rank's share of the features of all labelled images, or of those of `ids`."""
        loader = loading.make_evaluation_loader(
            self.dataset,
            self.loader,
            batch_size_per_worker=_BLOCK_ROWS,
            rank=rank,
            world_size=world_size,
            prep=model.preprocessing,
            ids=ids,
        )
        pixels = ((batch.pixels, batch.positions) for batch in loader)
        return features.batches_of(model, pixels, batch_size=_BLOCK_ROWS)

    def features_of(self, ids: Ints) -> Tensor:
        """(b, F) float32; `cache_features` came first."""
        assert self.features is not None
        return torch.from_numpy(self.features[np.searchsorted(self.index.labelled_ids, ids)])

    def classes_of(self, ids: Ints) -> Ints:
        """(b,) class numbers."""
        return self.index.classes(self.index.places(ids))


class Examined(NamedTuple):
    """What an examination measured."""

    results: validation.Results
    mean_distance: float
    """Mean pairwise L2 distance of (a sample of) the unseen images' embeddings, as the model returns them."""


class TrainingData:
    """The batches and the examination of one rank; making it reads the sample indexes and no image.

    ConfigError for datasets without labels, fewer classes than a batch wants, or nothing to be examined on.
    """

    def __init__(
        self,
        train: Dataset,
        unseen: Dataset | None,
        *,
        data: DataConfig,
        batch: PKConfig,
        loader: LoaderConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        writes_cache: bool = True,
    ) -> None:
        """unseen: the validation dataset, or None to hold classes out. seed: 0 to 2^63 - 1."""
        self._batch, self._loader, self._seed = batch, loader, seed
        self._rank, self._world_size, self._writes_cache = rank, world_size, writes_cache
        self._train = _Labelled(train, loader)
        self._unseen = _Labelled(unseen, loader) if unseen else self._train
        every = self._train.index.class_index
        if unseen is None:
            names = self._train.index.class_names
            share = data.share_of(len(every.ids))
            held = validation.classes_to_hold_out(every, names, share=share, seed=seed)
            examined = validation.only(every, held)
        else:
            held, examined = np.empty(0, np.int64), self._unseen.index.class_index
        trained = np.setdiff1d(np.arange(every.num_classes), held)
        self.classes = validation.only(every, trained)
        sampling.check_drawable(self.classes, batch)
        if not len(examined.drawn_classes):
            raise ConfigError(f"{self._unseen.dataset.uri}: no class has two images, nothing to validate on")
        self._numbers = torch.full((every.num_classes,), -1)
        self._numbers[torch.from_numpy(trained)] = torch.arange(len(trained))
        others = self._others(num=_OTHERS * len(examined.ids)) if unseen is None else np.empty(0, np.int64)
        self.unseen_ids = np.sort(examined.ids)
        self.searched_ids = np.sort(np.concatenate([examined.ids, others]))
        self._searched_labels = self._unseen.classes_of(self.searched_ids)
        self._split = Split(
            queries=np.searchsorted(self.searched_ids, self.unseen_ids),
            gallery=np.arange(len(self.searched_ids)),
        )
        self._loaded: torch.utils.data.DataLoader[loading.Batch] | None = None

    @property
    def num_classes(self) -> int:
        """C, the classes to train on; labels of batches are 0 .. C - 1."""
        return self.classes.num_classes

    def _others(self, *, num: int) -> Ints:
        """Ids of images of trained classes, drawn by the seed."""
        every = np.sort(self.classes.ids)
        return np.random.default_rng((self._seed, 1)).choice(every, min(num, len(every)), replace=False)

    def cache_features(self, model: NamrModel) -> None:
        """Compute all features or map those of before; batches are made of them from now on. Collective."""
        for labelled in {id(each): each for each in (self._train, self._unseen)}.values():
            labelled.cache_features(
                model, rank=self._rank, world_size=self._world_size, writes=self._writes_cache
            )

    def sample_features(self, model: NamrModel, *, num: int) -> Values:
        """(n, F) of `num` images to train on, drawn by the seed (of all where there are fewer). Collective.

        The same bits on every rank and on any number of ranks.
        """
        every = np.sort(self.classes.ids)
        chosen = np.random.default_rng(self._seed).choice(len(every), min(num, len(every)), replace=False)
        ids = every[np.sort(chosen)]
        if self._train.features is not None:
            return self._train.features_of(ids).numpy()
        computed = self._train.compute_features(model, rank=self._rank, world_size=self._world_size, ids=ids)
        return features.whole(computed, num_rows=len(ids), width=model.heads.sample.in_features)

    def batches(
        self, model: NamrModel, *, first_step: int, num_steps: int, augment: AugmentConfig | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The rank's slices of the global batches: pixels or features, and labels (b,) int64."""
        if self._train.features is not None:
            mine = slice_of_rank(self._batch.num_samples, rank=self._rank, world_size=self._world_size)
            for step in range(first_step, first_step + num_steps):
                ids = self.ids_of(step)[mine]
                labels = torch.from_numpy(self._train.classes_of(ids))
                yield self._train.features_of(ids), self._numbers[labels]
            return
        loader = loading.make_loader(
            self._train.dataset,
            self._loader,
            batches=self._batch,
            seed=self._seed,
            rank=self._rank,
            world_size=self._world_size,
            first_step=first_step,
            num_steps=num_steps,
            prep=model.preprocessing,
            augment=augment,
            classes=self.classes,
        )
        for batch in loader:
            yield batch.pixels, self._numbers[batch.labels]

    def ids_of(self, step: int) -> Ints:
        """(B,) of the global batch of a step."""
        return sampling.global_batch(self.classes, self._batch, seed=self._seed, step=step)

    def keys_of(self, ids: Ints) -> list[str]:
        """The user's own names of images to train on."""
        dataset, shards = self._train.dataset, set(shard_of(ids).tolist())
        tables = {entry.number: dataset.samples(entry) for entry in dataset.shards if entry.number in shards}
        rows = zip(shard_of(ids).tolist(), row_of(ids).tolist(), strict=True)
        return [tables[shard].keys[row] for shard, row in rows]

    def examine(self, model: NamrModel, ways: Sequence[SearchDefaults]) -> Examined:
        """Each unseen image queries all that are searched, in each way. Collective; leaves eval mode on."""
        model.eval()
        dim = model.config.embedding_dim
        computed = self._of_features(model) if self._unseen.features is not None else self._of_images(model)
        vectors = features.whole(computed, num_rows=len(self.searched_ids), width=2 * dim)
        device = next(model.parameters()).device
        x = vectors[:, :dim]
        results = validation.measure(
            x, vectors[:, dim:], self._searched_labels, ways=ways, device=device, splits=[self._split]
        )
        rows = self._split.queries
        some = x[rows[:: math.ceil(len(rows) / _MOST_MEAN_ROWS)]]
        return Examined(results, float(distances.mean_pairwise(torch.from_numpy(some))))

    def _of_features(self, model: NamrModel) -> Iterator[Computed]:
        mine = slice_of_rank(len(self.searched_ids), rank=self._rank, world_size=self._world_size)
        device = next(model.parameters()).device
        for start in range(mine.start, mine.stop, _BLOCK_ROWS):
            places = np.arange(start, min(start + _BLOCK_ROWS, mine.stop))
            with torch.no_grad():
                both = model.heads(self._unseen.features_of(self.searched_ids[places]).to(device))
            yield Computed(places, torch.cat(both, dim=1).cpu().numpy())

    def _of_images(self, model: NamrModel) -> Iterator[Computed]:
        if self._loaded is None:  # kept, with its processes, for the next examination
            self._loaded = loading.make_evaluation_loader(
                self._unseen.dataset,
                self._loader,
                batch_size_per_worker=_BLOCK_ROWS,
                rank=self._rank,
                world_size=self._world_size,
                prep=model.preprocessing,
                ids=self.searched_ids,
            )
        device = next(model.parameters()).device
        for batch in self._loaded:
            with torch.no_grad():
                both = model(batch.pixels.to(device, non_blocking=True))
            yield Computed(batch.positions.numpy(), torch.cat(both, dim=1).cpu().numpy())
