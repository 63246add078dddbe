"""What a plan says to people."""

import pytest

from namr.plan import constants, estimate, wording
from namr.plan.estimate import PlanConfig

KNOWN = constants.find(constants.SHIPPED_PATH)


def lines(config: PlanConfig) -> list[str]:
    return wording.text(config, estimate.estimate(config, KNOWN.constants), KNOWN).splitlines()


def test_a_plan_says_all_that_was_asked_for() -> None:
    config = PlanConfig(num_vectors=1e9, dim=256, memory_gb_per_node=64, num_cores=64)
    told = lines(config)
    text = "\n".join(told)
    assert told[0] == "1,000,000,000 vectors of dimension 256, recall@10 0.95"
    assert "IVF65536,PQ32x4fs: 65,536 lists, 64 parts, 1 segment; trained on 4,194,304 vectors" in text
    assert "49.1 GB of 64 GB in a serving node" in text and "re-rank vectors 954 GB" in text
    for stage in ("sample", "train", "build parts", "merge", "vectors", "items", "measure", "together"):
        assert any(line.startswith(stage) for line in told)
    assert "queries/s per core" in text and " lists, " in text and "vectors compared" in text
    assert "IVF65536,SQ8" in text and "takes more than max_index_bytes" in text
    assert "--build.max-index-bytes 32091302912 --build.num-parts 64" in text
    assert KNOWN.constants.machine in text and "--calibrate measures this machine" in text


def test_few_images_have_no_lists_and_one_of_a_thing_is_no_plural() -> None:
    text = "\n".join(lines(PlanConfig(num_vectors=100, dim=8)))
    assert "Flat: no lists, 1 part, 1 segment;" in text and "compares all 3.12 KB of vectors" in text


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KB"), (1 << 30, "1 GB"), (3 << 50, "3,072 TB")],
)
def test_sizes_have_units(num_bytes: int, expected: str) -> None:
    assert wording.size(num_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.012, "0.012 s"), (59, "59 s"), (600, "10.0 min"), (7300, "2.0 h"), (864_000, "10.0 days")],
)
def test_times_have_units(seconds: float, expected: str) -> None:
    assert wording.duration(seconds) == expected
