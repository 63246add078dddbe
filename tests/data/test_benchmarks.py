"""Benchmarks: each layout gives the split that the field uses, and every broken file or line is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from namr.data import benchmarks, sources
from namr.data.sources import Source
from namr.errors import ConfigError
from namr.store import storage
from tests import small_benchmarks
from tests.small_benchmarks import TREES


def opened(kind: str, root: Path, split: str) -> Source:
    return sources.open_source(f"{kind}:{root}:{split}", classes="all", download_folder=Path("/nowhere"))


def labels(source: Source) -> dict[str | None, int]:
    found = [image.label for image in source.images]
    return {label: found.count(label) for label in sorted(set(found))}


def test_cub_trains_on_the_first_hundred_classes(tmp_path: Path) -> None:
    root = small_benchmarks.cub(tmp_path)
    train, test = (opened("cub", root, split) for split in ("train", "test"))
    assert labels(train) == {"001.Bird_1": 3, "002.Bird_2": 3, "100.Bird_100": 3}
    assert labels(test) == {"101.Bird_101": 3, "102.Bird_102": 3, "200.Bird_200": 3}
    assert test.images[0].key == "101.Bird_101/Bird_0"
    assert test.images[0].location == f"{root}/images/101.Bird_101/Bird_0.jpg"
    assert test.images[0].num_bytes == Path(test.images[0].location).stat().st_size
    assert (test.refused, test.passed_over) == ((), ())


def test_cars_train_on_the_first_98_classes_whatever_half_of_them_an_image_is_in(tmp_path: Path) -> None:
    root = small_benchmarks.cars(tmp_path)
    train, test = (opened("cars196", root, split) for split in ("train", "test"))
    assert labels(train) == {"001 Acme C/V 2012": 3, "098 Acme Sedan 98 2012": 3}
    assert labels(test) == {"099 Acme Sedan 99 2012": 3, "196 Acme Sedan 196 2012": 3}
    assert [image.key for image in train.images] == [f"car_ims/{at:06d}" for at in range(1, 7)]


def test_cars_of_the_development_kit_are_read_from_both_of_its_halves(tmp_path: Path) -> None:
    root = small_benchmarks.cars_devkit(tmp_path)
    train, test = (opened("cars196", root, split) for split in ("train", "test"))
    assert labels(train) == {"001 Acme C/V 2012": 2, "098 Acme Sedan 98 2012": 4}
    assert labels(test) == {"099 Acme Sedan 99 2012": 2, "196 Acme Sedan 196 2012": 4}
    expected = [f"cars_{split}/{at:05d}" for split in ("test", "train") for at in (1, 2, 3)]
    assert [image.key for image in train.images] == expected


def test_one_annotation_is_an_array_too(tmp_path: Path) -> None:
    small_benchmarks.pictures(tmp_path, ["car_ims/000001.jpg"])
    structs = small_benchmarks.structs({"relative_im_path": ["car_ims/000001.jpg"], "class": [np.uint8(196)]})
    names = {"annotations": structs, "class_names": small_benchmarks.car_names()}
    scipy.io.savemat(tmp_path / "cars_annos.mat", names)
    assert labels(opened("cars196", tmp_path, "test")) == {"196 Acme Sedan 196 2012": 1}


def test_products_are_split_by_their_lists(tmp_path: Path) -> None:
    root = small_benchmarks.products(tmp_path)
    assert labels(opened("sop", root, "train")) == {"1": 3, "2": 3}
    test = opened("sop", root, "test")
    assert labels(test) == {"11319": 3, "11320": 3}
    assert test.images[0].key == "chair_final/11319_0"


def test_in_shop_has_a_query_and_a_gallery_of_the_same_items(tmp_path: Path) -> None:
    root = small_benchmarks.in_shop(tmp_path)
    assert labels(opened("inshop", root, "train")) == {"id_00000002": 2, "id_00000080": 2}
    assert labels(opened("inshop", root, "query")) == {"id_00007970": 1, "id_00007982": 1}
    gallery = opened("inshop", root, "gallery")
    assert labels(gallery) == {"id_00007970": 1, "id_00007982": 2}
    assert gallery.images[0].key == "img/MEN/Tees_Tanks/id_00007982/01_2_side"
    assert gallery.images[0].location == f"{root}/Img/{gallery.images[0].key}.jpg"


def test_vehicles_have_tests_of_three_sizes(tmp_path: Path) -> None:
    root = small_benchmarks.vehicles(tmp_path)
    assert labels(opened("vehicleid", root, "train")) == {"1": 3, "2": 3}
    assert labels(opened("vehicleid", root, "test_800")) == {"5": 3}
    assert labels(opened("vehicleid", root, "test_1600")) == {"5": 3, "6": 3}
    assert labels(opened("vehicleid", root, "test_2400")) == {"5": 3, "6": 3, "9": 3}
    assert opened("vehicleid", root, "test_800").images[0].key == "0000500"


@pytest.mark.parametrize("kind", TREES)
def test_no_class_and_no_image_is_both_trained_on_and_tested_with(kind: str, tmp_path: Path) -> None:
    root = TREES[kind](tmp_path)
    train, *tests = (opened(kind, root, split) for split in benchmarks._BENCHMARKS[kind].splits)
    assert train.images
    for test in tests:
        assert test.images
        assert not labels(train).keys() & labels(test).keys()
        assert not {image.key for image in train.images} & {image.key for image in test.images}


@pytest.mark.parametrize("kind", TREES)
def test_a_split_has_to_be_one_of_the_benchmark(kind: str, tmp_path: Path) -> None:
    for source in (f"{kind}:", f"{kind}:{tmp_path}", f"{kind}:{tmp_path}:dev", f"{kind}::train"):
        with pytest.raises(ConfigError, match=rf"expected {kind}:<folder>:<split>, .* one of train, "):
            list(benchmarks.read(source))


def test_a_folder_may_be_named_like_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_benchmarks.pictures(tmp_path / "cub", ["a/1.jpg"])
    monkeypatch.chdir(tmp_path)
    source = sources.open_source("cub", classes="all", download_folder=tmp_path)
    assert [image.key for image in source.images] == ["a/1"]


FILES = [
    ("cub", "test", ("images.txt", "image_class_labels.txt", "classes.txt"), "CUB_200_2011.tgz"),
    ("cars196", "test", ("cars_annos.mat",), "car_ims.tgz"),
    ("sop", "train", ("Ebay_train.txt",), "Stanford_Online_Products.zip"),
    ("sop", "test", ("Ebay_test.txt",), "Stanford_Online_Products.zip"),
    ("inshop", "query", ("Eval/list_eval_partition.txt",), "Img/img.zip extracted to Img/img"),
    ("vehicleid", "train", ("train_test_split/train_list.txt",), "VehicleID_V1.0"),
    ("vehicleid", "test_1600", ("train_test_split/test_list_1600.txt",), "VehicleID_V1.0"),
]


@pytest.mark.parametrize(
    ("kind", "split", "name", "archive"),
    [(kind, split, name, archive) for kind, split, names, archive in FILES for name in names],
)
def test_a_missing_file_is_named_with_the_archive_that_has_it(
    kind: str, split: str, name: str, archive: str, tmp_path: Path
) -> None:
    root = TREES[kind](tmp_path / "set")
    (root / name).unlink()
    with pytest.raises(ConfigError) as caught:
        opened(kind, root, split)
    assert str(caught.value).startswith(f"{root}/{name} is missing; expected ")
    assert archive in str(caught.value)
    assert str(caught.value).endswith("check the folder, or extract it anew")


@pytest.mark.parametrize("name", ["devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"])
def test_a_missing_file_of_the_development_kit_is_named(name: str, tmp_path: Path) -> None:
    root = small_benchmarks.cars_devkit(tmp_path)
    (root / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} is missing; expected .*car_devkit\.tgz"):
        opened("cars196", root, "train")


@pytest.mark.parametrize(
    ("kind", "split", "name", "line", "text", "message"),
    [
        ("cub", "train", "images.txt", 2, "2", "is '2'; expected 'image path'"),
        ("cub", "train", "images.txt", 2, "2 a b", "is '2 a b'; expected 'image path'"),
        ("cub", "train", "images.txt", 2, "99 a/b.jpg", "has image 99, which image_class_labels.txt hasn't"),
        ("cub", "train", "image_class_labels.txt", 4, "4", "is '4'; expected 'image class'"),
        (
            "cub",
            "train",
            "image_class_labels.txt",
            4,
            "4 201",
            "has the class '201'; expected a number from 1",
        ),
        (
            "cub",
            "train",
            "image_class_labels.txt",
            4,
            "4 x",
            "has the class 'x'; expected a number from 1 to 200",
        ),
        ("cub", "train", "classes.txt", 2, "2", "is '2'; expected 'class name'"),
        (
            "sop",
            "test",
            "Ebay_test.txt",
            1,
            "1 2 5 a.JPG",
            "is '1 2 5 a.JPG'; expected 'image_id class_id super",
        ),
        (
            "sop",
            "test",
            "Ebay_test.txt",
            3,
            "2 11319 5",
            "is '2 11319 5'; expected 'image_id class_id super_clas",
        ),
        (
            "sop",
            "test",
            "Ebay_test.txt",
            3,
            "2 0 5 a.JPG",
            "has the class '0'; expected a number of 1 or more",
        ),
        (
            "inshop",
            "query",
            "Eval/list_eval_partition.txt",
            1,
            "many",
            "is 'many'; expected the number of images",
        ),
        ("inshop", "query", "Eval/list_eval_partition.txt", 1, "10", "says 10 images, and 9 are listed"),
        (
            "inshop",
            "query",
            "Eval/list_eval_partition.txt",
            2,
            "img/a.jpg id_1 query",
            "expected 'image_name item",
        ),
        (
            "inshop",
            "query",
            "Eval/list_eval_partition.txt",
            5,
            "img/a.jpg query",
            "expected 'image_name item_id",
        ),
        (
            "inshop",
            "query",
            "Eval/list_eval_partition.txt",
            5,
            "img/a.jpg id_1 dev",
            "has the status 'dev'; expec",
        ),
        (
            "vehicleid",
            "train",
            "train_test_split/train_list.txt",
            3,
            "0000102",
            "is '0000102'; expected 'image v",
        ),
        (
            "vehicleid",
            "test_800",
            "train_test_split/test_list_800.txt",
            1,
            "a b c",
            "expected 'image vehicle'",
        ),
    ],
)
def test_a_broken_line_is_named_with_its_file_and_number(
    kind: str, split: str, name: str, line: int, text: str, message: str, tmp_path: Path
) -> None:
    root = TREES[kind](tmp_path / "set")
    kept = (root / name).read_text().splitlines()
    kept[line - 1] = text
    small_benchmarks.lines(root / name, kept)
    with pytest.raises(ConfigError) as caught:
        opened(kind, root, split)
    assert str(caught.value).startswith(f"{root}/{name}, line {line} ")
    assert message in str(caught.value)


def test_a_class_without_a_name_and_an_empty_or_foreign_list_are_named(tmp_path: Path) -> None:
    root = small_benchmarks.cub(tmp_path / "cub")
    small_benchmarks.lines(root / "classes.txt", ["1 001.Bird_1"])
    with pytest.raises(ConfigError, match=r"images.txt, line 4 is of class 2, which classes.txt hasn't"):
        opened("cub", root, "train")
    (root / "classes.txt").write_bytes(b"1 caf\xe9\n")
    with pytest.raises(
        ConfigError, match=r"classes.txt is no text: .*utf-8.*; expected the folder CUB_200_2011"
    ):
        opened("cub", root, "train")
    root = small_benchmarks.products(tmp_path / "sop")
    (root / "Ebay_train.txt").write_text("")
    with pytest.raises(ConfigError, match=r"Ebay_train\.txt, line 1 is ''; expected 'image_id"):
        opened("sop", root, "train")
    root = small_benchmarks.in_shop(tmp_path / "inshop")
    (root / "Eval" / "list_eval_partition.txt").write_text("")
    with pytest.raises(
        ConfigError, match=r"list_eval_partition\.txt, line 1 is ''; expected the number of images"
    ):
        opened("inshop", root, "train")
    root = small_benchmarks.vehicles(tmp_path / "vehicleid")
    (root / "train_test_split" / "train_list.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match="has no images"):
        opened("vehicleid", root, "train")


def save(**variables: object) -> Callable[[Path], None]:
    return lambda path: scipy.io.savemat(path, variables)


STRUCTS, NAMES = small_benchmarks.structs, small_benchmarks.car_names()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"no mat file at all" * 20), "is no .mat file"),
        (lambda path: path.write_bytes(path.read_bytes()[:700]), "is no .mat file"),
        (save(other=1), "has no variable class_names"),
        (save(class_names=NAMES), "has no variable annotations"),
        (save(class_names=NAMES[:, :5]), "names 5 classes, not 196"),
        (save(class_names=NAMES, annotations=STRUCTS({"fname": ["a.jpg"], "class": [1]})), "have the fields"),
        (
            save(class_names=NAMES, annotations=np.ones(3)),
            "have the fields None; expected relative_im_path and",
        ),
        (
            save(
                class_names=NAMES, annotations=STRUCTS({"relative_im_path": ["a.jpg"] * 2, "class": [1, 197]})
            ),
            "annotation 2 has the path 'a.jpg' and the class 197; expected a text and a number from 1 to 196",
        ),
        (
            save(class_names=NAMES, annotations=STRUCTS({"relative_im_path": [3.0], "class": [1]})),
            "annotation 1 has the path 3",
        ),
        (
            save(class_names=NAMES, annotations=STRUCTS({"relative_im_path": ["a.jpg"], "class": ["x"]})),
            "annotation 1 has the path 'a.jpg' and the class 'x'",
        ),
    ],
)
def test_a_broken_mat_file_is_named(write: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    root = small_benchmarks.cars(tmp_path)
    write(root / "cars_annos.mat")
    with pytest.raises(ConfigError) as caught:
        opened("cars196", root, "train")
    assert str(caught.value).startswith(f"{root}/cars_annos.mat")
    assert message in str(caught.value)


def test_a_missing_image_is_refused_by_itself_and_all_of_them_are_an_error(tmp_path: Path) -> None:
    root = small_benchmarks.in_shop(tmp_path / "set")
    missing = root / "Img" / "img" / "MEN" / "Tees_Tanks" / "id_00007982" / "01_2_side.jpg"
    missing.unlink()
    source = opened("inshop", root, "gallery")
    assert [(image.key, image.reason) for image in source.refused] == [
        ("img/MEN/Tees_Tanks/id_00007982/01_2_side", "nothing is there")
    ]
    assert len(source.images) == 2
    (root / "Img").rename(root / "Images")
    with pytest.raises(
        ConfigError, match=r"none of its 3 images can be read, .*01_2_side.jpg: nothing is there"
    ):
        opened("inshop", root, "gallery")


def test_an_image_that_is_listed_twice_is_named(tmp_path: Path) -> None:
    root = small_benchmarks.vehicles(tmp_path)
    path = root / "train_test_split" / "train_list.txt"
    path.write_text(path.read_text() + "0000100 2\n")
    with pytest.raises(ConfigError, match="have the same key '0000100'"):
        opened("vehicleid", root, "train")


@pytest.mark.s3
def test_a_benchmark_may_lie_in_a_bucket(s3: str, tmp_path: Path) -> None:
    root = small_benchmarks.vehicles(tmp_path)
    for path in (path for path in root.rglob("*") if path.is_file()):
        storage.upload(path, f"{s3}/VehicleID_V1.0/{path.relative_to(root)}")
    test = sources.open_source(
        f"vehicleid:{s3}/VehicleID_V1.0:test_800", classes="all", download_folder=tmp_path
    )
    assert labels(test) == {"5": 3}
    assert test.images[0].location == f"{s3}/VehicleID_V1.0/image/0000500.jpg"
    assert storage.read(test.images[0].location) == (root / "image" / "0000500.jpg").read_bytes()
    with pytest.raises(ConfigError, match=r"s3://.*/Nowhere/train_test_split/train_list.txt is missing"):
        sources.open_source(f"vehicleid:{s3}/Nowhere:train", classes="all", download_folder=tmp_path)
