"""Resampling: bit for bit what Pillow makes of the same box, mirror and colour matrix."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from namr.data import resampling
from namr.data.resampling import Box, Colours

_FILTERS = {False: Image.Resampling.BILINEAR, True: Image.Resampling.BICUBIC}


def picture(width: int, height: int) -> Image.Image:
    draw = np.random.default_rng(width)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))


def in_steps(
    source: Image.Image, box: Box, size: int, *, is_cubic: bool, mirrored: bool, colours: Colours | None
) -> npt.NDArray[np.uint8]:
    """By Pillow."""
    made = source.resize((size, size), _FILTERS[is_cubic], box=box)
    if mirrored:
        made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if colours:
        grey = np.array([0.299, 0.587, 0.114])
        mean = np.array(made.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) @ grey
        matrix = colours.contrast * colours.brightness * (
            colours.saturation * np.eye(3) + (1 - colours.saturation) * grey
        )  # fmt: skip
        offset = np.full((3, 1), colours.brightness * (1 - colours.contrast) * mean)
        made = made.convert("RGB", tuple(np.hstack([matrix, offset]).ravel().tolist()))
    return np.asarray(made).transpose(2, 0, 1)


def check(source: Image.Image, box: Box, size: int, **how: object) -> None:
    out = np.empty((3, size, size), np.uint8)
    resampling.render(source, box, out, **how)  # type: ignore[arg-type]
    assert np.array_equal(out, in_steps(source, box, size, **how)), (source.size, box, size, how)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_cubic", [False, True])
@pytest.mark.parametrize("shape", ["wide", "tall", "any"])
def test_every_bit_is_pillows(shape: str, is_cubic: bool) -> None:
    draw = np.random.default_rng(1)
    for number in range(20):
        short, long = np.sort(draw.integers(5, 300, 2)).tolist()
        width, height = {"wide": (long, short), "tall": (short, long), "any": (short, short)}[shape]
        left, top = draw.uniform(0, 0.9) * width, draw.uniform(0, 0.9) * height
        right, bottom = draw.uniform(left + 0.05 * width, width), draw.uniform(top + 0.05 * height, height)
        colours = Colours(*draw.uniform(0.5, 1.5, 3).tolist()) if number % 3 else None
        check(
            picture(width, height),
            (left, top, right, bottom),
            int(draw.integers(1, 150)),
            is_cubic=is_cubic,
            mirrored=number % 2 == 0,
            colours=colours,
        )


@pytest.mark.parametrize("size", [(60, 60), (60, 40), (40, 60), (60, 500), (1, 1), (1, 300), (300, 1)])
def test_whole_pictures_of_the_same_or_of_extreme_sides_are_as_pillow_makes_them(
    size: tuple[int, int],
) -> None:
    for is_cubic in (False, True):
        check(picture(*size), (0, 0, *size), 60, is_cubic=is_cubic, mirrored=False, colours=None)


def test_a_picture_that_lies_in_pieces_is_read_all_the_same() -> None:
    check(
        picture(2200, 2100),
        (7.5, 3.25, 2190.5, 2099),
        64,
        is_cubic=False,
        mirrored=True,
        colours=Colours(0.9, 1.1, 1.05),
    )


def test_many_threads_render_at_once() -> None:
    source = picture(90, 70)

    def render(size: int) -> npt.NDArray[np.uint8]:
        out = np.empty((3, size, size), np.uint8)
        resampling.render(source, (1, 2, 80, 60), out, is_cubic=True)
        return out

    wanted = [render(size) for size in range(20, 60)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(render, range(20, 60)))
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
