"""Where users' images come from: folders, tables, torchvision's and the field's data sets, digits.

A source is written as one word:

    photos/train, s3://bucket/photos     a folder of class folders; images outside of any have no label
    items.csv, s3://bucket/items.parquet columns `path` (or `uri`), `label`, `key` (both optional), the rest
                                         are fields; relative paths are relative to the table
    digits                               scikit-learn's 1,797 handwritten digits, enlarged to 32 px
    torchvision:Omniglot                 any torchvision data set of labelled images, all its splits;
    torchvision:Flowers102:test          or one of them
    cub:CUB_200_2011:test                one split of a data set that metric learning is measured on, from the
                                         folder that has its files: cub, cars196, sop, inshop, vehicleid

The key of an image is its path in the folder or table without the extension, unless the table has keys.
What is no image (other suffixes, hidden files and folders, pipes and devices) is passed over and counted. An
image that can't be read, or whose name can't be stored as text, is refused by itself and doesn't keep the
others out. Not covered: the files of `benchmarks`, reading and checking the images (`packing` does), and
foreign shards.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import sklearn.datasets
import torchvision.datasets

from namr.data import benchmarks, files, images
from namr.data.leftovers import PassedOver, RefusedImage, Tally, printable
from namr.data.offered import Offered, SourceImage
from namr.data.shards import EXTENSIONS, Scalar
from namr.errors import ConfigError, ImageRefused, ManifestError, StorageError
from namr.store import scratch, storage, tables

Classes = Literal["all", "first_half", "second_half"]

_SPLIT_NAMES = {"train", "test", "val", "valid", "validation"}
_TORCHVISION_SPLITS = ("train", "val", "test", "trainval")
_DIGIT_ENLARGEMENT = 4


@dataclass(frozen=True)
class Source:
    """All that a source offers."""

    images: Offered
    """by ascending key"""
    refused: tuple[RefusedImage, ...]
    """of all classes"""
    passed_over: tuple[PassedOver, ...]


class _Leftovers:
    """Collects what is not offered."""

    def __init__(self) -> None:
        self.refused: list[RefusedImage] = []
        self.tally = Tally()

    def refuse(self, key: str, location: str, reason: str) -> None:
        self.refused.append(RefusedImage(key=printable(key), location=printable(location), reason=reason))


def open_source(source: str, *, classes: Classes, download_folder: Path) -> Source:
    """List what a source offers, of all classes or of one half of the sorted labels.

    Raises ConfigError if it is empty, can't be understood, or offers a key twice.
    """
    kind, _, rest = source.partition(":")
    leftovers = _Leftovers()
    found: Iterable[SourceImage]
    if source == "digits":
        found = _digits()
    elif kind == "torchvision":
        found = _torchvision(rest, download_folder)
    elif benchmarks.is_one(source):
        found = _benchmark(source, leftovers)
    elif PurePosixPath(source).suffix.lower() in (".csv", ".parquet", ".pq"):
        found = _table(source, leftovers)
    else:
        found = _folder(source, leftovers)
    offered = Offered.of(found, source=source)
    passed_over = leftovers.tally.total()
    if not len(offered) and not leftovers.refused:
        others = f", but {', '.join(map(str, passed_over))}" if passed_over else ""
        raise ConfigError(f"{source} has no images (.{', .'.join(EXTENSIONS)}){others}; check the path")
    if classes != "all":
        _keep_half(offered, classes)
    return Source(offered, tuple(leftovers.refused), passed_over)


def _keep_half(offered: Offered, classes: Classes) -> None:
    labels = list(offered.labels())
    middle = (len(labels) + 1) // 2
    chosen = labels[:middle] if classes == "first_half" else labels[middle:]
    if not chosen:
        raise ConfigError(f"classes is {classes}, and there are {len(labels)} classes; expected at least 2")
    offered.keep_labels(chosen[0], chosen[-1])


def _folder(source: str, leftovers: _Leftovers) -> Iterator[SourceImage]:
    root = storage.absolute(source)
    if storage.is_local(root) and not Path(root).is_dir():
        raise ConfigError(f"{source} is not a folder, a .csv or a .parquet file; check the path")
    top: set[str] = set()
    grandchildren = False
    for name, listed_bytes in files.below(root, leftovers.tally):
        path = PurePosixPath(name)
        if path.suffix.lower().lstrip(".") not in EXTENSIONS:
            leftovers.tally.add(path.suffix.lower() or "no suffix", name)
            continue
        label = path.parts[0] if len(path.parts) > 1 else None
        top.add(label or "")
        grandchildren |= len(path.parts) > 2
        key, location = str(path.with_suffix("")), storage.join(root, name)
        try:
            num_bytes = files.size_of(location)
        except ImageRefused as refusal:
            leftovers.refuse(key, location, refusal.reason)
        else:
            num_bytes = listed_bytes if num_bytes is None else num_bytes
            yield SourceImage(key=key, location=location, label=label, num_bytes=num_bytes)
    if grandchildren and top <= _SPLIT_NAMES:
        raise ConfigError(
            f"{source} holds the splits {', '.join(sorted(top))} and not classes; give one of them, like "
            f"{storage.join(source, max(top))}"
        )


def _table(source: str, leftovers: _Leftovers) -> Iterator[SourceImage]:
    num_before = 0
    for columns in _columns(source):
        yield from _rows(source, columns, num_before, leftovers)
        num_before += len(next(iter(columns.values()), []))


def _rows(
    source: str, columns: Mapping[str, list[Any]], num_before: int, leftovers: _Leftovers
) -> Iterator[SourceImage]:
    """Of some rows of a table, with `num_before` before them."""
    place = "path" if "path" in columns else "uri"
    if place not in columns:
        raise ConfigError(f"{source} has the columns {list(columns)}; expected one called path or uri")
    wrong = next((value for value in columns[place] if not isinstance(value, str | None)), None)
    if wrong is not None:
        raise ConfigError(
            f"{source}: the column {place} holds {type(wrong).__name__} values like {wrong!r}; expected text"
        )
    base = storage.absolute(source).rpartition("/")[0]
    for row in range(len(columns[place])):
        path = columns[place][row] or ""
        is_whole = "://" in path or path.startswith("/")
        location = path if is_whole or not path else storage.join(base, path)
        key = _value(columns, "key", row)
        name = _without_extension(path) if key is None else str(key)
        try:
            if not path or not name:
                raise ImageRefused(f"row {num_before + row + 1} has no {'key' if path else place}")
            num_bytes = files.size_of(location)
        except ImageRefused as refusal:
            leftovers.refuse(name, location or f"{source}, row {num_before + row + 1}", refusal.reason)
            continue
        label = _value(columns, "label", row)
        yield SourceImage(
            key=name,
            location=location,
            label=None if label is None else str(label),
            fields={
                name: _value(columns, name, row) for name in columns if name not in (place, "label", "key")
            },
            num_bytes=num_bytes,
        )


def _benchmark(source: str, leftovers: _Leftovers) -> list[SourceImage]:
    offered = []
    for key, location, label in benchmarks.read(source):
        try:
            num_bytes = files.size_of(location)
        except ImageRefused as refusal:
            leftovers.refuse(key, location, refusal.reason)
        else:
            offered.append(SourceImage(key=key, location=location, label=label, num_bytes=num_bytes))
    if leftovers.refused and not offered:
        first = leftovers.refused[0]
        raise ConfigError(
            f"{source}: none of its {len(leftovers.refused)} images can be read, to begin with "
            f"{first.location}: {first.reason}; {benchmarks.advice(source)}"
        )
    return offered


def _columns(source: str) -> Iterator[dict[str, list[Any]]]:
    uri = storage.absolute(source)
    try:
        if storage.is_local(uri):
            yield from tables.read_rows(Path(uri))
            return
        with scratch.folder("table-") as folder:
            path = Path(folder) / PurePosixPath(uri).name
            storage.download(uri, path)
            yield from tables.read_rows(path)
    except UnicodeDecodeError as error:
        raise ManifestError(f"{source} holds text that is not UTF-8: {error}; write it anew") from error


def _value(columns: Mapping[str, list[Any]], name: str, row: int) -> Scalar:
    """A field of a table; what JSON has no word for as text, NaN as none."""
    value = columns[name][row] if name in columns else None
    if value is None or value != value:
        return None
    return value if isinstance(value, str | int | float | bool) else str(value)


def _without_extension(path: str) -> str:
    stem, dot, extension = path.rpartition(".")
    return stem if dot and extension.lower() in EXTENSIONS else path


def _digits() -> Iterator[SourceImage]:
    bunch = sklearn.datasets.load_digits()
    square = np.ones((_DIGIT_ENLARGEMENT, _DIGIT_ENLARGEMENT))
    for row, (values, digit) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        pixels = np.kron(values * (255 / 16), square).round().astype(np.uint8)
        data = images.encode_png(pixels)
        key = f"{digit}/{row:04d}"
        yield SourceImage(
            key=key, location=f"digits[{row}]", label=str(digit), num_bytes=len(data), data=data
        )


def _torchvision(wanted: str, download_folder: Path) -> Iterator[SourceImage]:
    """Files are taken as they are where the data set reads files, and as PNG where it holds arrays."""
    name, _, split = wanted.partition(":")
    cls = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(cls) or "download" not in inspect.signature(cls).parameters:
        raise ConfigError(f"torchvision:{name}: torchvision.datasets has no such data set to download")
    root = download_folder.expanduser().absolute() / name
    root.mkdir(parents=True, exist_ok=True)
    seen: set[Path] = set()
    for split_name, dataset in _splits(cls, root, split):
        classes = getattr(dataset, "classes", None)
        for row in range(len(dataset)):
            image, number = dataset[row]
            if not isinstance(number, int | np.integer):
                raise ConfigError(
                    f"torchvision:{name} has {type(number).__name__} labels; expected class numbers"
                )
            label = str(classes[number]) if classes else f"{number:04d}"
            if isinstance(dataset, torchvision.datasets.Omniglot):  # whose numbers follow os.listdir
                label = "/".join(image.parts[-3:-1])
            if not isinstance(image, Path):
                data = images.encode_png(np.asarray(image.convert("RGB")))
                key = f"{label}/{split_name or 'all'}-{row:06d}"
                where = f"torchvision:{name}:{key}"
                yield SourceImage(key=key, location=where, label=label, num_bytes=len(data), data=data)
            elif image not in seen:
                seen.add(image)
                key, num_bytes = str(image.relative_to(root).with_suffix("")), image.stat().st_size
                yield SourceImage(key=key, location=str(image), label=label, num_bytes=num_bytes)


def _splits(cls: Callable[..., Any], root: Path, wanted: str) -> Iterator[tuple[str, Any]]:
    """The data set of each split, or of the one wanted; torchvision has three ways to ask for a split."""
    parameters = inspect.signature(cls).parameters
    choices: dict[str, dict[str, Any]] = {"": {}}
    if "background" in parameters:
        choices = {"background": {"background": True}, "evaluation": {"background": False}}
    elif "train" in parameters:
        choices = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in parameters:
        choices = {split: {"split": split} for split in ([wanted] if wanted else _TORCHVISION_SPLITS)}
    if wanted and wanted not in choices:
        raise ConfigError(f"split {wanted!r} of {cls.__name__}: expected one of {[c for c in choices if c]}")
    loader = {"loader": Path} if "loader" in parameters else {}
    num_found = 0
    for split in [wanted] if wanted else choices:
        if split == "trainval" and num_found > 1:
            continue  # it is train and val together
        try:
            dataset = cls(root=root, download=True, **choices[split], **loader)
        except ValueError as error:
            if wanted:
                raise ConfigError(f"split {wanted!r} of {cls.__name__}: {error}") from error
            continue  # torchvision's word for a split that this data set doesn't have
        except (OSError, RuntimeError) as error:
            raise StorageError(
                f"torchvision could not download {cls.__name__} to {root}: {error}; "
                "check the internet access, or put its files there"
            ) from error
        num_found += 1
        yield split, dataset
