"""The five data sets on which the field compares itself, read from the files as their authors give them out.

    cub:<folder>:<split>        CUB-200-2011 (Wah et al., 2011): train, test
        images.txt              "<image> <path below images/>"
        image_class_labels.txt  "<image> <class>", 1 to 200
        classes.txt             "<class> <name>"
        images/                 classes 1 to 100 are to train on, 101 to 200 to test
    cars196:<folder>:<split>    Cars-196 (Krause et al., 2013): train, test
        cars_annos.mat          `annotations`: relative_im_path, class, and more; `class_names`
        car_ims/                classes 1 to 98 are to train on, 99 to 196 to test
      or, where there is no cars_annos.mat, the same images as the development kit has them
        devkit/cars_meta.mat    `class_names`
        devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat     `annotations`: fname, class, and more
        cars_train/, cars_test/ (halves of every class, for classification: both are read)
    sop:<folder>:<split>        Stanford Online Products (Oh Song et al., CVPR 2016): train, test
        Ebay_train.txt, Ebay_test.txt    a header, then "<image> <class> <super class> <path>"
    inshop:<folder>:<split>     In-Shop of DeepFashion (Liu et al., CVPR 2016): train, query, gallery
        Eval/list_eval_partition.txt     how many, a header, then "<path below Img/> <item> <split>"
        Img/img/
    vehicleid:<folder>:<split>  VehicleID (Liu et al., CVPR 2016): train, test_800, test_1600, test_2400
        train_test_split/train_list.txt, test_list_800.txt and so on    "<name of the image> <vehicle>"
        image/<name>.jpg

No class is both trained on and tested with; In-Shop's query and gallery are one test, and VehicleID's lists
are tests of three sizes. The key of an image is its path as it is listed, without extension; its label the
name of its class, or the number where classes have none.

Not covered: bounding boxes, attributes, the lists' other columns, downloading.
"""

import io
import posixpath
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from namr.errors import ConfigError, ObjectMissing
from namr.store import storage

_DAMAGED = (
    *(ValueError, TypeError, NotImplementedError, OSError, IndexError, MatReadError, zlib.error),
    UnboundLocalError,  # where a variable says to be of a type that there isn't
)
"""What scipy's reader raises on damaged bytes."""


class Listed(NamedTuple):
    """An image, as a benchmark lists it."""

    key: str
    location: str
    label: str


@dataclass(frozen=True)
class _Files:
    """A benchmark's folder, in which every file has to be."""

    folder: str
    """path or URI"""
    benchmark: "_Benchmark"

    def read(self, name: str) -> bytes:
        try:
            return storage.read(self.uri(name))
        except ObjectMissing as error:
            raise ConfigError(f"{self.uri(name)} is missing; {self.benchmark.advice}") from error

    def lines(self, name: str) -> list[str]:
        """Of a text file, without their ends."""
        try:
            return self.read(name).decode().splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.uri(name)} is no text: {error}; {self.benchmark.advice}") from error

    def rows(self, name: str, columns: str, *, num_headers: int = 0) -> Iterator[tuple[int, list[str]]]:
        """The number of each line and its words, as many as `columns` has; empty lines are passed over."""
        for number, line in enumerate(self.lines(name), start=1):
            words = line.split()
            if number <= num_headers or not words:
                continue
            if len(words) != len(columns.split()):
                raise self.wrong(name, number, f"is {line!r}; expected {columns!r}")
            yield number, words

    def number(self, name: str, line: int, word: str, *, at_most: int | None = None) -> int:
        """A class number, 1 and up."""
        if not (word.isascii() and word.isdigit() and 1 <= int(word) <= (at_most or int(word))):
            wanted = f"from 1 to {at_most}" if at_most else "of 1 or more"
            raise self.wrong(name, line, f"has the class {word!r}; expected a number {wanted}")
        return int(word)

    def wrong(self, name: str, line: int, what: str) -> ConfigError:
        return ConfigError(f"{self.uri(name)}, line {line} {what}; {self.benchmark.advice}")

    def listed(self, path: str, label: str, *, below: str = "") -> Listed:
        """An image whose path, below a folder of this name, is its identity."""
        location = storage.join(self.folder, below, path) if below else self.uri(path)
        return Listed(posixpath.splitext(path)[0], location, label)

    def uri(self, name: str) -> str:
        return storage.join(self.folder, name)


