"""What a night of one per cent new images costs, against building all of it: time and bytes.

    python -m tests.benchmarks.night [--images 100000] [--new 1000] [--dim 128] [--rounds 3]

Made-up embeddings, as in `scale`, on a local disk; a tenth as many old images as there are new ones are taken
out. Both sides go through what the night does after extraction: build (or add), open, measure on held-out
images, hold against the release that serves, look for lost images, verify, publish. Ray is up and has run
tasks before anything is timed. Left out on both sides is the page of the report, which takes as long for
both. Before anything is compared the answers of the release that was added to are compared with those of one
index over the same images.

Of the median night the share of each step is told, as a share of the full build's time. The last line's ratio
is that of the worse of the two: what is allowed (5 % of the time, 3 % of the bytes) over what it took.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from namr import ray_connection
from namr.data import datasets
from namr.nightly import (
    assessment,
    building,
    comparison,
    drift,
    kept_truth,
    latency,
    losses,
    measuring,
)
from namr.nightly.aging import AgingConfig
from namr.nightly.assessment import AssessmentConfig
from namr.nightly.measuring import Settings
from namr.release import publication, releases, templates
from namr.release.build import BuildConfig
from namr.release.releases import Release
from namr.search import opening
from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.store import manifests, scratch, storage
from namr.store.cache import Cache
from tests import scale_stages
from tests.scale_stages import MODEL, Gallery

TIME_SHARE, BYTES_SHARE = 0.05, 0.03
CONFIG = BuildConfig(num_parts=2)
STEPS: dict[str, tuple[Any, str]] = {
    "build": (building, "make"),
    "open": (opening, "opened"),
    "true neighbours": (kept_truth, "follow"),
    "recall": (assessment, "assess"),
    "against what serves": (comparison, "compare"),
    "drift": (drift, "measured"),
    "latency": (latency, "measured"),
    "lost images": (losses, "lost_images"),
    "publish": (publication, "publish"),
}
SETTINGS = Settings(CONFIG, AssessmentConfig(), AgingConfig())


class Night(NamedTuple):
    """What one night took."""

    release: Release
    build_s: float
    measure_s: float
    publish_s: float
    num_bytes: int
    how: str
    steps: dict[str, float]
    """seconds of each of `STEPS`"""

    @property
    def seconds(self) -> float:
        return self.build_s + self.measure_s + self.publish_s


def main() -> None:
    options = parse()
    ray_connection.connect(num_cpus=options.threads)
    ray_connection.in_order("starting", warm_up, range(2 * options.threads))
    rounds = []
    for number in range(options.rounds):
        with scratch.folder("night-") as folder:
            rounds.append(one_round(folder, options, checks=number == 0))
            print(f"round {number}: {told(*rounds[-1])}", flush=True)
    time_share = statistics.median(night.seconds / full.seconds for full, night in rounds)
    build_share = statistics.median(night.build_s / full.build_s for full, night in rounds)
    bytes_share = statistics.median(night.num_bytes / full.num_bytes for full, night in rounds)
    shares = {
        name: 100 * statistics.median(night.steps[name] / full.seconds for full, night in rounds)
        for name in STEPS
    }
    print("of a full build's time: " + ", ".join(f"{name} {share:.2f} %" for name, share in shares.items()))
    print(
        f"{options.images:,} x {options.dim}, {options.new:,} new: {100 * time_share:.1f} % of the time "
        f"({100 * TIME_SHARE:.0f} % allowed; of the build alone {100 * build_share:.1f} %), "
        f"{100 * bytes_share:.1f} % of the bytes ({100 * BYTES_SHARE:.0f} % allowed)"
    )
    print(f"night ratio {min(TIME_SHARE / time_share, BYTES_SHARE / bytes_share):.2f} target 1.0")


def warm_up(_: int) -> None:
    """In each worker what a build imports; long enough that all of them get one."""
    import namr.release.build  # noqa: F401

    time.sleep(1)


def parse() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--new", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def one_round(folder: Path, options: Any, *, checks: bool) -> tuple[Night, Night]:
    gallery = Gallery(folder=folder, num_samples=options.images, dim=options.dim, rows_per_shard=10_000)
    scale_stages.make(gallery)
    with timed() as steps:
        full = a_night(gallery, None)._replace(steps=dict(steps))
    scale_stages.grow(gallery, options.new, num_dead=options.new // 10)
    with timed() as steps:
        night = a_night(gallery, full.release)._replace(steps=dict(steps))
    assert night.how.startswith("added to")
    if checks:
        check(gallery, night.release)
    return full, night


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds of each of `STEPS`, while they run inside."""
    steps = dict.fromkeys(STEPS, 0.0)

    def timing(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return step(*given, **named)
            finally:
                steps[name] += time.perf_counter() - began

        return run

    with ExitStack() as stack:
        for name, (module, function) in STEPS.items():
            patch = mock.patch.object(module, function, timing(name, getattr(module, function)))
            stack.enter_context(patch)
        yield steps


def a_night(gallery: Gallery, current: Release | None) -> Night:
    before, root, dataset = stored_bytes(gallery), gallery.releases_uri, gallery.dataset()
    cache = Cache(gallery.folder / "cache", max_bytes=1 << 40)
    expected, began = releases.read_pointer(root), time.perf_counter()
    made = building.make(
        dataset,
        gallery.embeddings_uri,
        root,
        CONFIG,
        model_digest=MODEL,
        metric="l2",
        current=current,
        is_alike=True,
        cache=cache,
    )
    built = time.perf_counter()
    draft = scale_stages.manifest_of(gallery, made.built, release_id=f"night-{dataset.version.version}")
    measured = measuring.measure(Release(root, draft), made, SETTINGS, current=current, cache=cache)
    report = releases.store(root, "report.json", manifests.encode_manifest(measured.report))
    manifest, told_s = replace(measured.manifest, report_json=report), time.perf_counter()
    if current:
        assert losses.lost_images(Release(root, manifest), dataset, current=current).num == 0
    release = publication.publish(root, manifest, expected=expected)
    ended = time.perf_counter()
    return Night(
        release,
        built - began,
        told_s - built,
        ended - told_s,
        stored_bytes(gallery) - before,
        made.how,
        {},
    )


def stored_bytes(gallery: Gallery) -> int:
    """All that lies under the releases, what builds left behind included."""
    root = gallery.releases_uri
    return sum(storage.size(storage.join(root, name)) for name in storage.list_names(root))


def check(gallery: Gallery, release: Release) -> None:
    """The same answers as one index over the same images, all candidates compared."""
    cache = Cache(gallery.folder / "cache", max_bytes=1 << 40)
    whole = building.build.build(
        datasets.open_version(gallery.dataset_uri),
        gallery.embeddings_uri,
        gallery.releases_uri,
        replace(CONFIG, index_key=release.manifest.index_key),
        model_digest=MODEL,
        metric="l2",
        template=templates.of_release(release),
    )
    one = Release(gallery.releases_uri, scale_stages.manifest_of(gallery, whole, release_id="whole"))
    queries = np.random.default_rng(5).standard_normal((2, 50, gallery.dim), dtype=np.float32)
    found = [
        Searcher.of(each, cache=cache, query_model=None).search_arrays(
            queries[0], 1 + 0.1 * queries[1], options=SearchOptions(nprobe=4, depth=gallery.num_samples)
        )
        for each in (release, one)
    ]
    np.testing.assert_array_equal(found[0].ids, found[1].ids)
    np.testing.assert_array_equal(found[0].distances, found[1].distances)


def told(full: Night, night: Night) -> str:
    return "; ".join(
        f"{name} build {each.build_s:.2f} + measure {each.measure_s:.2f} + publish {each.publish_s:.2f} s, "
        f"{each.num_bytes / 1e6:.2f} MB"
        for name, each in (("full", full), ("night", night))
    )


if __name__ == "__main__":
    main()
