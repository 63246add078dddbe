"""The words of a search: what they refuse, and that they need no arrays."""

import subprocess
from dataclasses import FrozenInstanceError, fields

import pytest

from namr.errors import ConfigError
from namr.search.answers import SearchOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0; expected 1 or more"),
        ({"depth": -1}, "depth is -1"),
        ({"depth": 0}, "depth is 0; expected 1 or more"),
        ({"depth": True}, 'depth is True; expected 1 or more, or "adaptive"'),
        ({"depth": "deep"}, "depth is 'deep'; expected 1 or more, or \"adaptive\""),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"side": "left"}, "side is 'left'; expected one of none, query, both, scale"),
    ],
)
def test_options_that_cannot_be_are_refused_where_they_are_made(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchOptions(**options)


def test_options_are_fixed_and_all_described() -> None:
    options = SearchOptions(k=3)
    with pytest.raises(FrozenInstanceError):
        options.k = 4
    assert all(len(option.metadata["description"]) > 10 for option in fields(SearchOptions))


def test_naming_an_answer_loads_no_arrays(python: str) -> None:
    program = "import sys, namr.search.answers; print(*sys.modules)"
    loaded = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"numpy", "torch", "ray", "faiss", "pydantic"} & set(loaded) == set()
