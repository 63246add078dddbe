"""Bytes and seconds: every byte of a release is in one line, and what a service holds is told apart."""

from dataclasses import replace
from pathlib import Path

import pytest

from namr.measure.report import Table
from namr.release.releases import ReleaseManifest
from namr.reports import costs
from namr.reports.costs import StageSeconds
from tests import planted


def tables_of(manifest: ReleaseManifest, stages: StageSeconds | None) -> tuple[Table, Table]:
    memory, seconds = costs.section(manifest, 12.5, stages).tables
    return memory, seconds


@pytest.mark.parametrize(("index_key", "is_mapped"), [("Flat", False), ("IVF4,SQ8", True)])
def test_all_bytes_are_told_and_a_mapped_index_is_not_held(
    index_key: str, is_mapped: bool, tmp_path: Path
) -> None:
    manifest = planted.searcher_of(tmp_path, index_key=index_key).manifest
    memory, _ = tables_of(manifest, None)
    *parts, total = memory.rows
    megabytes = sum(stored.size_bytes for stored in set(manifest.objects())) / 1e6
    assert float(total[1]) == pytest.approx(megabytes, abs=0.005)
    assert sum(float(row[1]) for row in parts) == pytest.approx(megabytes, abs=0.03)
    index = manifest.segments[0].file.size_bytes / 1e6
    held, mapped = parts[0][2:]
    assert (mapped if is_mapped else held) == f"{index:.2f}" and "–" in (held, mapped)


def test_places_of_several_segments_are_joined_in_memory(tmp_path: Path) -> None:
    manifest = planted.searcher_of(tmp_path, index_key="IVF4,SQ8").manifest
    of_two = replace(manifest, vectors=(*manifest.vectors, *manifest.vectors))
    held = [tables_of(each, None)[0].rows[2][2] for each in (manifest, of_two)]
    assert held[0] == "–" and held[1] != "–"


def test_seconds_are_told_as_far_as_they_are_known(tmp_path: Path) -> None:
    manifest = planted.searcher_of(tmp_path).manifest
    _, unknown = tables_of(manifest, None)
    assert [row[0] for row in unknown.rows] == ["build"]
    stages = StageSeconds(open_s=0.25, measure_s=1, show_s=2, extract_s=30, num_extracted=2000)
    _, known = tables_of(manifest, stages)
    assert [row[:2] for row in known.rows] == [
        ["extract", "30.00"],
        ["build", "12.50"],
        ["open", "0.25"],
        ["measure", "1.00"],
        ["show", "2.00"],
    ]
    assert known.rows[0][2] == "2,000 images"
