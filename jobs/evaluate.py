"""Compare models on the labelled images of a dataset: each way of searching, Recall@K, MAP@R, R-precision.

    ray job submit --working-dir . -- python jobs/evaluate.py --config jobs/configs/evaluate.toml \
        --dataset-uri s3://bucket/datasets/photos-test --models candidate=models:/namr@candidate

Several models: `--models "lambda 0=runs/plain/model" namr=models:/namr@candidate`. Other images to query by:
`--query-uri s3://bucket/datasets/photos-query`. `--help` explains every flag.
"""

from namr import config
from namr.measure import evaluation
from namr.measure.evaluation import EvaluationConfig


def main() -> None:
    """Load the config, measure, and print the table."""
    comparison = evaluation.evaluate(config.load(EvaluationConfig, description=__doc__ or ""))
    print(comparison.to_markdown())


if __name__ == "__main__":
    config.run(main)
