"""The P x K loader against a plain webdataset pipeline: same shards, transforms, number of workers.

    python -m tests.benchmarks.loader [--images 6000] [--size-px 96] [--num-workers 2] [--rounds 3]

Synthetic JPEGs of 160 x 160 (or --source FOLDER of class folders) are packed once by class into a SeaweedFS
that this starts. webdataset reads the shards from front to back through a shuffle buffer, as it is meant to
be used, decodes by its own "pil" and augments by Pillow's resize, transpose and convert (torchvision's
transforms of these names take half as long again); namr reads P classes x K samples from anywhere. Each image
of a first pass is checked to be the same on both sides, pixel for pixel, with the same random numbers; photos
so large that namr decodes them smaller may differ by half a level on average.

cached: the shards lie on local disk, both read them there.
cold:   nothing is cached; both read through a proxy that waits 30 ms before each S3 request. namr fills its
        shard cache meanwhile. Counted from the first batch on, over a pass as long as the data set.
remote: the same, with a cache too small for any shard: ranged reads alone, where webdataset streams.

Rounds alternate between the two sides; each ratio is the median over rounds. The last line is the worst of
the three against its target.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageFilter

from namr.data import datasets, images, loading, reading, sample_index, sampling
from namr.data.datasets import Dataset
from namr.data.images import AugmentConfig, Preprocessing
from namr.data.loading import LoaderConfig
from namr.data.sampling import PKConfig
from namr.store import storage

AUGMENT = AugmentConfig()
SEED = 3
TARGETS = {"cached": 1.3, "cold": 1.2, "remote": 0.8}
GREY = np.array([0.299, 0.587, 0.114])
MOST_DIFFERENCE = 0.5
"""of 255, on average, where a JPEG is decoded smaller than it is stored"""


class Setting(NamedTuple):
    """Where both sides read from, and what they make of it."""

    dataset: Dataset
    prep: Preprocessing
    batches: PKConfig
    num_workers: int
    num_batches: int


def main() -> None:
    from infra import services  # here, so that loader workers don't import it and Ray when they start
    from tests.benchmarks.delay import delaying_proxy

    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="namr-loader-") as name:
        folder = Path(name)
        with (
            services.object_store(folder / "store") as store,
            delaying_proxy(store.endpoint, 0.03) as delayed,
        ):
            os.environ.update(store.environment)
            remote = pack(
                options.source or draw_images(folder / "images", options.images),
                store.create_bucket("loader"),
            )
            os.environ["AWS_ENDPOINT_URL"] = delayed  # read by each process when it first needs S3
            local = copy(remote, folder / "local")
            run(options, local, remote, folder)


def run(options: Any, local: Dataset, remote: Dataset, folder: Path) -> None:
    prep = Preprocessing(
        size_px=options.size_px, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", fit="squash"
    )
    batches = PKConfig(classes_per_batch=16, samples_per_class=4)
    num_batches = local.num_live // batches.num_samples
    setting = Setting(local, prep, batches, options.num_workers, num_batches)
    num_bytes = sum(entry.tar.size_bytes for entry in local.shards)
    print(
        f"{local.num_live} images in {len(local.shards)} shards, {num_bytes / 1e6:.0f} MB; "
        f"{options.num_workers} workers, batches of {batches.num_samples} at {options.size_px} px",
        flush=True,
    )
    check_same_pixels(setting, folder)
    ratios = {}
    for name in TARGETS:
        rates: dict[str, list[float]] = {"namr": [], "webdataset": []}
        for turn in range(options.rounds):
            here = setting._replace(dataset=local if name == "cached" else remote)
            config = LoaderConfig(
                num_workers=options.num_workers,
                cache_folder=folder / ("cache" if name == "cached" else f"{name}{turn}"),
                cache_bytes=1 if name == "remote" else 1 << 40,
            )
            rates["namr"].append(images_per_s(namr_loader(here, config), batches.num_samples))
            rates["webdataset"].append(images_per_s(webdataset_loader(here), batches.num_samples))
        ratios[name] = statistics.median(
            ours / theirs for ours, theirs in zip(rates["namr"], rates["webdataset"], strict=True)
        )
        shown = {side: " ".join(f"{rate:.0f}" for rate in found) for side, found in rates.items()}
        print(
            f"{name}: images/s namr {shown['namr']}, webdataset {shown['webdataset']}: {ratios[name]:.2f}",
            flush=True,
        )
    worst = min(TARGETS, key=lambda name: ratios[name] / TARGETS[name])
    print(f"loader ratio {ratios[worst]:.2f} target {TARGETS[worst]}")


def parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--source", help="a folder of class folders instead of synthetic images")
    parser.add_argument("--size-px", type=int, default=96)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def draw_images(folder: Path, num: int) -> str:
    """Blurred noise as JPEG, 40 images a class: about as many bytes and as hard to decode as photographs."""
    rng = np.random.default_rng(0)
    for number in range(num):
        path = folder / f"class{number // 40:04d}" / f"{number % 40}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (160, 160, 3), np.uint8))
        noise.filter(ImageFilter.GaussianBlur(1)).save(path, quality=90)
    return str(folder)


def pack(source: str, bucket: str) -> Dataset:
    from namr import ray_connection
    from namr.data import packing

    packing.pack(packing.PackingConfig(source=source, dataset_uri=f"{bucket}/set", shard_bytes=8 << 20))
    ray_connection.disconnect()
    return datasets.open_version(f"{bucket}/set")


def copy(remote: Dataset, folder: Path) -> Dataset:
    """The same dataset on local disk."""
    for name in storage.list_names(remote.uri):
        storage.download(storage.join(remote.uri, name), folder / name)
    return datasets.open_version(str(folder))


def namr_loader(setting: Setting, config: LoaderConfig) -> Iterator[torch.Tensor]:
    loader = loading.make_loader(
        setting.dataset,
        config,
        batches=setting.batches,
        seed=SEED,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=setting.num_batches,
        prep=setting.prep,
        augment=AUGMENT,
    )
    return (batch.pixels for batch in loader)


def webdataset_loader(setting: Setting) -> Iterator[torch.Tensor]:
    """Shards in a shuffled order, over and over, each worker its own; a shuffle buffer; batches."""
    pipeline = wds.DataPipeline(
        wds.ResampledShards(
            [setting.dataset.shard_uri(entry) for entry in setting.dataset.shards], seed=SEED
        ),
        samples_of_shards,
        wds.shuffle(1000),
        wds.decode("pil"),
        wds.map(partial(prepared, prep=setting.prep)),
        wds.batched(setting.batches.num_samples, collation_fn=collated),
    ).with_epoch(math.ceil(setting.num_batches / max(1, setting.num_workers)))  # of each worker
    loader = torch.utils.data.DataLoader(
        pipeline,
        batch_size=None,
        num_workers=setting.num_workers,
        multiprocessing_context="spawn" if setting.num_workers else None,
        prefetch_factor=2 if setting.num_workers else None,
    )
    return (pixels for pixels, _, _ in loader)


def samples_of_shards(sources: Iterator[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """webdataset's own reading of tars, over the file objects that namr uses too."""
    opened = ({"url": s["url"], "stream": storage.open_stream(s["url"])} for s in sources)
    yield from wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(opened))


