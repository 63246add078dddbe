"""Kills add up over runs, and only those count that were looked at afterwards."""

from pathlib import Path

from tests.soak.tally import Tally


def test_what_was_looked_at_adds_up_over_runs(tmp_path: Path) -> None:
    path = tmp_path / "kills.jsonl"
    first = Tally(path, seed=1)
    first.killed("driver", [("night", "measure")])
    first.killed("store", [("night", "measure"), ("pack", "publish")])
    first.looked(2)
    first.killed("driver", [("night", "measure")])
    second = Tally(path, seed=2)
    assert second.num_kills == {"driver": 1, "store": 1} and second.num_seen == 0
    second.killed("worker", [("pack", "write shards")])
    second.looked(1)
    second.ended(packed=3)
    third = Tally(path, seed=3)
    assert (third.num_hits("night", "measure"), third.num_hits("pack", "write shards")) == (2, 1)
    assert third.sums == {"runs": 3, "looks": 2, "packed": 3, "rounds": 1}
    head, _, *rows = third.table().splitlines()
    assert head == "| command | stage | all | driver | worker | store |"
    assert {"| night | measure | 2 | 1 |  | 1 |", "| pack | write shards | 1 |  | 1 |  |"} < set(rows)
    assert "| compaction | build |  |  |  |  |" in rows, "what was never hit is told, too"
    assert third.fewest == 0


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    tally = Tally()
    tally.killed("driver", [("pack", "publish")])
    assert tally.num_hits("pack", "publish") == 1 and not list(tmp_path.iterdir())
