"""Sources: folders, tables, digits and torchvision's data sets offer what they hold, under stable keys."""

import hashlib
import io
import os
import struct
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.io
import torchvision.datasets
from PIL import Image

from namr.data import sources
from namr.data.offered import SourceImage
from namr.errors import ConfigError, ManifestError, StorageError


def listed(
    source: object, folder: Path = Path("/nowhere"), classes: sources.Classes = "all"
) -> list[SourceImage]:
    return list(sources.open_source(str(source), classes=classes, download_folder=folder).images)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")
    return root


def test_a_folder_gives_its_class_folders_as_labels_and_paths_as_keys(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "cat/1.jpg",
        "cat/old/2.PNG",
        "dog/a.b.webp",
        "loose.jpeg",
        "cat/notes.txt",
        "dog/.hidden.jpg",
    )
    source = sources.open_source(str(tmp_path), classes="all", download_folder=tmp_path)
    assert [(i.key, i.label, i.num_bytes) for i in source.images] == [
        ("cat/1", "cat", 5),
        ("cat/old/2", "cat", 5),
        ("dog/a.b", "dog", 5),
        ("loose", None, 5),
    ]
    assert [str(each) for each in source.passed_over] == [
        "1 .txt (cat/notes.txt)",
        "1 hidden (dog/.hidden.jpg)",
    ]
    assert source.refused == ()
    assert Path(source.images[1].location).read_bytes() == b"12345"


def test_what_offers_nothing_or_no_classes_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        listed(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="has no images"):
        listed(tmp_path)
    touch(tmp_path, "a/x.heic")
    with pytest.raises(ConfigError, match=r"has no images .* but 1 \.heic \(a/x\.heic\)"):
        listed(tmp_path)
    touch(tmp_path, "set/train/cat/1.jpg", "set/test/dog/1.jpg")
    with pytest.raises(ConfigError, match=r"the splits test, train and not classes; give one .*/set/train"):
        listed(tmp_path / "set")
    touch(tmp_path, "twice/1.jpg", "twice/1.png")
    with pytest.raises(ConfigError, match=r"1\.jpg and .*1\.png have the same key '1'"):
        listed(tmp_path / "twice")


def test_a_half_of_the_classes_can_be_chosen(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "c/1.jpg", "loose.jpg")
    assert [i.key for i in listed(tmp_path, classes="first_half")] == ["a/1", "b/1"]
    assert [i.key for i in listed(tmp_path, classes="second_half")] == ["c/1"]
    touch(tmp_path / "flat", "1.jpg")
    with pytest.raises(ConfigError, match="0 classes; expected at least 2"):
        listed(tmp_path / "flat", classes="first_half")


def test_a_folder_keeps_out_nothing_but_what_it_refuses_or_counts(tmp_path: Path) -> None:
    root = touch(tmp_path / "in", "cat/1.jpg", ".ipynb_checkpoints/cat/1.jpg")
    touch(tmp_path / "elsewhere", "2.jpg")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "gone.jpg").symlink_to("nowhere")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.jpg")).write_bytes(b"12345")
    os.mkfifo(root / "cat" / "pipe.jpg")
    source = sources.open_source(str(root), classes="all", download_folder=tmp_path)
    assert [(image.key, image.label) for image in source.images] == [("cat/1", "cat"), ("dog/2", "dog")]
    assert {(image.key, image.reason) for image in source.refused} == {
        ("cat/gone", "nothing is there"),
        ("caf\\udce9", "its name is not UTF-8"),
    }
    assert {str(each) for each in source.passed_over} == {
        "1 hidden (.ipynb_checkpoints)",
        "1 fifo (cat/pipe.jpg)",
    }


