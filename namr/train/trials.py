"""Trials under Ray Tune: as many at once as the cluster holds, the worse of them stopped early (ASHA).

Trials compete within a league only; in each league the best of those who come to a rung goes on, so that each
has one at least that is trained to its end. A trial that ends is told to the caller at once, who keeps it:
Tune's own files are thrown away, and what ended in an earlier attempt is handed in as `Past`.

Not covered: checkpoints of trials (one that was cut off begins anew); what a trial does (`sweep`).
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import ray
import torch
from ray import tune
from ray.tune import schedulers

from namr.errors import ConfigError, NamrError
from namr.store import scratch
from namr.train.examination import SCORE, Examination
from namr.train.ray_group import WorkersConfig

_client: Any = ray.util.client  # without annotations
_asha: Any = schedulers.ASHAScheduler

_STEP = "step"


class Trial(NamedTuple):
    """What is to be tried, by the name that `work` knows it by."""

    name: str
    league: str


class Past(NamedTuple):
    """A trial that ended in an earlier attempt."""

    trial: Trial
    curve: Sequence[tuple[int, float]]
    """(step, score), by step."""


class Ended(NamedTuple):
    """What came of a trial."""

    trial: Trial
    state: Literal["finished", "stopped", "failed"]
    reason: str
    """Why it failed."""
    examinations: Sequence[Examination]
    """By step."""


class Rungs(NamedTuple):
    """Where trials are compared: after `first` steps, and each time after `reduction` times as many."""

    first: int
    reduction: int
    num_steps: int


Tell = Callable[[Examination], None]
Work = Callable[[Any, str, torch.device, Tell], str | None]
"""(given, name, device, tell) -> why the trial failed, or None. A NamrError ends all trials."""


def run(
    work: Work,
    given: Any,
    trials: Sequence[Trial],
    *,
    past: Iterable[Past],
    rungs: Rungs,
    workers: WorkersConfig,
    ended: Callable[[Ended], None],
) -> None:
    """`work` for every trial; `ended` is called in this process, one trial after the other.

    Raises what `ended` raises and the NamrError of a trial, both of which end all others; NamrError at the
    end where trials were lost, with the first reason, after the failures that `workers` allows.
    """
    if not trials:
        return
    if _client.ray.is_connected():
        raise ConfigError(
            "Ray's address is ray://; submit a sweep as a job, or run it on a node of the cluster"
        )
    # Tune's own tables, loggers and handler of Ctrl-C; they are read when it starts.
    os.environ |= {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns that its own files are not there
    leagues = _Leagues({trial.name: trial.league for trial in trials}, past, rungs)
    watch = _Watch({trial.name: trial for trial in trials}, leagues, rungs, ended)
    trainable = tune.with_parameters(_try, work=work, given=given, workers=workers)
    with scratch.folder("sweep-") as folder:
        results = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([workers.each])),
            param_space={"name": tune.grid_search([trial.name for trial in trials])},
            tune_config=tune.TuneConfig(scheduler=leagues, reuse_actors=True),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(folder),
                verbose=0,
                callbacks=[watch],
                stop=_Stop(watch),
                failure_config=tune.FailureConfig(max_failures=workers.max_failures),
            ),
        ).fit()
    if watch.fault is not None:
        raise watch.fault
    if lost := len(trials) - watch.num_ended:
        reasons = [str(error).strip().splitlines()[-1] for error in results.errors]
        raise NamrError(
            f"{lost} of {len(trials)} settings were lost: {(reasons or ['no reason was told'])[0]}; what "
            "ended is kept, the same name tries the others again"
        )


def _try(config: dict[str, Any], *, work: Work, given: Any, workers: WorkersConfig) -> None:
    """What Tune calls for each trial, in an actor of its own."""
    torch.set_num_threads(workers.cpus_per_worker)
    device = torch.device("cuda" if workers.use_gpu else "cpu")

    def tell(examination: Examination) -> None:
        tune.report({_STEP: examination.step, SCORE: examination.score, "examination": examination})

    try:
        failure = work(given, config["name"], device, tell)
    except NamrError as error:
        tune.report({"fault": error})
        return
    if failure is not None:
        tune.report({"failure": failure})


class _Leagues(schedulers.FIFOScheduler):
    """One ASHA for each league."""

    def __init__(self, league_of: dict[str, str], past: Iterable[Past], rungs: Rungs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        past = list(past)
        self._league_of = league_of
        self.stopped: set[str] = set()
        names = {*league_of.values(), *(each.trial.league for each in past)}
        self._by_league = {
            name: _asha(
                time_attr=_STEP,
                metric=SCORE,
                mode="max",
                max_t=rungs.num_steps,
                grace_period=rungs.first,
                reduction_factor=rungs.reduction,
            )
            for name in names
        }
        for each in past:
            self._replay(each)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(self._of(trial).on_trial_result(tune_controller, trial, result))
        if decision == schedulers.TrialScheduler.STOP:
            self.stopped.add(trial.config["name"])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)

    def _of(self, trial: Any) -> Any:
        return self._by_league[self._league_of[trial.config["name"]]]

    def _replay(self, past: Past) -> None:
        asha, stand_in = self._by_league[past.trial.league], _StandIn(f"past {past.trial.name}")
        asha.on_trial_add(None, stand_in)
        for step, score in past.curve:
            asha.on_trial_result(None, stand_in, {_STEP: step, SCORE: score})


class _StandIn(NamedTuple):
    """All that ASHA asks of a trial."""

    trial_id: str


class _Watch(tune.Callback):
    """Collects what trials tell, and hands on those that ended."""

    def __init__(
        self, trials: dict[str, Trial], leagues: _Leagues, rungs: Rungs, ended: Callable[[Ended], None]
    ) -> None:
        self._trials, self._leagues, self._rungs, self._ended = trials, leagues, rungs, ended
        self._told: dict[str, list[Examination]] = {name: [] for name in trials}
        self._failures: dict[str, str] = {}
        self.fault: NamrError | None = None
        self.num_ended = 0

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        return tune.Callback, ()  # Tune stores a copy for its own restore, which nobody asks for

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:  # type: ignore[override]
        name = trial.config["name"]
        if "fault" in result:
            self.fault = self.fault or result["fault"]
        elif "failure" in result:
            self._failures[name] = result["failure"]
        elif "examination" in result:
            told = self._told[name]
            if told and result[_STEP] <= told[-1].step:  # an actor was lost, and another one began anew
                told.clear()
            told.append(result["examination"])

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]
        name = trial.config["name"]
        told, failure = self._told.pop(name, []), self._failures.get(name)
        state: Literal["finished", "stopped", "failed"]
        if failure is not None:
            state = "failed"
        elif told and told[-1].step == self._rungs.num_steps:
            state = "finished"
        elif name in self._leagues.stopped:
            state = "stopped"
        else:
            return
        if self.fault is not None:
            return
        try:
            self._ended(Ended(self._trials[name], state, failure or "", told))
        except NamrError as error:
            self.fault = error
        else:
            self.num_ended += 1


class _Stop(tune.Stopper):
    """Ends all trials once one told of a fault that all of them have."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002  Tune's signature
        return False

    def stop_all(self) -> bool:
        return self._watch.fault is not None
