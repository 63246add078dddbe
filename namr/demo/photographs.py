"""The demo's own images: spots in photographs, each seen by several views, to be told apart.

The photographs are those that scikit-image (namr's `demo` extra) and scikit-learn bring with them. A class
is a spot in one of them; its images are crops around it, each turned, zoomed, moved and lit in another way,
as if somebody had come back to the place. Every second photograph is to learn from, the rest is the gallery:
training sees neither the spots nor the photographs that it is measured on.

Not covered: packing them (`data`).
"""

import importlib.resources
import importlib.util
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from namr.errors import ConfigError

Place = tuple[float, float]

SIZE_PX = 64
SPOTS_OF_EACH = 24
VIEWS_OF_EACH = 6

_SCIKIT_IMAGE = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "ihc", "moon", "motorcycle_left", "page", "retina", "rocket", "text"),
)
_SCIKIT_LEARN = ("china", "flower")
_MAX_TURN = np.deg2rad(40)
_MAX_LOG_ZOOM = 0.35
_MAX_MOVE = 0.15
"""of the crop's side"""
_MAX_LOG_LIGHT = 0.4
_APART = 0.8
"""The least distance of two spots, in sides of the crop: two views of one place must not be two classes."""
_TRIES = 4
"""A spot is the one of so many places with the most contrast: a black corner is nobody's spot."""


def write(folder: Path, *, spots: int = SPOTS_OF_EACH, views: int = VIEWS_OF_EACH, seed: int = 0) -> None:
    """Write `folder`/{train,test}/<photograph>-<spot>/<view>.png, once; ConfigError without scikit-image."""
    if folder.is_dir():
        return
    paths = sorted(_paths(), key=lambda path: path.stem)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, path in enumerate(paths):
        random = np.random.default_rng((seed, number))
        with Image.open(path) as photograph:
            picture = photograph.convert("RGB")
        side = max(SIZE_PX * 3 // 4, min(picture.size) // 7)
        for spot, place in enumerate(_spots(picture, side, spots, random)):
            target = partial / ("train", "test")[number % 2] / f"{path.stem}-{spot:02d}"
            target.mkdir(parents=True)
            for view, image in enumerate(_views(picture, place, side, views, random)):
                image.save(target / f"{view}.png")
    partial.rename(folder)


def _paths() -> Iterator[Path]:
    if importlib.util.find_spec("skimage") is None:
        raise ConfigError(
            "the demo's photographs come with scikit-image, which is not installed: "
            "pip install 'namr[demo]', or give --data a folder of your own"
        )
    for package, names in (("skimage.data", _SCIKIT_IMAGE), ("sklearn.datasets.images", _SCIKIT_LEARN)):
        files = (Path(str(file)) for file in importlib.resources.files(package).iterdir())
        shipped = {path.stem: path for path in files}
        if missing := [name for name in names if name not in shipped]:
            raise ConfigError(f"{package} has no {', '.join(missing)}; give --data a folder of your own")
        yield from (shipped[name] for name in names)


def _spots(picture: Image.Image, side: int, num: int, random: np.random.Generator) -> list[Place]:
    """At most `num` places that don't overlap much; a small photograph has room for fewer."""

    def contrast(place: Place) -> float:
        return float(np.std(np.asarray(_view(picture, place, side))))

    width, height = picture.size
    spots: list[Place] = []
    while len(spots) < num:
        drawn = [(random.uniform(side, width - side), random.uniform(side, height - side)) for _ in range(60)]
        free = [one for one in drawn if all(math.dist(one, other) > _APART * side for other in spots)]
        if not free:
            break
        spots.append(max(free[:_TRIES], key=contrast))
    return spots


def _views(
    picture: Image.Image, place: Place, side: int, num: int, random: np.random.Generator
) -> Iterator[Image.Image]:
    """Views of one spot, drawn by `random`."""
    for _ in range(num):
        turn = random.uniform(-_MAX_TURN, _MAX_TURN)
        zoom = np.exp(random.uniform(-_MAX_LOG_ZOOM, _MAX_LOG_ZOOM))
        right, down = random.uniform(-_MAX_MOVE, _MAX_MOVE, 2) * side
        image = _view(picture, (place[0] + right, place[1] + down), side * zoom, turn)
        for of in (ImageEnhance.Brightness, ImageEnhance.Contrast):
            image = of(image).enhance(float(np.exp(random.uniform(-_MAX_LOG_LIGHT, _MAX_LOG_LIGHT))))
        yield image


def _view(picture: Image.Image, place: Place, side: float, turn: float = 0.0) -> Image.Image:
    """The square of this side around a place, turned by so many radians."""
    x, y = place
    scale, half = side / SIZE_PX, SIZE_PX / 2
    cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
    to_picture = (cos, -sin, x - cos * half + sin * half, sin, cos, y - sin * half - cos * half)
    return picture.transform((SIZE_PX, SIZE_PX), Image.Transform.AFFINE, to_picture, Image.Resampling.BICUBIC)
