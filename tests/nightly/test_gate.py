"""The gate: images are held against the current release by key, recall by what was measured."""

import functools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr.data import datasets
from namr.data.datasets import Dataset
from namr.data.shards import make_id
from namr.errors import ConfigError, NamrError
from namr.nightly import gate, losses
from namr.nightly.assessment import Age, Assessment, ByAge, SideResult
from namr.nightly.comparison import Compared
from namr.nightly.drift import Drift, Spread
from namr.nightly.gate import GateConfig
from namr.nightly.latency import Latencies, Latency
from namr.nightly.recall_loss import RecallLoss
from namr.nightly.release_report import ReleaseReport
from namr.release import releases, takedowns
from namr.release.releases import Counts, Release
from namr.store import manifests
from namr.store.tables import SampleTable
from tests import small_release
from tests.small_release import NOW, Recipe

SIDES = ("none", "scale", "query", "both")
check = functools.partial(gate.check, lost_where=lambda _: RecallLoss(0.1, 0.02, 0.0))
KEYS = {make_id(row // 50, row % 50): f"digit/{row}" for row in range(100)}
"""of the dataset, by id"""
NEW = {make_id(5, row): f"new/{row}" for row in range(50)}


def a_report(*, recall: float = 0.96, right: float | None = 0.8) -> ReleaseReport:
    sides = tuple(SideResult(side=side, recall_at_1=right, recall_at_10=1.0, proved=0.0) for side in SIDES)
    return ReleaseReport(
        counts=Counts(num_samples=100, num_indexed=100, num_refused=0, num_tombstoned=0),
        index_key="IVF4,Flat",
        num_parts=4,
        imbalance=1.0,
        build_s=1.0,
        assessment=Assessment(
            num_queries=10,
            num_labelled=10,
            num_items=100,
            nprobe=2,
            num_lists=4,
            recall_at_10=recall,
            recall_by_nprobe=((2, recall),),
            sides=sides,
            depth=20,
            queries_per_s=1.0,
        ),
        against_current=None if right is None else Compared(10, 0.8, right),
    )


def items_of(keys: dict[int, str]) -> SampleTable:
    ids = sorted(keys)
    nothing = np.zeros(len(ids), np.int64)
    return SampleTable(
        ids=np.array(ids, np.int64),
        keys=[keys[each] for each in ids],
        labels=[None] * len(ids),
        fields=["{}"] * len(ids),
        offsets=nothing,
        sizes=nothing,
    )


def holding(like: Release, name: str, keys: dict[int, str], *, dataset: Dataset | None = None) -> Release:
    """A release as `like`, but of these items."""
    uri = like.releases_uri
    return Release(
        uri,
        replace(
            like.manifest,
            release_id=name,
            dataset_uri=dataset.uri if dataset else like.manifest.dataset_uri,
            items=small_release.store_items(uri, items_of(keys)),
            counts=Counts(num_samples=100, num_indexed=len(keys), num_refused=0, num_tombstoned=0),
        ),
    )


@pytest.fixture
def current(tmp_path: Path) -> Release:
    """A release of 100 images with a report."""
    made = small_release.publish(tmp_path, Recipe(num_shards=2, rows_per_shard=50))
    report = releases.store(made.releases_uri, "report.json", manifests.encode_manifest(a_report()))
    release = Release(made.releases_uri, replace(made.manifest, report_json=report))
    items = small_release.table_of(release)
    assert dict(zip(items.ids.tolist(), items.keys, strict=True)) == KEYS
    return release


@pytest.fixture
def dataset(current: Release) -> Dataset:
    return datasets.open_version(current.manifest.dataset_uri)


def without(rows: Iterable[int]) -> dict[int, str]:
    lost = {f"digit/{row}" for row in rows}
    return {each: key for each, key in KEYS.items() if key not in lost}


def test_as_many_new_images_do_not_hide_those_that_were_lost(current: Release, dataset: Dataset) -> None:
    draft = holding(current, "new", without(range(50)) | NEW)
    expected = (
        r"release new is not published: 50 of the 100 images of release first are gone and nobody took them "
        r"out, for one 'digit/0'"
    )
    with pytest.raises(NamrError, match=expected):
        check(GateConfig(), draft, a_report(), dataset, current=current)


@pytest.mark.parametrize(("num_lost", "is_fine"), [(0, True), (1, True), (2, False)])
def test_few_may_be_lost(num_lost: int, is_fine: bool, current: Release, dataset: Dataset) -> None:
    draft = holding(current, "new", without(range(num_lost)) | NEW)
    assert losses.lost_images(draft, dataset, current=current).num == num_lost
    if is_fine:
        check(GateConfig(max_lost_share=0.01), draft, a_report(), dataset, current=current)
        return
    with pytest.raises(NamrError, match="2 of the 100 images"):
        check(GateConfig(max_lost_share=0.01), draft, a_report(), dataset, current=current)


def test_what_somebody_took_out_is_not_lost(current: Release) -> None:
    draft = holding(current, "new", without(range(30)))
    out = [f"digit/{row}" for row in range(10)]
    dataset = datasets.tombstone(current.manifest.dataset_uri, out, now=NOW)
    takedowns.take_down(current.releases_uri, dataset.uri, range(10, 25))
    lost = [f"digit/{row}" for row in range(25, 30)]
    assert losses.lost_images(draft, dataset, current=current) == (5, lost)


def test_a_dataset_that_was_packed_elsewhere_is_held_against_the_old_one(
    current: Release, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    packed = small_release.make_dataset(tmp_path / "elsewhere", Recipe(num_shards=1, rows_per_shard=90))
    new_ids = {row: f"digit/{row}" for row in range(90)}
    moved = holding(current, "moved", new_ids, dataset=packed)
    expected = [f"digit/{row}" for row in range(90, 100)]
    assert losses.lost_images(moved, packed, current=current) == (10, expected)
    packed = datasets.tombstone(packed.uri, ["digit/60"], now=NOW)  # id 60 there, and 1 << 32 | 10 before
    takedowns.take_down(current.releases_uri, current.manifest.dataset_uri, [make_id(1, 49)])
    smaller = holding(
        current, "smaller", {row: key for row, key in new_ids.items() if row not in (10, 60)}, dataset=packed
    )
    expected = ["digit/10", *(f"digit/{row}" for row in range(90, 99))]
    assert losses.lost_images(smaller, packed, current=current) == (10, expected)
    with pytest.raises(NamrError, match="10 of the 100 images of release first are gone"):
        check(GateConfig(), smaller, a_report(), packed, current=current)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (a_report(right=0.76), None),
        (a_report(right=None), None),
        (a_report(right=0.7), r"Recall@1 of 10 images fell from 0\.800 to 0\.700"),
        (a_report(recall=0.85), r"recall@10 is 0\.850 with 2 of 4 lists and depth 20, the gate wants 0\.900"),
        (a_report(recall=0.85, right=0.1), r"recall@10 is .*; Recall@1 of 10 images fell"),
    ],
)
def test_recall_is_held_against_what_serves(
    measured: ReleaseReport, expected: str | None, current: Release, dataset: Dataset
) -> None:
    draft = holding(current, "new", KEYS)
    if expected is None:
        check(GateConfig(), draft, measured, dataset, current=current)
        return
    with pytest.raises(NamrError, match=f"release new is not published: {expected}"):
        check(GateConfig(), draft, measured, dataset, current=current)


def test_the_first_release_has_to_reach_the_recall_alone(current: Release, dataset: Dataset) -> None:
    check(GateConfig(), current, a_report(right=None), dataset, current=None)
    with pytest.raises(NamrError, match="the gate wants"):
        check(GateConfig(), current, a_report(recall=0.5), dataset, current=None)


@pytest.mark.parametrize(
    "name", ["min_recall_at_10", "max_lost_share", "max_recall_at_1_drop", "max_flat_axes"]
)
def test_limits_of_the_gate_are_shares(name: str) -> None:
    with pytest.raises(ConfigError, match=f"gate.{name} is 1.5"):
        GateConfig(**{name: 1.5})


def test_recall_of_new_images_has_to_be_as_good_and_the_cause_is_told(
    current: Release, dataset: Dataset
) -> None:
    good, asked = a_report(), list[str]()
    by_age = ByAge(old=Age(100, 0.96, 1.0), new=Age(100, 0.85, 1.0))
    new_is_worse = replace(good, assessment=replace(good.assessment, by_age=by_age))

    def lost_where(what: str) -> RecallLoss:
        asked.append(what)
        return RecallLoss(0.01, 0.13, 0.01)

    expected = (
        r"recall@10 of new images is 0\.850 with 2 of 4 lists and depth 20, the gate wants 0\.900; of points "
        r"lost 1\.0 in lists that are not probed, 13\.0 in depth, 1\.0 in codes: compare more candidates"
    )
    with pytest.raises(NamrError, match=expected):
        gate.check(GateConfig(), current, new_is_worse, dataset, current=None, lost_where=lost_where)
    assert asked == ["recall@10 of new images"]
    gate.check(GateConfig(), current, good, dataset, current=None, lost_where=lost_where)
    assert len(asked) == 1, "it costs a good night nothing"


LIES = Spread(num_images=100, mean_norm=2.0, num_flat_axes=1, effective_rank=40.0)


@pytest.mark.parametrize(
    ("here", "shift", "expected"),
    [
        (LIES, 0.0, None),
        (LIES._replace(effective_rank=20.0, num_flat_axes=7, mean_norm=0.21), 0.49, None),
        (LIES, None, None),
        (
            LIES._replace(effective_rank=19.9),
            0.0,
            r"effective rank of the embeddings fell from 40\.0 to 19\.9",
        ),
        (LIES._replace(num_flat_axes=8), 0.0, r"on 8 of 64 axes all embeddings are alike, and were on 1"),
        (
            LIES._replace(mean_norm=0.19),
            0.0,
            r"mean norm of the embeddings is 0\.19, and was 2; the gate allows 10",
        ),
        (LIES._replace(mean_norm=20.1), None, r"mean norm of the embeddings is 20\.1"),
        (LIES._replace(mean_norm=0.0), None, r"mean norm of the embeddings is 0,"),
        (LIES, 0.6, r"their shift is 0\.60, and the gate allows 0\.50"),
    ],
)
def test_embeddings_that_collapsed_or_moved_are_stopped(
    here: Spread, shift: float | None, expected: str | None, current: Release, dataset: Dataset
) -> None:
    measured = replace(a_report(), drift=Drift(64, here, LIES, shift))
    if expected is None:
        check(GateConfig(), current, measured, dataset, current=current)
        return
    with pytest.raises(NamrError, match=expected):
        check(GateConfig(), current, measured, dataset, current=current)
    check(
        GateConfig(max_rank_drop=1, max_flat_axes=1, max_norm_ratio=1e9, max_shift=1),
        current,
        replace(measured, drift=Drift(64, here._replace(mean_norm=here.mean_norm or 1), LIES, shift)),
        dataset,
        current=current,
    )
    check(
        GateConfig(), current, replace(a_report(), drift=Drift(64, here, None, None)), dataset, current=None
    )


def test_map_at_r_is_held_against_what_serves(current: Release, dataset: Dataset) -> None:
    fallen = replace(a_report(), map_at_r=Compared(9, 0.5, 0.44))
    with pytest.raises(
        NamrError, match=r"MAP@R of 9 images fell from 0\.500 to 0\.440, and the gate allows 0\.050"
    ):
        check(GateConfig(), current, fallen, dataset, current=current)
    check(GateConfig(max_map_at_r_drop=0.07), current, fallen, dataset, current=current)


@pytest.mark.parametrize(
    ("here_ms", "then_ms", "is_fine"),
    [(12.1, 6.0, False), (11.9, 6.0, True), (4.9, 0.2, True), (9.0, None, True)],
)
def test_queries_that_take_twice_as_long_are_stopped_unless_nobody_notices(
    here_ms: float, then_ms: float | None, is_fine: bool, current: Release, dataset: Dataset
) -> None:
    then = None if then_ms is None else Latency(then_ms, 10.0)
    slow = replace(a_report(), latency=Latencies(30, Latency(here_ms, 15.0), then))
    if is_fine:
        check(GateConfig(), current, slow, dataset, current=current)
        return
    expected = (
        r"a query takes 12\.1 ms \(median; 95 % of them 15\.0 ms\), and takes 6\.0 ms in the current release"
    )
    with pytest.raises(NamrError, match=expected):
        check(GateConfig(), current, slow, dataset, current=current)
    check(GateConfig(max_latency_ratio=3), current, slow, dataset, current=current)


def test_a_report_of_an_earlier_namr_is_judged_by_what_it_has(current: Release, dataset: Dataset) -> None:
    data = json.loads(manifests.encode_manifest(a_report()))
    for name in ("map_at_r", "drift", "latency"):
        del data[name]
    earlier = manifests.decode_manifest(json.dumps(data).encode(), ReleaseReport, "report.json")
    assert earlier == a_report()
    check(GateConfig(), current, earlier, dataset, current=current)
