"""Everything below a folder, searched for some bytes: files as they are, and Parquet files decoded too."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def traces(root: Path, wanted: Mapping[str, bytes]) -> dict[str, set[str]]:
    """By the name of what was looked for, where it is."""
    found: dict[str, set[str]] = {}
    for path in (path for path in sorted(root.rglob("*")) if path.is_file()):
        held = b"\n".join([path.read_bytes(), *(_decoded(path) if path.suffix == ".parquet" else ())])
        for name, data in wanted.items():
            if data in held:
                found.setdefault(name, set()).add(str(path.relative_to(root)))
    return found


def _decoded(path: Path) -> Iterator[bytes]:
    """What the columns hold, without compression and dictionaries."""
    table: pa.Table = pq.read_table(path)
    for column in table.columns:
        for chunk in column.chunks:
            whole = chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk
            yield from (buffer.to_pybytes() for buffer in whole.buffers() if buffer is not None)
