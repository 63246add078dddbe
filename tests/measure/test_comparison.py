"""The table as text: every way of searching, the field's K, and which set was searched by whom."""

import json

import numpy as np
import pytest

from namr.errors import ConfigError
from namr.measure import evaluation
from namr.measure.evaluation import Entry

# On a line: 0 and 1 of class 0, 3 and 9 of class 1. Plain: 0 -> 1, 1 -> 0, 3 -> 1 (wrong), 9 -> 3.
LINE = np.array([[0.0], [1.0], [3.0], [9.0]], np.float32)
LABELS = np.array([0, 0, 1, 1])


def test_markdown_and_json_say_everything() -> None:
    entries = [Entry("raw", LINE + 1, None, "l2"), Entry("trained", LINE + 1, np.ones_like(LINE), "l2")]
    table = evaluation.compare(entries, LABELS, set_name="four", depth=3, with_nmi=True)
    lines = table.to_markdown().splitlines()
    assert lines[2] == "| Recall@1 / MAP@R (%) | trained for | l2 | cosine | scale | query | both |"
    assert lines[4].startswith("| raw | l2 | 75.0 / 75.00 |")
    assert lines[4].endswith("|  |  |  |")
    assert lines[5].endswith("| 75.0 / 75.00 | 75.0 / 75.00 | 75.0 / 75.00 |")
    assert lines[7] == (
        "| (%) | searched by | Recall@1 | Recall@2 | Recall@4 | Recall@8 | MAP@R | R-precision | NMI |"
    )
    assert lines[9].startswith("| raw | l2 | 75.0 | 75.0 | 100.0 | 100.0 | 75.0 | 75.0 |")
    assert [line.split(" | ")[:2] for line in lines[9:]] == [
        *(["| raw", way] for way in ("l2", "cosine")),
        *(["| trained", way] for way in ("l2", "cosine", "scale", "query", "both")),
    ]
    assert [line.endswith(" |  |") for line in lines[9:]] == [False, True, False, True, True, True, True]
    stored = json.loads(table.to_json())
    assert stored["rows"][0]["by_column"]["l2"]["recall_at_k"]["1"] == 0.75
    assert (stored["num_images"], stored["depth"]) == (4, 3)


def test_the_title_says_how_many_were_left_out_and_a_row_is_found_by_its_name() -> None:
    x = np.append(LINE, [[20.0]], axis=0).astype(np.float32)
    table = evaluation.compare([Entry("line", x, None, "l2")], np.append(LABELS, 2), set_name="five")
    assert table.title == (
        "five: 5 images of 3 classes; each queries all others (1 without a match left out); re-ranked: the "
        "first 100, by the distance trained for"
    )
    assert table.row("line").metric == "l2"
    with pytest.raises(ConfigError, match="no row 'other'; there are line"):
        table.row("other")
