"""When a template is told to be too old, and by which number."""

from dataclasses import replace

import pytest

from namr.errors import ConfigError
from namr.nightly import aging
from namr.nightly.aging import AgingConfig
from namr.nightly.assessment import Age, Assessment, ByAge
from namr.release.releases import TemplateBirth

BIRTH = TemplateBirth(num_entries=1000, recall_at_10=0.96, imbalance=1.2)
YOUNG = Assessment(
    num_queries=200,
    num_labelled=0,
    num_items=1500,
    nprobe=8,
    num_lists=64,
    recall_at_10=0.95,
    recall_by_nprobe=((8, 0.95),),
    sides=(),
    depth=100,
    queries_per_s=1.0,
    by_age=ByAge(old=Age(100, 0.96, 0.5), new=Age(100, 0.94, 0.6)),
)


def said(assessed: Assessment = YOUNG, *, num_entries: int = 1500, imbalance: float = 1.3) -> str | None:
    return aging.aged(AgingConfig(), BIRTH, assessed, num_entries=num_entries, imbalance=imbalance)


def test_a_template_that_fits_is_kept() -> None:
    assert said() is None
    assert said(replace(YOUNG, by_age=None), num_entries=1000) is None
    assert said(num_entries=2000, imbalance=1.79) is None


def test_the_number_that_decides_is_told() -> None:
    assert said(num_entries=2001) == "2001 entries, and the template was trained for 1000"
    assert said(replace(YOUNG, recall_at_10=0.929)) == (
        "recall@10 is 0.929, and was 0.960 when the template was new"
    )
    old, new = YOUNG.by_age or (None, None)
    assert old and new
    worse = replace(YOUNG, by_age=ByAge(old, new._replace(recall_at_10=0.92)))
    assert said(worse) == "recall@10 of new images is 0.920, and was 0.960 when the template was new"
    worse = replace(YOUNG, by_age=ByAge(old._replace(recall_at_10=0.92), new))
    assert said(worse) == "recall@10 of images from before is 0.920, and was 0.960 when the template was new"
    assert said(imbalance=1.81) == "the imbalance of the lists is 1.81, and was 1.20"
    far = replace(YOUNG, by_age=ByAge(old, new._replace(error=0.66)))
    assert said(far) == "new images lie 1.32 times as far from their lists' centres, squared"


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_growth", 0.0), ("max_recall_drop", 1.5), ("max_imbalance_growth", 0.9), ("max_error_growth", 0.5)],
)
def test_limits_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is {value}"):
        AgingConfig(**{field: value})
