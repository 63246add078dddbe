"""The benchmark that asks for better settings: of held-out classes alone, one field at a time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.data.sampling import PKConfig
from namr.errors import ConfigError
from namr.measure.metrics import RetrievalMetrics
from namr.model.losses import LossConfig
from namr.model.model import ModelConfig, SearchDefaults
from tests.benchmarks import fine_tuning
from tests.benchmarks import fine_tuning_choices as choices
from tests.benchmarks.fine_tuning import RATES, Run
from tests.benchmarks.method import Labelled, Setting
from tests.small_pictures import folder_of

CLASSES, PER_CLASS = 10, 4
HELD_OUT = 2 * PER_CLASS


def run_of(folder: Path) -> Run:
    config = ModelConfig(backbone="test_resnet", weights="none", embedding_dim=8, image_size_px=32)
    setting = Setting(choices.SHIPPED, LossConfig(base="triplet"), config, 2)
    training = replace(RATES, num_steps=2)
    return Run(setting, 0, training, True, folder / "cache", folder)


def test_a_choice_changes_the_fields_that_it_names_and_no_other(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert choices.changed(run, choices.SHIPPED) == run
    assert choices.changed(run, "warmup_steps=0").training == replace(run.training, warmup_steps=0)
    assert choices.changed(run, "schedule=constant").training.schedule == "constant"
    assert choices.changed(run, "ranking_weight=0.5").setting.loss.weight == 0.5
    both = choices.changed(run, "learning_rate=2e-3,backbone_learning_rate=6e-4").training
    assert both == replace(run.training, learning_rate=2e-3, backbone_learning_rate=6e-4)
    assert choices.changed(run, "structure_range=0.25").setting.model.structure_range == 0.25
    results = {choices.changed(run, choice).result for choice in (choices.SHIPPED, *choices.CHOICES)}
    assert len(results) == 1 + len(choices.CHOICES)
    with pytest.raises(ConfigError, match="augment=True: expected a value of one of warmup_steps"):
        choices.changed(run, "augment=True")


def test_held_out_images_ask_themselves_and_two_of_trained_classes_each() -> None:
    y = np.repeat(np.arange(CLASSES), PER_CLASS)
    images, split = choices.searched_of(Labelled(np.arange(len(y)), y))
    assert len(images.y) == len(split.gallery) == 3 * HELD_OUT
    assert len(set(images.x.tolist())) == 3 * HELD_OUT
    asked = y[images.x[split.queries]]
    assert len(asked) == HELD_OUT
    assert not set(asked) & set(y[images.x[: 2 * HELD_OUT]])
    assert np.unique(images.y[split.queries]).size == 2
    assert not set(images.y[split.queries]) & set(images.y[: 2 * HELD_OUT])


def test_choices_are_trained_and_told_beside_the_shipped_setting_without_a_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tuning, "BATCH", PKConfig(classes_per_batch=4, samples_per_class=2))
    names = [f"train/{label}/{at}.png" for label in range(CLASSES) for at in range(PER_CLASS)]
    run = run_of(folder_of(tmp_path, *names))
    measured = {}
    for choice in (choices.SHIPPED, "weight_decay=1e-5", "ranking_weight=0"):
        changed = choices.changed(run, choice)
        assert choices.train(changed).startswith(changed.result.stem)
        pixels = fine_tuning.pixels_of(tmp_path / "train", run.setting.model, run.cache)
        measured[choice] = [choices.measure(changed, choices.searched_of(pixels))]
    assert measured[choices.SHIPPED][0].cosine.num_queries == HELD_OUT
    told = choices.table("triplet", measured).splitlines()
    assert told[0].startswith("| triplet, Recall@1")
    assert [line.split(" | ")[0] for line in told[2:]] == [f"| {choice}" for choice in measured]
    assert told[3].endswith("| +0.00 (+0.00 to +0.00) |")


def found(score: float) -> choices.Measured:
    """Of two queries of each of two classes."""
    scores, classes = np.full(4, score), np.repeat([0, 1], 2)
    of_all = RetrievalMetrics(
        recall_at_k={1: score}, map_at_r=score, r_precision=score, num_queries=4, num_skipped=0,
        scores=scores, classes=classes,
    )  # fmt: skip
    return choices.Measured(of_all, of_all, of_all, SearchDefaults(metric="cosine"))


def test_a_gain_is_told_for_each_seed_against_the_same_seed_as_shipped() -> None:
    measured = {choices.SHIPPED: [found(0.5), found(0.25)], "t=2": [found(0.625), found(0.125)]}
    *_, shipped, changed = choices.table("triplet", measured).splitlines()
    assert shipped.endswith("| 37.5 / 37.50 (cosine) |  |")
    assert changed.endswith(
        "| 37.5 / 37.50 (cosine) | +12.50 (+12.50 to +12.50), -12.50 (-12.50 to -12.50) |"
    )