@dataclass(frozen=True)
class _Benchmark:
    splits: tuple[str, ...]
    read: Callable[[_Files, str], Iterator[Listed]]
    archives: str
    """What its authors call the files to be had, and where they go."""

    @property
    def advice(self) -> str:
        """What to do where something isn't as it should be."""
        return f"expected {self.archives}: check the folder, or extract it anew"


def is_one(source: str) -> bool:
    """Whether a source is named like one of these."""
    kind, colon, _ = source.partition(":")
    return bool(colon) and kind in _BENCHMARKS


def read(source: str) -> Iterator[Listed]:
    """The images of one split, in the order of its list; ConfigError for what is missing or can't be read."""
    kind, _, rest = source.partition(":")
    folder, _, split = rest.rpartition(":")
    benchmark = _BENCHMARKS[kind]
    if not folder or split not in benchmark.splits:
        raise ConfigError(
            f"{source}: expected {kind}:<folder>:<split>, where the split is one of "
            f"{', '.join(benchmark.splits)}"
        )
    yield from benchmark.read(_Files(storage.absolute(folder), benchmark), split)


def advice(source: str) -> str:
    """Which files a source of these needs, and where."""
    return _BENCHMARKS[source.partition(":")[0]].advice


def _cub(files: _Files, split: str) -> Iterator[Listed]:
    names = dict(words for _, words in files.rows("classes.txt", "class name"))
    class_of: dict[str, int] = {}
    for line, (image, number) in files.rows("image_class_labels.txt", "image class"):
        class_of[image] = files.number("image_class_labels.txt", line, number, at_most=200)
    for line, (image, path) in files.rows("images.txt", "image path"):
        if image not in class_of:
            raise files.wrong("images.txt", line, f"has image {image}, which image_class_labels.txt hasn't")
        of_image = class_of[image]
        if str(of_image) not in names:
            raise files.wrong("images.txt", line, f"is of class {of_image}, which classes.txt hasn't")
        if (of_image <= 100) == (split == "train"):
            yield files.listed(path, names[str(of_image)], below="images")


def _cars(files: _Files, split: str) -> Iterator[Listed]:
    if storage.exists(files.uri("cars_annos.mat")) or not storage.exists(files.uri("devkit/cars_meta.mat")):
        names = _class_names(files, "cars_annos.mat")
        lists = {"cars_annos.mat": ("relative_im_path", "")}
    else:
        names = _class_names(files, "devkit/cars_meta.mat")
        lists = {
            "devkit/cars_train_annos.mat": ("fname", "cars_train/"),
            "cars_test_annos_withlabels.mat": ("fname", "cars_test/"),
        }
    for name, (field, below) in lists.items():
        annotations = _matlab(files, name, "annotations")
        if not {field, "class"} <= set(annotations.dtype.names or ()):
            raise ConfigError(
                f"{files.uri(name)}: its annotations have the fields {annotations.dtype.names}; expected "
                f"{field} and class; {files.benchmark.advice}"
            )
        for place, (path, number) in enumerate(zip(annotations[field], annotations["class"], strict=True), 1):
            if not isinstance(path, str) or number not in range(1, 197):
                raise ConfigError(
                    f"{files.uri(name)}: annotation {place} has the path {path!r} and the class {number!r}; "
                    f"expected a text and a number from 1 to 196; {files.benchmark.advice}"
                )
            if (number <= 98) == (split == "train"):
                yield files.listed(below + path, f"{int(number):03d} {names[int(number) - 1]}")


