"""One segment in place of many: makes a release that nights have added to quick to search again.

    ray job submit --working-dir . -- python jobs/compact.py \
        --embeddings-uri s3://bucket/embeddings --releases-uri s3://bucket/releases

Runs beside nights: the long part takes no lease, and what nights added meanwhile stays. The answers are those
of the release before, which is compared. Where nothing is worn it says so and ends; killed anywhere, the same
command goes on; beside another compaction it ends with exit code 2. `--help` explains every flag.
"""

from namr import config
from namr.nightly import compacting
from namr.nightly.compacting import CompactConfig


def main() -> None:
    """Load the config, compact, and say what came of it."""
    done = compacting.compact(config.load(CompactConfig, description=__doc__ or ""))
    print(f"published release {done.release.manifest.release_id}: {done.how}" if done.release else done.how)


if __name__ == "__main__":
    config.run(main)
