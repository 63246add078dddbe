"""Embed a dataset version with a model: one file of embeddings a shard, and only those that are missing.

    ray job submit --working-dir . -- python jobs/extract.py --config jobs/configs/extract.toml \
        --model models:/namr@champion --dataset-uri s3://bucket/datasets/photos \
        --embeddings-uri s3://bucket/embeddings

The same command again embeds only what is new. `--help` explains every flag.
"""

from dataclasses import dataclass, field
from pathlib import Path

from namr import config
from namr.data import datasets
from namr.embed import extraction
from namr.embed.extraction import ExtractionConfig
from namr.registry import references


@dataclass(frozen=True, kw_only=True)
class ExtractJob:
    """What this job reads."""

    dataset_uri: str
    """the dataset: a folder or s3://bucket/name"""
    embeddings_uri: str
    """root of all embeddings: files lie below it by model and shard"""
    model: str
    """models:/<name>@<alias>, models:/<name>/<version>, or the folder or URI of a saved model"""
    dataset_version: int | None = None
    """the current one where none is named"""
    tracking_uri: str | None = None
    """MLflow that has the model; None: MLFLOW_TRACKING_URI, else mlflow.db in the current folder"""
    model_folder: Path = Path("~/.cache/namr/models")
    """where models that are fetched are kept"""
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)


def main() -> None:
    """Load the config, embed what is missing, and say what came of it."""
    job = config.load(ExtractJob, description=__doc__ or "")
    fetched = references.fetch(job.model, folder=job.model_folder.expanduser(), tracking_uri=job.tracking_uri)
    dataset = datasets.open_version(job.dataset_uri, job.dataset_version)
    report = extraction.extract(dataset, job.embeddings_uri, str(fetched.path), job.extraction)
    refused = ", ".join(f"{row.key} ({row.reason})" for row in report.refused)
    print(
        f"{report.num_samples} samples: {report.num_embedded} embedded, {report.num_refused} refused; "
        f"{report.num_new} of them now, in {report.num_new_files} files, "
        f"{report.throughput.seconds:.1f} s, by "
        f"{fetched.name} {fetched.version} (digest {report.embedding_set.manifest.model_digest[:12]})"
        + (f"; {report.throughput.stages}" if report.num_new else "")
        + (f"; refused among others: {refused}" if refused else "")
    )


if __name__ == "__main__":
    config.run(main)
