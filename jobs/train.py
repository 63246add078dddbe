"""Train a model on a dataset, validate it on unseen classes, and register its best weights as candidate.

    ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/train.toml \
        --run-name photos-1 --storage-uri s3://bucket/runs --data.dataset-uri s3://bucket/datasets/photos

The same run name goes on from its last checkpoint. `--dry-run` says what a run will take, and trains nothing.
`--help` explains every flag.
"""

from namr import config
from namr.train import dry_run, job
from namr.train.run import TrainJobConfig


def main() -> None:
    """Load the config, train, and say what came of it."""
    wanted = config.load(TrainJobConfig, description=__doc__ or "")
    if wanted.dry_run:
        print(dry_run.look(wanted).text)
        return
    result = job.fit(wanted)
    print(
        f"run {result.run_name} {'was finished already' if result.was_finished else 'is finished'}: "
        f"{result.model_name} {result.model_version} is {result.place}, "
        f"Recall@1 {100 * result.recall_at_1:.1f} % on unseen classes; {result.against_start}; it recommends "
        f"search by {result.search.metric}, structure {result.search.structure_side}; it trained on "
        f"{result.images_per_s:.0f} images/s; {result.model_uri}"
    )


if __name__ == "__main__":
    config.run(main)
