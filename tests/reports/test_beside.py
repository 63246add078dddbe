"""All of a page below its numbers, and the tables beside it: of one release, with what is known of it."""

import io
from pathlib import Path

import pyarrow.parquet as pq

from namr.measure import report
from namr.measure.report import ReportPage
from namr.reports import beside
from namr.reports.beside import Beside, Known
from namr.reports.costs import StageSeconds
from namr.reports.self_search import SelfSearchConfig
from namr.search.searcher import Searcher
from tests import planted

KEYS = [f"digit/{number}" for number in range(0, planted.NUM, 3)]
STAGES = StageSeconds(open_s=0.1, measure_s=0.2)


def made(searcher: Searcher, first_new: int | None = None) -> Beside:
    return beside.make(
        searcher,
        searcher.manifest,
        Known(build_s=3.0, stages=STAGES),
        KEYS,
        SelfSearchConfig(),
        first_new_id=None if first_new is None else planted.id_of(first_new),
    )


def test_sections_tables_and_numbers_are_of_one_search(tmp_path: Path) -> None:
    labels = {5: "1", 100: "0"}
    told = made(planted.searcher_of(tmp_path, copies={100: 3}, labels=labels))
    assert [section.title for section in told.sections] == [
        *("Recall against latency", "The lists of the index", "Memory and time by stage"),
        *("Near-duplicates across the gallery", "Label suspects", "What the structure embedding says"),
    ]
    rows = {name: pq.read_table(io.BytesIO(data)).num_rows for name, data in told.tables.items()}
    assert rows == {"near-duplicates": 1, "label-suspects": 1}
    found = told.searched
    assert (found.num_asked, found.num_pairs, found.num_groups, found.num_suspects) == (120, 1, 1, 1)
    assert told.stages is not None and told.stages.show_s > 0 and told.stages.open_s == 0.1
    html = report.render(ReportPage(title="t", grids=told.grids, sections=told.sections))
    assert html.count('<h2 id="section-') == 6 and html.index("Best answered") < html.index(
        ">Label suspects</h2>"
    )


def test_only_what_is_new_asks_and_without_labels_there_is_no_table_of_suspects(tmp_path: Path) -> None:
    told = made(planted.searcher_of(tmp_path, labels=dict.fromkeys(range(120))), first_new=110)
    assert set(told.tables) == {"near-duplicates"}
    assert (told.searched.num_asked, told.searched.num_suspects) == (10, None)
