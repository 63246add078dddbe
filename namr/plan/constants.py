"""What the work of a build and of a query took on one machine, as estimates scale it; stored as small JSON.

Not covered: measuring it (`calibration`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from namr.errors import ConfigError
from namr.store import manifests, scratch

SHIPPED_PATH = Path(__file__).with_name("constants.json")
DEFAULT_PATH = Path("namr-plan.json")
"""in the folder of work, where a calibration leaves its constants and a plan looks for them"""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Recall@10 by how much was looked at: lists, or candidates."""

    num: int
    recall: float


@dataclass(frozen=True, kw_only=True)
class CodeCosts:
    """What one kind of codes takes."""

    train_s_per_axis: float
    """of training the codes, beside the centroids: it doesn't grow with the number of vectors"""
    encode_s_per_axis: float
    """of a vector, and of writing it into a part"""
    scan_s_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Seconds of one core, for one unit of work each."""

    FORMAT: ClassVar[str] = "namr-plan-constants"
    FORMAT_VERSION: ClassVar[int] = 1

    machine: str
    measured: str
    """the day, ISO 8601"""
    num_vectors: int
    dim: int
    seconds: float
    """that the calibration took"""
    read_s_per_byte: float
    """of stored embeddings and structures"""
    train_s_per_distance_axis: float
    """training vectors x lists x D"""
    assign_s_per_distance_axis: float
    """vectors x lists x D, in a build as in a query"""
    codes: dict[str, CodeCosts]
    """by codec: Flat, SQ8, PQ"""
    merge_s_per_vector: float
    merge_s_per_byte: float
    store_s_per_byte: float
    """of re-rank vectors: placed, sorted, joined"""
    items_s_per_image: float
    items_bytes_per_image: float
    exact_s_per_axis: float
    """queries x vectors x D, of exact search by every side in one pass"""
    compare_s_per_byte: float
    """of candidates' stored vectors, by both structures, in memory"""
    query_s: float
    """of a query beside finding lists, scanning and comparing: keeping the candidates in order, in batches"""
    imbalance: float
    by_lists: tuple[Found, ...]
    """with exact codes, ascending"""
    by_depth: dict[int, tuple[Found, ...]]
    """by axes of a 4-bit piece, with all lists probed"""


class Known(NamedTuple):
    """Constants, and whose they are, in words."""

    constants: Constants
    source: str


def find(path: Path | None) -> Known:
    """The constants of a file; of None those of DEFAULT_PATH if it is there, else those that come with namr.

    ConfigError for a file that is missing, ManifestError for one that holds no constants.
    """
    if path is None and not DEFAULT_PATH.is_file():
        return Known(manifests.read_manifest(str(SHIPPED_PATH), Constants), "those that come with namr")
    path = path or DEFAULT_PATH
    if not path.is_file():
        raise ConfigError(f"--constants {path}: there is no such file; with --calibrate it is made")
    return Known(manifests.read_manifest(str(path), Constants), str(path))


def check_writable(path: Path) -> None:
    """ConfigError where no constants can be written."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ConfigError(f"--constants {path}: can't be written; expected a file in a folder that exists")


def write(path: Path, constants: Constants) -> None:
    """Store constants, in place of those that were there."""
    check_writable(path)
    with scratch.beside(path) as temporary:
        temporary.write_bytes(manifests.encode_manifest(constants))
        temporary.replace(path)
