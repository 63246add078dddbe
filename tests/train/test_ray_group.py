"""A group under a real Ray: what its function is told and returns, which checkpoint counts, who goes on."""

import os
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.preemption import PreemptionInfo

from namr.errors import ConfigError, NamrError, StorageError
from namr.train import ray_group
from namr.train.examination import Examination
from namr.train.ray_group import Outcome, Worker, WorkersConfig
from tests.running import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

SCORES = (0.5, 0.9, 0.7, 0.1)
"""Of the steps from 1 on."""


def group(work: ray_group.Work, folder: Path, given: Any = None, **workers: Any) -> Outcome:
    return ray_group.run(
        work,
        given,
        name="group",
        storage_uri=str(folder),
        num_steps=len(SCORES),
        workers=WorkersConfig(wait_s=60, **workers),
    )


def any_is_kept(folder: Path) -> bool:
    """Whether Ray Train has noted a checkpoint of the group, which it does after the workers went on."""
    noted = folder / "checkpoint_manager_snapshot.json"
    return noted.exists() and "step-" in noted.read_text()


def count(given: Path | None, worker: Worker) -> list[Any]:
    """A checkpoint for each score; rank 1 dies once after the second, where `given` is a file to make."""
    with worker.last_checkpoint() as folder:
        first = int((folder / "step").read_text()) if folder else 0
    for step, score in enumerate(SCORES[first:], first + 1):

        def write(folder: Path, step: int = step) -> None:
            (folder / "step").write_text(str(step))

        worker.say(step, "counted")
        worker.checkpoint(
            write if worker.rank == 0 else None, Examination(step=step, mean_distance=1.5, score=score)
        )
        if given is not None and step == 2 and worker.rank == 1 and not given.exists():
            wait_for(lambda: any_is_kept(given.parent / "group"), True)
            given.write_text("died")
            os._exit(1)
    return [first, worker.rank, worker.world_size, str(worker.device)]


def test_a_lost_worker_is_replaced_and_the_group_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    outcome = group(count, tmp_path, tmp_path / "died", num_workers=2, max_failures=1)
    first, rank, world_size, device = outcome.value
    assert first in (1, 2)  # rank 1 may die before the second checkpoint of both is complete
    assert (rank, world_size, device) == (0, 2, "cpu")
    assert outcome.examination == Examination(step=2, mean_distance=1.5, score=0.9)
    with outcome.checkpoint.as_directory() as folder:
        assert (Path(folder) / "step").read_text() == "2"


def fails(*_: Any) -> None:
    raise StorageError("no room on the disk")


def gives_up(_: Any, worker: Worker) -> NamrError:
    count(None, worker)
    return StorageError("the same again")


def test_what_a_worker_said_is_what_is_told(tmp_path: Path) -> None:
    with pytest.raises(NamrError, match=r"run 'group' failed: no room on the disk\nCheckpoints are kept"):
        group(fails, tmp_path, max_failures=0)


def test_an_error_that_is_returned_is_raised_and_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^the same again$"):
        group(gives_up, tmp_path, max_failures=5)


def warned_once(_: None, worker: Worker) -> list[int]:
    """The first group is told of the end of a node after its second checkpoint, the next one trains on."""
    with worker.last_checkpoint() as folder:
        first = int((folder / "step").read_text()) if folder else 0
    for step in range(first + 1, len(SCORES) + 1):

        def write(folder: Path, step: int = step) -> None:
            (folder / "step").write_text(str(step))

        if step == 3 and first == 0:
            announced = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a node": [1]})
            get_train_context().preemption_context.preemption_info = announced
        worker.checkpoint(
            write if worker.rank == 0 else None, Examination(step=step, mean_distance=1.5, score=0.5)
        )
        if worker.is_warned():
            worker.leave()
    return [first, worker.world_size]


def test_a_group_that_is_warned_leaves_with_a_checkpoint_and_that_is_no_failure(tmp_path: Path) -> None:
    outcome = group(warned_once, tmp_path, num_workers=2, max_failures=0, max_preemption_failures=1)
    assert outcome.value == [3, 2]


def test_more_workers_than_cores_is_an_error_and_no_wait_without_end() -> None:
    with pytest.raises(ConfigError, match=r"4 workers with .* found no room within 2 s"):
        ray_group.check_resources(WorkersConfig(num_workers=4, wait_s=2))
