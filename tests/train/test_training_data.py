"""What is trained on and examined on: held-out classes, validation datasets, and what the seed decides."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from namr.data.images import AugmentConfig
from namr.data.sampling import PKConfig
from namr.errors import ConfigError
from namr.measure import validation
from namr.model import model
from namr.train import loop
from namr.train.run import TrainJobConfig
from tests.small_training import data_of, make_dataset, make_job

Make = Callable[..., TrainJobConfig]


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def make(data_uri: str, tmp_path: Path) -> Make:
    return partial(make_job, data_uri, tmp_path)


def test_held_out_classes_are_never_trained_on_and_all_examined(make: Make) -> None:
    config = make()
    data = data_of(config)
    assert (data.num_classes, len(data.unseen_ids)) == (6, 10)
    assert set(data.classes.ids.tolist()).isdisjoint(data.unseen_ids.tolist())
    built = model.build(config.model, seed=0)
    labels = [y for _, y in data.batches(built, first_step=0, num_steps=6, augment=None)]
    assert set(torch.cat(labels).tolist()) == set(range(6))


def test_no_more_classes_are_held_out_than_have_so_many_images(make: Make) -> None:
    config = make()
    for most, num_held_out in ((None, 3), (1000, 3), (10, 2), (1, 2)):  # of 8 classes of 5 images
        few = replace(config, data=replace(config.data, held_out_share=0.4, held_out_images=most))
        data = data_of(few)
        assert (data.num_classes, len(data.unseen_ids)) == (8 - num_held_out, 5 * num_held_out)
        assert len(data.searched_ids) == min(15 * num_held_out, 40)


def test_a_validation_dataset_leaves_all_classes_to_training(make: Make, tmp_path: Path) -> None:
    data = data_of(make(), unseen=make_dataset(tmp_path / "unseen", num_classes=2))
    assert (data.num_classes, len(data.unseen_ids)) == (8, 10)
    assert data.searched_ids.tolist() == data.unseen_ids.tolist()


def test_unseen_images_are_searched_among_images_of_trained_classes(make: Make) -> None:
    """Each of 10 unseen images queries these and 20 of the 30 images to train on; those ask nothing."""
    config = make()
    data = data_of(config)
    others = np.setdiff1d(data.searched_ids, data.unseen_ids)
    assert len(others) == 20
    assert set(others.tolist()) < set(data.classes.ids.tolist())
    assert data_of(config).searched_ids.tolist() == data.searched_ids.tolist()
    built = model.build(config.model, seed=0).eval()
    data.cache_features(built)
    ways = validation.ways("l2")[:1]
    found = data.examine(built, ways).results[ways[0]]
    assert found.num_queries == 10
    with torch.no_grad():
        x = built.heads.sample(data._unseen.features_of(data.searched_ids)).numpy()
    labels = data._unseen.classes_of(data.searched_ids)
    distances = np.square(x[:, None] - x[None]).sum(2)
    np.fill_diagonal(distances, np.inf)
    rows = np.flatnonzero(np.isin(data.searched_ids, data.unseen_ids))
    assert found.recall_at_1 == np.mean(labels[distances[rows].argmin(1)] == labels[rows])


def test_features_and_images_give_one_examination_and_the_same_batches(make: Make) -> None:
    config = make()
    built = model.build(config.model, seed=0).eval()
    of_images, of_features = data_of(config), data_of(config)
    of_features.cache_features(built)
    ways = validation.ways("l2")
    one, other = of_features.examine(built, ways), of_images.examine(built, ways)
    assert one.results == other.results
    assert one.mean_distance == pytest.approx(other.mean_distance, rel=1e-5)
    arguments: dict[str, Any] = {"first_step": 1, "num_steps": 2, "augment": None}
    with torch.no_grad():
        for (pixels, labels), (features, same) in zip(
            of_images.batches(built, **arguments), of_features.batches(built, **arguments), strict=True
        ):
            assert torch.equal(labels, same)
            torch.testing.assert_close(built.features(pixels), features, rtol=1e-4, atol=1e-4)


def test_a_dataset_without_labels_can_not_be_trained_on(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "unlabelled", num_classes=3, labelled=False)
    with pytest.raises(ConfigError, match="none of 15 images has a label"):
        data_of(make_job(uri, tmp_path))


def test_fewer_classes_than_a_batch_wants_is_an_error(make: Make) -> None:
    with pytest.raises(ConfigError, match="classes_per_batch is 7, but only 6 of 6"):
        data_of(make(batch=PKConfig(classes_per_batch=7, samples_per_class=2)))


@pytest.mark.parametrize(("num_classes", "left"), [(1, "0 of 0"), (2, "0 of 0"), (3, "1 of 1")])
def test_so_few_classes_that_none_are_left_to_train_on_are_told(
    num_classes: int, left: str, tmp_path: Path
) -> None:
    uri = make_dataset(tmp_path / "few", num_classes=num_classes)
    said = rf"classes_per_batch is 2, but only {left} .*add images of more classes: a batch needs two, beside"
    with pytest.raises(ConfigError, match=said):
        data_of(make_job(uri, tmp_path, batch=PKConfig(classes_per_batch=2, samples_per_class=2)))


def test_the_one_seed_decides_held_out_classes_batches_and_augmentation(make: Make) -> None:
    built = model.build(make().model, seed=0)

    def drawn(seed: int, augment: AugmentConfig | None) -> tuple[list[int], torch.Tensor]:
        data = data_of(make(seed=seed))
        ((pixels, _),) = data.batches(built, first_step=3, num_steps=1, augment=augment)
        return data.unseen_ids.tolist(), pixels

    held_out, pixels = drawn(1, AugmentConfig())
    again, same = drawn(1, AugmentConfig())
    assert held_out == again and torch.equal(pixels, same)
    assert any(drawn(seed, None)[0] != held_out for seed in (2, 3))
    assert not torch.equal(drawn(2, None)[1], drawn(1, None)[1])
    assert not torch.equal(drawn(1, None)[1], pixels)


def test_the_one_seed_decides_heads_proxies_and_mining(make: Make) -> None:
    def begun(seed: int) -> dict[str, Any]:
        config = make(seed=seed)
        trainer = loop.make_trainer(
            config.model,
            config.loss,
            config.training,
            data_of(config),
            seed=config.seed,
            device=torch.device("cpu"),
        )
        assert trainer.whole.seed == trainer.seed == seed
        return trainer.state()

    one, same, other = begun(1), begun(1), begun(2)
    for name, (part, key) in {
        "heads": ("model", "heads.sample.weight"), "proxies": ("loss", "base.proxies")
    }.items():  # fmt: skip
        assert torch.equal(one[part][key], same[part][key]), name
        assert not torch.equal(one[part][key], other[part][key]), name
