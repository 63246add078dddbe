"""From a decoded picture to the bytes of a batch in one compiled pass: crop, resize, mirror, recolour.

The bits are those of Pillow's `resize(box=...)`, its `transpose` and its `convert` with a colour matrix, one
after the other: weights of 22 bits, whole numbers between the two directions, and the rule of Pillow 13 for
which direction comes first. Pictures in between are never made, the channels come out apart, as a model takes
them, and the four bytes of a pixel are weighed at once: a quarter of the time.

Not covered: decoding, and which box and colours (`images`); filters other than those two.
Legend: H height, W width, S size of the square.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from PIL import Image

from namr.compiling import compiled, inlined

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Weights = npt.NDArray[np.int32]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture."""

_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))
_GREY = (0.299, 0.587, 0.114)
_HOW: dict[str, Any] = {"nogil": True}


class Colours(NamedTuple):
    """What saturation, contrast around the mean grey, and brightness are multiplied by, in this order."""

    brightness: float
    contrast: float
    saturation: float


def render(
    picture: Image.Image,
    box: Box,
    out: Bytes,
    *,
    is_cubic: bool,
    mirrored: bool = False,
    colours: Colours | None = None,
) -> None:
    """Fill `out` (3, S, S) uint8 with what lies in the box of an RGB picture."""
    factors = colours or Colours(1.0, 1.0, 1.0)
    _compiled()(_pixels(picture), *box, is_cubic, mirrored, colours is not None, *factors, out)


def _pixels(picture: Image.Image) -> Bytes:
    """(H, W, 4) uint8: where they lie, unless they are so many that they lie in pieces."""
    try:
        lying = pa.array(picture).values
    except ValueError:
        return np.asarray(picture.convert("RGBA"))
    return np.frombuffer(lying.buffers()[1], np.uint8).reshape(picture.height, picture.width, 4)


@functools.cache
def _compiled() -> Callable[..., None]:
    """`_render`; the first time takes seconds if nothing was kept."""
    source = types.Array(types.uint8, 3, "C", readonly=True)
    signature = types.void(
        *(source, *(types.float32,) * 4, *(types.boolean,) * 3, *(types.float64,) * 3),
        types.Array(types.uint8, 3, "C"),
    )
    return compiled(_render, signature, **_HOW)


def _render(
    source: Bytes,
    left: float,
    top: float,
    right: float,
    bottom: float,
    is_cubic: bool,
    mirrored: bool,
    recolours: bool,
    brightness: float,
    contrast: float,
    saturation: float,
    out: Bytes,
) -> None:
    height, width, size = source.shape[0], source.shape[1], out.shape[1]
    columns, num_columns, column_weights = _plan(width, left, right, size, is_cubic)
    rows, num_rows, row_weights = _plan(height, top, bottom, size, is_cubic)
    if height > size and height - size > 2 * (width - size):  # Pillow's rule, by the whole picture
        first, last = columns[0], columns[-1] + num_columns[-1]
        lines = source.reshape(height, width * 4)[:, 4 * first : 4 * last]
        narrow = np.empty((size, 4 * (last - first)), np.uint8)
        _down(lines, rows, num_rows, row_weights, narrow)
        columns -= first
        _across(narrow.reshape(size, last - first, 4), columns, num_columns, column_weights, mirrored, out)
    else:
        first, last = rows[0], rows[-1] + num_rows[-1]
        flat = np.empty((3, last - first, size), np.uint8)
        _across(source[first:last], columns, num_columns, column_weights, mirrored, flat)
        rows -= first
        for channel in range(3):
            _down(flat[channel], rows, num_rows, row_weights, out[channel])
    if recolours:
        _recolour(out, brightness, contrast, saturation)


@inlined(**_HOW)
def _plan(size: int, start: float, stop: float, num: int, is_cubic: bool) -> tuple[Ints, Ints, Weights]:
    """Of each of `num` places in a row or column of `size`: its first source, how many, and their weights."""
    scale = (stop - start) / num
    stretch = max(scale, 1.0)
    support = (2.0 if is_cubic else 1.0) * stretch
    firsts, counts = np.empty(num, np.int64), np.empty(num, np.int64)
    weights = np.empty((num, math.ceil(support) * 2 + 1), np.int32)
    each = np.empty(weights.shape[1])
    for place in range(num):
        centre = start + (place + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), size) - first
        total = 0.0
        for k in range(count):
            each[k] = _filter((k + first - centre + 0.5) * (1.0 / stretch), is_cubic)
            total += each[k]
        for k in range(count):
            weight = each[k] / total if total != 0 else each[k]
            weights[place, k] = int(weight * (1 << _BITS) + (-0.5 if weight < 0 else 0.5))
        firsts[place], counts[place] = first, count
    return firsts, counts, weights


@inlined(**_HOW)
def _filter(x: float, is_cubic: bool) -> float:
    """The triangle, or the cubic of a = -0.5."""
    x = abs(x)
    if not is_cubic:
        return 1.0 - x if x < 1 else 0.0
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * -0.5
    return 0.0


