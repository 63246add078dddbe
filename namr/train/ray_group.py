"""A group of processes under Ray Train: reserve them, run a function in each, keep its checkpoints.

The function is told which `Worker` of the group it runs in. Lost workers are replaced and begin again with
the last checkpoint; the best by score and the last are kept in storage, under the run's name. An elastic
group goes on with the workers that there is room for, and begins again with more where there is more room.

Checkpoints are uploaded by Ray Train while the function goes on, one at a time, and count when they are
complete. Not covered: what the function does (`job`).
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from namr import checks, ray_connection
from namr.errors import ConfigError, NamrError
from namr.progress import shown
from namr.store import scratch, storage
from namr.train.examination import SCORE, Examination

_train: Any = ray.train  # its annotations are those of the API before V2

_MOST_WORKERS = 4096
"""More is a slip of the hand, and Ray would be asked to reserve all of them."""
_STALE_S = 20.0
"""For so long Ray may count a lost node's resources, and an elastic group waits in vain for them."""
_FAILED_STARTS = {"fixed": 2, "elastic": 100}
"""How often a group may find no room or no way between its workers; an elastic one does at each lost node."""
_COMMITTED = _train.CheckpointConsistencyMode.COMMITTED


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """The processes that train, and what each of them gets."""

    num_workers: int | tuple[int, int] = 1
    """Processes; the global batch is split over them and the result does not depend on it. Two numbers are
    the fewest and the most of an elastic group: it goes on without lost nodes, and grows with new ones."""
    cpus_per_worker: int = 1
    """Cores, and threads of torch, for each."""
    use_gpu: bool = False
    """One GPU for each."""
    max_failures: int = 2
    """How often lost workers are replaced, from the last checkpoint, before the run fails."""
    max_preemption_failures: int | None = None
    """How often the workers may leave a node that Ray announces to be taken away. None: always. That doesn't
    count as a failure."""
    resize_interval_s: float = 60.0
    """How often an elastic group looks whether there is room for more; growing goes back to the last
    checkpoint."""
    wait_s: float = 120.0
    """How long to wait for a cluster to have the resources free."""
    system_metrics_s: float | None = None
    """Seconds between two measurements of each machine's processors, memory, disk, network and (where pynvml
    is installed) GPUs, which go to the run's metrics in MLflow; 10 is usual. None: they aren't measured."""

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, int):
            checks.in_range(self, "num_workers", at_least=1, at_most=_MOST_WORKERS, place="workers")
        elif not 1 <= self.fewest <= self.most <= _MOST_WORKERS:
            raise ConfigError(
                f"workers.num_workers is {self.fewest} to {self.most}; expected the fewest and the most, "
                f"1 to {_MOST_WORKERS}"
            )
        checks.in_range(self, "cpus_per_worker", at_least=1, place="workers")
        at_least_0 = ("max_failures", "max_preemption_failures", "wait_s")
        checks.in_range(self, *at_least_0, at_least=0, place="workers")
        checks.in_range(self, "resize_interval_s", "system_metrics_s", above=0, place="workers")

    @property
    def fewest(self) -> int:
        """The group trains with no fewer than these."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """The group trains with no more than these."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def each(self) -> dict[str, float]:
        """Ray's resources of one worker."""
        gpu = {"GPU": 1.0} if self.use_gpu else {}
        return {"CPU": float(self.cpus_per_worker), **gpu}


