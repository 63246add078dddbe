"""Build the index of an embedded dataset version: template, parts side by side, one merged segment.

    ray job submit --working-dir . -- python jobs/build_index.py --config jobs/configs/build_index.toml \
        --model models:/namr@champion --indexing.dataset-uri s3://bucket/datasets/photos \
        --indexing.embeddings-uri s3://bucket/embeddings --indexing.releases-uri s3://bucket/releases

Nothing is published: jobs/reindex.py measures and publishes, and goes on from what this has built. The same
command again finds its own work and ends at once. `--help` explains every flag.
"""

from dataclasses import dataclass
from pathlib import Path

from namr import config, indexing, model, references
from namr.indexing import IndexingConfig


@dataclass(frozen=True, kw_only=True)
class BuildIndexJob:
    """What this job reads."""

    indexing: IndexingConfig
    model: str
    """models:/<name>@<alias>, models:/<name>/<version>, or the folder or URI of a saved model"""
    tracking_uri: str | None = None
    """MLflow that has the model; None: MLFLOW_TRACKING_URI, else mlflow.db in the current folder"""
    model_folder: Path = Path("~/.cache/namr/models")
    """where models that are fetched are kept"""


def main() -> None:
    """Load the config, build, and say what came of it."""
    job = config.load(BuildIndexJob, description=__doc__ or "")
    found = references.fetch(job.model, folder=job.model_folder.expanduser(), tracking_uri=job.tracking_uri)
    saved = model.describe(found.path)
    report = indexing.build(job.indexing, model_digest=saved.digest, metric=saved.search.metric)
    counts = report.counts
    print(
        f"{counts.num_samples} samples: {counts.num_indexed} indexed, {counts.num_refused} refused, "
        f"{counts.num_tombstoned} tombstoned; {report.index_key} in {report.num_parts} parts, template "
        f"{report.template_hash[:12]} of {report.num_training_vectors} vectors, imbalance "
        f"{report.imbalance:.2f}, {report.seconds:.1f} s; segment {report.segments[0].file.name}"
    )


if __name__ == "__main__":
    config.run(main)
