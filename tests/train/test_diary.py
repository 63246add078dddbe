"""Numbers go to MLflow behind the back of the steps: none waits, none is lost, none is there twice."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infra import services
from infra.processes import Program, free_ports
from namr.data import datasets
from namr.errors import StorageError
from namr.registry import registry
from namr.registry.registry import Registry
from namr.train import diary, loop
from namr.train.diary import Diary
from namr.train.training_data import TrainingData
from tests.small_training import make_dataset, make_job

Sent = list[tuple[int, dict[str, float]]]


class Away:
    """A tracking server that is away until somebody says that it is back."""

    def __init__(self) -> None:
        self.is_back = False
        self.asked = threading.Event()
        self.got: Sent = []
        self.times_ms: list[int | None] = []

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        self.asked.set()
        if not self.is_back:
            raise StorageError(f"run {run_id}: nobody answers")
        return [(step, numbers[metric]) for step, numbers in self.got if metric in numbers]

    def log_metrics(
        self, run_id: str, numbers: dict[str, float], *, step: int, time_ms: int | None = None
    ) -> None:
        self.asked.set()
        if not self.is_back:
            raise StorageError(f"run {run_id}: nobody answers")
        self.got.append((step, numbers))
        self.times_ms.append(time_ms)


class Stuck(Away):
    """A server that takes a request and never answers it."""

    def history(self, *_: object) -> list[tuple[int, float]]:
        self.asked.set()
        threading.Event().wait()
        return []


def diary_of(server: Away, said: list[tuple[int, str]] | None = None, **options: float) -> Diary:
    telling = [] if said is None else said
    return Diary(
        server,  # type: ignore[arg-type]
        "r",
        lambda step, words: telling.append((step, words)),
        retry_s=0.01,
        **options,  # type: ignore[arg-type]
    )


def test_numbers_are_kept_in_order_until_mlflow_takes_them() -> None:
    server, said = Away(), list[tuple[int, str]]()
    with diary_of(server, said) as telling:
        telling.write({"loss": 3.0}, step=10)
        with telling._changed:
            assert telling._changed.wait_for(lambda: telling._fault is not None, 30)
        telling.write({"loss": 2.0}, step=20)
        assert said == [(20, "(MLflow: run r: nobody answers; kept 2 entries)")]
        server.is_back = True
        telling.write({"loss": 1.0}, step=30)
    assert server.got == [(10, {"loss": 3.0}), (20, {"loss": 2.0}), (30, {"loss": 1.0})]
    assert None not in server.times_ms and sorted(server.times_ms, key=str) == server.times_ms


@pytest.mark.parametrize("server", [Away(), Stuck()])
def test_the_end_waits_a_bounded_time_and_says_what_was_not_sent(server: Away) -> None:
    said = (
        r"2 entries of run r were not taken by MLflow within 0.2 s \(.*(nobody answers|no answer)\).* go on"
    )
    with pytest.raises(StorageError, match=said), diary_of(server, wait_s=0.2) as telling:
        telling.write({"loss": 3.0}, step=10)
        telling.write({"loss": 2.0}, step=20)


def test_a_failure_is_told_and_not_what_was_left_unsent() -> None:
    with pytest.raises(ZeroDivisionError), diary_of(Away(), wait_s=0.1) as telling:
        telling.write({"loss": 3.0}, step=10)
        raise ZeroDivisionError


def test_numbers_of_before_a_failure_are_sent() -> None:
    server = Away()
    server.is_back = True
    with pytest.raises(ZeroDivisionError), diary_of(server) as telling:
        telling.write({"loss": 3.0}, step=10)
        raise ZeroDivisionError
    assert server.got == [(10, {"loss": 3.0})]


def test_what_was_not_sent_goes_on_from_the_checkpoint_with_its_own_time(tmp_path: Path) -> None:
    away = Away()
    with pytest.raises(StorageError), diary_of(away, wait_s=0.1) as telling:
        telling.write({"loss": 3.0}, step=10)
        telling.write({"loss": float("nan")}, step=20)
        telling.write_unsent(tmp_path)
    unsent = diary.read_unsent(tmp_path)
    back = Away()
    back.is_back = True
    with Diary(back, "r", lambda *_: None, unsent=unsent) as telling:  # type: ignore[arg-type]
        telling.write({"loss": 1.0}, step=30)
    assert [step for step, _ in back.got] == [10, 20, 30]
    assert back.times_ms[:2] == [entry.time_ms for entry in unsent]


def test_steps_that_are_done_again_are_not_told_again() -> None:
    server = Away()
    server.is_back = True
    with diary_of(server) as telling:
        for step in (10, 20, 30):
            telling.write({"loss": 1.0, "norm": 2.0}, step=step)
        telling.write({"recall": 0.5}, step=20)
    with diary_of(server) as telling:  # of a group that goes on from step 15
        for step in (20, 30, 40):
            telling.write({"loss": 9.0, "norm": 9.0}, step=step)
            telling.write({"recall": 0.9}, step=step)
    told = {
        "loss": [(step, 1.0) for step in (10, 20, 30)] + [(40, 9.0)],
        "recall": [(20, 0.5), (30, 0.9), (40, 0.9)],
    }
    assert {name: server.history("r", name) for name in told} == told


def test_a_checkpoint_of_before_there_was_a_diary_in_it_has_nothing_unsent(tmp_path: Path) -> None:
    assert diary.read_unsent(tmp_path) == []


def test_what_is_kept_is_bounded_and_what_is_lost_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diary, "_MOST_ENTRIES", 2)
    with (
        pytest.raises(StorageError, match=r"2 entries .*; 3 more did not fit and are lost"),
        diary_of(Stuck(), wait_s=0.1) as telling,
    ):
        for step in range(5):
            telling.write({"loss": 1.0}, step=step)


class Server:
    """An MLflow server on one port and one database, that can be stopped, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, (self._port,) = folder, free_ports(1)
        self.uri = f"http://127.0.0.1:{self._port}"
        self._program = self._start()

    def _start(self) -> Program:
        command = [
            *(str(services.SCRIPTS_PATH / "mlflow"), "server", "--host", "127.0.0.1", "--workers", "1"),
            *("--port", str(self._port), "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
        ]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        program = Program(
            "the MLflow server",
            command,
            log_path=self._folder / "log",
            environment=quiet,
            folder=self._folder,
        )
        program.wait_until(lambda: services.http_status(f"{self.uri}/health") == 200, timeout_s=120)
        return program

    def leave(self, how: str) -> None:
        if how == "killed":
            self._program.kill()
        else:
            self._signal(signal.SIGSTOP)

    def come_back(self, how: str) -> None:
        if how == "killed":
            self._program = self._start()
        else:
            self._signal(signal.SIGCONT)

    def end(self) -> None:
        self._signal(signal.SIGCONT)
        self._program.stop()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._program.pids():
            os.kill(pid, number)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path)
    try:
        yield started
    finally:
        started.end()


