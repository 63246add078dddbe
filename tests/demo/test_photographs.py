"""The demo's own images: spots in photographs, seen by several views, the same on every machine."""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namr.demo import photographs
from namr.errors import ConfigError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage", reason="scikit-image is not installed (pip install '.[demo]')")
    folder = tmp_path_factory.mktemp("photographs") / "views"
    photographs.write(folder, spots=2, views=3)
    return folder


def test_training_sees_no_photograph_of_the_gallery(written: Path) -> None:
    spots = {split: sorted(path.name for path in (written / split).iterdir()) for split in ("train", "test")}
    assert [len(names) for names in spots.values()] == [20, 18]
    of = [{name.rpartition("-")[0] for name in names} for names in spots.values()]
    assert not of[0] & of[1]
    assert all(len(list(spot.iterdir())) == 3 for split in spots for spot in (written / split).iterdir())


def test_views_of_a_spot_differ_and_are_nearer_to_each_other_than_to_another_spot(written: Path) -> None:
    def view(spot: str, number: int) -> np.ndarray:
        with Image.open(written / "train" / spot / f"{number}.png") as image:
            assert (image.size, image.mode) == ((photographs.SIZE_PX, photographs.SIZE_PX), "RGB")
            return np.asarray(image, np.float32)

    first, again, other = view("coffee-00", 0), view("coffee-00", 1), view("gravel-00", 0)
    assert 0 < np.abs(first - again).mean() < np.abs(first - other).mean()


def test_spots_keep_apart_and_a_small_photograph_has_fewer() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)
    found = photographs._spots(Image.fromarray(noise), 48, 100, np.random.default_rng(1))
    assert 10 < len(found) < 40
    distances = [math.dist(one, other) for one, other in itertools.combinations(found, 2)]
    assert min(distances) > 0.8 * 48


def test_what_was_written_is_left_alone_and_the_seed_decides(written: Path, tmp_path: Path) -> None:
    photographs.write(tmp_path / "again", spots=2, views=3)
    photographs.write(tmp_path / "other", spots=2, views=3, seed=1)
    name = "test/brick-01/2.png"
    assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (written / name).read_bytes()
    (written / name).write_bytes(b"mine")
    photographs.write(written, spots=2, views=3)
    assert (written / name).read_bytes() == b"mine"


def test_without_the_package_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'namr\[demo\]'"):
        photographs.write(tmp_path / "views")
    assert not (tmp_path / "views").exists()
