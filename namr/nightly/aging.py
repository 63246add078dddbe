"""How a template ages: whether the lists that it was trained into still fit the images that came since.

A template is trained once, and night after night segments are added that use its lists. What was measured
when it was young is kept in the release (`TemplateBirth`); what is measured of each release since is held
against it, with images from before and after apart. A template that has aged still serves: the release is
published, its report says which number decided, and the next build trains a new one.

Not covered: whether a release is good enough to serve (`gate`).
"""

from dataclasses import dataclass

from namr import checks
from namr.nightly.assessment import Assessment
from namr.release.releases import TemplateBirth


@dataclass(frozen=True, kw_only=True)
class AgingConfig:
    """When the next build trains a new template, in place of adding to what is there."""

    max_growth: float = 1.0
    """images, as a share of those that the template was trained for, that may come to them: more want more
    lists"""
    max_recall_drop: float = 0.03
    """how far recall@10, of images from before or of new ones, may fall below what it was"""
    max_imbalance_growth: float = 1.5
    """times what the imbalance of the lists was"""
    max_error_growth: float = 1.3
    """times the mean squared distance to its list's centre, of a new image against one from before"""

    def __post_init__(self) -> None:
        checks.in_range(self, "max_growth", above=0, place="aging")
        checks.in_range(self, "max_recall_drop", at_least=0, at_most=1, place="aging")
        checks.in_range(self, "max_imbalance_growth", "max_error_growth", at_least=1, place="aging")


def aged(
    config: AgingConfig, birth: TemplateBirth, assessed: Assessment, *, num_entries: int, imbalance: float
) -> str | None:
    """Which number decides that a new template is due, in words; None while the old one fits."""
    growth = num_entries / max(1, birth.num_entries) - 1
    if growth > config.max_growth:
        return f"{num_entries} entries, and the template was trained for {birth.num_entries}"
    for what, recall in assessed.recalls.items():
        if recall < birth.recall_at_10 - config.max_recall_drop:
            return f"{what} is {recall:.3f}, and was {birth.recall_at_10:.3f} when the template was new"
    if imbalance > config.max_imbalance_growth * birth.imbalance:
        return f"the imbalance of the lists is {imbalance:.2f}, and was {birth.imbalance:.2f}"
    if assessed.by_age:
        old, new = assessed.by_age
        if new.error > config.max_error_growth * old.error:
            return (
                f"new images lie {new.error / old.error:.2f} times as far from their lists' centres, squared"
            )
    return None
