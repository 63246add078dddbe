"""What a run is: which configurations are refused, what one seed decides, how it begins and goes on."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from namr import config as configuration
from namr.data import erasing
from namr.data.loading import LoaderConfig
from namr.data.sampling import PKConfig
from namr.errors import ConfigError, ManifestError, NamrError
from namr.registry import registry
from namr.store import manifests
from namr.train import run
from namr.train.ray_group import WorkersConfig
from namr.train.run import TrainingRun, TrainJobConfig
from namr.train.training_data import DataConfig
from tests.small_release import NOW
from tests.small_training import make_dataset, make_job

Make = Callable[..., TrainJobConfig]
ROOT = Path(__file__).parents[2]
FLAGS = ["--run-name", "r", "--storage-uri", "runs", "--data.dataset-uri", "set"]


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def make(data_uri: str, tmp_path: Path) -> Make:
    return partial(make_job, data_uri, tmp_path)


def store(config: TrainJobConfig, **changes: Any) -> TrainingRun:
    """As if a run of this configuration, but for some of its texts, had begun."""
    texts = {
        name: str(value) for name, value in configuration.to_flat(run.absolute(config)).items()
    } | changes
    stored = TrainingRun(
        created="",
        mlflow_run_id="1",
        config={name: text for name, text in texts.items() if text is not None},
        data_version=1,
        data_digest="",
        validation_version=None,
        validation_digest=None,
    )
    manifests.write_manifest(f"{config.run_uri}/run.json", stored)
    return stored


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_a_seed_that_is_none_is_refused_by_name(seed: int, make: Make) -> None:
    with pytest.raises(ConfigError, match=rf"^seed is {seed}; expected 0 to 9223372036854775807"):
        make(seed=seed)


@pytest.mark.parametrize(("classes", "samples"), [(10**7, 2), (2, 10**7)])
def test_a_batch_that_fits_nowhere_is_refused_by_name(classes: int, samples: int, make: Make) -> None:
    said = rf"classes_per_batch is {classes} and batch.samples_per_class is {samples}, a batch of 20000000"
    with pytest.raises(ConfigError, match=said):
        make(batch=PKConfig(classes_per_batch=classes, samples_per_class=samples))


def test_numbers_of_workers_that_are_a_slip_are_refused_by_name(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"^workers.num_workers is 1000000; expected 1 to"):
        WorkersConfig(num_workers=10**6)
    with pytest.raises(ConfigError, match=r"^loader.num_workers is 1000000; expected 0 to"):
        LoaderConfig(num_workers=10**6)
    with pytest.raises(ConfigError, match="num_workers is 9 and a batch has 8"):
        make(workers=WorkersConfig(num_workers=(1, 9)))
    for few, many in ((0, 2), (3, 2), (1, 10**6)):
        with pytest.raises(ConfigError, match=rf"num_workers is {few} to {many}; expected the fewest and"):
            WorkersConfig(num_workers=(few, many))


def test_an_elastic_group_is_two_numbers_in_files_and_flags(tmp_path: Path) -> None:
    file = ROOT / "jobs" / "configs" / "train.toml"
    flags = ["--config", str(file), *FLAGS, "--workers.num-workers", "2", "4"]
    job = configuration.load(TrainJobConfig, flags)
    assert (job.workers.fewest, job.workers.most) == job.workers.num_workers == (2, 4)
    stored = tmp_path / "job.toml"
    stored.write_text(configuration.to_toml(job))
    assert configuration.load(TrainJobConfig, ["--config", str(stored)]) == job


@pytest.mark.parametrize("old", ["batch.seed", "training.seed"])
def test_a_file_or_flag_that_names_an_old_seed_is_told_the_new_one(old: str, tmp_path: Path) -> None:
    said = rf"{old} is no field any more; set seed, which took its place"
    file = ROOT / "jobs" / "configs" / "train.toml"
    with pytest.raises(ConfigError, match=said):
        configuration.load(TrainJobConfig, ["--config", str(file), *FLAGS, f"--{old}", "3"])
    table = old.partition(".")[0]
    older = tmp_path / "older.toml"
    older.write_text(file.read_text().replace(f"[{table}]", f"[{table}]\nseed = 3"))
    with pytest.raises(ConfigError, match=said):
        configuration.load(TrainJobConfig, ["--config", str(older), *FLAGS])
    assert configuration.load(TrainJobConfig, ["--config", str(file), *FLAGS, "--seed", "3"]).seed == 3


def test_a_run_refuses_another_configuration_but_for_what_may_change(make: Make) -> None:
    stored = store(make())
    with pytest.raises(ConfigError, match=r"training.learning_rate was 0.0003 and is 1.0; choose another"):
        run.begun(run.absolute(make(training={"learning_rate": 1.0})))
    with pytest.raises(ConfigError, match="seed was 1 and is 2"):
        run.finished(run.absolute(make(seed=2)))
    assert run.begun(run.absolute(make(workers=WorkersConfig(num_workers=1)))) == stored


def test_settings_that_are_off_are_no_part_of_what_is_stored_so_that_older_runs_go_on(make: Make) -> None:
    new = {"loss.memory", "training.average", "training.patience", "training.backbone.", "workers.system"}
    stored = run.texts(make())
    assert [name for name in stored if name.startswith(tuple(new))] == []
    assert run.changes({name: stored[name] for name in stored if name != "dry_run"}, stored) == ""


def test_a_run_goes_on_with_the_data_it_began_with_and_with_no_other(make: Make) -> None:
    config = run.absolute(make())
    train, _ = run.open_datasets(config, None)
    stored = store(config)  # of other data: the digest of its version is another
    with pytest.raises(ManifestError, match=r"is not the dataset that run 'run' began with"):
        run.open_datasets(config, stored)
    newer = run.absolute(make(data=replace(config.data, dataset_version=7)))
    assert run.open_datasets(newer, replace(stored, data_digest=train.digest)) == (train, None)


def test_a_run_that_began_with_two_seeds_of_one_number_goes_on(make: Make) -> None:
    before: dict[str, Any] = {"seed": None, "batch.seed": "1", "training.seed": "1"}
    assert run.begun(run.absolute(make())) is None
    stored = store(make(), **before)
    assert run.begun(run.absolute(make())) == stored


def test_a_run_that_began_with_two_seeds_that_differ_does_not(make: Make) -> None:
    store(make(), seed=None, **{"batch.seed": "1", "training.seed": "0"})
    with pytest.raises(ConfigError, match=r"batch.seed was 1 and is None.* training.seed was 0 and is None"):
        run.begun(run.absolute(make()))


@pytest.mark.slow
def test_of_a_run_that_was_killed_while_it_began_no_mlflow_run_is_left_running(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run.absolute(make())
    runs = registry.connect(config.tracking_uri)
    train, unseen = run.open_datasets(config, None)
    other = runs.create_run(config.experiment, run_name="somebody's")
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write_manifest", _killed)
        with pytest.raises(NamrError, match="killed"):
            run.begin(config, runs, train, unseen)
    (left,) = set(_statuses(runs, config.experiment)) - {other}
    begun = run.begin(config, runs, train, unseen)
    assert _statuses(runs, config.experiment) == {
        other: "RUNNING", left: "KILLED", begun.mlflow_run_id: "RUNNING"
    }  # fmt: skip
    assert run.begun(config) == begun


def test_a_run_goes_on_with_its_version_after_images_of_it_were_erased(make: Make, tmp_path: Path) -> None:
    config = make(data=DataConfig(dataset_uri=make_dataset(tmp_path / "set", num_classes=2)))
    train, _ = run.open_datasets(config, None)
    begun = replace(store(config), data_digest=train.digest)
    erasing.empty(train.uri, [3], erasure_id="e", now=NOW)
    left, _ = run.open_datasets(config, begun)
    assert left.version.version == 1 and left.live(np.array([2, 3])).tolist() == [True, False]
    with pytest.raises(ManifestError, match=r"is not the dataset that run .* began with"):
        run.open_datasets(config, replace(begun, data_digest="0" * 64))


def _killed(*_: Any) -> None:
    raise NamrError("killed")


def _statuses(runs: registry.Registry, experiment: str) -> dict[str, str]:
    client = runs._client
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    return {each.info.run_id: each.info.status for each in client.search_runs([known.experiment_id])}


def test_the_resolved_job_names_one_seed(make: Make) -> None:
    flat = configuration.to_flat(make(seed=5))
    assert {name: value for name, value in flat.items() if "seed" in name} == {"seed": 5}
    assert json.loads(json.dumps(flat))["seed"] == 5
