"""Try settings of the training on the classes held out: which is best, and what does the ranking loss bring?

    ray job submit --working-dir . -- python jobs/sweep.py --config jobs/configs/sweep.toml \
        --sweep-name photos-1 --storage-uri s3://bucket/sweeps --data.dataset-uri s3://bucket/datasets/photos

The same sweep name goes on with the settings that have not ended. `--help` explains every flag.
"""

from namr import config
from namr.train import sweep
from namr.train.settings import SweepConfig


def main() -> None:
    """Load the config, try the settings, and show what was found."""
    result = sweep.sweep(config.load(SweepConfig, description=__doc__ or ""))
    print(result.table)
    print(
        f"sweep {result.sweep_name} {'was finished already' if result.was_finished else 'is finished'}: "
        f"{result.words}; jobs/train.py trains with the best by --config {result.config_uri}"
    )


if __name__ == "__main__":
    config.run(main)
