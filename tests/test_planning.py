"""The benchmark of planning: what is too small for it to say anything, and the size that it says is not."""

import re

import pytest

from namr.index import planning as plans
from tests.benchmarks import planning


def test_the_worst_of_the_stages_that_took_long_enough_counts() -> None:
    ratios = {"train": 0.9, "merge": 0.7, "items": 0.1}
    assert planning.worst(ratios, {"train": 3.0, "merge": 0.5, "items": 0.49}, num_vectors=1) == 0.7


@pytest.mark.parametrize(("longest_s", "needed"), [(0.143, 200_000), (0.49, 40_000), (0.012, 2_000_000)])
def test_where_none_took_long_enough_the_size_that_it_takes_is_said(longest_s: float, needed: int) -> None:
    with pytest.raises(SystemExit) as ended:
        planning.worst({"train": 0.9, "merge": 0.7}, {"train": longest_s, "merge": 0.01}, num_vectors=30_000)
    said = str(ended.value)
    assert "with 30000 vectors every stage took less than 0.5 s (the longest, train, " in said
    assert int(re.findall(r"--vectors (\d+) or more", said)[0]) == needed
    assert planning.worst({"train": 0.9}, {"train": longest_s * needed / 30_000}, num_vectors=needed) == 0.9


def test_what_has_no_lists_to_plan_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        planning.parse(["--vectors", str(plans.FLAT_BELOW - 1)])
    assert "--vectors is 19999; expected at least 20000" in capsys.readouterr().err
    assert planning.parse(["--vectors", str(plans.FLAT_BELOW)]).vectors == plans.FLAT_BELOW
