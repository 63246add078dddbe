"""What a run took is the sum of its parts, told as what one worker does in a second of a stage."""

import pytest

from namr.embed import throughput
from namr.embed.throughput import Throughput

SHARD = Throughput(
    num_images=100, read_s=0.1, decode_s=2.0, model_s=4.0, write_s=0.05, waited_s=1.0, seconds=5.0
)


def test_a_run_is_the_sum_of_its_shards_and_has_its_own_clock() -> None:
    run = throughput.total([SHARD, SHARD, SHARD], seconds=10)
    assert run.num_images == 300 and run.seconds == 10 and run.images_per_s == 30
    assert (run.read_s, run.model_s) == (pytest.approx(0.3), 12)
    assert run.stages == (
        "images/s of one alone: read 1,000, decode 50, model 25, write 2,000; models waited 20% of their time"
    )


def test_a_run_that_embedded_nothing_says_so() -> None:
    run = throughput.total([], seconds=0.0)
    assert (run.num_images, run.images_per_s, run.stages) == (0, 0, "no image was embedded")
