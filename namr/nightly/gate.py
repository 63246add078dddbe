"""Whether a release may replace the one that serves: images, recall, Recall@1, and embeddings that collapsed.

Not covered: which images were lost (`losses`), the measuring (`assessment`), and counts that don't add up
(publishing refuses those).
"""

from dataclasses import dataclass

from namr import checks
from namr.data.datasets import Dataset
from namr.errors import NamrError
from namr.nightly import losses, release_report
from namr.nightly.assessment import Assessment
from namr.nightly.release_report import ReleaseReport
from namr.release.releases import Release


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

    max_rank_drop: float = 0.5
    """share by which the effective rank of the embeddings may fall below the current release's: a model that
    maps all images to few directions tells them apart no more"""

    def __post_init__(self) -> None:
        shares = ("min_recall_at_10", "max_lost_share", "max_recall_at_1_drop", "max_rank_drop")
        checks.in_range(self, *shares, at_least=0, at_most=1, place="gate")


def check(
    config: GateConfig, draft: Release, measured: ReleaseReport, dataset: Dataset, *, current: Release | None
) -> None:
    """NotGoodEnough, with every reason, unless the draft (of `dataset`) may replace the current release."""
    assessed = measured.assessment
    reasons = []
    for what, recall in assessed.recalls.items():
        if recall < config.min_recall_at_10:
            reasons.append(
                f"{what} is {recall:.3f} with {assessed.probed}, the gate wants "
                f"{config.min_recall_at_10:.3f}: {_cause(assessed)}"
            )
    if current:
        reasons += _collapsed(config, measured, current)
        reasons += _lost_images(config, draft, dataset, current)
        reasons += _lost_recall(config, measured)
    if reasons:
        raise NotGoodEnough(
            f"release {draft.manifest.release_id} is not published: {'; '.join(reasons)}. What serves stays; "
            "look with `namr releases show`; change the gate's limits, or say why by --force, if it is meant"
        )


def _cause(assessed: Assessment) -> str:
    """Where the recall is lost: in the lists that aren't probed, or in codes."""
    if not assessed.num_lists:
        return "compare more candidates (assessment.depth)"
    if assessed.nprobe >= assessed.num_lists:
        return "all lists were probed, so it is lost in codes or depth: take another build.index_key"
    return "it is lost in lists that are not probed: raise assessment.target_recall"


def _collapsed(config: GateConfig, measured: ReleaseReport, current: Release) -> list[str]:
    then, here = release_report.read(current).effective_rank, measured.effective_rank
    if then is None or here is None or here >= (1 - config.max_rank_drop) * then:
        return []
    return [
        f"the effective rank of the embeddings fell from {then:.1f} to {here:.1f}: the model tells images "
        "apart in fewer ways; look at what it was trained with"
    ]


def _lost_images(config: GateConfig, draft: Release, dataset: Dataset, current: Release) -> list[str]:
    before = current.manifest.counts.num_indexed
    lost = losses.lost_images(draft, dataset, current=current)
    if lost.num <= config.max_lost_share * before:
        return []
    return [
        f"{lost.num} of the {before} images of release {current.manifest.release_id} are gone and nobody "
        f"took them out, for one {lost.keys[0]!r}: look at the refused ones"
    ]


def _lost_recall(config: GateConfig, measured: ReleaseReport) -> list[str]:
    compared = measured.against_current
    if compared is None or compared.then - compared.here <= config.max_recall_at_1_drop:
        return []
    return [
        f"Recall@1 of {compared.num_queries} images fell from {compared.then:.3f} to {compared.here:.3f}: "
        "compare the models before promoting this one"
    ]
