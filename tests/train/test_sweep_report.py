"""What is best, what the ranking loss brings, and how it is told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr import config as configuration
from namr.errors import NamrError
from namr.measure.metrics import RetrievalMetrics
from namr.train import settings, sweep_report
from namr.train.run import TrainJobConfig
from namr.train.settings import Setting
from namr.train.sweep_run import Point, Scores, SettingResult, State
from tests.train.test_settings import make

CLASSES = np.repeat(np.arange(10), 4)


def result(
    weight: float, scores: list[float], *, state: State = "finished", rate: float = 1e-3
) -> SettingResult:
    setting = Setting(
        base="margin",
        ranking_weight=weight,
        num_clusters=4,
        structure_side="both",
        learning_rate=rate,
        backbone_learning_rate=0.0,
    )
    points = tuple(Point(10 * at, score, score, score, "cosine") for at, score in enumerate(scores))
    reason = "step 3 is not finite" if state == "failed" else ""
    return SettingResult(setting=setting, mlflow_run_id="r", state=state, reason=reason, points=points)


def scores_of(results: list[SettingResult], noise: float = 0.0):  # type: ignore[no-untyped-def]
    """Queries whose mean is the score, with noise of each setting's own that differs from class to class."""

    def measured(score: float, seed: int) -> RetrievalMetrics:
        draw = np.random.default_rng(seed).normal(0, noise, 10)
        of_queries = score + (draw - draw.mean())[CLASSES]
        return RetrievalMetrics(recall_at_k={1: 0}, map_at_r=0, r_precision=0, num_queries=40, num_skipped=0,
                                scores=of_queries, classes=CLASSES)  # fmt: skip

    by_setting = {each.setting: each for each in results}

    def find(setting: Setting) -> Scores:
        each, seed = by_setting[setting], list(by_setting).index(setting)
        return Scores(measured(each.points[0].score, 99), measured(each.best.score, seed))

    return find


def test_the_best_is_the_highest_score_at_any_examination_the_earliest_of_equals() -> None:
    results = [result(0, [0.5, 0.6, 0.55]), result(1, [0.5, 0.7, 0.7])]
    finding = sweep_report.find(results, scores_of(results))
    assert (finding.best, finding.best.best.step) == (results[1], 10)
    assert finding.ranking_gain is not None
    assert finding.ranking_gain.mean == pytest.approx(0.1)
    assert finding.training_gain.mean == pytest.approx(0.2)
    assert (
        "with ranking loss the best of 1 (70.0 %) is ahead of the best of 1 without (60.0 %), by +10.00"
        in (sweep_report.words(finding, results))
    )


def test_of_equal_scores_the_base_loss_alone_is_best_and_it_is_said_that_the_ranking_loss_is_not_ahead() -> (
    None
):
    results = [result(1, [0.5, 0.6]), result(0, [0.5, 0.6])]
    finding = sweep_report.find(results, scores_of(results))
    assert finding.best == results[1]
    assert "IS NOT AHEAD of" in sweep_report.words(finding, results)


def test_a_gain_within_its_interval_is_not_called_clear() -> None:
    results = [result(0, [0.5, 0.6]), result(1, [0.5, 0.61])]
    finding = sweep_report.find(results, scores_of(results, noise=0.2))
    assert finding.ranking_gain is not None
    _, low, high = finding.ranking_gain
    assert low is not None and high is not None and low < 0 < high
    assert "BUT NOT CLEARLY" in sweep_report.words(finding, results)


def test_it_is_said_when_a_setting_that_is_compared_was_stopped_early() -> None:
    results = [result(0, [0.5, 0.6]), result(1, [0.5, 0.7], state="stopped")]
    told = sweep_report.words(sweep_report.find(results, scores_of(results)), results)
    assert "(70.0 %, stopped after 10 steps) is ahead of the best of 1 without (60.0 %)" in told


def test_it_is_said_when_no_setting_beat_the_start() -> None:
    results = [result(0, [0.5, 0.4]), result(1, [0.5, 0.3])]
    told = sweep_report.words(sweep_report.find(results, scores_of(results)), results)
    assert "NO SETTING BEAT THE MODEL BEFORE ITS FIRST STEP" in told


