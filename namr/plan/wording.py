"""An estimate as lines of text."""

from collections.abc import Iterator

from namr.plan.constants import Known
from namr.plan.estimate import Estimate, PlanConfig

_UNITS = ((1 << 40, "TB"), (1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB"))


def text(config: PlanConfig, told: Estimate, known: Known) -> str:
    """The plan, and whose constants it was made with."""
    return "\n".join(_lines(config, told, known))


def _lines(config: PlanConfig, told: Estimate, known: Known) -> Iterator[str]:
    chosen = next(row for row in told.considered if row.is_chosen)
    node = f"{config.memory_gb_per_node:g} GB"
    lists = f"{told.num_lists:,} lists, " if told.num_lists else "no lists, "
    yield f"{int(config.num_vectors):,} vectors of dimension {config.dim}, recall@10 {config.recall_at_10:g}"
    yield ""
    yield (
        f"index     {told.key}: {lists}{_plural(told.num_parts, 'part')}, "
        f"{_plural(told.num_segments, 'segment')}; trained on {_plural(told.num_training_vectors, 'vector')}"
    )
    yield f"          {chosen.why}"
    index, vectors = size(told.index_bytes), size(told.vectors_bytes)
    yield f"memory    {size(told.memory_bytes)} of {node} in a serving node: the index ({index}) twice, while"
    yield "          the next release is opened; re-rank vectors are mapped, fast where the rest holds them"
    yield f"disk      index {index}, and its parts as much while it is built; re-rank vectors {vectors};"
    yield f"          items {size(told.items_bytes)}; embeddings {size(told.embeddings_bytes)}"
    yield f"a query   {_effort(told)}: {told.query_ms:.3g} ms, {told.queries_per_s:,.0f} queries/s per core"
    yield ""
    yield f"{'stage':12} {'one core':>12} {_plural(config.num_cores, 'core'):>12}"
    for stage in told.stages:
        yield f"{stage.name:12} {duration(stage.core_s):>12} {duration(stage.wall_s):>12}"
    total = [sum(stage.core_s for stage in told.stages), sum(stage.wall_s for stage in told.stages)]
    yield f"{'together':12} {duration(total[0]):>12} {duration(total[1]):>12}"
    yield f"The largest task takes {size(told.build_bytes)} of memory. Extraction is not in it."
    yield ""
    yield "What else there is:"
    for row in told.considered:
        if not row.is_chosen:
            yield f"  {row.key:22} {size(row.index_bytes):>9}  {row.why}"
    yield ""
    yield (
        f"Build it with --build.max-index-bytes {told.max_index_bytes} --build.num-parts {told.num_parts} "
        f"--assessment.target-recall {config.recall_at_10:g}"
    )
    of = known.constants
    yield f"Constants: {known.source}, measured {of.measured} on {of.machine}, by {of.num_vectors:,} made-up"
    yield f"vectors of dimension {of.dim}" + (
        "" if config.calibrate else "; --calibrate measures this machine and keeps its own"
    )


def _effort(told: Estimate) -> str:
    if not told.num_lists:
        return f"compares all {size(told.scanned_bytes)} of vectors"
    compared = f"{told.depth} vectors compared" if told.depth else "none compared again"
    return (
        f"probes {told.nprobe} of {told.num_lists:,} lists, {size(told.scanned_bytes)} of codes scanned, "
        f"{compared}"
    )


def _plural(num: int, name: str) -> str:
    return f"{num:,} {name}{'' if num == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Bytes as people say them, in powers of two."""
    for unit, name in _UNITS:
        if num_bytes >= unit:
            return (
                f"{num_bytes / unit:.3g} {name}"
                if num_bytes < 999.5 * unit
                else f"{num_bytes / unit:,.0f} {name}"
            )
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
