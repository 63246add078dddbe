"""Whether a release may replace the one that serves: its images, its answers, its embeddings and its speed.

    images      those that the current release has and this one lacks, one by one (`losses`)
    answers     recall@10 against exact search, of old and of new images; where it is lost (`recall_loss`)
                Recall@1 and MAP@R of labelled images, against the current release (`comparison`)
    embeddings  norms, axes on which nothing differs any more, effective rank, shift (`drift`)
    speed       of single queries, against the current release (`latency`)

Each limit is one that a night without a mistake is far from. Embeddings that are NaN never come this far:
extraction refuses them, and the build again.

Not covered: the measuring (`measuring`), and counts that don't add up (publishing refuses those).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from namr import checks
from namr.data.datasets import Dataset
from namr.errors import NamrError
from namr.nightly import losses
from namr.nightly.comparison import Compared
from namr.nightly.drift import Drift
from namr.nightly.latency import Latencies
from namr.nightly.recall_loss import RecallLoss
from namr.nightly.release_report import ReleaseReport
from namr.release.releases import Release

_NOTICED_MS = 5.0
"""what a query may take whatever it took before: nobody notices, and so short a time is mostly chance"""


class NotGoodEnough(NamrError):
    """A release that may not replace the one that serves."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a release has to reach before it replaces the one that serves."""

    min_recall_at_10: float = 0.9
    """of the index against exact search"""
    max_lost_share: float = 0.01
    """of the images that the current release has, how many the new one may lack (take-downs don't count)"""
    max_recall_at_1_drop: float = 0.05
    """how far Recall@1 may fall below the current release's, of the same labelled images"""
    max_map_at_r_drop: float = 0.05
    """the same of MAP@R, over the first 20 answers"""
    max_rank_drop: float = 0.5
    """share by which the effective rank of the embeddings may fall below the current release's: a model that
    maps all images to few directions tells them apart no more"""
    max_flat_axes: float = 0.1
    """share of the axes on which embeddings differed in the current release, and may differ no more"""
    max_norm_ratio: float = 10.0
    """how many times as long, or as short, as the current release's the mean embedding may be"""
    max_shift: float = 0.5
    """how far the embeddings of the same model may lie from the current release's, see `drift`; 1 is as far
    as images lie from their mean"""
    max_latency_ratio: float = 2.0
    """times the median time of a query in the current release; below 5 ms it is never too long"""

    def __post_init__(self) -> None:
        shares = ("max_lost_share", "max_recall_at_1_drop", "max_map_at_r_drop", "max_rank_drop")
        checks.in_range(
            self, "min_recall_at_10", *shares, "max_flat_axes", at_least=0, at_most=1, place="gate"
        )
        checks.in_range(self, "max_norm_ratio", "max_latency_ratio", at_least=1, place="gate")
        checks.in_range(self, "max_shift", at_least=0, place="gate")


def check(
    config: GateConfig,
    draft: Release,
    measured: ReleaseReport,
    dataset: Dataset,
    *,
    current: Release | None,
    lost_where: Callable[[str], RecallLoss],
) -> None:
    """NotGoodEnough, with every reason, unless the draft (of `dataset`) may replace the current release.

    lost_where: of a recall by its name, asked of those that fall short alone.
    """
    reasons = [*_low_recall(config, measured, lost_where)]
    if current:
        reasons += _lost_images(config, draft, dataset, current)
    drops = (
        ("Recall@1", measured.against_current, config.max_recall_at_1_drop),
        ("MAP@R", measured.map_at_r, config.max_map_at_r_drop),
    )
    for what, compared, most in drops:
        if compared:
            reasons += _worse_answers(what, compared, most)
    if measured.drift:
        reasons += _drifted(config, measured.drift)
    if measured.latency:
        reasons += _slower(config, measured.latency)
    if reasons:
        raise NotGoodEnough(
            f"release {draft.manifest.release_id} is not published: {'; '.join(reasons)}. What serves stays; "
            "look with `namr releases show`; change the gate's limits, or say why by --force, if it is meant"
        )


def _low_recall(
    config: GateConfig, measured: ReleaseReport, lost_where: Callable[[str], RecallLoss]
) -> Iterator[str]:
    least, assessed = config.min_recall_at_10, measured.assessment
    for what, recall in assessed.recalls.items():
        if recall < least:
            yield (
                f"{what} is {recall:.3f} with {assessed.probed} and depth {assessed.depth}, the gate wants "
                f"{least:.3f}; {lost_where(what).in_words}"
            )


def _lost_images(config: GateConfig, draft: Release, dataset: Dataset, current: Release) -> Iterator[str]:
    before = current.manifest.counts.num_indexed
    lost = losses.lost_images(draft, dataset, current=current)
    if lost.num > config.max_lost_share * before:
        yield (
            f"{lost.num} of the {before} images of release {current.manifest.release_id} are gone and nobody "
            f"took them out, for one {lost.keys[0]!r}; the gate allows {100 * config.max_lost_share:g} %: "
            "look at the refused ones"
        )


def _worse_answers(what: str, compared: Compared, most: float) -> Iterator[str]:
    if compared.then - compared.here > most:
        yield (
            f"{what} of {compared.num_queries} images fell from {compared.then:.3f} to {compared.here:.3f}, "
            f"and the gate allows {most:.3f}: compare the models before promoting this one"
        )


def _drifted(config: GateConfig, drift: Drift) -> Iterator[str]:
    here, then = drift.here, drift.then
    if then is None:
        return
    if here.effective_rank < (1 - config.max_rank_drop) * then.effective_rank:
        yield (
            f"the effective rank of the embeddings fell from {then.effective_rank:.1f} to "
            f"{here.effective_rank:.1f}, and the gate allows a drop of {100 * config.max_rank_drop:g} %: the "
            "model tells images apart in fewer ways; look at what it was trained with"
        )
    if here.num_flat_axes - then.num_flat_axes > config.max_flat_axes * drift.dim:
        yield (
            f"on {here.num_flat_axes} of {drift.dim} axes all embeddings are alike, and were on "
            f"{then.num_flat_axes}; the gate allows {100 * config.max_flat_axes:g} % more: look at the "
            "model's head"
        )
    shorter, longer = sorted((here.mean_norm, then.mean_norm))
    if longer > config.max_norm_ratio * shorter:
        yield (
            f"the mean norm of the embeddings is {here.mean_norm:.3g}, and was {then.mean_norm:.3g}; the "
            f"gate allows {config.max_norm_ratio:g} times more or less: look at the model's head"
        )
    if drift.shift is not None and drift.shift > config.max_shift:
        yield (
            f"the embeddings of the same model lie elsewhere: their shift is {drift.shift:.2f}, and the gate "
            f"allows {config.max_shift:.2f}; look at what the images show, and at the dataset's URI"
        )


def _slower(config: GateConfig, latency: Latencies) -> Iterator[str]:
    here, then = latency.here, latency.then
    if then and here.p50_ms > max(_NOTICED_MS, config.max_latency_ratio * then.p50_ms):
        yield (
            f"a query takes {here.p50_ms:.1f} ms (median; 95 % of them {here.p95_ms:.1f} ms), and takes "
            f"{then.p50_ms:.1f} ms in the current release; the gate allows {config.max_latency_ratio:g} "
            "times that: look at what was built, or take another build.index_key"
        )
