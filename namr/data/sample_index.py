"""Where every image of a dataset version lies, and its class: memory-mapped columns.

They are written once per node, about 24 bytes a sample, and shared by all ranks and loader workers there.
Class numbers are places in the sorted distinct labels of live samples. Not covered: keys and fields, which
training doesn't need.

Legend: N rows of all shards in order of id, n live and labelled ones, C classes, S shards, b asked for.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from namr.data.datasets import Dataset
from namr.data.sampling import ClassIndex
from namr.data.shards import row_of, shard_of
from namr.store import tables
from namr.store.tables import SampleTable

Ints = npt.NDArray[np.int64]

_UNUSED_AFTER_S = 7 * 24 * 3600.0


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """The columns in a folder; another process that gets this maps the files itself."""

    folder: Path

    @cached_property
    def _columns(self) -> dict[str, npt.NDArray[Any]]:
        return tables.open_columns(self.folder)

    @cached_property
    def class_index(self) -> ClassIndex:
        """For `sampling`: its ids are those of samples, (n,) sorted by class and id."""
        return ClassIndex(ids=self._columns["ids_by_class"], starts=self._columns["class_starts"])

    @cached_property
    def class_names(self) -> list[str]:
        """The label of each class, (C,)."""
        return [str(name) for name in self._columns["class_names"]]

    @property
    def num_classes(self) -> int:
        """C, classes with one image included."""
        return self.class_index.num_classes

    @cached_property
    def labelled_ids(self) -> Ints:
        """(n,) ids of live samples with a label, ascending."""
        return np.sort(self.class_index.ids)

    def places(self, ids: Ints) -> Ints:
        """(b,) rows of the columns for ids."""
        shards = np.searchsorted(self._columns["shard_numbers"], shard_of(ids))
        rows: Ints = self._columns["shard_starts"][shards] + row_of(ids)
        return rows

    def offsets(self, places: Ints) -> Ints:
        """(b,) of the image's first byte in its tar."""
        return np.asarray(self._columns["offsets"][places], np.int64)

    def sizes(self, places: Ints) -> Ints:
        """(b,) bytes of the image."""
        return np.asarray(self._columns["sizes"][places], np.int64)

    def classes(self, places: Ints) -> Ints:
        """(b,) class numbers, -1 for samples that are tombstoned or have no label."""
        return np.asarray(self._columns["classes"][places], np.int64)

    def __reduce__(self) -> tuple[type["SampleIndex"], tuple[Path]]:
        return SampleIndex, (self.folder,)


def build(dataset: Dataset, folder: Path) -> SampleIndex:
    """The sample index of a dataset version in `folder`, written by the first process of a node to ask.

    The others wait for it. Labels are taken from the shards' sample indexes.
    """
    target = folder.expanduser().absolute() / "indexes" / dataset.digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{dataset.digest}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _remove_unused(target.parent)
            with_live = ((table, dataset.live(table.ids)) for table in dataset.all_samples())
            write(target, with_live)
        os.utime(target)
    return SampleIndex(target)


def _remove_unused(folder: Path) -> None:
    """Indexes of versions that nobody opened for a week; who has one mapped keeps it."""
    for path in folder.iterdir():
        if path.is_dir() and path.stat().st_mtime < time.time() - _UNUSED_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)


def write(folder: Path, shards: Iterable[tuple[SampleTable, npt.NDArray[np.bool_]]]) -> SampleIndex:
    """Write the columns of shards, by ascending number, each with the mask of those not tombstoned."""
    numbers: dict[str, int] = {}
    offsets, ids = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    sizes, classes = [np.empty(0, np.uint32)], [np.empty(0, np.int32)]
    for table, live in shards:
        class_of_row = [
            numbers.setdefault(label, len(numbers)) if label is not None and is_live else -1
            for label, is_live in zip(table.labels, live & (table.sizes > 0), strict=True)
        ]
        classes.append(np.array(class_of_row, np.int32))
        offsets.append(table.offsets)
        sizes.append(table.sizes.astype(np.uint32))
        ids.append(table.ids)
    names = sorted(numbers)
    renumbered = np.full(len(names) + 1, -1, np.int32)  # the last, for -1, stays -1
    renumbered[[numbers[name] for name in names]] = np.arange(len(names))
    class_of_sample = renumbered[np.concatenate(classes)]
    by_class, all_ids = ClassIndex.from_labels(class_of_sample), np.concatenate(ids)
    shard_numbers, shard_starts = np.unique(shard_of(all_ids), return_index=True)
    columns: dict[str, npt.NDArray[Any]] = {
        "shard_numbers": shard_numbers,
        "shard_starts": shard_starts.astype(np.int64),
        "offsets": np.concatenate(offsets),
        "sizes": np.concatenate(sizes),
        "classes": class_of_sample,
        "ids_by_class": all_ids[by_class.ids],
        "class_starts": by_class.starts,
        "class_names": np.array(names, np.str_),
    }
    tables.write_columns(folder, columns)
    return SampleIndex(folder)
