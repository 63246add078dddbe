"""The whole chain on one machine: pack, train, extract, build, publish, evaluate, report, serve.

The default data set is `photographs`: spots to be found again in pictures that training never saw. Everything
lies below one folder; a second run goes on from what is there.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from namr import ray_connection
from namr.data import packing
from namr.data.loading import LoaderConfig
from namr.demo import recipes, weights
from namr.demo.recipes import Recipe
from namr.measure import evaluation, report
from namr.measure.comparison import COLUMNS, Comparison
from namr.measure.evaluation import EvaluationConfig
from namr.model.losses import LossConfig
from namr.model.model import ModelConfig
from namr.nightly import reindexing, release_report
from namr.nightly.gate import GateConfig
from namr.nightly.reindexing import ReindexConfig, ReindexReport
from namr.registry import registry
from namr.reports import beside
from namr.reports.beside import Known
from namr.reports.self_search import SelfSearchConfig
from namr.search.searcher import Searcher
from namr.serve import process
from namr.serve.process import ServeConfig
from namr.store import scratch
from namr.store.cache import Cache
from namr.train import job
from namr.train.ray_group import WorkersConfig
from namr.train.run import FitResult, TrainJobConfig
from namr.train.training_data import DataConfig

_CORES = 2
_HELD_OUT_IMAGES = 700
"""at most, about; with a user's many images examinations would take longer than the steps"""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole chain on one machine, from images to a search page."""

    data: str = "photographs"
    """photographs (the demo's own), a folder of class folders (or with train/ and test/ folders of those),
    torchvision:<Name>, or a table of paths and labels"""
    folder: Path = Path("demo-data")
    """where everything is kept"""
    serve: bool = True
    """open the search service and the MLflow UI, until Ctrl-C"""
    weights: str = "timm"
    """the backbone's: timm (those of the demo extra, else timm downloads them), none starts untrained, else a
    .safetensors file"""
    backbone: str = "tf_efficientnet_lite0"
    """a timm model"""
    num_steps: int = 60
    """of each of the two trainings"""
    port: int = 0
    """of the search page; 0 chooses a free one"""


def run(config: DemoConfig) -> None:
    """Run every stage, say what came of it, write the report, and serve if asked to."""
    console = Console()
    folder = config.folder.absolute() / recipes.name_of(config.data)
    tracking_uri = f"sqlite:///{folder / 'mlflow.db'}"
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]namr demo[/bold] on {config.data}, everything below {folder}")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray warns of how its own Ray Data starts actors
    ray_connection.connect(num_cpus=_CORES)
    try:
        with _stage(console, "1/5 pack"):
            sources = recipes.sources_of(config.data, folder)
            packed = packing.pack(sources.train)
            gallery = packing.pack(sources.gallery)
        console.print(
            f"    {packed.num_classes} classes to learn from, {gallery.num_classes} never seen; "
            f"{packed.num_packed + gallery.num_packed} images packed now, "
            f"{packed.num_known + gallery.num_known} were there"
        )
        recipe = recipes.recipe_of(
            config.data,
            num_classes=packed.num_classes - packed.num_single_classes,
            num_images=packed.num_packed + packed.num_known,
            num_steps=config.num_steps,
            weights=config.weights,
            backbone=config.backbone,
        )
        recipe = replace(recipe, model=_with_weights(console, recipe.model, folder))
        with _stage(console, "2/5 train, with 2 workers"):
            plain = _fit(recipe, folder, tracking_uri, ranking_weight=0.0)
            namr = _fit(recipe, folder, tracking_uri, ranking_weight=None)
            registry.connect(tracking_uri).promote(namr.model_name, version=namr.model_version)
        style = "dim" if namr.beat_its_start else "red"
        console.print(f"    [{style}]{namr.against_start}[/{style}]")
        console.print(
            f"    {namr.num_steps} steps without and with the ranking loss, {namr.images_per_s:.0f} images a "
            f"second; {namr.model_name} version {namr.model_version} is {namr.place}, and the champion"
        )
        with _stage(console, "3/5 extract, build, measure, publish"):
            night = reindexing.reindex(
                ReindexConfig(
                    dataset_uri=str(folder / "gallery"),
                    embeddings_uri=str(folder / "embeddings"),
                    releases_uri=str(folder / "releases"),
                    model=f"models:/{namr.model_name}@champion",
                    tracking_uri=tracking_uri,
                    build=recipe.build,
                    gate=GateConfig(max_recall_at_1_drop=1.0),  # a second demo may train with fewer steps
                )
            )
        _tell_release(console, night)
        with _stage(console, "4/5 evaluate"):
            comparison = evaluation.evaluate(
                EvaluationConfig(
                    dataset_uri=str(folder / "gallery"),
                    models=(f"lambda 0={plain.model_uri}", f"NAMR={namr.model_uri}"),
                    raw_pixels=True,
                    untrained=True,
                    whitened_by=None if recipe.model.weights == "none" else str(folder / "train"),
                    loader=_loader(folder),
                )
            )
        console.print(
            f"    {comparison.num_images:,} images of {comparison.num_classes:,} classes that training "
            f"never saw; each queries all others; re-ranked: the first {comparison.depth}"
        )
        for table in tables(comparison):
            console.print(table)
        if loss := _below_untrained(comparison, namr):
            console.print(f"    [bold red]{loss}[/bold red]")
        if recipe.validates_on_gallery:
            console.print(
                "    [dim]too few classes to hold some out: checkpoint and way of searching were chosen on "
                "this gallery, so these numbers flatter a little[/dim]"
            )
        with _stage(console, "5/5 report"):
            report_path = folder / "report.html"
            report_path.write_text(_report(config, tracking_uri, night, comparison, (plain, namr)))
        console.print(f"    {report_path.as_uri()}")
    finally:
        ray_connection.disconnect()
    if config.serve:
        _serve(console, config, folder, tracking_uri)


