"""Trials under a real Ray Tune, of curves that are known beforehand."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from namr.errors import ConfigError, NamrError
from namr.train import trials
from namr.train.examination import Examination
from namr.train.ray_group import WorkersConfig
from namr.train.trials import Ended, Past, Rungs, Tell, Trial

ONE = WorkersConfig(max_failures=0)
RUNGS = Rungs(first=1, reduction=2, num_steps=4)
GOOD = Past(Trial("good", "ranked"), [(step, 0.9) for step in range(5)])


def _curve(given: dict[str, Any], name: str, device: torch.device, tell: Tell) -> str | None:
    assert device.type == "cpu"
    for step, score in enumerate(given[name]):
        if isinstance(score, str):
            return score
        if isinstance(score, Exception):
            raise score
        tell(Examination(step=step, mean_distance=1.0, score=score))
    return None


def trials_of(names: Iterable[str]) -> list[Trial]:
    """Those whose name begins with p are in a league of their own."""
    return [Trial(name, "plain" if name.startswith("p") else "ranked") for name in names]


def run(curves: dict[str, Any], ended: Callable[[Ended], None], past: tuple[Past, ...] = ()) -> None:
    trials.run(_curve, curves, trials_of(curves), past=past, rungs=RUNGS, workers=ONE, ended=ended)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_bad_trials_are_stopped_failed_and_lost_ones_told_and_the_rest_goes_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    curves = {
        "low": [0.1] * 5,
        "plain": [0.1] * 5,
        "nan": [0.5, "step 1 is not finite"],
        "lost": [0.5, MemoryError("no memory")],
        "high": [0.95] * 5,
    }
    got: dict[str, Ended] = {}
    with pytest.raises(NamrError, match=r"1 of 5 settings were lost: .*no memory"):
        run(curves, lambda each: got.update({each.trial.name: each}), past=(GOOD,))
    told = {
        name: (each.state, each.reason, [one.step for one in each.examinations]) for name, each in got.items()
    }
    assert told == {
        "low": ("stopped", "", [0, 1]),  # at the first rung, by what an earlier attempt had reached
        "plain": ("finished", "", [0, 1, 2, 3, 4]),  # as low, and best of its own league
        "nan": ("failed", "step 1 is not finite", [0]),
        "high": ("finished", "", [0, 1, 2, 3, 4]),
    }
    shown = "".join(capfd.readouterr())
    assert "Trial status" not in shown and "not found" not in shown


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_fault_that_all_trials_have_ends_them_and_is_raised() -> None:
    got: list[Ended] = []
    with pytest.raises(ConfigError, match="no such weights"):
        run({name: [ConfigError("no such weights")] for name in "abcdef"}, got.append)
    assert got == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_the_keeper_raises_is_raised_and_nothing_is_kept_after_it() -> None:
    asked: list[Ended] = []

    def refuse(each: Ended) -> None:
        asked.append(each)
        raise NamrError("the lease is lost")

    with pytest.raises(NamrError, match="the lease is lost"):
        run({name: [0.5] * 5 for name in "abcd"}, refuse)
    assert len(asked) == 1


def test_nothing_to_try_needs_no_ray() -> None:
    run({}, lambda _: None)