def prepared(sample: dict[str, Any], prep: Preprocessing) -> tuple[torch.Tensor, str, int]:
    seed = hash_of(sample["__key__"])
    return in_steps(sample["jpg"], prep, seed), sample["json"]["__key__"], seed


def in_steps(image: Image.Image, prep: Preprocessing, seed: int) -> torch.Tensor:
    """`images.augment` for "squash" as one would write it with Pillow: uint8 (3, size, size)."""
    draw = np.random.default_rng(seed).random(8)
    area, root_aspect = AUGMENT.min_area + (1 - AUGMENT.min_area) * draw[0], (4 / 3) ** (draw[1] - 0.5)
    width = min(image.width, image.width * math.sqrt(area) * root_aspect)
    height = min(image.height, image.height * math.sqrt(area) / root_aspect)
    left, top = (image.width - width) * draw[2], (image.height - height) * draw[3]
    box = (left, top, left + width, top + height)
    made = image.resize((prep.size_px, prep.size_px), Image.Resampling.BILINEAR, box=box)
    if draw[4] < 0.5:
        made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    brightness, contrast, saturation = 1 + AUGMENT.color_jitter * (2 * draw[5:8] - 1)
    mean_grey = np.array(made.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) @ GREY
    matrix = contrast * brightness * (saturation * np.eye(3) + (1 - saturation) * GREY)
    offset = np.full((3, 1), brightness * (1 - contrast) * mean_grey)
    made = made.convert("RGB", tuple(np.hstack([matrix, offset]).ravel().tolist()))
    return torch.from_numpy(np.ascontiguousarray(np.asarray(made).transpose(2, 0, 1)))