def _class_names(files: _Files, name: str) -> list[str]:
    names = [str(each) for each in _matlab(files, name, "class_names")]
    if len(names) != 196:
        raise ConfigError(f"{files.uri(name)} names {len(names)} classes, not 196; {files.benchmark.advice}")
    return names


def _matlab(files: _Files, name: str, variable: str) -> np.ndarray[Any, Any]:
    """A variable of a .mat file, without its axes of length 1."""
    data = io.BytesIO(files.read(name))
    try:
        found: Mapping[str, Any] = scipy.io.loadmat(data, squeeze_me=True)
    except _DAMAGED as error:
        raise ConfigError(f"{files.uri(name)} is no .mat file: {error}; {files.benchmark.advice}") from error
    if variable not in found:
        raise ConfigError(f"{files.uri(name)} has no variable {variable}; {files.benchmark.advice}")
    return np.atleast_1d(found[variable])


def _products(files: _Files, split: str) -> Iterator[Listed]:
    name, columns = f"Ebay_{split}.txt", "image_id class_id super_class_id path"
    _check_header(files, name, columns, line=1)
    for line, (_, number, _, path) in files.rows(name, columns, num_headers=1):
        yield files.listed(path, str(files.number(name, line, number)))


def _in_shop(files: _Files, split: str) -> Iterator[Listed]:
    name, columns = "Eval/list_eval_partition.txt", "image_name item_id evaluation_status"
    first = (files.lines(name) or [""])[0].strip()
    if not first.isdigit():
        raise files.wrong(name, 1, f"is {first!r}; expected the number of images")
    _check_header(files, name, columns, line=2)
    num_rows = 0
    for line, (path, item, status) in files.rows(name, columns, num_headers=2):
        num_rows += 1
        if status not in ("train", "query", "gallery"):
            raise files.wrong(name, line, f"has the status {status!r}; expected train, query or gallery")
        if status == split:
            yield files.listed(path, item, below="Img")
    if num_rows != int(first):
        raise files.wrong(name, 1, f"says {first} images, and {num_rows} are listed")


def _vehicles(files: _Files, split: str) -> Iterator[Listed]:
    kind, _, size = split.partition("_")
    name = f"train_test_split/{kind}_list{'_' if size else ''}{size}.txt"
    for _, (image, vehicle) in files.rows(name, "image vehicle"):
        yield files.listed(f"{image}.jpg", vehicle, below="image")


def _check_header(files: _Files, name: str, columns: str, *, line: int) -> None:
    lines = files.lines(name)
    found = lines[line - 1] if len(lines) >= line else ""
    if found.split() != columns.split():
        raise files.wrong(name, line, f"is {found!r}; expected {columns!r}")


_BENCHMARKS = {
    "cub": _Benchmark(
        ("train", "test"),
        _cub,
        "the folder CUB_200_2011 of the archive CUB_200_2011.tgz, as it is",
    ),
    "cars196": _Benchmark(
        ("train", "test"),
        _cars,
        "cars_annos.mat and, beside it, the folder car_ims of the archive car_ims.tgz; or the folders devkit "
        "(car_devkit.tgz), cars_train and cars_test, and cars_test_annos_withlabels.mat beside them",
    ),
    "sop": _Benchmark(
        ("train", "test"),
        _products,
        "the folder Stanford_Online_Products of the archive Stanford_Online_Products.zip, as it is",
    ),
    "inshop": _Benchmark(
        ("train", "query", "gallery"),
        _in_shop,
        "the folder of DeepFashion's In-shop Clothes Retrieval Benchmark, with Eval/list_eval_partition.txt, "
        "and with its Img/img.zip extracted to Img/img",
    ),
    "vehicleid": _Benchmark(
        ("train", "test_800", "test_1600", "test_2400"),
        _vehicles,
        "the folder VehicleID_V1.0, which its authors at PKU give on request, with image/ and "
        "train_test_split/ in it",
    ),
}
