"""A small release in which it is known what there is to find: near-duplicates, and labels that are wrong.

Six classes of twenty images lie far apart. Image n has the key `digit/<n>`, the class n // 20 as its label,
and is one of scikit-learn's digits to look at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from namr.data.shards import make_id
from namr.reports import self_search
from namr.reports.self_search import SelfSearch, SelfSearchConfig
from namr.search.searcher import Searcher
from namr.search.stages import Plan
from namr.sides import Side
from namr.store.cache import Cache
from tests import small_release
from tests.small_release import Recipe, Vectors

NUM, PER_CLASS, DIM, PER_SHARD = 120, 20, 16, 40


def id_of(number: int) -> int:
    return make_id(number // PER_SHARD, number % PER_SHARD)


def searcher_of(
    root: Path,
    *,
    copies: Mapping[int, int] | None = None,
    labels: Mapping[int, str | None] | None = None,
    index_key: str = "Flat",
    side: Side = "both",
) -> Searcher:
    """copies: an image that lies a hair beside another. labels: those that are not their class's."""
    rng = np.random.default_rng(0)
    centres = 10 * np.eye(DIM)[: NUM // PER_CLASS]
    x = centres[np.arange(NUM) // PER_CLASS] + rng.standard_normal((NUM, DIM))
    for copy, original in (copies or {}).items():
        x[copy] = x[original] + 0.01
    s = rng.uniform(0.8, 1.25, (NUM, DIM))
    number_of = {small_release.digit(number): number for number in range(NUM)}

    def of_images(pictures: list[bytes]) -> Vectors:
        rows = [number_of[picture] for picture in pictures]
        return Vectors(x[rows].astype(np.float32), s[rows].astype(np.float32))

    recipe = Recipe(index_key=index_key, structure_side=side, dim=DIM)
    release = small_release.publish(root, recipe, of_images=of_images)
    searcher = Searcher.of(release, cache=Cache(root / "cache", 1 << 30), query_model=None)
    of_classes = {number: str(number // PER_CLASS) for number in range(NUM)} | dict(labels or {})
    table = replace(small_release.table_of(release), labels=[of_classes[number] for number in range(NUM)])
    return small_release.with_items(searcher, small_release.as_items(table))


def plan_of(searcher: Searcher) -> Plan:
    manifest = searcher.manifest
    side, depth, nprobe = manifest.structure_side, manifest.depth, manifest.nprobe
    return Plan(k=self_search.K, side=side, depth=depth, nprobe=nprobe, exact=False)


def ask(searcher: Searcher, *, most: int = NUM, first_new: int | None = None) -> SelfSearch:
    first_new_id = None if first_new is None else id_of(first_new)
    config = SelfSearchConfig(most_asked=most)
    return self_search.ask(searcher, plan_of(searcher), config, first_new_id=first_new_id)


def numbers_of(ids: np.ndarray) -> Sequence[int]:
    return [int(each >> 32) * PER_SHARD + int(each & 0xFFFFFFFF) for each in ids.tolist()]
