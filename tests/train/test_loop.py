"""The loop around the steps: where a run starts from, what it keeps of that, and what counts as speed."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from namr.data.images import AugmentConfig
from namr.errors import ManifestError, ModelMismatch, ShapeError
from namr.measure import validation
from namr.model import model, whitening
from namr.model.losses import LossConfig
from namr.train import loop
from namr.train.examination import Examination
from namr.train.loop import Trained
from namr.train.recipe import TrainingConfig
from namr.train.run import TrainJobConfig
from namr.train.step import Trainer
from namr.train.training_data import TrainingData
from tests.ranks import on_ranks
from tests.small_training import data_of, make_pretrained_job, trainer_of


class Ran(NamedTuple):
    trainer: Trainer
    trained: Trained
    kept: list[Examination]
    starts: dict[str, torch.Tensor]
    """the head's weights at the first checkpoint"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainJobConfig:
    return make_pretrained_job(tmp_path_factory.mktemp("loop"))


def run(config: TrainJobConfig, *, state: dict[str, Any] | None = None) -> Ran:
    data = data_of(config)
    trainer = trainer_of(config, data)
    if state:
        trainer.load_state(state)
    kept: list[Examination] = []
    starts: dict[str, torch.Tensor] = {}

    def checkpoint(_: loop.Write, examination: Examination) -> None:
        kept.append(examination)
        if not starts:
            starts.update(
                {name: value.clone() for name, value in trainer.model.heads.sample.state_dict().items()}
            )

    trained = loop.train(
        trainer, data, augment=AugmentConfig(), num_images=8, diary=None, checkpoint=checkpoint
    )
    return Ran(trainer, trained, kept, starts)


def test_the_model_before_its_first_step_is_examined_and_kept(config: TrainJobConfig) -> None:
    ran = run(config)
    assert [each.step for each in ran.kept] == [0, 1, 2]
    start = ran.trained.start
    assert start is not None and start[1:] == ran.kept[0].recommended
    assert start.words == "the whitened features of 30 images (power 0.25)"
    assert ran.kept[0].score >= 0 and ran.kept[0].mean_distance > 0


def test_the_head_starts_as_the_whitening_of_the_features_of_classes_to_train_on(
    config: TrainJobConfig,
) -> None:
    ran = run(config)
    data = data_of(config)
    built = model.build(config.model, seed=config.seed)
    features = data.sample_features(built, num=1000)
    assert len(features) == 30  # six of eight classes, five images each
    expected = whitening.whitening(features, dim=8, power=0.25)
    assert np.array_equal(ran.starts["weight"].numpy(), expected.weight)
    assert np.array_equal(ran.starts["bias"].numpy(), expected.bias)


def test_an_untrained_model_ranks_as_its_whitened_features(config: TrainJobConfig) -> None:
    """What step 0 measured is what the features themselves find after the same map."""
    ran, data = run(config), data_of(config)
    built = model.build(config.model, seed=config.seed).eval()
    start = whitening.whitening(data.sample_features(built, num=1000), dim=8, power=0.25)
    data.cache_features(built)
    x = data._unseen.features_of(data.searched_ids).numpy() @ start.weight.T + start.bias
    ways = validation.ways("cosine")
    results = validation.measure(x, None, data._searched_labels, ways=ways[:2], splits=[data._split])
    for way in ways[:2]:
        assert ran.kept[0].recall_at_1[validation.name_of(way)] == results[way].recall_at_1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"whitening_power": None}}, "random weights"),
        ({"model": {"weights": "none"}}, "random weights, since the backbone does too"),
        (
            {"model": {"embedding_dim": 30}},
            "random weights, since 30 images are too few to whiten 30 dimensions",
        ),
    ],
)
def test_where_there_is_nothing_to_whiten_heads_start_at_random_and_say_so(
    config: TrainJobConfig, change: dict[str, dict[str, Any]], words: str
) -> None:
    changed = replace(config, **{part: replace(getattr(config, part), **of) for part, of in change.items()})
    ran = run(changed)
    assert ran.trained.start is not None and ran.trained.start.words == words
    fresh = model.build(changed.model, seed=changed.seed).heads.sample.weight
    assert torch.equal(ran.starts["weight"], fresh)


def test_a_run_that_goes_on_keeps_its_start_and_does_not_begin_anew(config: TrainJobConfig) -> None:
    ran = run(config)
    longer = replace(config, training=replace(config.training, num_steps=3))
    again = run(longer, state=ran.trainer.state())
    assert again.trained.start == ran.trained.start
    assert [each.step for each in again.kept] == [3]


