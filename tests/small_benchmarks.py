"""Small trees in the layouts of the five data sets that metric learning is measured on, of tiny pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.io

from tests.small_pictures import picture

CUB_CLASSES = (1, 2, 100, 101, 102, 200)
CAR_CLASSES = (1, 98, 99, 196)
PER_CLASS = 3


def cub(root: Path) -> Path:
    """Three birds of each of six classes, half of them to train on."""
    names = {number: f"{number:03d}.Bird_{number}" for number in range(1, 201)}
    paths = [f"{names[number]}/Bird_{at}.jpg" for number in CUB_CLASSES for at in range(PER_CLASS)]
    pictures(root / "images", paths)
    numbers = [number for number in CUB_CLASSES for _ in range(PER_CLASS)]
    lines(root / "classes.txt", (f"{number} {name}" for number, name in names.items()))
    lines(root / "images.txt", (f"{at} {path}" for at, path in enumerate(paths, 1)))
    lines(root / "image_class_labels.txt", (f"{at} {number}" for at, number in enumerate(numbers, 1)))
    return root


def cars(root: Path) -> Path:
    """Three cars of each of four classes, in one list, half of each for the classification's own test."""
    numbers = [number for number in CAR_CLASSES for _ in range(PER_CLASS)]
    paths = [f"car_ims/{at:06d}.jpg" for at in range(1, len(numbers) + 1)]
    pictures(root, paths)
    columns = {"relative_im_path": paths, "bbox_x1": numbers, "class": numbers, "test": [0, 1] * 6}
    scipy.io.savemat(root / "cars_annos.mat", {"annotations": structs(columns), "class_names": car_names()})
    return root


def cars_devkit(root: Path) -> Path:
    """The same, as the development kit has them."""
    (root / "devkit").mkdir(parents=True)
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": car_names()})
    for split, name in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        names = [f"{at:05d}.jpg" for at in range(1, 7)]
        pictures(root / f"cars_{split}", names)
        columns = {"bbox_x1": [1] * 6, "class": [1, 98, 98, 99, 196, 196], "fname": names}
        scipy.io.savemat(root / name, {"annotations": structs(columns)})
    return root


def products(root: Path) -> Path:
    """Two classes to train on and two to test, of three products each."""
    for split, classes in (("train", (1, 2)), ("test", (11319, 11320))):
        paths = [f"chair_final/{number}_{at}.JPG" for number in classes for at in range(PER_CLASS)]
        pictures(root, paths)
        numbers = [number for number in classes for _ in range(PER_CLASS)]
        rows = (
            f"{at} {number} 5 {path}" for at, (number, path) in enumerate(zip(numbers, paths, strict=True), 1)
        )
        lines(root / f"Ebay_{split}.txt", ["image_id class_id super_class_id path", *rows])
    return root


def in_shop(root: Path) -> Path:
    """Two items to train on; two items with a query each and two or one in the gallery."""
    listed = [
        ("WOMEN/Dresses/id_00000002/02_1_front", "id_00000002", "train"),
        ("WOMEN/Dresses/id_00000002/02_2_side", "id_00000002", "train"),
        ("MEN/Denim/id_00000080/01_1_front", "id_00000080", "train"),
        ("MEN/Denim/id_00000080/01_4_full", "id_00000080", "train"),
        ("MEN/Tees_Tanks/id_00007982/01_1_front", "id_00007982", "query"),
        ("MEN/Tees_Tanks/id_00007982/01_2_side", "id_00007982", "gallery"),
        ("MEN/Tees_Tanks/id_00007982/01_3_back", "id_00007982", "gallery"),
        ("WOMEN/Shorts/id_00007970/02_1_front", "id_00007970", "query"),
        ("WOMEN/Shorts/id_00007970/02_7_additional", "id_00007970", "gallery"),
    ]
    pictures(root / "Img", [f"img/{path}.jpg" for path, _, _ in listed])
    rows = (f"img/{path}.jpg       {item}     {split}" for path, item, split in listed)
    header = "image_name                   item_id evaluation_status"
    lines(root / "Eval" / "list_eval_partition.txt", [str(len(listed)), header, *rows])
    return root


def vehicles(root: Path) -> Path:
    """Two vehicles to train on, and tests of one, two and three others."""
    lists = {
        "train_list": (1, 2),
        "test_list_800": (5,),
        "test_list_1600": (5, 6),
        "test_list_2400": (5, 6, 9),
    }
    for name, vehicle_ids in lists.items():
        images = [(f"{vehicle:05d}{at:02d}", vehicle) for vehicle in vehicle_ids for at in range(PER_CLASS)]
        pictures(root / "image", [f"{image}.jpg" for image, _ in images])
        rows = (f"{image} {vehicle}" for image, vehicle in images)
        lines(root / "train_test_split" / f"{name}.txt", rows)
    return root


TREES = {"cub": cub, "cars196": cars, "sop": products, "inshop": in_shop, "vehicleid": vehicles}


def pictures(root: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number, "JPEG"))


def lines(path: Path, rows: Iterator[str] | Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def structs(columns: dict[str, Sequence[object]]) -> np.ndarray:
    """(1, N) structs, as MATLAB has them."""
    num = len(next(iter(columns.values())))
    table = np.empty((1, num), [(name, object) for name in columns])
    for name, values in columns.items():
        for at, value in enumerate(values):
            table[name][0, at] = value
    return table


def car_names() -> np.ndarray:
    """(1, 196) cells of text; number 1 has a slash in it, as Ram C/V has."""
    names = np.empty((1, 196), object)
    names[0] = ["Acme C/V 2012", *(f"Acme Sedan {number} 2012" for number in range(2, 197))]
    return names
