"""The template that all segments of a release are built from: trained on a sample of the embeddings.

    sample of all embeddings -> template, in the work folder and in the releases

The sample goes from task to task by way of the work folder: it may be gigabytes, and the driver holds none of
it. Held-out images are not in it.

Not covered: the single steps (`build_steps`), and when a template has grown too old (`nightly.aging`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from namr import ray_connection
from namr.embed.embeddings import EmbeddingFile
from namr.index import ivf
from namr.index.ivf import Template
from namr.index.planning import IndexPlan
from namr.release import build_steps, releases
from namr.release.build_steps import HeldOut, SampleTask, TrainTask, VectorSource
from namr.release.releases import Release
from namr.store import storage
from namr.store.manifests import StoredObject

_FILES_PER_SAMPLE_TASK = 16

Ids = npt.NDArray[np.int64]


class StoredTemplate(NamedTuple):
    """A template, and where it lies in the releases."""

    template: Template
    stored: StoredObject


def of_release(release: Release) -> StoredTemplate:
    """The template of a release; ManifestError if it is damaged or gone."""
    stored = release.manifest.template
    return StoredTemplate(ivf.load_template(release.read(stored)), stored)


def train(
    source: VectorSource,
    files: Sequence[EmbeddingFile],
    plan: IndexPlan,
    held: HeldOut,
    *,
    seed: int,
    use_gpu: bool,
    work_uri: str,
    releases_uri: str,
) -> StoredTemplate:
    """The template in the work folder, trained now if there is none, stored in the releases."""
    uri = storage.join(work_uri, "template.faiss")
    if not storage.exists(uri):
        picks = picked(files, plan.num_training_vectors, seed=seed)
        batches = [
            picks[start : start + _FILES_PER_SAMPLE_TASK]
            for start in range(0, len(picks), _FILES_PER_SAMPLE_TASK)
        ]
        tasks = [SampleTask(source.of(file for file, _ in some), held, some, work_uri) for some in batches]
        sampled = ray_connection.in_order("sampling embeddings", build_steps.sample, tasks)
        task = TrainTask(sampled, files[0].embedding_dim, plan.key, seed, work_uri, use_gpu)
        (trained,) = ray_connection.in_order("training", build_steps.train, [task], num_gpus=float(use_gpu))
        storage.write_if_absent(uri, trained.data)
        for some in sampled:
            storage.delete(storage.join(work_uri, some.stored.name))
    template = ivf.load_template(storage.read(uri))
    return StoredTemplate(template, releases.store(releases_uri, "template.faiss", template.data))


def picked(files: Sequence[EmbeddingFile], num: int, *, seed: int) -> list[tuple[EmbeddingFile, Ids]]:
    """`num` embedded rows (all where there are fewer), ascending: of each file its share, at random."""
    sizes = [file.num_embedded for file in files]
    shares = np.diff(np.cumsum([0, *sizes]) * min(num, sum(sizes)) // max(1, sum(sizes))).tolist()
    rng = np.random.default_rng(seed)
    return [
        (file, np.sort(rng.choice(file.num_embedded, share, replace=False, shuffle=False)))
        for file, share in zip(files, shares, strict=True)
        if share
    ]