def _with_weights(console: Console, model: ModelConfig, folder: Path) -> ModelConfig:
    """The model with the package's weights where they are timm's; says which ones it has."""
    path = weights.packaged() if model.backbone == weights.BACKBONE else None
    if model.weights == "none":
        words = "none, it starts from scratch"
    elif model.weights != "timm":
        words = model.weights
    elif path is None:
        words = "timm's, downloaded"
    else:
        words = f"package {weights.PACKAGE}"
        weights.convert(path, folder / "lite0.safetensors")
        model = replace(model, weights=str(folder / "lite0.safetensors"))
    console.print(f"    {model.backbone}, weights: {words}")
    return model


def _loader(folder: Path) -> LoaderConfig:
    return LoaderConfig(num_workers=0, cache_folder=folder / "cache")


def _fit(recipe: Recipe, folder: Path, tracking_uri: str, *, ranking_weight: float | None) -> FitResult:
    digest = hashlib.sha256(repr((recipe, ranking_weight)).encode()).hexdigest()[:8]
    name = "namr-without-structure" if ranking_weight == 0 else "namr"
    return job.fit(
        TrainJobConfig(
            run_name=f"{name}-{digest}",
            storage_uri=str(folder / "runs"),
            data=DataConfig(
                dataset_uri=str(folder / "train"),
                validation_uri=str(folder / "gallery") if recipe.validates_on_gallery else None,
                held_out_images=_HELD_OUT_IMAGES,
            ),
            batch=recipe.batch,
            model=recipe.model,
            loss=LossConfig(base="triplet", ranking_weight=ranking_weight, num_clusters=4),
            training=recipe.training,
            augment=recipe.augment,
            loader=_loader(folder),
            workers=WorkersConfig(num_workers=_CORES),
            model_name=name,
            tracking_uri=tracking_uri,
        )
    )


def _tell_release(console: Console, night: ReindexReport) -> None:
    manifest, assessed = night.release.manifest, night.report.assessment
    console.print(
        f"    release {manifest.release_id}{'' if night.is_new else ' (was there)'}: "
        f"{manifest.counts.num_indexed} images in {night.report.num_parts} merged parts of "
        f"{manifest.index_key}; "
        f"recall@10 {assessed.recall_at_10:.3f} with {assessed.probed}"
    )