@pytest.mark.mlflow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_while_a_real_server_is_away_all_steps_are_done_and_afterwards_it_has_each_number_once(
    how: str, server: Server, tmp_path: Path
) -> None:
    """The loop ends before the server is let back, so no step and no examination waited for it."""
    config = make_job(make_dataset(tmp_path / "set"), tmp_path, training={"num_steps": 40})
    data = TrainingData(
        datasets.open_version(config.data.dataset_uri),
        None,
        data=config.data,
        batch=config.batch,
        loader=config.loader,
        seed=config.seed,
    )
    trainer = loop.make_trainer(
        config.model, config.loss, config.training, data, seed=config.seed, device=torch.device("cpu")
    )
    run_id = registry.connect(server.uri).create_run("diary", run_name="r")
    with Diary(registry.unasked(server.uri), run_id, lambda *_: None, retry_s=0.2, wait_s=120) as telling:
        server.leave(how)
        loop.train(
            trainer,
            data,
            augment=config.augment,
            num_images=config.batch.num_samples,
            diary=telling,
            checkpoint=lambda *_: None,
        )
        assert trainer.next_step == 40
        server.come_back(how)
    runs = registry.connect(server.uri)
    assert logged_steps(runs, run_id, "train/total") == [10, 20, 30, 40]
    assert logged_steps(runs, run_id, "validation/recall_at_1/l2") == [*range(0, 41, 2)]


def logged_steps(runs: Registry, run_id: str, metric: str) -> list[int]:
    """Of every entry that MLflow holds."""
    return [entry.step for entry in runs._client.get_metric_history(run_id, metric)]
