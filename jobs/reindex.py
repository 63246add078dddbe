"""The night: embed what is missing, add it to the index, measure, judge, publish and collect.

    ray job submit --working-dir . -- python jobs/reindex.py --config jobs/configs/reindex.toml \
        --dataset-uri s3://bucket/datasets/photos --embeddings-uri s3://bucket/embeddings \
        --releases-uri s3://bucket/releases

New images become one more segment, and what was taken out is hidden; all is built anew only where the model,
the settings or an aged template ask for it. Where nothing is new, or a roll-back holds the current release,
it says so and ends. With --prepare a release of another model is made beside nights and not published, to be
switched to later. Killed anywhere, the same command goes on. While another night is under way it ends at
once, and a release that is not good enough stays unpublished, both with exit code 2 and the reason.
`--help` explains every flag.
"""

from namr import config
from namr.nightly import reindexing
from namr.nightly.reindexing import ReindexConfig


def main() -> None:
    """Load the config, reindex, and say what came of it."""
    done = reindexing.reindex(config.load(ReindexConfig, description=__doc__ or ""))
    manifest, assessed = done.release.manifest, done.report.assessment
    if done.held:
        print(
            f"held: release {manifest.release_id} is pinned since {done.held.since} ({done.held.reason}); "
            "nothing was done. `namr releases unpin` lifts it"
        )
        return
    what = "prepared" if manifest.is_prepared else "published" if done.is_new else "current"
    extracted = done.extracted.num_new if done.extracted else 0
    print(
        f"{what if done.is_new else f'nothing is new; {what} is'} release {manifest.release_id}: "
        f"{manifest.counts.num_indexed} of {manifest.counts.num_samples} images ({extracted} embedded now, "
        f"{manifest.counts.num_refused} refused, {manifest.counts.num_tombstoned} taken out), "
        f"{manifest.index_key}, recall@10 {assessed.recall_at_10:.3f} with {assessed.probed}; model "
        f"{manifest.model_name} {manifest.model_version}, dataset version {manifest.dataset_version}; "
        f"built: {done.report.built}"
        + (f"; {done.report.aged}" if done.report.aged else "")
        + f"; {done.collected}; {done.compacted}"
    )


if __name__ == "__main__":
    config.run(main)
