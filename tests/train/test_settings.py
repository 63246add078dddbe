"""Which settings a sweep tries, and which it refuses."""

from typing import Any

import pytest

from namr import config as configuration
from namr.data.sampling import PKConfig
from namr.errors import ConfigError
from namr.model.losses import LossConfig
from namr.model.model import ModelConfig
from namr.train import settings
from namr.train.ray_group import WorkersConfig
from namr.train.recipe import TrainingConfig
from namr.train.run import TrainJobConfig
from namr.train.settings import Setting, SweepConfig
from namr.train.training_data import DataConfig


def make(**changes: Any) -> SweepConfig:
    fields: dict[str, Any] = {
        "sweep_name": "s",
        "storage_uri": "/sweeps",
        "data": DataConfig(dataset_uri="/data"),
        "batch": PKConfig(classes_per_batch=4, samples_per_class=2),
        "model": ModelConfig(backbone="test_resnet", weights="none", embedding_dim=8, image_size_px=32),
        "loss": LossConfig(base="triplet"),
        "training": TrainingConfig(num_steps=9, evaluation_interval=3),
    }
    return SweepConfig(**fields | changes)


WIDE: dict[str, Any] = {
    "bases": ("triplet", "margin", "multi_similarity"),
    "ranking_weights": ("own", 0, 2),
    "num_clusters": (2, 4),
    "structure_sides": ("query", "both"),
    "learning_rates": (1e-4, 1e-3),
}


def shared(setting: Setting) -> tuple[str, float, float]:
    return setting.base, setting.learning_rate, setting.backbone_learning_rate


def test_every_combination_is_tried_once_and_each_base_loss_alone_at_each_rate() -> None:
    tried = settings.settings_of(make(**WIDE))
    assert len(set(tried)) == len(tried) == 3 * 2 * (2 * 2 * 2 + 1)
    plain = [setting for setting in tried if setting.is_plain]
    assert {shared(setting) for setting in plain} == {shared(setting) for setting in tried}
    assert len(plain) == 6
    assert len({setting.name for setting in tried}) == len(tried)


def test_own_is_the_weight_of_each_base_loss_and_the_same_number_is_no_second_setting() -> None:
    weights = {
        (setting.base, setting.ranking_weight)
        for setting in settings.settings_of(make(bases=("triplet", "margin"), ranking_weights=("own", 1)))
    }
    assert weights == {("triplet", 0), ("triplet", 1), ("margin", 0), ("margin", 0.3), ("margin", 1)}
    assert len(settings.settings_of(make(ranking_weights=("own", 1.0)))) == 2


@pytest.mark.parametrize("num", [2, 3, 7, 20, 53])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_drawn_part_has_the_base_loss_alone_beside_every_setting(num: int, seed: int) -> None:
    tried = settings.settings_of(make(**WIDE, num_settings=num, seed=seed))
    assert num - 1 <= len(tried) <= num
    plain = {shared(setting) for setting in tried if setting.is_plain}
    assert {shared(setting) for setting in tried if not setting.is_plain} == plain


def test_the_same_seed_draws_the_same_list_and_another_draws_another() -> None:
    lists = [settings.settings_of(make(**WIDE, num_settings=10, seed=seed)) for seed in (3, 3, 4)]
    assert lists[0] == lists[1]
    assert set(lists[0]) != set(lists[2])


def test_empty_lists_mean_the_value_of_the_fixed_part() -> None:
    loss = LossConfig(base="margin", num_clusters=3, structure_side="query")
    training = TrainingConfig(num_steps=9, learning_rate=0.5, backbone_learning_rate=0)
    assert {setting.name for setting in settings.settings_of(make(loss=loss, training=training))} == {
        "margin-w0-lr0.5-blr0",
        "margin-w0.3-c3-query-lr0.5-blr0",
    }


def test_a_setting_becomes_a_training_run_that_differs_in_nothing_else() -> None:
    config = make(**WIDE, seed=5)
    setting = settings.settings_of(config)[0]
    job = config.job_of(setting)
    assert (job.loss.base, job.loss.weight) == (setting.base, setting.ranking_weight)
    assert (job.loss.num_clusters, job.loss.structure_side) == (setting.num_clusters, setting.structure_side)
    assert job.training.learning_rate == setting.learning_rate
    assert (job.seed, job.data, job.batch, job.model) == (5, config.data, config.batch, config.model)
    assert job.run_name == "s-best"


def test_a_sweep_in_toml_is_read_back(tmp_path: Any) -> None:
    config = make(**WIDE, num_settings=7, backbone_learning_rates=(0.0, 1e-5))
    path = tmp_path / "sweep.toml"
    path.write_text(configuration.to_toml(config))
    assert configuration.load(SweepConfig, ["--config", str(path)]) == config


def test_the_first_examination_is_the_grace_unless_said() -> None:
    assert make().first_rung == 3
    assert make(grace_steps=5).first_rung == 5
    assert make(training=TrainingConfig(num_steps=9, evaluation_interval=200)).first_rung == 9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rates": (1e-3, -1.0)}, "lr-1-.*training.learning_rate"),
        ({"backbone_learning_rates": (-1.0,)}, "training.backbone_learning_rate"),
        ({"ranking_weights": (-1.0,)}, "loss.ranking_weight"),
        ({"num_clusters": (1,)}, "loss.num_clusters"),
        (
            {"bases": ("margin", "multi_similarity"), "loss": LossConfig(base="margin", margin=0.2)},
            "setting multi_similarity.*loss.margin",
        ),
        ({"ranking_weights": (0.0,)}, "ranking_weights is .* above 0"),
        ({"loss": LossConfig(base="margin", ranking_weight=1)}, "loss.ranking_weight is 1"),
        ({"workers": WorkersConfig(num_workers=2)}, "workers.num_workers is 2"),
        ({"sweep_name": "a/b"}, "sweep_name is 'a/b'"),
        ({"num_settings": 1}, "num_settings is 1"),
        ({"reduction": 1}, "reduction is 1"),
        ({"grace_steps": 10}, "grace_steps is 10"),
    ],
)
def test_what_can_not_be_tried_is_refused_by_its_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(**changes)


def test_paths_are_made_absolute_for_workers_and_nothing_else_changes() -> None:
    config = make(data=DataConfig(dataset_uri="data"), storage_uri="sweeps")
    absolute = settings.absolute(config)
    assert absolute.storage_uri.endswith("/sweeps") and absolute.data.dataset_uri.startswith("/")
    assert settings.settings_of(absolute) == settings.settings_of(config)
    assert absolute.loss == config.loss
    assert isinstance(absolute.job_of(settings.settings_of(absolute)[0]), TrainJobConfig)
