"""From a number of vectors and the memory of a node to an index, its bytes, its seconds and its queries.

    memory      the index twice, because a service opens the next release beside the one that it serves, the
                table of places (4 bytes an image), and the process itself
    seconds     units of work x what one takes on one core (`constants`); stages that run in tasks are divided
                by the cores, those that are one task are not
    effort      the fewest candidates whose codes find enough, then the fewest lists, as the measuring of a
                release chooses them, by what the calibration's vectors needed; larger indexes of such
                vectors needed no more

Extraction, training of the model, and what an object store or a cold disk adds are not covered.
Legend: N vectors, D dimension, L lists.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from namr import checks
from namr.errors import ConfigError
from namr.index import index_files, planning
from namr.plan.constants import Constants, Found
from namr.release import build_steps

_GB = 1 << 30
_PROCESS_BYTES = 1 << 29
_PLACE_BYTES = 4
_DEPTHS = (100, 200, 400, 800, 1600)
"""that the measuring of a release tries"""
_MOST_VECTORS = 10**12


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Say what an index will take before it is built: its type, memory, disk, time, and cost of a query.

    Everything is an estimate from what this machine, or the one that namr's own constants name, took for a
    small build; docs/planning.md says how far estimates were off.
    """

    num_vectors: float
    """images in the index; 1e9 is fine"""
    dim: int
    """of the embeddings"""
    memory_gb_per_node: float = 16.0
    """memory of a serving node, in GB of 2^30 bytes"""
    recall_at_10: float = 0.95
    """share of the true ten nearest that a query should find, before structure orders them"""
    num_cores: int = 1
    """that build side by side"""
    num_held_out: int = 500
    """queries that the release is measured with, as build.num_held_out"""
    constants: Path | None = None
    """file of constants; namr-plan.json in the current folder unless named, else those that come with namr"""
    calibrate: bool = False
    """measure this machine first, for about a minute, and keep the constants in that file"""

    def __post_init__(self) -> None:
        checks.in_range(self, "num_vectors", at_least=1, at_most=_MOST_VECTORS)
        checks.in_range(self, "dim", "num_cores", "num_held_out", at_least=1, at_most=1_000_000)
        checks.in_range(self, "memory_gb_per_node", above=0)
        checks.in_range(self, "recall_at_10", above=0, at_most=1)
        if self.num_vectors != int(self.num_vectors):
            raise ConfigError(f"num_vectors is {self.num_vectors}; expected a whole number")

    @property
    def memory_bytes(self) -> int:
        """Of a node."""
        return int(self.memory_gb_per_node * _GB)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a build."""

    name: str
    core_s: float
    wall_s: float
    """with the cores of the plan"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is to be built, and what it will take."""

    key: str
    num_lists: int
    num_parts: int
    num_segments: int
    num_training_vectors: int
    max_index_bytes: int
    """what build.max_index_bytes may be, for a node of this memory"""
    index_bytes: int
    memory_bytes: int
    """of a serving node, while it opens the next release"""
    vectors_bytes: int
    items_bytes: int
    embeddings_bytes: int
    build_bytes: int
    """memory of the largest task of the build"""
    stages: tuple[Stage, ...]
    nprobe: int
    depth: int
    scanned_bytes: int
    """of one query"""
    query_ms: float
    """of one core, in batches"""
    considered: tuple[planning.Considered, ...]

    @property
    def queries_per_s(self) -> float:
        """Of one core."""
        return 1e3 / self.query_ms


def estimate(config: PlanConfig, constants: Constants) -> Estimate:
    """The plan; ConfigError where no index fits a node, or none that fits is expected to find enough."""
    num, dim = int(config.num_vectors), config.dim
    most = _most_index_bytes(config.memory_bytes, num)
    smallest = smallest_bytes(num, dim)
    if smallest > most:
        raise ConfigError(_nothing_fits(config, smallest))
    plan = planning.plan(num, dim, num_parts=config.num_cores, max_index_bytes=most)
    key = index_files.parse_key(plan.key, dim=dim)
    nprobe, depth = _effort(key, dim, config.recall_at_10, constants)
    share = nprobe / key.num_lists * constants.imbalance if key.num_lists else 1.0
    scanned = int(min(share, 1.0) * num * key.code_bytes)
    codec = key.codec if key.codec in constants.codes else "SQ8"
    query_s = (
        constants.query_s
        + key.num_lists * dim * constants.assign_s_per_distance_axis
        + scanned * constants.codes[codec].scan_s_per_byte
        + depth * 4 * dim * constants.compare_s_per_byte
    )
    return Estimate(
        key=plan.key,
        num_lists=key.num_lists,
        num_parts=plan.num_parts,
        num_segments=1,
        num_training_vectors=plan.num_training_vectors if key.num_lists else 0,
        max_index_bytes=most,
        index_bytes=plan.index_bytes,
        memory_bytes=_memory_bytes(plan.index_bytes, num),
        vectors_bytes=plan.vectors_bytes,
        items_bytes=int(num * constants.items_bytes_per_image),
        embeddings_bytes=plan.vectors_bytes,
        build_bytes=plan.build_bytes,
        stages=_stages(config, constants, plan, key, codec, query_s),
        nprobe=nprobe,
        depth=depth,
        scanned_bytes=scanned,
        query_ms=1e3 * query_s,
        considered=tuple(planning.considered(num, dim, chosen=plan.key, max_index_bytes=most)),
    )