def _below_untrained(comparison: Comparison, namr: FitResult) -> str | None:
    """What to say where the trained model finds less than the backbone's untouched features do."""
    side = namr.search.structure_side
    trained = comparison.row("NAMR").by_column[namr.search.metric if side == "none" else side]
    untouched = comparison.row("untrained").by_column.values()
    losses = [
        f"{name} {100 * ours:.1f} % where the untouched features have {100 * theirs:.1f} %"
        for name, ours, theirs in (
            ("Recall@1", trained.recall_at_1, max(found.recall_at_1 for found in untouched)),
            ("MAP@R", trained.map_at_r, max(found.map_at_r for found in untouched)),
        )
        if ours < theirs
    ]
    if not losses:
        return None
    return f"training made it worse: {'; '.join(losses)}; more classes to train on, or more steps, would help"


def tables(comparison: Comparison) -> list[Table]:
    """Recall@1 and MAP@R in per cent, a table for each, so that both fit a terminal of 80 columns."""
    made = []
    for name, metric in (("Recall@1 (%)", "recall_at_1"), ("MAP@R (%)", "map_at_r")):
        table = Table(name, *COLUMNS)
        for column in table.columns[1:]:
            column.justify = "right"
        best = max(getattr(each, metric) for row in comparison.rows for each in row.by_column.values())
        for row in comparison.rows:
            cells = []
            for way in COLUMNS:
                each = row.by_column.get(way)
                value = None if each is None else getattr(each, metric)
                text = "" if value is None else f"{100 * value:.1f}"
                cells.append(f"[bold]{text}[/bold]" if value == best else text)
            table.add_row(row.name, *cells)
        made.append(table)
    return made


def _report(
    config: DemoConfig,
    tracking_uri: str,
    night: ReindexReport,
    comparison: Comparison,
    runs: tuple[FitResult, FitResult],
) -> str:
    """The release's own report, with the comparison and the curves of both trainings before it."""
    header, *rows = comparison.ways_table()
    ways = report.Table(title=comparison.title, columns=header, rows=rows)
    recalls = {
        row.name: {way: 100 * row.by_column[way].recall_at_1 for way in COLUMNS if way in row.by_column}
        for row in comparison.rows
    }
    runs_registry = registry.connect(tracking_uri)
    losses = {run.run_name: runs_registry.history(run.mlflow_run_id, "train/metric") for run in runs}
    manifest = night.release.manifest
    with scratch.folder("demo-") as temporary:
        cache = Cache(Path(temporary), max_bytes=1 << 30)
        searcher = Searcher.of(night.release, cache=cache, query_model=None)
        keys = [item.key for item in searcher.items.draw(500, seed=0)]
        known = Known(night.report.build_s, night.report.stages, night.report.assessment.frontier)
        told = beside.make(searcher, manifest, known, keys, SelfSearchConfig())
    page = release_report.page(f"namr on {config.data}", manifest, night.report, told.grids, told.sections)
    return report.render(
        replace(
            page,
            tables=[ways, *page.tables],
            plots=[
                report.bars("Recall@1 on unseen classes", recalls, x_label="per cent"),
                report.curves("Base loss while training", losses, x_label="step", y_label="loss"),
                *page.plots,
            ],
        )
    )


@contextmanager
def _stage(console: Console, title: str) -> Iterator[None]:
    """A line for a stage, and how long it took."""
    console.print(f"[bold]{title}[/bold]")
    began = time.monotonic()
    yield
    console.print(f"    [dim]{time.monotonic() - began:.1f} s[/dim]")


def _serve(console: Console, config: DemoConfig, folder: Path, tracking_uri: str) -> None:
    """The search page and the MLflow UI, until Ctrl-C; what was started is ended."""
    with _mlflow_ui(folder, tracking_uri) as address:
        console.print(f"MLflow UI:    [link]{address}[/link]")
        serve_config = ServeConfig(
            releases_uri=str(folder / "releases"),
            tracking_uri=tracking_uri,
            cache_folder=folder / "cache",
            port=config.port,
        )
        console.print("[dim]Ctrl-C ends both[/dim]")
        with suppress(KeyboardInterrupt):
            process.serve(serve_config, announce=lambda line: console.print(f"search page:  {line}"))


@contextmanager
def _mlflow_ui(folder: Path, tracking_uri: str) -> Iterator[str]:
    """An MLflow server over the demo's runs, as a process of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", tracking_uri, "--workers", "1"),
    ]
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "mlflow-ui.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)
