"""The exceptions: the tree that the docstring draws is the tree that is there, and all survive a process."""

import inspect
import pickle

import pytest

from namr import errors
from namr.errors import ImageRefused, NamrError

ALL = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, NamrError)]


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_the_docstring_draws_every_error_below_its_parent(error: type[NamrError]) -> None:
    lines = (errors.__doc__ or "").splitlines()
    (at,) = [row for row, line in enumerate(lines) if f"{error.__name__} " in f"{line} "]
    if error is NamrError:
        return
    indent = len(lines[at].split(error.__name__)[0])
    above = next(line for line in reversed(lines[:at]) if len(line) - len(line.lstrip(" │├└─")) < indent)
    assert error.__bases__[0].__name__ in above.split()


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_an_error_that_crosses_processes_keeps_its_message(error: type[NamrError]) -> None:
    raised = error("the disk is full")
    assert str(pickle.loads(pickle.dumps(raised))) == str(raised)


def test_a_refused_image_carries_its_reason_alone() -> None:
    refusal = pickle.loads(pickle.dumps(ImageRefused("empty: 0 bytes")))
    assert (refusal.reason, str(refusal)) == ("empty: 0 bytes", "image refused: empty: 0 bytes")
