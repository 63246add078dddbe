"""Build the index of an embedded dataset version: template, parts side by side, one merged segment.

    ray job submit --working-dir . -- python jobs/build_index.py --config jobs/configs/build_index.toml \
        --model models:/namr@champion --dataset-uri s3://bucket/datasets/photos \
        --embeddings-uri s3://bucket/embeddings --releases-uri s3://bucket/releases

Nothing is published: jobs/reindex.py does that, within a day from here. `--help` explains every flag.
"""

from dataclasses import dataclass, field
from pathlib import Path

from namr import config
from namr.data import datasets
from namr.model import model
from namr.registry import references
from namr.release import build
from namr.release.build import BuildConfig


@dataclass(frozen=True, kw_only=True)
class BuildIndexJob:
    """What this job reads."""

    dataset_uri: str
    """the dataset: a folder or s3://bucket/name"""
    embeddings_uri: str
    """root of all embeddings, as jobs/extract.py filled it"""
    releases_uri: str
    """root of all releases; segments and vectors are stored below it"""
    model: str
    """models:/<name>@<alias>, models:/<name>/<version>, or the folder or URI of a saved model"""
    dataset_version: int | None = None
    """the current one where none is named"""
    tracking_uri: str | None = None
    """MLflow that has the model; None: MLFLOW_TRACKING_URI, else mlflow.db in the current folder"""
    model_folder: Path = Path("~/.cache/namr/models")
    """where models that are fetched are kept"""
    build: BuildConfig = field(default_factory=BuildConfig)


def main() -> None:
    """Load the config, build, and say what came of it."""
    job = config.load(BuildIndexJob, description=__doc__ or "")
    found = references.fetch(job.model, folder=job.model_folder.expanduser(), tracking_uri=job.tracking_uri)
    saved, dataset = model.describe(found.path), datasets.open_version(job.dataset_uri, job.dataset_version)
    report = build.build(
        dataset, job.embeddings_uri, job.releases_uri, job.build,
        model_digest=saved.digest, metric=saved.search.metric,
    )  # fmt: skip
    print(
        f"{report.counts.in_words}; {report.index_key} in {report.num_parts} parts, template "
        f"{report.template_hash[:12]}, imbalance {report.imbalance:.2f}, {report.seconds:.1f} s; "
        f"segment {report.segments[0].file.name}"
    )


if __name__ == "__main__":
    config.run(main)
