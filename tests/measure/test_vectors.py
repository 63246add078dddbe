"""Vectors: each maker gives one row for each labelled image, by id, with the label's own name."""

from pathlib import Path

import numpy as np
import pytest

from namr.data import datasets
from namr.data.loading import LoaderConfig
from namr.errors import ConfigError
from namr.measure import vectors
from namr.measure.vectors import Made, Reading
from namr.model import model
from namr.model.model import ModelConfig
from tests.small_training import make_dataset

CONFIG = ModelConfig(
    backbone="test_efficientnet", weights="none", embedding_dim=8, structure_hidden_dim=8, image_size_px=32
)


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    loader = LoaderConfig(num_workers=0, cache_folder=tmp_path / "cache")
    return Reading(loader=loader, batch_size=5, device="cpu")


def test_every_maker_gives_a_row_and_a_name_for_each_image(tmp_path: Path, reading: Reading) -> None:
    dataset = datasets.open_version(make_dataset(tmp_path / "set", num_classes=3, per_class=4))
    one = model.build(CONFIG, seed=1).eval()
    names = [f"class-{number}" for number in range(3) for _ in range(4)]
    for made, width in (
        (vectors.embedded(dataset, one, reading), 8),
        (vectors.of_untrained(dataset, one, reading), one.heads.sample.in_features),
        (vectors.of_raw_pixels(dataset, reading), 3 * vectors.RAW_SIZE_PX**2),
    ):
        assert made.embeddings.shape == (12, width)
        assert made.labels.tolist() == names
    assert vectors.of_raw_pixels(dataset, reading).embeddings.max() <= 1


def test_a_model_without_structure_has_none(tmp_path: Path, reading: Reading) -> None:
    dataset = datasets.open_version(make_dataset(tmp_path / "set", num_classes=2, per_class=2))
    plain = model.build(ModelConfig(**{**vars(CONFIG), "structure_range": 0.0}), seed=1).eval()
    assert vectors.embedded(dataset, plain, reading).structures is None
    structures = vectors.embedded(dataset, model.build(CONFIG, seed=1).eval(), reading).structures
    assert structures is not None and structures.shape == (4, 8)


def test_features_are_whitened_by_the_images_that_were_learnt_from() -> None:
    """Two axes of the features, of variance 16 and 1: whitened, 4 times as wide becomes sqrt(4) times."""
    names = np.array(["a"] * 4)
    learnt = np.array([[4, 1], [4, -1], [-4, 1], [-4, -1]], np.float32) + 7
    features = Made(np.array([[8, 1], [-8, 1], [0, 2], [0, 0]], np.float32) + 7, None, names)
    white = vectors.whitened(features, learnt_from=Made(learnt, None, names), dim=2)
    x = white.embeddings
    wide, narrow = np.linalg.norm(x[0] - x[1]) / 16, np.linalg.norm(x[2] - x[3]) / 2
    assert wide / narrow == pytest.approx(0.5, rel=1e-5)
    assert white.labels is names and white.structures is None


def test_datasets_are_joined_in_order() -> None:
    one = Made(np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32), np.array(["a", "long name"]))
    other = Made(np.ones((1, 3), np.float32), np.zeros((1, 3), np.float32), np.array(["b"]))
    both = vectors.joined([one, other])
    assert both.embeddings[:, 0].tolist() == [0, 0, 1]
    assert both.structures is not None and both.structures[:, 0].tolist() == [1, 1, 0]
    assert both.labels.tolist() == ["a", "long name", "b"]
    assert vectors.joined([Made(one.embeddings, None, one.labels)]).structures is None


def test_a_dataset_without_labels_has_no_vectors(tmp_path: Path, reading: Reading) -> None:
    dataset = datasets.open_version(make_dataset(tmp_path / "set", num_classes=2, labelled=False))
    with pytest.raises(ConfigError, match="no image has a label"):
        vectors.of_raw_pixels(dataset, reading)
