"""All that the page of a release shows below its numbers, and the tables that lie beside the page.

Not covered: the numbers themselves and the page as a whole (`nightly.release_report`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from namr.measure.report import Grid, Section
from namr.release.releases import ReleaseManifest
from namr.reports import costs, duplicates, frontier, grids, lists, self_search, structure_section, suspects
from namr.reports.costs import StageSeconds
from namr.reports.frontier import Frontier
from namr.reports.self_search import SelfSearchConfig
from namr.search import stages
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher

DUPLICATES, SUSPECTS = "near-duplicates", "label-suspects"
"""the tables, by the names that a release lists them under"""


@dataclass(frozen=True, kw_only=True)
class SelfSearched:
    """What images found when they asked their own gallery, in numbers."""

    num_asked: int
    num_pairs: int
    """of near-duplicates"""
    num_groups: int
    limit: float
    """plain distance of near-duplicates, at most"""
    num_suspects: int | None
    """None where none that asked has a label"""


class Known(NamedTuple):
    """What was measured before, and is shown too."""

    build_s: float
    stages: StageSeconds | None = None
    frontier: Frontier | None = None


class Beside(NamedTuple):
    """What there is to show, and to work with."""

    grids: list[Grid]
    sections: list[Section]
    tables: dict[str, bytes]
    """Parquet files by name"""
    searched: SelfSearched
    stages: StageSeconds | None
    """with what all this took"""


def make(
    searcher: Searcher,
    manifest: ReleaseManifest,
    known: Known,
    keys: Sequence[str],
    config: SelfSearchConfig,
    *,
    first_new_id: int | None = None,
) -> Beside:
    """manifest: the searcher's, with how far it is searched. keys: of queries to show.

    first_new_id: of what was added to the release before; only these ask the gallery then.
    """
    began = time.perf_counter()
    plan = stages.plan_of(SearchOptions(k=self_search.K), manifest)
    asked = self_search.ask(searcher, plan, config, first_new_id=first_new_id)
    twins, doubted = duplicates.among(asked), suspects.among(asked, searcher)
    shown = grids.retrieval_grids(searcher, keys, plan)
    sections = [
        frontier.section(known.frontier, manifest),
        lists.section(searcher),
        duplicates.section(twins, asked, searcher),
        suspects.section(doubted, asked, searcher),
        structure_section.section(
            searcher,
            keys,
            nprobe=manifest.nprobe,
            most_images=structure_section.MANY_IMAGES
            if first_new_id is None
            else structure_section.FEW_IMAGES,
        ),
    ]
    tables = {DUPLICATES: duplicates.table(twins, searcher)}
    if doubted.num_labelled:
        tables[SUSPECTS] = suspects.table(doubted, asked, searcher)
    searched = SelfSearched(
        num_asked=len(asked.ids),
        num_pairs=len(twins.ones),
        num_groups=twins.num_groups,
        limit=twins.limit,
        num_suspects=len(doubted.rows) if doubted.num_labelled else None,
    )
    told = replace(known.stages, show_s=time.perf_counter() - began) if known.stages else None
    sections.insert(2, costs.section(manifest, known.build_s, told))
    return Beside(shown, sections, tables, searched, told)
