"""The stages that the crasher speaks of are those of the commands."""

import importlib
import inspect

from tests.soak import witness


def test_every_stage_begins_with_a_function_that_is_there() -> None:
    begins = {of for stages in witness.STAGES.values() for of in stages.values()}
    assert all(inspect.isfunction(getattr(importlib.import_module(module), name)) for module, name in begins)


def test_a_command_has_the_stages_of_its_first_words() -> None:
    assert list(witness.stages_of(["jobs/reindex.py", "--prepare", "--model=m"]))[-1] == "keep"
    assert list(witness.stages_of(["jobs/reindex.py", "--no-compact"]))[-1] == "collect"
    assert list(witness.stages_of(["jobs/reindex.py", "--compact"]))[-1] == "compact"
    assert list(witness.stages_of(["namr", "releases", "publish"])) == ["look", "publish"]
    assert ("compaction", "compare") in witness.all_stages()