def with_scores(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> None:
    """Examinations that find these scores, by step, and nothing else."""
    real = loop.examine
    monkeypatch.setattr(
        loop, "examine", lambda trainer, data: replace(real(trainer, data), score=scores[trainer.next_step])
    )


def test_training_ends_when_patience_does_and_does_not_go_on_when_it_is_resumed(
    config: TrainJobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scores(monkeypatch, {0: 0.5, 1: 0.4, 2: 0.6, 3: 0.6, 4: 0.3, 5: 0.9})
    patient = replace(
        config, training=replace(config.training, num_steps=5, patience=2, evaluation_interval=1)
    )
    ran = run(patient)
    assert [each.step for each in ran.kept] == [0, 1, 2, 3, 4]
    assert ran.trained.num_steps == 4
    again = run(patient, state=ran.trainer.state())
    assert again.kept == [] and again.trained.num_steps == 4


def test_patience_counts_on_over_a_resume(config: TrainJobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with_scores(monkeypatch, {0: 0.5, 1: 0.4, 2: 0.4, 3: 0.4, 4: 0.4})
    training = replace(config.training, num_steps=4, evaluation_interval=1)
    cut = run(replace(config, training=replace(training, num_steps=1, patience=3)))
    whole = run(replace(config, training=replace(training, patience=3)), state=cut.trainer.state())
    assert [each.step for each in whole.kept] == [2, 3]


class Killed(Exception):
    """What a test ends a run with, anywhere."""


@pytest.mark.slow
def test_killed_at_whatever_step_or_in_an_upload_a_run_ends_with_the_weights_of_one_that_was_not(
    config: TrainJobConfig, tmp_path: Path
) -> None:
    """All is trained, augmented and mined; every step is a checkpoint, and every other one examined."""
    training = TrainingConfig(num_steps=4, evaluation_interval=2, checkpoint_interval=1, batchnorm="frozen")
    whole = replace(config, training=training, loss=LossConfig(base="margin"))
    data = data_of(whole)
    undisturbed = trained_from(whole, data, tmp_path / "undisturbed").state()
    for step in range(5):
        for in_upload in (False, True):
            folder = tmp_path / f"{step}-{in_upload}"
            with pytest.raises(Killed):
                trained_from(whole, data, folder, killed_at=step, in_upload=in_upload)
            again = trained_from(whole, data, folder).state()
            assert (again["step"], again["start"]) == (4, undisturbed["start"])
            for part in ("model", "loss"):
                for name, value in undisturbed[part].items():
                    assert torch.equal(again[part][name], value), (step, in_upload, name)


def trained_from(
    config: TrainJobConfig,
    data: TrainingData,
    folder: Path,
    *,
    killed_at: int | None = None,
    in_upload: bool = False,
) -> Trainer:
    """From the newest whole checkpoint there; killed when the one of a step is there, or half of it."""
    trainer = trainer_of(config, data)
    if stored := sorted(folder.glob("step-*")):
        loop.go_on(trainer, stored[-1])

    def checkpoint(_: loop.Write, examination: Examination) -> None:
        coming = folder / f"coming-{examination.step}"
        coming.mkdir(parents=True, exist_ok=True)
        torch.save(trainer.state(), coming / "state.pt")
        if examination.step == killed_at and in_upload:
            raise Killed
        coming.rename(folder / f"step-{examination.step}")
        if examination.step == killed_at:
            raise Killed

    loop.train(trainer, data, augment=config.augment, num_images=8, diary=None, checkpoint=checkpoint)
    return trainer


def test_who_is_warned_leaves_after_a_checkpoint_of_that_step(config: TrainJobConfig) -> None:
    data = data_of(config)
    trainer = trainer_of(config, data)
    kept: list[int] = []
    trained = loop.train(
        trainer,
        data,
        augment=AugmentConfig(),
        num_images=8,
        diary=None,
        checkpoint=lambda _, examination: kept.append(examination.step),
        is_warned=lambda: True,
    )
    assert trained is None
    assert kept == [0, 1] and trainer.next_step == 1


def test_a_checkpoint_of_another_model_is_refused_by_what_differs(
    config: TrainJobConfig, tmp_path: Path
) -> None:
    data = data_of(config)
    torch.save(trainer_of(config, data).state(), tmp_path / "state.pt")
    for change, said in (
        ({"embedding_dim": 4}, r"checkpoint of step 0 is not of the model .*size mismatch for heads"),
        ({"backbone": "test_resnet", "weights": "none"}, r"is not of the model .*(Missing|Unexpected) key"),
    ):
        other = replace(config, model=replace(config.model, **change))  # type: ignore[arg-type]
        with pytest.raises(ModelMismatch, match=said):
            loop.go_on(trainer_of(other, data_of(other)), tmp_path)


def test_a_checkpoint_that_is_cut_off_is_refused(config: TrainJobConfig, tmp_path: Path) -> None:
    data = data_of(config)
    trainer = trainer_of(config, data)
    torch.save(trainer.state(), tmp_path / "state.pt")
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ManifestError, match=r"the checkpoint's state.pt can't be read"):
        loop.go_on(trainer, tmp_path)


def test_features_that_are_no_numbers_end_the_run_before_its_first_step(
    config: TrainJobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        TrainingData, "sample_features", lambda *_, **__: np.full((40, 16), np.nan, np.float32)
    )
    with pytest.raises(ShapeError, match="features of image 0 hold NaN"):
        run(config)


def started(config: TrainJobConfig) -> torch.Tensor:
    """On each rank: the head after the start, features computed by all ranks together."""
    rank, world_size = loop.collectives.rank(), loop.collectives.world_size()
    uncached = replace(config, training=replace(config.training, augment=True))
    data = data_of(uncached, rank=rank, world_size=world_size)
    trainer = trainer_of(uncached, data)
    loop._whiten(trainer, data)
    return torch.cat(
        [trainer.model.heads.sample.weight, trainer.model.heads.sample.bias[:, None]], 1
    ).detach()


@pytest.mark.slow
def test_the_start_has_the_same_bits_on_any_number_of_ranks(config: TrainJobConfig) -> None:
    results = on_ranks(started, config)
    (alone,) = results[1]
    for world_size, of_ranks in results.items():
        for head in of_ranks:
            assert torch.equal(head, alone), f"{world_size} ranks"


def test_speed_counts_steady_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    speed = loop._Speed(num_images=8)
    for number in range(9):
        now[0] += 10.0 if number < 5 else 0.5
        speed.step()
    assert speed.images_per_s == 16.0
    speed.pause()
    now[0] += 100.0
    speed.step()
    now[0] += 0.5
    speed.step()
    assert speed.images_per_s == 16.0
