"""What a sweep found: the best setting, what the ranking loss brings, a table, a plot.

Not covered: that the best of many is partly luck. An interval is that of two settings as if they had been
named beforehand, by a normal distribution, and too narrow for a handful of classes; the words say among how
many each was chosen, and which was stopped early.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from namr import config as configuration
from namr.errors import NamrError
from namr.measure import metrics, report
from namr.measure.metrics import RetrievalMetrics
from namr.measure.report import Plot
from namr.train.settings import Setting, SweepConfig
from namr.train.sweep_run import Gain, Scores, SettingResult


class Rivals(NamedTuple):
    """The best setting without ranking loss and the best with it; None where all such settings failed."""

    plain: SettingResult | None
    ranked: SettingResult | None
    gain: Gain | None
    """of the second over the first"""


class Finding(NamedTuple):
    """What is best, and by how much."""

    best: SettingResult
    plain: SettingResult | None
    """The best without ranking loss; None where all of them failed."""
    ranked: SettingResult | None
    """The best with it."""
    ranking_gain: Gain | None
    """`ranked` over `plain`."""
    training_gain: Gain
    """`best` over the model before its first step."""
    of_bases: dict[str, Rivals]
    """Those of each base loss, by its name."""


def in_order(results: Sequence[SettingResult]) -> list[SettingResult]:
    """Best first; of equals the base loss alone, then the smaller weight; failed ones last."""

    def place(result: SettingResult) -> tuple[float, float, str]:
        score = -math.inf if result.state == "failed" else result.best.score
        return -score, result.setting.ranking_weight, result.setting.name

    return sorted(results, key=place)


def find(results: Sequence[SettingResult], scores_of: Callable[[Setting], Scores]) -> Finding:
    """The best with and without ranking loss. NamrError, with the first reason, if all settings failed."""
    good = [result for result in in_order(results) if result.state != "failed"]
    if not good:
        first = results[0]
        raise NamrError(
            f"all {len(results)} settings failed, {first.setting.name}: {first.reason}; lower the rates, or "
            "choose other settings under another sweep_name"
        )
    of_best, of_all = scores_of(good[0].setting), _rivals(good, scores_of)
    bases = sorted({result.setting.base for result in good})
    return Finding(
        best=good[0],
        plain=of_all.plain,
        ranked=of_all.ranked,
        ranking_gain=of_all.gain,
        training_gain=_gain(of_best.best, of_best.start),
        of_bases={
            base: _rivals([result for result in good if result.setting.base == base], scores_of)
            for base in bases
        },
    )


def _rivals(good: Sequence[SettingResult], scores_of: Callable[[Setting], Scores]) -> Rivals:
    plain = next((result for result in good if result.setting.is_plain), None)
    ranked = next((result for result in good if not result.setting.is_plain), None)
    gain = None
    if plain and ranked:
        gain = _gain(scores_of(ranked.setting).best, scores_of(plain.setting).best)
    return Rivals(plain, ranked, gain)


def words(finding: Finding, results: Sequence[SettingResult]) -> str:
    """What was found, and what was not."""
    best = finding.best
    told = [f"best: {best.setting.name}, score {_percent(best.best.score)} at step {best.best.step}"]
    if best.best.step == 0:
        told.append("NO SETTING BEAT THE MODEL BEFORE ITS FIRST STEP, so there is nothing to choose")
    else:
        told.append(f"that is {_in_points(finding.training_gain)} over the model before its first step")
    num_plain = sum(result.setting.is_plain for result in results)
    if finding.plain is None or finding.ranked is None or finding.ranking_gain is None:
        side = "without" if finding.plain is None else "with"
        told.append(f"all settings {side} ranking loss failed, so nothing is known of what it brings")
    else:
        gain = finding.ranking_gain
        ahead = "is ahead of"
        if gain.mean <= 0:
            ahead = "IS NOT AHEAD of"
        elif gain.low is None or gain.low <= 0:
            ahead = "is ahead, BUT NOT CLEARLY, of"
        ranked, plain = _told(finding.ranked), _told(finding.plain)
        told.append(
            f"with ranking loss the best of {len(results) - num_plain} ({ranked}) {ahead} the best of "
            f"{num_plain} without ({plain}), by {_in_points(gain)}"
        )
    if num_failed := sum(result.state == "failed" for result in results):
        told.append(f"{num_failed} of {len(results)} settings failed")
    return "; ".join(told)


def table(results: Sequence[SettingResult]) -> str:
    """Markdown that reads as plain text too; best first."""
    head = ("loss", "lambda", "C", "side", "rate", "backbone rate", "score %", "Recall@1 %", "MAP@R %",
            "gain", "searched by", "at step", "of", "ended")  # fmt: skip
    return _markdown([head, *(_row(result) for result in in_order(results))])


def rivals_table(finding: Finding) -> str:
    """Markdown: what the ranking loss brings to each base loss."""
    head = ("loss", "best without, score %", "best with, score %", "gain in points (95 %)")
    rows: list[tuple[str, ...]] = [head]
    for base, (plain, ranked, gain) in finding.of_bases.items():
        told = (_told(each) if each else "failed" for each in (plain, ranked))
        rows.append((base, *told, "-" if gain is None else _in_points(gain)))
    return _markdown(rows)


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:])) + "\n"


def plot(results: Sequence[SettingResult]) -> Plot:
    """For each base loss the best without and with ranking loss, beside the model before its first step."""
    good = [result for result in in_order(results) if result.state != "failed"]
    bars: dict[str, dict[str, float]] = {}
    for base in sorted({result.setting.base for result in good}):
        ours = [result for result in good if result.setting.base == base]
        bars[base] = {"start": 100 * ours[0].points[0].score}
        for name, is_plain in (("lambda = 0", True), ("lambda > 0", False)):
            scores = [100 * result.best.score for result in ours if result.setting.is_plain == is_plain]
            if scores:
                bars[base][name] = scores[0]
    return report.bars("sweep", bars, x_label="mean of Recall@1 and MAP@R, %, unseen classes")


def training_toml(config: SweepConfig, best: SettingResult, *, data_version: int) -> str:
    """The training run with the best setting, as `jobs/train.py --config` takes it."""
    point = best.best
    head = (
        f"# The best setting of sweep {config.sweep_name}: score {_percent(point.score)} (Recall@1 "
        f"{_percent(point.recall_at_1)}) at step {point.step},\n# on the held-out classes of version "
        f"{data_version} of the dataset.\n"
    )
    return head + configuration.to_toml(config.job_of(best.setting))


def _gain(one: RetrievalMetrics, other: RetrievalMetrics) -> Gain:
    low, high = metrics.interval(one, other) or (None, None)
    return Gain(metrics.difference(one, other).mean, low, high)


def _row(result: SettingResult) -> tuple[str, ...]:
    setting = result.setting
    structure = ("-", "-") if setting.is_plain else (str(setting.num_clusters), setting.structure_side)
    said = (setting.base, f"{setting.ranking_weight:g}", *structure, f"{setting.learning_rate:g}",
            f"{setting.backbone_learning_rate:g}")  # fmt: skip
    if result.state == "failed":
        return (*said, *("-",) * 7, "failed: " + result.reason.replace("|", "/").replace("\n", " "))
    best = result.best
    shares = (best.score, best.recall_at_1, best.map_at_r)
    gain = f"{100 * (best.score - result.points[0].score):+.1f}"
    return (*said, *(f"{100 * share:.1f}" for share in shares), gain, best.search, str(best.step),
            str(result.points[-1].step), result.state)  # fmt: skip


def _told(result: SettingResult) -> str:
    cut = f", stopped after {result.points[-1].step} steps" if result.state == "stopped" else ""
    return _percent(result.best.score) + cut


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _in_points(gain: Gain) -> str:
    if gain.low is None or gain.high is None:
        return f"{100 * gain.mean:+.2f} points (of one class: no interval)"
    return f"{100 * gain.mean:+.2f} points (95 %: {100 * gain.low:+.2f} to {100 * gain.high:+.2f})"