def test_a_csv_gives_paths_labels_and_fields(tmp_path: Path) -> None:
    whole = touch(tmp_path, "elsewhere/3", "img/1.jpg") / "elsewhere" / "3"
    table = tmp_path / "items.csv"
    table.write_text(f"path,label,price\nimg/1.jpg,cat,3\ns3://bucket/2.PNG,,\n{whole},7,x\n")
    assert listed(table) == [
        SourceImage(key=f"{whole}", location=f"{whole}", label="7", fields={"price": "x"}, num_bytes=5),
        SourceImage(
            key="img/1", location=f"{tmp_path}/img/1.jpg", label="cat", fields={"price": "3"}, num_bytes=5
        ),
        SourceImage(key="s3://bucket/2", location="s3://bucket/2.PNG", fields={"price": None}),
    ]


def test_a_bad_row_of_a_table_is_refused_by_itself(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    rows = ["1.jpg", ".", "", f"{'x' * 5000}.jpg", "a\0b.jpg", "gone.jpg", "pipe.jpg", "http://host/2.jpg"]
    keys = [f"k{row}" for row in range(len(rows))]
    pyarrow.parquet.write_table(
        pyarrow.table({"path": [*rows, "1.jpg"], "key": [*keys, ""]}), tmp_path / "items.parquet"
    )
    source = sources.open_source(str(tmp_path / "items.parquet"), classes="all", download_folder=tmp_path)
    assert [image.key for image in source.images] == ["k0"]
    assert {image.key: image.reason for image in source.refused} == {
        "k1": "a folder, not a file",
        "k2": "row 3 has no path",
        "k3": "File name too long",
        "k4": "its path holds a NUL",
        "k5": "nothing is there",
        "k6": "a fifo, not a file",
        "k7": "'http://host/2.jpg': unknown kind of URI; expected s3://bucket/key or a local path",
        "": "row 9 has no key",
    }
    (tmp_path / "items.csv").write_bytes(b"path,label\n1.jpg,a\na\0b.jpg,b\n")
    source = sources.open_source(str(tmp_path / "items.csv"), classes="all", download_folder=tmp_path)
    assert [image.reason for image in source.refused] == ["its path holds a NUL"]


@pytest.mark.parametrize("values", [[1, 2], [b"1.jpg", b"2.jpg"], [["1.jpg"], None]])
def test_paths_that_are_no_text_are_a_named_error(tmp_path: Path, values: list[object]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"uri": values}), tmp_path / "items.parquet")
    with pytest.raises(ConfigError, match=r"the column uri holds (int|bytes|list) values .*; expected text"):
        listed(tmp_path / "items.parquet")


def test_a_table_of_text_that_is_not_utf8_is_a_named_error(tmp_path: Path) -> None:
    paths = pyarrow.array([b"caf\xe9.jpg"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"path": paths}), tmp_path / "items.parquet")
    (tmp_path / "items.csv").write_bytes(b"path\ncaf\xe9.jpg\n")
    for name in ("items.parquet", "items.csv"):
        with pytest.raises(ManifestError, match=name):
            listed(tmp_path / name)


