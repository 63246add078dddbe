"""What a worker tells while it learns: nothing is lost while MLflow is away, and a pause costs no speed."""

import pytest

from namr.errors import StorageError
from namr.measure import validation
from namr.measure.metrics import RetrievalMetrics
from namr.train import loop


class Away:
    """A tracking server that is away for a while."""

    def __init__(self) -> None:
        self.is_there = False
        self.got: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, run_id: str, numbers: dict[str, float], *, step: int) -> None:
        if not self.is_there:
            raise StorageError(f"run {run_id}: nobody answers")
        self.got.append((step, numbers))


def test_numbers_are_kept_until_mlflow_takes_them() -> None:
    server, said = Away(), []
    diary = loop.Diary(server, "r", lambda step, words: said.append((step, words)))  # type: ignore[arg-type]
    diary.write({"loss": 3.0}, step=10)
    diary.write({"loss": 2.0}, step=20)
    assert said[-1] == (20, "(MLflow: run r: nobody answers; kept 2 entries)")
    with pytest.raises(StorageError, match="nobody answers"):
        diary.close()
    server.is_there = True
    diary.write({"loss": 1.0}, step=30)
    assert server.got == [(10, {"loss": 3.0}), (20, {"loss": 2.0}), (30, {"loss": 1.0})]
    diary.close()
    assert len(server.got) == 3


def test_speed_counts_steady_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    speed = loop._Speed(num_images=8)
    for number in range(9):
        now[0] += 10.0 if number < 5 else 0.5
        speed.step()
    assert speed.images_per_s == 16.0
    speed.pause()
    now[0] += 100.0
    speed.step()
    now[0] += 0.5
    speed.step()
    assert speed.images_per_s == 16.0


def test_a_checkpoint_is_worth_what_the_way_it_recommends_finds() -> None:
    ways = validation.ways("l2")

    def summary(*recalls: float) -> dict[str, float | str]:
        found = {
            way: RetrievalMetrics(
                recall_at_k={1: recall}, map_at_r=0, r_precision=0, num_queries=1000, num_skipped=0
            )
            for way, recall in zip(ways, recalls, strict=True)
        }
        return loop.summary(found, ways)

    plain = summary(0.75, 0.75, 0.74, 0.75, 0.76)
    assert (plain["metric"], plain["structure_side"], plain[loop.SCORE]) == ("l2", "none", 0.75)
    other = summary(0.70, 0.82, 0.70, 0.70, 0.70)
    assert (other["metric"], other["structure_side"], other[loop.SCORE]) == ("cosine", "none", 0.82)
    assert other["validation/recall_at_1/l2"] == 0.70
