"""Range checks: what passes, and how the others are told."""

from dataclasses import dataclass

import pytest

from namr import checks
from namr.errors import ConfigError


@dataclass(frozen=True)
class Config:
    num: float | None


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0, {"at_least": 1}, "num is 0; expected 1 or more"),
        (0.0, {"above": 0}, "num is 0.0; expected more than 0"),
        (1.5, {"at_least": 0, "at_most": 1}, "num is 1.5; expected 0 to 1"),
        (1, {"at_least": 0, "below": 1}, "num is 1; expected 0 or more and less than 1"),
        (0, {"above": 0, "at_most": 1}, "num is 0; expected more than 0 and at most 1"),
        (float("nan"), {"at_least": 0}, "num is nan; expected 0 or more"),
        (float("inf"), {"above": 0}, "num is inf; expected more than 0"),
        (float("-inf"), {}, "num is -inf; expected a finite number"),
        pytest.param(10**400, {"at_most": 1}, f"num is {10**400}; expected at most 1", id="no float"),
    ],
)
def test_a_value_outside_is_named_with_what_was_expected(
    value: float, limits: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        checks.in_range(Config(value), "num", **limits)  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_the_edges_and_no_value_pass() -> None:
    checks.in_range(Config(None), "num", at_least=1)
    checks.in_range(Config(1), "num", at_least=1, at_most=1)
    checks.in_range(Config(0.999), "num", above=0, below=1)


def test_the_config_s_place_in_the_job_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^training\.num is -1;"):
        checks.in_range(Config(-1), "num", at_least=0, place="training")