def test_a_parquet_gives_typed_fields_and_keys(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    table = tmp_path / "items.parquet"
    columns = {
        "uri": ["a.jpg", "b.jpg"],
        "key": ["B", "A"],
        "label": [3, None],
        "price": [1.5, float("nan")],
        "day": [date(2026, 11, 23), None],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    first, second = listed(table)
    assert (first.key, first.label, first.fields) == ("A", None, {"price": None, "day": None})
    assert (second.key, second.label, second.fields) == ("B", "3", {"price": 1.5, "day": "2026-11-23"})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "file,label\n1.jpg,a\n",
            ConfigError,
            r"columns \['file', 'label'\]; expected one called path or uri",
        ),
        ("path\n1.jpg\n1.png\n", ConfigError, "same key '1'"),
        ("path\n", ConfigError, "has no images"),
        ("path,label\n1.jpg,a,b\n", ManifestError, "can't be read as a table"),
    ],
)
def test_an_unclear_table_is_a_named_error(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    touch(tmp_path, "1.jpg", "1.png")
    (tmp_path / "items.csv").write_text(text)
    with pytest.raises(error, match=message):
        listed(tmp_path / "items.csv")


def test_the_digits_are_1797_png_images_of_ten_classes() -> None:
    found = listed("digits")
    assert len(found) == 1797
    assert {i.label for i in found} == set("0123456789")
    assert {i.label for i in listed("digits", classes="first_half")} == set("01234")
    picture = Image.open(io.BytesIO(found[0].data or b""))
    assert (picture.format, picture.size) == ("PNG", (32, 32))


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), number, np.uint8)).save(path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_omniglot_as_torchvision_lays_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "Omniglot" / "omniglot-py"
    for split, alphabet, num_characters in (
        ("images_background", "Greek", 2),
        ("images_evaluation", "Latin", 1),
    ):
        for character in range(num_characters):
            for drawing in range(2):
                write_image(root / split / alphabet / f"character{character}" / f"{drawing}.png", drawing)
        (root / f"{split}.zip").write_bytes(b"already extracted")
        monkeypatch.setitem(torchvision.datasets.Omniglot.zips_md5, split, md5(root / f"{split}.zip"))
    found = listed("torchvision:Omniglot", tmp_path)
    characters = ["Greek/character0", "Greek/character1", "Latin/character0"]
    assert [i.label for i in found] == [name for name in characters for _ in range(2)]
    assert found[0].key == "omniglot-py/images_background/Greek/character0/0"
    assert Path(found[0].location).read_bytes().startswith(b"\x89PNG")  # the file as it is
    assert len(listed("torchvision:Omniglot:evaluation", tmp_path)) == 2
    with pytest.raises(ConfigError, match=r"split 'train' of Omniglot: expected one of \['background'"):
        listed("torchvision:Omniglot:train", tmp_path)


def test_flowers_as_torchvision_lays_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "Flowers102" / "flowers-102"
    for number in range(1, 7):
        write_image(root / "jpg" / f"image_{number:05d}.jpg", number)
    scipy.io.savemat(root / "imagelabels.mat", {"labels": np.array([1, 1, 2, 2, 102, 102])})
    splits = {"trnid": np.array([1, 3]), "valid": np.array([2, 5]), "tstid": np.array([4, 6])}
    scipy.io.savemat(root / "setid.mat", splits)
    files = torchvision.datasets.Flowers102._file_dict
    for name in ("label", "setid"):
        monkeypatch.setitem(files, name, (files[name][0], md5(root / files[name][0])))
    found = listed("torchvision:Flowers102", tmp_path)
    assert [i.key for i in found] == [f"flowers-102/jpg/image_{n:05d}" for n in range(1, 7)]
    names = torchvision.datasets.Flowers102.classes
    assert [i.label for i in found] == [names[0]] * 2 + [names[1]] * 2 + [names[101]] * 2
    assert len(listed("torchvision:Flowers102:test", tmp_path)) == 2
    with pytest.raises(ConfigError, match="split 'dev' of Flowers102"):
        listed("torchvision:Flowers102:dev", tmp_path)


def test_a_data_set_of_arrays_becomes_png(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, num in (("train", 3), ("t10k", 2)):
        pixels = np.arange(num * 28 * 28, dtype=np.uint64).astype(np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, num, 28, 28) + pixels.tobytes()
        )
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, num) + bytes(range(num)))
    found = listed("torchvision:MNIST", tmp_path)
    assert [i.label for i in found] == ["0 - zero", "0 - zero", "1 - one", "1 - one", "2 - two"]
    picture = Image.open(io.BytesIO(found[1].data or b""))
    assert np.array_equal(np.asarray(picture)[:, :, 0].ravel(), np.arange(784).astype(np.uint8))


def test_what_torchvision_has_not_or_can_not_reach_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Nothing", "ImageFolder", "wrap_dataset_for_transforms_v2"):
        with pytest.raises(ConfigError, match=f"torchvision:{name}: torchvision.datasets has no such"):
            listed(f"torchvision:{name}", tmp_path)
    monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"could not download Omniglot .* check the internet access"):
        listed("torchvision:Omniglot", tmp_path)