def test_queries_of_one_class_give_a_gain_without_an_interval() -> None:
    results = [result(0, [0.5]), result(1, [0.6])]
    one = RetrievalMetrics(recall_at_k={}, map_at_r=0, r_precision=0, num_queries=2, num_skipped=0,
                           scores=np.array([0.5, 0.7]), classes=np.zeros(2, np.int64))  # fmt: skip
    finding = sweep_report.find(results, lambda _: Scores(one, one))
    assert finding.training_gain == (0.0, None, None)
    assert "no interval" in sweep_report.words(finding, results)


def test_a_failed_setting_is_counted_and_listed_last_with_its_reason() -> None:
    results = [result(2, [0.9], state="failed"), result(0, [0.5, 0.6]), result(1, [0.5, 0.55])]
    finding = sweep_report.find(results, scores_of(results))
    assert finding.best == results[1]
    assert "1 of 3 settings failed" in sweep_report.words(finding, results)
    assert "failed: step 3 is not finite" in sweep_report.table(results).splitlines()[-1]


def test_without_a_rival_nothing_is_said_of_the_ranking_loss() -> None:
    results = [result(0, [], state="failed"), result(1, [0.5, 0.55])]
    finding = sweep_report.find(results, scores_of(results))
    assert finding.ranking_gain is None
    assert "all settings without ranking loss failed" in sweep_report.words(finding, results)


def test_when_all_failed_the_first_reason_is_told() -> None:
    results = [result(0, [], state="failed"), result(1, [], state="failed")]
    with pytest.raises(NamrError, match=r"all 2 settings failed, margin-w0-.*: step 3 is not finite"):
        sweep_report.find(results, scores_of(results))


def test_the_table_is_aligned_markdown_best_first() -> None:
    lines = sweep_report.table([result(0, [0.5, 0.6]), result(1, [0.5, 0.7], state="stopped")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["margin", "1", "4", "both", "0.001", "0", "70.0", "70.0", "70.0", "+20.0", "cosine",
                        "10", "10", "stopped"]  # fmt: skip
    assert cells[3][:5] == ["margin", "0", "-", "-", "0.001"]


def test_each_base_loss_is_held_against_itself() -> None:
    triplet = [replace(each, setting=replace(each.setting, base="triplet")) for each in
               (result(0, [0.5, 0.52]), result(1, [0.5, 0.55]))]  # fmt: skip
    results = [result(0, [0.5, 0.7]), result(1, [0.5, 0.6]), *triplet]
    finding = sweep_report.find(results, scores_of(results))
    gains = {base: rivals.gain.mean for base, rivals in finding.of_bases.items() if rivals.gain}
    assert gains == pytest.approx({"margin": -0.1, "triplet": 0.03})
    rows = sweep_report.rivals_table(finding).splitlines()
    assert [cell.strip() for cell in rows[2].split("|")][1:4] == ["margin", "70.0 %", "60.0 %"]
    failed = [result(0, [], state="failed"), result(1, [0.5, 0.55])]
    lonely = sweep_report.rivals_table(sweep_report.find(failed, scores_of(failed)))
    assert [cell.strip() for cell in lonely.splitlines()[2].split("|")][2:5] == ["failed", "55.0 %", "-"]


def test_the_plot_shows_each_base_loss_before_training_and_with_and_without_ranking_loss() -> None:
    svg = sweep_report.plot([result(0, [0.5, 0.6]), result(1, [0.5, 0.7]), result(2, [], state="failed")]).svg
    assert all(word in svg for word in ("margin", "start", "lambda = 0", "70.0", "60.0"))


def test_the_config_of_the_best_is_taken_by_the_training_job_as_it_is(tmp_path: Path) -> None:
    config = make(ranking_weights=(0.25,), learning_rates=(3e-5,))
    setting = settings.settings_of(config)[1]
    best = SettingResult(setting=setting, mlflow_run_id="r", state="finished", reason="",
                         points=(Point(0, 0.5, 0.5, 0.5, "l2"),))  # fmt: skip
    path = tmp_path / "best.toml"
    path.write_text(sweep_report.training_toml(config, best, data_version=3))
    assert configuration.load(TrainJobConfig, ["--config", str(path)]) == config.job_of(setting)
    assert path.read_text().startswith("# The best setting of sweep s: score 50.0 %")
