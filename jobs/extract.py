"""Embed a dataset version with a model: one file of embeddings a shard, and only those that are missing.

    ray job submit --working-dir . -- python jobs/extract.py --config jobs/configs/extract.toml \
        --model models:/namr@champion --extraction.dataset-uri s3://bucket/datasets/photos \
        --extraction.embeddings-uri s3://bucket/embeddings

The same command again embeds only what is new. `--help` explains every flag.
"""

from dataclasses import dataclass
from pathlib import Path

from namr import config, extraction, references
from namr.extraction import ExtractionConfig


@dataclass(frozen=True, kw_only=True)
class ExtractJob:
    """What this job reads."""

    extraction: ExtractionConfig
    model: str
    """models:/<name>@<alias>, models:/<name>/<version>, or the folder or URI of a saved model"""
    tracking_uri: str | None = None
    """MLflow that has the model; None: MLFLOW_TRACKING_URI, else mlflow.db in the current folder"""
    model_folder: Path = Path("~/.cache/namr/models")
    """where models that are fetched are kept"""


def main() -> None:
    """Load the config, embed what is missing, and say what came of it."""
    job = config.load(ExtractJob, description=__doc__ or "")
    found = references.fetch(job.model, folder=job.model_folder.expanduser(), tracking_uri=job.tracking_uri)
    report = extraction.extract(job.extraction, str(found.path))
    refused = ", ".join(f"{row.key} ({row.reason})" for row in report.refused)
    print(
        f"{report.num_samples} samples: {report.num_embedded} embedded, {report.num_refused} refused; "
        f"{report.num_new} of them now, in {report.num_new_files} files, {report.seconds:.1f} s, by "
        f"{found.name} {found.version} (digest {report.embedding_set.manifest.model_digest[:12]})"
        + (f"; refused among others: {refused}" if refused else "")
    )


if __name__ == "__main__":
    config.run(main)
