"""Retrieval metrics against loops and pytorch-metric-learning, and the laws of exact rankings."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from namr import collectives
from namr.data.sampling import slice_of_rank
from namr.errors import ConfigError, ShapeError
from namr.measure import metrics
from namr.measure.metrics import RetrievalMetrics
from namr.model.distances import Metric, Side
from tests.ranks import on_ranks

SIDES: tuple[Side, ...] = ("none", "query", "both", "scale")


def retrieval(embeddings: Any, labels: Any, **options: Any) -> RetrievalMetrics:
    """Over all rows at once."""
    return metrics.combine([metrics.retrieval_sums(embeddings, labels, **options)])


class Points:
    """Images in clusters that overlap: embeddings, structures, labels."""

    def __init__(self, num: int, dim: int, *, num_classes: int, spread: float = 1.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.y = rng.integers(0, num_classes, num)
        centres = rng.normal(size=(num_classes, dim))
        self.x = (3 + centres[self.y] + spread * rng.normal(size=(num, dim))).astype(np.float32)
        self.s = rng.uniform(0.5, 1.5, (num, dim)).astype(np.float32)

    def retrieval(self, **options: Any) -> RetrievalMetrics:
        structures = None if options.get("side", "none") == "none" else self.s
        return retrieval(self.x, self.y, structures=structures, **options)


def looped(
    points: Points,
    *,
    side: Side,
    metric: Metric,
    depth: int,
    ks: tuple[int, ...],
    query_rows: NDArray[np.integer] | None = None,
    gallery_rows: NDArray[np.integer] | None = None,
) -> RetrievalMetrics:
    """From the definitions, one query at a time, in float64."""
    x, s, y = points.x.astype(np.float64), points.s.astype(np.float64), points.y
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    hits, precisions, averages, skipped = dict.fromkeys(ks, 0), [], [], 0
    gallery = set(range(len(x)) if gallery_rows is None else gallery_rows.tolist())
    for query in range(len(x)) if query_rows is None else query_rows.tolist():
        searched = gallery - {query}
        others = sum(y[row] == y[query] for row in searched)
        if others == 0:
            skipped += 1
            continue
        plain = ((x - x[query]) ** 2).sum(1)
        order = [row for row in np.argsort(plain, kind="stable") if row in searched]
        weights = {
            "none": np.ones_like(s),
            "query": np.broadcast_to(s[query], s.shape),
            "both": (s[query] + s) / 2,
            "scale": np.sqrt(s.mean(1, keepdims=True)) * np.ones_like(s),
        }[side]
        adaptive = (weights * (x - x[query]) ** 2).sum(1)
        if side != "none":
            order = sorted(order[:depth], key=lambda row: adaptive[row]) + order[depth:]
        correct = [y[row] == y[query] for row in order]
        for k in ks:
            hits[k] += any(correct[:k])
        precisions.append(sum(correct[:others]) / others)
        averages.append(sum(sum(correct[: i + 1]) / (i + 1) for i in range(others) if correct[i]) / others)
    return RetrievalMetrics(
        recall_at_k={k: hits[k] / len(averages) for k in ks},
        map_at_r=float(np.mean(averages)),
        r_precision=float(np.mean(precisions)),
        num_queries=len(averages),
        num_skipped=skipped,
    )


def assert_same(one: RetrievalMetrics, other: RetrievalMetrics, *, tolerance: float = 1e-12) -> None:
    assert (one.num_queries, one.num_skipped) == (other.num_queries, other.num_skipped)
    assert one.recall_at_k == pytest.approx(other.recall_at_k, abs=tolerance)
    assert one.map_at_r == pytest.approx(other.map_at_r, abs=tolerance)
    assert one.r_precision == pytest.approx(other.r_precision, abs=tolerance)


def test_five_points_by_hand() -> None:
    """On a line at 0, 1, 3, 7, 20 with classes a, b, a, b, c.

    0 sees 1 3: b a; 1 sees 0 3 7: a a b; 3 sees 1 0 7: b a b; 7 sees 3 1: a b; c is alone. R = 1 for each.
    """
    x = np.array([[0.0], [1.0], [3.0], [7.0], [20.0]], dtype=np.float32)
    found = retrieval(x, np.array([0, 1, 0, 1, 2]), ks=(1, 2, 3))
    assert found.recall_at_k == {1: 0.0, 2: 0.75, 3: 1.0}
    assert (found.map_at_r, found.r_precision, found.recall_at_1) == (0.0, 0.0, 0.0)
    assert (found.num_queries, found.num_skipped) == (4, 1)


def test_queries_against_a_gallery_by_hand() -> None:
    """On a line the gallery lies at 0, 1, 3, 7, 20 with classes a, b, a, b, c.

    4 of class b sees 3 1 7 0 20: a b b a c, so Recall@1 is 0 and @2 is 1; R = 2, AP = (0 + 1/2) / 2.
    0.2 of class a sees 0 1 3 7 20: a b a b c; R = 2, AP = (1 + 0) / 2. 5 is of class d, which is not there.
    """
    x = np.array([[0.0], [1.0], [3.0], [7.0], [20.0], [4.0], [0.2], [5.0]], dtype=np.float32)
    y = np.array([0, 1, 0, 1, 2, 1, 0, 3])
    found = retrieval(x, y, ks=(1, 2, 30), query_rows=np.arange(5, 8), gallery_rows=np.arange(5))
    assert found.recall_at_k == {1: 0.5, 2: 1.0, 30: 1.0}
    assert (found.map_at_r, found.r_precision) == (0.375, 0.5)
    assert (found.num_queries, found.num_skipped) == (2, 1)


def test_map_at_r_by_hand() -> None:
    """Query 0 of four sees a, b, a (R = 2 of its class): AP = (1 + 0) / 2, R-precision 1 / 2."""
    x = np.array([[0.0], [1.0], [2.0], [4.0]], dtype=np.float32)
    sums = metrics.retrieval_sums(x, np.array([0, 0, 1, 0]), query_rows=np.array([0]))
    assert (sums.average_precision, sums.r_precision, sums.num_queries) == (0.5, 0.5, 1)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("side", SIDES)
def test_they_equal_loops(side: Side, metric: Metric) -> None:
    points = Points(120, 6, num_classes=14)
    points.y[7] = 99  # alone in its class
    options: dict[str, Any] = {"side": side, "metric": metric, "depth": 15, "ks": (1, 3, 40)}
    assert_same(points.retrieval(**options), looped(points, **options))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("overlap", [0, 25])
def test_queries_against_a_gallery_equal_loops(side: Side, metric: Metric, overlap: int) -> None:
    points = Points(140, 6, num_classes=14)
    points.y[3], points.y[100] = (
        98,
        99,
    )  # a query without a match, and a row of the gallery that nobody asks for
    rows = np.random.default_rng(1).permutation(140)
    split = {"query_rows": np.append(rows[: 60 + overlap], 3), "gallery_rows": rows[rows != 3][60:]}
    options: dict[str, Any] = {"side": side, "metric": metric, "depth": 15, "ks": (1, 3, 200), **split}
    expected = looped(points, **options)
    assert_same(points.retrieval(**options), expected)
    assert expected.num_skipped >= 1


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_queries_against_a_gallery_equal_pytorch_metric_learning(metric: Metric) -> None:
    points = Points(400, 16, num_classes=25)
    distance = CosineSimilarity() if metric == "cosine" else LpDistance(normalize_embeddings=False)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r", "r_precision"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(distance),
    )
    x, y = torch.from_numpy(points.x), torch.from_numpy(points.y)
    theirs = calculator.get_accuracy(x[:150], y[:150], x[150:], y[150:])
    ours = points.retrieval(metric=metric, query_rows=np.arange(150), gallery_rows=np.arange(150, 400))
    assert ours.recall_at_1 == pytest.approx(theirs["precision_at_1"], abs=1e-12)
    assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-12)
    assert ours.r_precision == pytest.approx(theirs["r_precision"], abs=1e-12)
    assert 0.1 < ours.map_at_r < 0.9


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_they_equal_pytorch_metric_learning(metric: Metric) -> None:
    points = Points(400, 16, num_classes=25)
    points.y[:2] = 100, 101
    distance = CosineSimilarity() if metric == "cosine" else LpDistance(normalize_embeddings=False)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r", "r_precision"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(distance),
    )
    theirs = calculator.get_accuracy(torch.from_numpy(points.x), torch.from_numpy(points.y))
    ours = points.retrieval(metric=metric)
    assert ours.recall_at_1 == pytest.approx(theirs["precision_at_1"], abs=1e-12)
    assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-12)
    assert ours.r_precision == pytest.approx(theirs["r_precision"], abs=1e-12)
    assert 0.1 < ours.map_at_r < 0.9


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("depth", [1, 4, 8, 30])
def test_reranking_m_leaves_recall_at_m_as_it_is(side: Side, depth: int) -> None:
    points = Points(200, 8, num_classes=30, spread=2.0)
    plain = points.retrieval(ks=(1, 4, 8, 30))
    reranked = points.retrieval(ks=(1, 4, 8, 30), side=side, depth=depth)
    for k, recall in plain.recall_at_k.items():
        if k >= depth:
            assert reranked.recall_at_k[k] == recall


def test_reranking_changes_the_order() -> None:
    points = Points(200, 8, num_classes=30, spread=2.0)
    different = {points.retrieval(side=side, depth=20).map_at_r for side in SIDES}
    assert len(different) == 4


def test_structure_of_one_changes_nothing() -> None:
    points = Points(150, 8, num_classes=20)
    points.s[:] = 1
    plain = points.retrieval()
    assert all(points.retrieval(side=side) == plain for side in SIDES)


@st.composite
def awkward_points(draw: st.DrawFn) -> Points:
    """Few different places, so that equal distances and duplicates are everywhere."""
    num = draw(st.integers(4, 60))
    points = Points(
        num, draw(st.integers(1, 5)), num_classes=draw(st.integers(1, 6)), seed=draw(st.integers(0, 99))
    )
    if draw(st.booleans()):
        points.x = np.round(points.x)
    if draw(st.booleans()):
        points.x[:] = points.x[0]
    points.y[:2] = 0
    return points


@given(awkward_points(), st.integers(1, 60), st.sampled_from(SIDES), st.sampled_from(["l2", "cosine"]))
@settings(max_examples=60, deadline=None)
def test_blocks_equal_one_shot_exactly(points: Points, block_rows: int, side: Side, metric: Metric) -> None:
    options: dict[str, Any] = {"side": side, "metric": metric, "depth": 7, "ks": (1, 2, 5)}
    whole = points.retrieval(block_rows=1000, **options)
    assert points.retrieval(block_rows=block_rows, **options) == whole


@given(awkward_points(), st.integers(1, 60), st.sampled_from(SIDES), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_blocks_of_queries_against_a_gallery_equal_one_shot_exactly(
    points: Points, block_rows: int, side: Side, seed: int
) -> None:
    rows = np.random.default_rng(seed).permutation(len(points.x))
    half = len(rows) // 2
    points.y[rows[half:]], points.y[rows[:1]] = points.y[rows[half]], points.y[rows[half]]
    options: dict[str, Any] = {"side": side, "depth": 7, "ks": (1, 2, 5)}
    options |= {"query_rows": rows[:half], "gallery_rows": rows[half:]}
    whole = points.retrieval(block_rows=1000, **options)
    assert points.retrieval(block_rows=block_rows, **options) == whole
    assert points.retrieval(**options | {"gallery_rows": np.tile(np.flip(rows[half:]), 2)}) == whole


def test_a_gallery_of_all_rows_is_leave_one_out() -> None:
    points = Points(150, 8, num_classes=20)
    for side in SIDES:
        whole = points.retrieval(side=side, depth=200)
        assert points.retrieval(side=side, depth=200, gallery_rows=np.arange(150)) == whole


@pytest.mark.parametrize("side", SIDES)
def test_sums_of_any_split_combine_to_the_whole(side: Side) -> None:
    points = Points(157, 8, num_classes=60)
    whole = points.retrieval(side=side)
    rows = np.random.default_rng(0).permutation(157)
    parts = [
        metrics.retrieval_sums(points.x, points.y, structures=points.s, side=side, query_rows=some)
        for some in np.array_split(rows, [3, 3, 90])
    ]
    assert sum(part.num_queries + part.num_skipped for part in parts) == 157
    assert_same(metrics.combine(parts), whole)
    assert metrics.combine(parts).recall_at_k == whole.recall_at_k


def test_many_equal_points_are_ranked_by_row_number() -> None:
    """More duplicates than candidates are taken: which rows rank first is decided, not left to chance."""
    x = np.zeros((500, 3), dtype=np.float32)
    x[450:] = 1
    y = np.repeat([0, 1, 2], [30, 420, 50])
    sums = metrics.retrieval_sums(x, y, query_rows=np.arange(30, 450), ks=(1, 30, 31))
    assert sums.hits == (0, 0, 420)  # the 30 rows of class 0 come before all of class 1


def test_near_duplicates_far_from_the_origin_are_told_apart() -> None:
    """Products in float32 lose these differences; the ranking may not."""
    rng = np.random.default_rng(0)
    x = 100 + rng.normal(size=(300, 4))
    steps = np.repeat(np.arange(3), 100) * 1e-3
    x = (np.tile(x[:100], (3, 1)) + steps[:, None]).astype(np.float32)
    exact = ((x[:, None].astype(np.float64) - x[None]) ** 2).sum(2)
    np.fill_diagonal(exact, np.inf)
    nearest = exact.argmin(1)
    y = np.arange(300)
    y[nearest] = y  # not a partition: only queries whose nearest is theirs count below
    hits = metrics.retrieval_sums(x, y, ks=(1,)).hits[0]
    assert hits == sum(int(y[row] == y[nearest[row]]) for row in range(300) if (y == y[row]).sum() > 1)


def test_arrays_and_tensors_of_any_float_type_give_the_same() -> None:
    points = Points(100, 8, num_classes=9)
    points.x = points.x.astype(np.float16).astype(np.float32)
    whole = points.retrieval()
    assert retrieval(points.x.astype(np.float16), points.y.astype(np.int32)) == whole
    assert retrieval(torch.from_numpy(points.x), torch.from_numpy(points.y)) == whole
    read_only = points.x.copy()
    read_only.flags.writeable = False  # as memory-mapped embeddings are
    assert retrieval(read_only, points.y) == whole


@pytest.mark.slow
def test_a_gallery_of_8131_takes_seconds() -> None:
    points = Points(8131, 512, num_classes=98, spread=3.0)
    start = time.process_time()  # what others do on this machine doesn't count
    measured = points.retrieval(side="both")
    assert time.process_time() - start < 60  # 8 s
    assert measured.num_queries == 8131


# k-means and the first stage


def test_nmi_of_clear_clusters_is_one_and_of_noise_near_zero() -> None:
    clear = Points(300, 8, num_classes=5, spread=0.01)
    assert metrics.nmi(clear.x, clear.y * 7, seed=0) == pytest.approx(1.0)
    noise = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    assert metrics.nmi(noise, np.arange(2000) % 5, seed=0) < 0.02


def test_nmi_is_pytorch_metric_learnings_and_seeded() -> None:
    points = Points(300, 8, num_classes=12, spread=1.5)
    clusters: list[NDArray[np.int32]] = []

    def kmeans(x: torch.Tensor, num_clusters: int) -> torch.Tensor:
        found = KMeans(num_clusters, n_init=1, random_state=3).fit_predict(x.numpy())
        clusters.append(found)
        return torch.from_numpy(found)

    calculator = AccuracyCalculator(include=("NMI",), device=torch.device("cpu"), kmeans_func=kmeans)
    theirs = calculator.get_accuracy(torch.from_numpy(points.x), torch.from_numpy(points.y))["NMI"]
    ours = metrics.nmi(points.x, points.y, seed=3)
    assert ours == metrics.nmi(points.x, points.y, seed=3)
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert ours == pytest.approx(normalized_mutual_info_score(points.y, clusters[0]), abs=1e-9)


# Ranks, errors


def sums_of_a_slice() -> metrics.RetrievalSums:
    points = Points(101, 8, num_classes=40)
    mine = slice_of_rank(101, rank=collectives.rank(), world_size=collectives.world_size())
    sums = metrics.retrieval_sums(points.x, points.y, query_rows=np.arange(101)[mine])
    return metrics.sum_over_ranks(sums)


@pytest.mark.slow
def test_sums_over_ranks_are_the_whole() -> None:
    whole = Points(101, 8, num_classes=40).retrieval()
    for ranks in on_ranks(sums_of_a_slice).values():
        for sums in ranks:
            assert_same(metrics.combine([sums]), whole)
            assert isinstance(sums.num_queries, int)


def test_a_row_that_is_no_number_is_named() -> None:
    points = Points(20, 4, num_classes=3)
    points.x[7, 2] = np.nan
    points.x[11, 0] = np.inf
    with pytest.raises(ShapeError, match="embeddings: 2 of 20 rows hold NaN or infinity, first row 7"):
        points.retrieval()
    with pytest.raises(ShapeError, match="first row 7"):
        metrics.nmi(points.x, points.y, seed=0)
    points = Points(20, 4, num_classes=3)
    points.s[5] = np.nan
    with pytest.raises(ShapeError, match="structures: 1 of 20 rows hold NaN or infinity, first row 5"):
        points.retrieval(side="both")


def test_wrong_arguments_are_named() -> None:
    points = Points(20, 4, num_classes=3)
    with pytest.raises(ShapeError, match="side 'both' needs the structure embeddings"):
        retrieval(points.x, points.y, side="both")
    with pytest.raises(ShapeError, match=r"structures \(20, 3\)"):
        retrieval(points.x, points.y, structures=points.s[:, :3], side="query")
    with pytest.raises(ShapeError, match=r"for each of 20 embeddings, got labels \(19,\)"):
        retrieval(points.x, points.y[:19])
    with pytest.raises(ShapeError, match=r"\(N, D\).*\(4,\)"):
        retrieval(points.x[0], points.y)
    with pytest.raises(ShapeError, match="label -1 at row 4"):
        retrieval(points.x, np.where(np.arange(20) == 4, -1, points.y))
    with pytest.raises(ShapeError, match="the gallery has no rows"):
        points.retrieval(gallery_rows=np.empty(0, np.int64))
    with pytest.raises(ConfigError, match=r"ks \(0, 1\)"):
        points.retrieval(ks=(0, 1))
    with pytest.raises(ShapeError, match="no queries: for each of 20 images the gallery has no"):
        retrieval(points.x, np.arange(20))
    one, other = (metrics.retrieval_sums(points.x, points.y, ks=ks) for ks in ((1, 2), (1, 4)))
    with pytest.raises(ShapeError, match="sums of one kind"):
        metrics.combine([one, other])


def scored(scores: list[float], classes: list[int]) -> RetrievalMetrics:
    return RetrievalMetrics(
        recall_at_k={1: 0.0}, map_at_r=0, r_precision=0, num_queries=len(scores), num_skipped=0,
        scores=np.array(scores), classes=np.array(classes),
    )  # fmt: skip


def test_a_difference_by_hand() -> None:
    one, other = scored([1, 1, 0, 1], [0, 0, 1, 1]), scored([0, 0, 0, 1], [0, 0, 1, 1])
    # gains 1, 1, 0, 0 around 1/2: 1 in class 0 and -1 in class 1; sqrt(2 / 1 * 2) / 4
    assert metrics.difference(one, other) == pytest.approx((0.5, 0.5))
    assert metrics.difference(one, one) == (0, 0)


def test_the_standard_error_of_a_difference_is_what_new_classes_would_spread() -> None:
    draw = np.random.default_rng(0)

    def drawn() -> metrics.Difference:
        of_class = np.repeat(draw.normal(0.1, 0.3, 40), 25)
        gains = of_class + draw.normal(0, 0.2, 1000)
        return metrics.difference(scored(list(gains), list(np.repeat(np.arange(40), 25))), zero)

    zero = scored([0.0] * 1000, list(np.repeat(np.arange(40), 25)))
    many = [drawn() for _ in range(300)]
    spread = float(np.std([each.mean for each in many]))
    assert np.mean([each.standard_error for each in many]) == pytest.approx(spread, rel=0.1)


def test_a_difference_over_one_class_or_other_queries_says_so() -> None:
    assert metrics.difference(scored([1, 1], [3, 3]), scored([0, 0], [3, 3])) == (1, np.inf)
    with pytest.raises(ShapeError, match="the same ones"):
        metrics.difference(scored([1, 1], [3, 3]), scored([0, 0], [3, 4]))


def test_the_bootstrap_interval_is_that_of_means_over_whole_classes() -> None:
    draw = np.random.default_rng(1)
    classes = np.repeat(np.arange(50), draw.integers(2, 30, 50))
    gains = draw.normal(0.05, 0.2, 50)[classes] + draw.normal(0, 0.2, len(classes))
    one, other = scored(list(gains), list(classes)), scored([0.0] * len(classes), list(classes))
    mean, error = metrics.difference(one, other)
    low, high = metrics.interval(one, other) or (0.0, 0.0)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.25 * error)
    assert metrics.interval(one, other) == (low, high)
    narrow = metrics.interval(one, other, confidence=0.5) or (0.0, 0.0)
    assert low < narrow[0] < mean < narrow[1] < high
    assert metrics.interval(one, one) == (0, 0)
    assert metrics.interval(scored([1, 1], [3, 3]), scored([0, 0], [3, 3])) is None
    with pytest.raises(ShapeError, match="the same ones"):
        metrics.interval(scored([1, 1], [3, 3]), scored([0, 0], [3, 4]))


def test_scores_are_those_of_the_queries_in_their_order() -> None:
    whole = metrics.combine([metrics.retrieval_sums(SMALL, SMALL_LABELS)])
    rows = [np.array([0, 1]), np.array([2, 3, 4])]
    parts = [metrics.retrieval_sums(SMALL, SMALL_LABELS, query_rows=some) for some in rows]
    united = metrics.combine(parts)
    assert united.scores.tolist() == whole.scores.tolist()
    assert united.classes.tolist() == whole.classes.tolist() == SMALL_LABELS.tolist()
    assert np.mean(whole.scores) == pytest.approx((whole.recall_at_1 + whole.map_at_r) / 2)


SMALL = np.array([[0.0], [0.1], [1.0], [1.1], [0.05]], np.float32)
SMALL_LABELS = np.array([0, 1, 1, 0, 0])