def hash_of(key: str) -> int:
    return int(storage.sha256(key.encode())[:12], 16)


def collated(samples: list[tuple[torch.Tensor, str, int]]) -> tuple[torch.Tensor, list[str], list[int]]:
    pixels, keys, seeds = zip(*samples, strict=True)
    return torch.stack(pixels), list(keys), list(seeds)


def images_per_s(batches: Iterator[torch.Tensor], num_per_batch: int) -> float:
    """From the first batch on, so that the start of processes isn't counted."""
    next(batches)
    started, num = time.perf_counter(), 0
    for pixels in batches:
        assert pixels.shape[0] == num_per_batch, pixels.shape
        num += num_per_batch
    return num / (time.perf_counter() - started)


def check_same_pixels(setting: Setting, folder: Path) -> None:
    """Every sample that webdataset yields is what namr makes of the same key and seed."""
    index = sample_index.build(setting.dataset, folder / "cache")
    reader = reading.SampleReader(setting.dataset, cache=None)
    id_of = {
        key: id
        for table in setting.dataset.all_samples()
        for key, id in zip(table.keys, table.ids, strict=True)
    }
    sources = [{"url": setting.dataset.shard_uri(entry)} for entry in setting.dataset.shards]
    num, differs = 0, 0.0
    for sample in wds.decode("pil")(samples_of_shards(iter(sources))):
        pixels, key, seed = prepared(sample, setting.prep)
        ids = np.array([id_of.pop(key)])
        places = index.places(ids)
        (data,) = reader.read(ids, index.offsets(places), index.sizes(places))
        ours = images.augment(data, setting.prep, AUGMENT, seed=seed)
        difference = float(np.abs(pixels.numpy().astype(np.int16) - ours).mean())
        is_small = images.decode(data, min_side_px=3 * setting.prep.size_px).size != sample["jpg"].size
        assert difference == 0 or is_small, key
        num, differs = num + 1, differs + difference
    assert not id_of, f"webdataset yielded {len(id_of)} samples fewer"
    assert differs / num < MOST_DIFFERENCE, differs / num
    loader = loading.make_loader(
        setting.dataset,
        LoaderConfig(num_workers=0, cache_folder=folder / "cache"),
        batches=setting.batches,
        seed=SEED,
        rank=0,
        world_size=1,
        first_step=7,
        num_steps=1,
        prep=setting.prep,
        augment=AUGMENT,
    )
    (batch,) = list(loader)
    places = index.places(batch.ids.numpy())
    found = reader.read(batch.ids.numpy(), index.offsets(places), index.sizes(places))
    seeds = sampling.augmentation_seeds(SEED, 7, np.arange(len(found))).tolist()
    for place, (data, seed) in enumerate(zip(found, seeds, strict=True)):
        ours = images.augment(data, setting.prep, AUGMENT, seed=seed)
        assert np.array_equal(batch.pixels[place].numpy(), ours), place
    print(f"{num} images: both sides differ by {differs / num:.3f} of 255 on average", flush=True)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
