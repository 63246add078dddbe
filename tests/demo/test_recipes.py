"""What the demo makes of a user's images: which classes teach, which validate, and what a batch holds."""

from pathlib import Path

import numpy as np
import pytest

from namr.data.sampling import ClassIndex
from namr.demo import recipes
from namr.measure import validation
from namr.train.training_data import DataConfig


@pytest.mark.parametrize("num_classes", [20, 21, 25, 41, 98, 500])
def test_with_enough_classes_some_are_held_out_and_a_batch_fits_the_others(num_classes: int) -> None:
    recipe = recipes.recipe_of("photos", num_classes=num_classes, num_images=2 * num_classes, num_steps=60)
    assert not recipe.validates_on_gallery
    index = ClassIndex.from_labels(np.repeat(np.arange(num_classes), 2))
    names = [str(number) for number in range(num_classes)]
    share = DataConfig(dataset_uri="photos").held_out_share
    held_out = validation.classes_to_hold_out(index, names, share=share, seed=0)
    assert recipe.batch.classes_per_batch <= num_classes - len(held_out)


@pytest.mark.parametrize("num_classes", [2, 19])
def test_few_classes_all_teach_and_the_gallery_validates(num_classes: int) -> None:
    recipe = recipes.recipe_of("photos", num_classes=num_classes, num_images=99, num_steps=60)
    assert recipe.validates_on_gallery
    assert recipe.batch.classes_per_batch == num_classes


@pytest.mark.parametrize(
    ("num_images", "dim"), [(8054, 256), (640, 256), (600, 128), (225, 64), (90, 32), (9, 16)]
)
def test_an_embedding_has_no_more_axes_than_half_of_the_images_that_whiten_it(
    num_images: int, dim: int
) -> None:
    """A fifth of 40 classes is held out."""
    recipe = recipes.recipe_of("photos", num_classes=40, num_images=num_images, num_steps=60)
    assert recipe.model.embedding_dim == dim


def test_a_folder_with_splits_gives_both_sides_and_one_without_is_halved(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
    of_splits = recipes.sources_of(str(tmp_path / "photos"), tmp_path)
    assert (of_splits.train.source, of_splits.gallery.source) == (
        str(tmp_path / "photos" / "train"),
        str(tmp_path / "photos" / "test"),
    )
    halves = recipes.sources_of("digits", tmp_path)
    assert (halves.train.classes, halves.gallery.classes) == ("first_half", "second_half")


def test_what_is_pre_trained_is_fine_tuned_in_however_few_steps() -> None:
    def rates(data: str, weights: str) -> tuple[float, float]:
        recipe = recipes.recipe_of(data, num_classes=40, num_images=600, num_steps=60, weights=weights)
        return recipe.training.learning_rate, recipe.training.backbone_learning_rate

    assert rates("photographs", "timm") == (1e-3, 3e-4)
    assert rates("photos", "timm") == (1e-3, 3e-4)
    assert rates("photographs", "none") == rates("photos", "none") == (1e-3, 1e-3)
    for num_steps in (1, 2, 60):
        recipe = recipes.recipe_of("photos", num_classes=40, num_images=600, num_steps=num_steps)
        assert recipe.training.warmup_steps < num_steps == recipe.training.evaluation_interval


def test_every_data_set_has_a_folder_of_its_own() -> None:
    names = [
        recipes.name_of(data)
        for data in ("photographs", "digits", "a/photos", "b/photos", "torchvision:Flowers102")
    ]
    assert len(set(names)) == 5
    assert all("/" not in name and ":" not in name for name in names)
