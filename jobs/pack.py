"""Bring images into a dataset: shards in the WebDataset layout, a sample index, and a new version.

    ray job submit --working-dir . -- python jobs/pack.py --config jobs/configs/pack.toml \
        --source photos/train --dataset-uri s3://bucket/datasets/photos

The same command again packs what is new, and what has another size or label than before (`--compare bytes`
reads all images to find other bytes of the same number). A benchmark's split is a source too: `--source
cub:CUB_200_2011:test`. `--help` explains every flag.
"""

from namr import config
from namr.data import packing
from namr.data.packing import PackingConfig


def main() -> None:
    """Load the config, pack, and say what came of it."""
    report = packing.pack(config.load(PackingConfig, description=__doc__ or ""))
    refused = ", ".join(f"{image.location} ({image.reason})" for image in report.refused[:10])
    passed_over = ", ".join(map(str, report.passed_over))
    print(
        f"packed {report.num_packed} of {report.num_found} images ({report.num_known} known before, "
        f"{report.num_replaced} replaced, {report.num_refused} refused) into {report.num_new_shards} new "
        f"shards; {report.dataset_uri} is at version {report.version}: {report.num_classes} classes, "
        f"{report.num_single_classes} of one image, {report.num_unlabelled} images without a label, "
        f"{report.seconds:.1f} s"
        + (f"; refused among others: {refused}" if refused else "")
        + (f"; passed over, being no images: {passed_over}" if passed_over else "")
    )


if __name__ == "__main__":
    config.run(main)
