"""The lists of an index: how many, how long, and how many are empty."""

from pathlib import Path

from namr.reports import lists
from tests import planted


def test_the_lists_of_a_real_index_are_told(tmp_path: Path) -> None:
    searcher = planted.searcher_of(tmp_path, index_key="IVF8,Flat")
    section, sizes = lists.section(searcher), searcher.index.list_sizes
    facts = {fact.name: fact.value for fact in section.summary}
    assert facts["lists"] == "8" and facts["largest"] == str(sizes.max()) and sizes.sum() == 120
    assert facts["empty"] == str((sizes == 0).sum())
    assert facts["imbalance"] == f"{searcher.index.imbalance:.2f}" and len(section.plots) == 1


def test_where_there_are_no_lists_that_is_said(tmp_path: Path) -> None:
    section = lists.section(planted.searcher_of(tmp_path))
    assert section.text == ["There are none: every image is compared with every query."]