def _as_weighted(_: Any, address: Any, weights: Any, count: Any) -> tuple[Any, Any]:
    def weighted(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        byte, number, long = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        four, pointer = ir.VectorType(number, 4), ir.PointerType()

        def constant(value: int) -> Any:
            return ir.Constant(four, [ir.Constant(number, value)] * 4)

        def place(base: Any, step: Any) -> Any:
            return builder.inttoptr(builder.add(base, builder.shl(step, long(2))), pointer)

        before = builder.block
        loop, after = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        step, sums = builder.phi(long), builder.phi(four)
        pixel = builder.load(place(values[0], step), align=1, typ=ir.VectorType(byte, 4))
        weight = builder.load(place(values[1], step), align=4, typ=number)
        first = builder.insert_element(ir.Constant(four, ir.Undefined), weight, number(0))
        every = builder.shuffle_vector(first, ir.Constant(four, ir.Undefined), constant(0))
        more, following = builder.add(sums, builder.mul(builder.zext(pixel, four), every)), long(1)
        following = builder.add(step, following)
        for phi, start, value in ((step, long(0), following), (sums, constant(int(_HALF)), more)):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, values[2]), loop, after)
        builder.position_at_end(after)
        whole = builder.ashr(more, constant(_BITS))
        for sign, bound in ((">", constant(0)), ("<", constant(255))):
            whole = builder.select(builder.icmp_signed(sign, whole, bound), whole, bound)
        return builder.bitcast(builder.trunc(whole, ir.VectorType(byte, 4)), number)

    return types.uint32(address, weights, count), weighted


_weighted: Any = intrinsic(_as_weighted)
"""Of `count` pixels of 4 bytes by as many int32 weights, the four channels at once: at least one of them."""


@inlined(**_HOW)
def _across(source: Bytes, firsts: Ints, counts: Ints, weights: Weights, mirrored: bool, out: Bytes) -> None:
    """Rows made shorter, (rows, columns, 4) -> (3, rows, num)."""
    num, address, step = len(firsts), source.ctypes.data, weights.ctypes.data
    for row in range(len(source)):
        pixels = address + row * source.strides[0]
        for place in range(num):
            at = num - 1 - place if mirrored else place
            pixel = _weighted(pixels + 4 * firsts[place], step + place * weights.strides[0], counts[place])
            for channel in range(3):
                out[channel, row, at] = pixel >> 8 * channel & 255


@inlined(**_HOW)
def _down(source: Bytes, firsts: Ints, counts: Ints, weights: Weights, out: Bytes) -> None:
    """Columns made shorter, (rows, columns) -> (num, columns)."""
    sums = np.empty(source.shape[1], np.int32)
    for place in range(len(firsts)):
        sums[:] = _HALF
        for k in range(counts[place]):
            weight, row = weights[place, k], source[firsts[place] + k]
            for column in range(len(row)):
                sums[column] += np.int32(weight * np.int32(row[column]))
        line = out[place]
        for column in range(len(line)):
            line[column] = _whole(sums[column])


@inlined(**_HOW)
def _whole(value: np.int32) -> np.uint8:
    """A weighted sum as a byte."""
    return np.uint8(min(max(value >> np.int32(_BITS), np.int32(0)), np.int32(255)))


@inlined(**_HOW)
def _recolour(pixels: Bytes, brightness: float, contrast: float, saturation: float) -> None:
    """One 3 x 4 colour matrix, in float32, over (3, S, S)."""
    offset = np.float32(brightness * (1 - contrast) * _mean_grey(pixels))
    matrix = np.empty((3, 3), np.float32)
    for row in range(3):
        for column in range(3):
            own = saturation if row == column else 0.0
            matrix[row, column] = contrast * brightness * (own + (1 - saturation) * _GREY[column])
    rr, rg, rb = matrix[0, 0], matrix[0, 1], matrix[0, 2]
    gr, gg, gb = matrix[1, 0], matrix[1, 1], matrix[1, 2]
    br, bg, bb = matrix[2, 0], matrix[2, 1], matrix[2, 2]
    for y in range(pixels.shape[1]):
        reds, greens, blues = pixels[0, y], pixels[1, y], pixels[2, y]
        for x in range(len(reds)):
            red, green, blue = np.float32(reds[x]), np.float32(greens[x]), np.float32(blues[x])
            reds[x] = _byte(rr * red + rg * green + rb * blue + offset)
            greens[x] = _byte(gr * red + gg * green + gb * blue + offset)
            blues[x] = _byte(br * red + bg * green + bb * blue + offset)


@inlined(**_HOW)
def _byte(value: np.float32) -> np.uint8:
    rounded = value + np.float32(0.5)
    return np.uint8(np.int32(min(max(rounded, np.float32(0)), np.float32(255))))


@inlined(**_HOW)
def _mean_grey(pixels: Bytes) -> float:
    """Grey of the mean colour, which is rounded by rows and then as a whole, as a picture of one pixel is."""
    num = pixels.shape[1]
    weight = int((1.0 / num) * (1 << _BITS) + 0.5)
    grey = 0.0
    for channel in range(3):
        total = np.int64(0)
        for y in range(num):
            of_row = np.int64(0)
            for x in range(num):
                of_row += pixels[channel, y, x]
            total += (of_row * weight + _HALF) >> _BITS
        grey += _GREY[channel] * ((total * weight + _HALF) >> _BITS)
    return grey
