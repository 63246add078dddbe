"""Which index, how many parts, and how many bytes, for N vectors of dimension D.

Rules of thumb, on purpose: what an index really finds is measured on held-out queries when it is released.

    lists       the power of two nearest to 2 sqrt(N), so that a search over a few percent of the lists costs
                about as much as finding them; none (Flat) below FLAT_BELOW vectors, where exact is fast
    codes       4 bits for every 2 axes, scanned fast, candidates compared by the stored vectors; for every 4
                or 8 axes where that doesn't fit the bytes that the index may take
    sample      SAMPLE_PER_LIST vectors a list; FAISS asks for 39 and uses no more than 256
    parts       enough that none holds more than PART_BYTES, and at least as many as asked for

`considered` says what else there is, and why it was not taken. Not covered: time (`namr.plan`), and a split
over several serving nodes.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from namr.errors import ConfigError
from namr.index import index_files

FLAT_BELOW = 20_000
SAMPLE_PER_LIST = 64
PART_BYTES = 1 << 30
AXES_PER_PIECE = (2, 4, 8)
"""of the codes that "auto" takes, from the most exact on"""


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """How to build an index, and what it will take."""

    key: str
    num_parts: int
    num_training_vectors: int
    """size of the sample that the template is trained on"""
    index_bytes: int
    """of the merged segment file"""
    vectors_bytes: int
    """of the re-rank vectors, both embeddings in float16"""
    build_bytes: int
    """memory that the largest step takes in one process: training the template, or building a part"""


class Considered(NamedTuple):
    """An index that could be built, and why it is, or is not."""

    key: str
    index_bytes: int
    scanned_bytes_per_vector: int
    """what a query reads of each vector in the lists that it probes, without the id"""
    is_chosen: bool
    why: str


def plan(
    num_vectors: int, dim: int, *, key: str = "auto", num_parts: int = 1, max_index_bytes: int = 16 << 30
) -> IndexPlan:
    """A plan for `num_vectors` of dimension `dim`; a key other than "auto" is kept as it is.

    Raises ConfigError where no index on offer fits max_index_bytes, and for a key that is not on offer.
    """
    for name, value in (("dim", dim), ("num_parts", num_parts), ("max_index_bytes", max_index_bytes)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected 1 or more")
    parsed = index_files.parse_key(
        _choose(num_vectors, dim, max_index_bytes) if key == "auto" else key, dim=dim
    )
    wanted = max(SAMPLE_PER_LIST * parsed.num_lists, 2 * parsed.min_training_vectors)
    sample = min(num_vectors, wanted)
    index_bytes = _index_bytes(num_vectors, dim, parsed)
    parts = max(num_parts, math.ceil(index_bytes / PART_BYTES))
    part_bytes = _index_bytes(math.ceil(num_vectors / parts), dim, parsed)
    return IndexPlan(
        key=parsed.text,
        num_parts=parts,
        num_training_vectors=sample,
        index_bytes=index_bytes,
        vectors_bytes=2 * 2 * num_vectors * dim,
        build_bytes=max(2 * 4 * sample * dim, 2 * part_bytes),
    )


def considered(
    num_vectors: int, dim: int, *, chosen: str, key: str = "auto", max_index_bytes: int
) -> list[Considered]:
    """All that `plan` could have taken, from the most exact on, beside the key that was `chosen`.

    key and max_index_bytes as for `plan`; a key that was asked for is the reason of itself.
    """
    lists = index_files.parse_key(chosen, dim=dim).num_lists or lists_of(num_vectors)
    codecs = ["Flat", "SQ8", *(key.partition(",")[2] for key in _codes_of(lists, dim))]
    keys = ["Flat", *(f"IVF{lists},{codec}" for codec in dict.fromkeys(codecs))]
    rows = []
    for each in keys if chosen in keys else [*keys, chosen]:
        parsed = index_files.parse_key(each, dim=dim)
        size = _index_bytes(num_vectors, dim, parsed)
        if each == chosen:
            why = _why_chosen(each) if key == "auto" else "named by build.index_key"
        elif size > max_index_bytes:
            why = f"takes more than max_index_bytes {max_index_bytes}"
        else:
            why = _why_not(each, chosen)
        rows.append(Considered(each, size, parsed.code_bytes, each == chosen, why))
    return rows


def _why_chosen(key: str) -> str:
    if key == "Flat":
        return f"fewer than {FLAT_BELOW} vectors, which are compared exactly in no time"
    if key.endswith("SQ8"):
        return "the dimension has no even pieces, which faster codes need"
    return "the most exact of the codes that are scanned fast, in the bytes that the index may take"


def _why_not(key: str, chosen: str) -> str:
    if key == "Flat":
        return "compares every vector with every query"
    if chosen == "Flat":
        return "probes some lists only, and so few vectors need none"
    if key.endswith("fs"):
        more = int(key.rpartition("PQ")[2].removesuffix("x4fs"))
        of_chosen = re.search(r"PQ(\d+)x4fs$", chosen)
        if of_chosen and more < int(of_chosen[1]):
            return "smaller codes, with which more candidates have to be compared by their stored vectors"
        return "codes are scanned faster, and their candidates compared by the stored vectors"
    return "reads more bytes of each vector; fast-scan codes with refinement find as much sooner"


def lists_of(num_vectors: int) -> int:
    """How many lists so many vectors get."""
    return int(2 ** round(math.log2(2 * math.sqrt(max(num_vectors, 1)))))


def _codes_of(lists: int, dim: int) -> list[str]:
    """Keys of the codes that "auto" takes, from the most exact on."""
    codecs = [f"PQ{dim // n}x4fs" for n in AXES_PER_PIECE if dim % (2 * n) == 0] or ["SQ8"]
    return [f"IVF{lists},{codec}" for codec in codecs]


def _choose(num_vectors: int, dim: int, max_index_bytes: int) -> str:
    """The most exact key that fits; of a dimension that doesn't come in even pieces, SQ8."""
    if (
        num_vectors < FLAT_BELOW
        and _index_bytes(num_vectors, dim, index_files.parse_key("Flat", dim=dim)) <= max_index_bytes
    ):
        return "Flat"
    sizes: dict[str, int] = {}
    for key in _codes_of(lists_of(num_vectors), dim):
        sizes[key] = _index_bytes(num_vectors, dim, index_files.parse_key(key, dim=dim))
        if sizes[key] <= max_index_bytes:
            return key
    smallest = min(sizes, key=lambda key: sizes[key])
    raise ConfigError(
        f"no index over {num_vectors} vectors of dimension {dim} fits max_index_bytes {max_index_bytes}: the "
        f"smallest, {smallest}, takes {sizes[smallest]}; allow more, or take a smaller embedding_dim"
    )


def _index_bytes(num_vectors: int, dim: int, key: index_files.IndexKey) -> int:
    """Codes and ids, centroids with a size each, code books; the few hundred bytes of header left out."""
    centroids = key.num_lists * (4 * dim + 8)
    code_books = 4 * key.num_centroids * dim
    return num_vectors * (key.code_bytes + 8) + centroids + code_books