class Worker(NamedTuple):
    """One process of the group, and what it can do there."""

    rank: int
    world_size: int
    local_rank: int
    """Among the workers of its machine."""
    device: torch.device
    folder: Path
    """On this machine, for checkpoints on their way."""
    say: Callable[[int, str], object]
    """How many steps are done, and a few words; shown by the driver."""

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """The folder that the last `checkpoint` wrote, in this run or before; None at the beginning."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
        else:
            with checkpoint.as_directory() as folder:
                yield Path(folder)

    def checkpoint(self, write: Callable[[Path], None] | None, examination: Examination) -> None:
        """Store what `write` puts into a folder, and the numbers of the examination with it.

        Collective; one rank writes and the others pass None. Returns before it is stored, but not before the
        one before it is.
        """
        name = f"step-{examination.step:08d}"
        if examination.share < 1:
            name = f"{name}-share-{examination.share:g}"
        checkpoint = None
        if write is not None:
            self.wait_until_stored()  # or a slow store would fill this machine's disk
            folder = self.folder / name
            folder.mkdir()
            write(folder)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        _train.report(
            examination.to_flat(),
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=_train.CheckpointUploadMode.ASYNC,  # which removes the folder afterwards
        )

    def wait_until_stored(self) -> None:
        """Until every checkpoint of this group is stored, and counts."""
        _train.get_all_reported_checkpoints(_COMMITTED)

    def is_warned(self) -> bool:
        """Whether a node of the group is announced to be taken away; collective, with one answer for all."""
        return _train.get_preemption_info() is not None

    def leave(self) -> NoReturn:
        """End this worker, after `is_warned`, so that the group begins elsewhere with what is stored.

        Ray Train counts workers that end by themselves as failures, but not those that their node's end took.
        """
        self.wait_until_stored()
        raise ray.exceptions.RayActorError(error_msg="left a node that is taken away", preempted=True)


class Outcome(NamedTuple):
    """What a group came to."""

    value: Any
    """What the function returned on rank 0."""
    examination: Examination
    """Of the best checkpoint."""
    checkpoint: ray.train.Checkpoint
    """The best one; `as_directory()` brings it here."""


Work = Callable[[Any, Worker], Any]


def check_resources(workers: WorkersConfig) -> None:
    """ConfigError unless the fewest workers fit within `wait_s`: Ray Train itself would wait without end.

    Asking also makes a cluster grow that can.
    """
    group = placement_group([workers.each] * workers.fewest)
    try:
        if group.wait(workers.wait_s):
            return
    finally:
        remove_placement_group(group)
    raise ConfigError(
        f"{workers.fewest} workers with {workers.each} each found no room within {workers.wait_s:g} s; "
        f"Ray has {ray_connection.total_cpus()} cores and {ray_connection.total_gpus()} GPUs in all. "
        "Take fewer workers, or start more nodes"
    )


def run(
    work: Work,
    given: Any,
    *,
    name: str,
    storage_uri: str,
    num_steps: int,
    workers: WorkersConfig,
) -> Outcome:
    """`work(given, worker)` on every worker, from the last checkpoint under that name if there is one.

    Raises NamrError with what a worker said, after the failures that `workers` allows, and the NamrError that
    `work` returns where repeating it wouldn't help.
    """
    filesystem, path = storage.arrow_filesystem(storage_uri)
    is_elastic = workers.fewest < workers.most
    room_s = _STALE_S if is_elastic else max(_STALE_S, workers.wait_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(room_s)
    with _shown(name, num_steps) as said:
        trainer = _train.torch.TorchTrainer(
            _work,
            train_loop_config={"work": work, "given": given, "said": said, "workers": workers},
            # Features and validation are gathered on CPUs, gradients where they are.
            torch_config=_train.torch.TorchConfig(
                backend="cpu:gloo,cuda:nccl" if workers.use_gpu else "gloo"
            ),
            scaling_config=_train.ScalingConfig(
                num_workers=(workers.fewest, workers.most) if is_elastic else workers.most,
                use_gpu=workers.use_gpu,
                resources_per_worker=workers.each,
                elastic_resize_monitor_interval_s=workers.resize_interval_s,
            ),
            run_config=_train.RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=_train.FailureConfig(
                    max_failures=workers.max_failures,
                    max_preemption_failures=_or_without_end(workers.max_preemption_failures),
                    controller_failure_limit=_FAILED_STARTS["elastic" if is_elastic else "fixed"],
                ),
                checkpoint_config=_train.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE),
                logging_config=_train.LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            result: Any = trainer.fit()
        except _train.TrainingFailedError as error:
            raise _explained(name, error) from error
    if isinstance(result.return_value, NamrError):
        raise result.return_value
    kept = [(Examination.from_flat(told), checkpoint) for checkpoint, told in result.best_checkpoints]
    # Of equals the earliest: training that gained nothing leaves its start.
    examination, checkpoint = max(kept, key=lambda each: (each[0].score, -each[0].step))
    return Outcome(result.return_value, examination, checkpoint)


def _work(config: dict[str, Any]) -> Any:
    """What Ray Train calls on each worker."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it tells each checkpoint with all its numbers
    context = ray.train.get_context()
    torch.set_num_threads(config["workers"].cpus_per_worker)
    with scratch.folder("checkpoints-") as folder:
        worker = Worker(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            local_rank=context.get_local_rank(),
            device=ray.train.torch.get_device(),
            folder=folder,
            say=lambda done, words: config["said"].put_nowait((done, words)),
        )
        value = config["work"](config["given"], worker)
        worker.wait_until_stored()  # Ray Train itself waits only after the folder is gone
        return value


def _or_without_end(most: int | None) -> int:
    """As Ray Train counts: -1 where there is no limit."""
    return -1 if most is None else most


def _explained(name: str, error: Any) -> NamrError:
    """What a worker said, if it said it in our words."""
    told: BaseException = error
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None and not isinstance(cause, NamrError):
            cause = getattr(cause, "_base_exc", None) or cause.__cause__
        told = cause or told
    return NamrError(
        f"run {name!r} failed: {told}\nCheckpoints are kept; the same name goes on from the last"
    )


@contextmanager
def _shown(name: str, num_steps: int) -> Iterator[Queue]:
    """A queue for what rank 0 says, and a thread of the driver that shows it.

    The queue lives on the driver's node: on a worker's it would die with that node, and the run with it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    said = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def watch() -> None:
        with shown(f"train {name}", num_steps) as show:
            while (word := said.get()) is not None:  # waits in the queue's actor: asking costs workers' time
                show(*word)

    watcher = threading.Thread(target=watch, name="namr-progress", daemon=True)
    watcher.start()
    try:
        yield said
    finally:
        said.put_nowait(None)
        watcher.join(timeout=10)
        said.shutdown(force=True)
