"""The night: embed what is missing, add it to the index, measure, judge, publish and collect.

    ray job submit --working-dir . -- python jobs/reindex.py --config jobs/configs/reindex.toml \
        --dataset-uri s3://bucket/datasets/photos --embeddings-uri s3://bucket/embeddings \
        --releases-uri s3://bucket/releases

New images become one more segment, and what was taken out is hidden; all is built anew only where the model,
the settings or an aged template ask for it. Where nothing is new, or a roll-back holds the current release,
it says so and ends. With --prepare a release of another model is made beside nights and not published, to be
switched to later. Killed anywhere, the same command goes on. While another night is under way it ends at
once, and a release that is not good enough stays unpublished, both with exit code 2 and the reason. The last
line says what came of it, and so does the webhook of `--notify-url` or $NAMR_NOTIFY_URL. `--help` explains
every flag.
"""

from namr import config
from namr.nightly import notice, reindexing
from namr.nightly.reindexing import ReindexConfig


def main() -> None:
    """Load the config, reindex, and say what came of it."""
    night = config.load(ReindexConfig, description=__doc__ or "")
    with notice.failures_told(night.notify_url):
        done = reindexing.reindex(night)
    told = notice.of_report(done)
    notice.tell(night.notify_url, told)
    print(told.text)


if __name__ == "__main__":
    config.run(main)
