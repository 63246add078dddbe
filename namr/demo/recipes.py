"""What the demo packs and trains: for the photographs it brings, and for anybody's.

Not covered: running any of it (`demo`).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from namr.data.images import AugmentConfig
from namr.data.packing import PackingConfig
from namr.data.sampling import PKConfig
from namr.demo import photographs
from namr.model.model import ModelConfig
from namr.release.build import BuildConfig
from namr.train.recipe import TrainingConfig

_SIZE_PX = 96
"""Of anybody's images: what can be learnt in minutes on two cores."""
_ENOUGH_CLASSES = 20
"""From here on some of the classes to learn from are held out to validate on; else the gallery serves."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What is packed: classes to learn from, and classes that training never sees."""

    train: PackingConfig
    gallery: PackingConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and how the index is built."""

    model: ModelConfig
    batch: PKConfig
    training: TrainingConfig
    augment: AugmentConfig
    build: BuildConfig
    validates_on_gallery: bool


def name_of(data: str) -> str:
    """A folder for each data set, so that trying another one mixes nothing."""
    tail = "".join(c if c.isalnum() else "-" for c in data.rstrip("/").rpartition("/")[2]).strip("-")
    if data == "photographs":
        return data
    return f"{tail[:40]}-{hashlib.sha256(data.encode()).hexdigest()[:8]}"


def sources_of(data: str, folder: Path) -> Sources:
    """The splits of a folder that has train/ and test/; of other data two halves of the classes.

    The demo's own photographs are written below `folder` first.
    """
    if data == "photographs":
        data = str(folder / data)
        photographs.write(Path(data))
    split = Path(data) / "train", Path(data) / "test"
    train, gallery = str(folder / "train"), str(folder / "gallery")
    if all(path.is_dir() for path in split):
        return Sources(
            train=PackingConfig(source=str(split[0]), dataset_uri=train),
            gallery=PackingConfig(source=str(split[1]), dataset_uri=gallery),
        )
    return Sources(
        train=PackingConfig(source=data, dataset_uri=train, classes="first_half"),
        gallery=PackingConfig(source=data, dataset_uri=gallery, classes="second_half"),
    )


def recipe_of(
    data: str,
    *,
    num_classes: int,
    num_images: int,
    num_steps: int,
    weights: str = "timm",
    backbone: str = "tf_efficientnet_lite0",
) -> Recipe:
    """As in jobs/configs/train.toml, in fewer steps of smaller pictures; "none" starts from scratch.

    num_classes, num_images: to learn from. An embedding has no more dimensions than half of the images that
    its start is whitened by.
    """
    own = data == "photographs"
    from_scratch = weights == "none"
    few = num_classes < _ENOUGH_CLASSES
    num_learnt = num_classes if few else num_classes * 4 // 5  # a fifth is held out
    return Recipe(
        model=ModelConfig(
            backbone=backbone,
            weights=weights,
            embedding_dim=_dim(num_images * num_learnt // max(1, num_classes)),
            image_size_px=photographs.SIZE_PX if own else _SIZE_PX,
        ),
        batch=PKConfig(classes_per_batch=max(2, min(num_learnt, 32 if own else 24)), samples_per_class=4),
        training=TrainingConfig(
            num_steps=num_steps,
            learning_rate=1e-3,
            backbone_learning_rate=1e-3 if from_scratch else 3e-4,
            warmup_steps=0 if from_scratch else min(10, num_steps // 2),
            schedule="constant" if from_scratch else "cosine",
            augment=from_scratch,
            evaluation_interval=max(1, num_steps // 3) if from_scratch else num_steps,
            checkpoint_interval=num_steps,
        ),
        augment=AugmentConfig(min_area=0.6),
        build=BuildConfig(index_key="IVF16,Flat" if own else "auto", num_parts=4),
        validates_on_gallery=few,
    )


def _dim(num_images: int) -> int:
    return next((dim for dim in (256, 128, 64, 32) if 2 * dim <= num_images), 16)
