"""Models between the start and the trained one: which is kept, and what a resumed run does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from namr import collectives
from namr.data.images import AugmentConfig
from namr.model import model
from namr.train import interpolation, loop
from namr.train.examination import Examination
from namr.train.run import TrainJobConfig
from namr.train.step import Trainer
from namr.train.training_data import TrainingData
from tests.ranks import on_ranks
from tests.small_training import data_of, make_job, make_pretrained_job, trainer_of


class Told(NamedTuple):
    """A diary that keeps what it is told."""

    numbers: list[tuple[int, dict[str, float]]]

    def write(self, numbers: dict[str, float], *, step: int) -> None:
        self.numbers.append((step, numbers))

    def say(self, step: int, words: str) -> None: ...

    def write_unsent(self, folder: Path) -> None: ...


class Looked(NamedTuple):
    trainer: Trainer
    kept: list[Examination]
    """checkpoints, the start's and the steps' first"""
    states: list[dict[str, Any]]
    told: list[tuple[int, dict[str, float]]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainJobConfig:
    return make_pretrained_job(tmp_path_factory.mktemp("line"))


@pytest.fixture
def look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[TrainJobConfig, dict[float, float]], Looked]:
    """A run whose examinations find these scores, by the share of the way; 1 also for the steps before."""

    def looked(config: TrainJobConfig, scores: dict[float, float], **state: Any) -> Looked:
        data, told = data_of(config), Told([])
        kept: list[Examination] = []
        states: list[dict[str, Any]] = []
        trainer = trainer_of(config, data)
        if state:
            trainer.load_state(state)
        coming = iter(interpolation.SHARES)
        real = loop.examine

        def examine(trainer: Trainer, data: TrainingData, examined: Any = None) -> Examination:
            found = real(trainer, data, examined)
            return replace(found, score=scores[next(coming) if examined else 1.0])

        def checkpoint(write: loop.Write, examination: Examination) -> None:
            assert write is not None
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            write(folder)
            kept.append(examination)
            states.append(loop.read_state(folder))

        monkeypatch.setattr(loop, "examine", examine)
        diary: Any = told
        loop.train(trainer, data, augment=AugmentConfig(), num_images=8, diary=diary, checkpoint=checkpoint)
        interpolation.look(trainer, data, diary=diary, checkpoint=checkpoint)
        monkeypatch.setattr(loop, "examine", real)
        return Looked(trainer, kept, states, told.numbers)

    return looked


def test_between_is_the_start_and_the_end_and_on_the_line() -> None:
    start = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    end = {"w": torch.tensor([3.0, -2.0]), "n": torch.tensor(7)}
    for share, expected in ((0, [1.0, 2.0]), (0.25, [1.5, 1.0]), (1, [3.0, -2.0])):
        mixed = interpolation.between(start, end, share)
        assert mixed["w"].tolist() == expected and int(mixed["n"]) == 7


def test_the_best_model_between_is_kept_where_no_step_was_as_good(
    config: TrainJobConfig, look: Callable[..., Looked]
) -> None:
    ran = look(config, {1.0: 0.5, 0.25: 0.6, 0.5: 0.8, 0.75: 0.7})
    assert [(each.step, each.share) for each in ran.kept] == [(0, 1.0), (1, 1.0), (2, 1.0), (2, 0.5)]
    start, end, state = ran.states[0]["model"], ran.states[2]["model"], ran.states[3]
    expected = interpolation.between(start, end, 0.5)
    assert {name for name in end if not torch.equal(start[name], end[name])}  # something was learnt
    for name, value in state["model"].items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert ran.kept[3].mean_distance not in {each.mean_distance for each in ran.kept[:3]}
    model.build(config.model, seed=0).load_state_dict(state["model"])


def test_what_was_found_on_the_line_is_told_by_the_share(
    config: TrainJobConfig, look: Callable[..., Looked]
) -> None:
    ran = look(config, {1.0: 0.5, 0.25: 0.1, 0.5: 0.8, 0.75: 0.7})
    curve = [(step, set(numbers)) for step, numbers in ran.told if "interpolation/map_at_r" in numbers]
    names = {"interpolation/recall_at_1", "interpolation/map_at_r"}
    assert curve == [(25, names), (50, names), (75, names)]


def test_a_run_that_is_better_than_what_lies_between_keeps_nothing_more(
    config: TrainJobConfig, look: Callable[..., Looked]
) -> None:
    ran = look(config, dict.fromkeys((1.0, 0.25, 0.5, 0.75), 0.5))
    assert [each.step for each in ran.kept] == [0, 1, 2]


def test_a_run_that_goes_on_is_what_it_was_and_looks_but_once(
    config: TrainJobConfig, look: Callable[..., Looked]
) -> None:
    scores = {1.0: 0.5, 0.25: 0.6, 0.5: 0.8, 0.75: 0.7}
    ran = look(config, scores)
    before_it, after_it = look(config, scores, **ran.states[2]), look(config, scores, **ran.states[3])
    [(again, state)] = zip(before_it.kept, before_it.states, strict=True)
    assert again == ran.kept[3]
    for name, value in state["model"].items():
        assert torch.equal(value, ran.states[3]["model"][name])
    assert after_it.kept == []
    for name, value in after_it.trainer.model.state_dict().items():  # what was trained, not what is published
        assert torch.equal(value, ran.states[2]["model"][name])


def test_between_random_heads_and_trained_ones_nothing_is_sought(
    config: TrainJobConfig, look: Callable[..., Looked], tmp_path: Path
) -> None:
    at_random = replace(config, training=replace(config.training, whitening_power=None))
    of_nothing = replace(make_job(config.data.dataset_uri, tmp_path), training=config.training)
    for other in (at_random, of_nothing):
        assert [each.step for each in look(other, {1.0: 0.5}).kept] == [0, 1, 2]


def found_by(config: TrainJobConfig) -> Tensor:
    """On each rank: the shares of its checkpoints, and the head a quarter of the way."""
    data = data_of(config, rank=collectives.rank(), world_size=collectives.world_size())
    trainer = trainer_of(config, data)
    kept: list[Examination] = []

    def keep(_: loop.Write, examination: Examination) -> None:
        kept.append(examination)

    loop.train(trainer, data, augment=AugmentConfig(), num_images=8, diary=None, checkpoint=keep)
    interpolation.look(trainer, data, diary=None, checkpoint=keep)
    head = interpolation.between(*interpolation.ends_of(trainer), 0.25)["heads.sample.weight"]
    return torch.cat([torch.tensor([each.share for each in kept]), head.flatten()])


@pytest.mark.slow
def test_all_ranks_find_the_same(config: TrainJobConfig) -> None:
    results = on_ranks(found_by, config)
    (alone,) = results[1]
    for of_ranks in results.values():
        for found in of_ranks:
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)
