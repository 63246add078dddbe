"""What a release takes: bytes where it is stored and where it is served, and seconds to make it.

Bytes are those of its files. A service holds in memory what a search needs unpacked and maps the rest, which
the page cache keeps as far as there is room.

Not covered: the model, and what Python and its libraries take by themselves (`plan` estimates all of it).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from namr.index import index_files
from namr.measure.report import Section, Table
from namr.release.releases import ReleaseManifest
from namr.store.manifests import StoredObject

TITLE = "Memory and time by stage"
_NOT = "\N{EN DASH}"


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """How long the stages of a night took, apart from the build."""

    open_s: float
    measure_s: float
    extract_s: float | None = None
    """None where the embeddings were not made by the same run"""
    num_extracted: int = 0
    """images that were embedded in that time"""
    show_s: float = 0.0
    """finding near-duplicates and suspects, and drawing sections"""


def section(manifest: ReleaseManifest, build_s: float, stages: StageSeconds | None) -> Section:
    """Two tables; stages None: an earlier namr made the release."""
    return Section(title=TITLE, tables=[_memory(manifest), _time(build_s, stages)])


def _memory(manifest: ReleaseManifest) -> Table:
    key = index_files.parse_key(manifest.index_key, dim=manifest.embedding_dim)
    segments = _bytes(segment.file for segment in manifest.segments)
    vectors = _bytes(each.file for each in manifest.vector_files)
    places = _bytes(stored for each in manifest.vectors for stored in (each.shards, each.rows))
    items, every = _bytes(manifest.items), _bytes(set(manifest.objects()))
    others = every - segments - vectors - places - items
    are_places_mapped = len(manifest.vectors) == 1
    parts = [
        ("index", segments, key.is_mapped),
        ("stored vectors", vectors, True),
        ("places of vectors", places, are_places_mapped),
        ("items", items, True),
    ]
    rows = [
        [name, _mb(size), _NOT if is_mapped else _mb(size), _mb(size) if is_mapped else _NOT]
        for name, size, is_mapped in parts
    ]
    held = sum(size for _, size, is_mapped in parts if not is_mapped)
    mapped = sum(size for _, size, is_mapped in parts if is_mapped)
    return Table(
        title="Memory",
        columns=["what", "stored (MB)", "held by a service (MB)", "mapped by a service (MB)"],
        rows=[
            *rows,
            ["template and others", _mb(others), _NOT, _NOT],
            ["all", _mb(every), _mb(held), _mb(mapped)],
        ],
        emphasis=[len(rows) + 1],
        note="Of what is mapped the system keeps in memory what is used, and gives it up where others need "
        "it. Without the model, and without this page and its tables.",
    )


def _time(build_s: float, stages: StageSeconds | None) -> Table:
    rows = [["build", f"{build_s:.2f}", ""]]
    if stages:
        if stages.extract_s is not None:
            rows.insert(0, ["extract", f"{stages.extract_s:.2f}", f"{stages.num_extracted:,} images"])
        rows += [
            ["open", f"{stages.open_s:.2f}", ""],
            ["measure", f"{stages.measure_s:.2f}", ""],
            ["show", f"{stages.show_s:.2f}", ""],
        ]
    return Table(
        title="Time",
        columns=["stage", "seconds", "of what"],
        rows=rows,
        note="Show is the finding of near-duplicates and label suspects, and the drawing of these sections.",
    )


def _bytes(stored: Iterable[StoredObject]) -> int:
    return sum(each.size_bytes for each in stored)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f}"