def _stages(
    config: PlanConfig,
    constants: Constants,
    plan: planning.IndexPlan,
    key: index_files.IndexKey,
    codec: str,
    query_s: float,
) -> tuple[Stage, ...]:
    num, dim, lists = int(config.num_vectors), config.dim, key.num_lists
    codes = constants.codes[codec]
    read_s = num * 4 * dim * constants.read_s_per_byte
    training = plan.num_training_vectors * lists * dim * constants.train_s_per_distance_axis
    assigning = num * lists * dim * constants.assign_s_per_distance_axis
    held = min(config.num_held_out, max(1, num // 5))
    exact = held * num * dim * constants.exact_s_per_axis
    tried = math.log2(max(1, 2 * lists)) / 2 + 6
    cores = config.num_cores
    work = (
        ("sample", read_s, cores),
        (
            "train",
            training + (dim * codes.train_s_per_axis if lists else 0),
            min(cores, build_steps.MOST_TRAINING_THREADS),
        ),
        ("build parts", read_s + assigning + num * dim * codes.encode_s_per_axis, min(cores, plan.num_parts)),
        ("merge", num * constants.merge_s_per_vector + plan.index_bytes * constants.merge_s_per_byte, 1),
        ("vectors", plan.vectors_bytes * constants.store_s_per_byte, cores),
        ("items", num * constants.items_s_per_image, cores),
        ("measure", exact + tried * held * query_s, 1),
    )
    return tuple(Stage(name=name, core_s=s, wall_s=s / side_by_side) for name, s, side_by_side in work)


def _effort(key: index_files.IndexKey, dim: int, recall: float, constants: Constants) -> tuple[int, int]:
    """nprobe and depth, as the measuring of a release would choose them; Flat has neither."""
    if key.num_lists == 0:
        return 0, 0
    of_codes, depth = 1.0, _DEPTHS[0]
    if key.codec == "PQ":
        known = constants.by_depth.get(dim // (2 * key.code_bytes), ())
        by_depth = [(_recall_at(known, depth), depth) for depth in _DEPTHS]
        enough = [(found, depth) for found, depth in by_depth if found >= recall]
        if not enough:
            best, depth = max(by_depth)
            raise ConfigError(
                f"recall_at_10 {recall} is not expected of {key.text}, the most exact index that fits: its "
                f"codes find {best:.3f} of the ten with {depth} candidates compared; allow more "
                "memory_gb_per_node, or less recall_at_10"
            )
        of_codes, depth = enough[0]
    # All lists of the calibration are all lists of any index.
    nprobe = _needed(constants.by_lists, recall / of_codes) or key.num_lists
    return min(nprobe, key.num_lists), depth


def _recall_at(known: Sequence[Found], num: int) -> float:
    """By the logarithm of num, between the points that were measured; 0 where nothing was."""
    logs = [math.log(found.num) for found in known]
    for at in range(1, len(known)):
        if num <= known[at].num:
            share = (math.log(num) - logs[at - 1]) / (logs[at] - logs[at - 1])
            return known[at - 1].recall + max(share, 0.0) * (known[at].recall - known[at - 1].recall)
    return known[-1].recall if known else 0.0


def _needed(known: Sequence[Found], recall: float) -> int | None:
    """How much has to be looked at, between the points that were measured; None where none was enough."""
    before: Found | None = None
    for found in known:
        if found.recall >= recall:
            if before is None or found.recall <= before.recall:
                return found.num
            at = (recall - before.recall) / (found.recall - before.recall)
            return math.ceil(before.num * math.pow(found.num / before.num, at))
        before = found
    return None


def smallest_bytes(num_vectors: int, dim: int) -> int:
    """Of the smallest index that "auto" could take."""
    rows = planning.considered(num_vectors, dim, chosen="Flat", max_index_bytes=1 << 62)
    plan = planning.plan(num_vectors, dim, max_index_bytes=1 << 62)
    sizes = [row.index_bytes for row in rows if row.key.endswith("fs")]
    return min([plan.index_bytes, *sizes])


def _memory_bytes(index_bytes: int, num_vectors: int) -> int:
    return 2 * index_bytes + _PLACE_BYTES * num_vectors + _PROCESS_BYTES


def _most_index_bytes(memory_bytes: int, num_vectors: int) -> int:
    return (memory_bytes - _PLACE_BYTES * num_vectors - _PROCESS_BYTES) // 2


def _nothing_fits(config: PlanConfig, smallest: int) -> str:
    num, dim = int(config.num_vectors), config.dim
    needed = _memory_bytes(smallest, num)
    others = []
    for less in (dim // 2, dim // 4, dim // 8):
        if less >= 16 and smallest_bytes(num, less) <= _most_index_bytes(config.memory_bytes, num):
            others.append(f"--dim {less}")
            break
    for nodes in range(2, 1025):
        slice_of = math.ceil(num / nodes)
        if smallest_bytes(slice_of, dim) <= _most_index_bytes(config.memory_bytes, slice_of):
            others.append(f"{nodes} nodes, each with a slice of {slice_of:,} vectors")
            break
    return (
        f"no index over {num:,} vectors of dimension {dim} fits a node with memory_gb_per_node "
        f"{config.memory_gb_per_node:g}: the smallest needs {needed / _GB:.1f} GB (itself twice, while the "
        f"next release is opened); take --memory-gb-per-node {math.ceil(10 * needed / _GB) / 10:g}"
        + "".join(f", or {other}" for other in others)
    )
