"""Images: the one way from bytes to pixels, shared by packing, training, extraction and service.

`decode` turns any of the formats that are read into an upright RGB picture in sRGB: EXIF orientation is
applied, an embedded colour profile is converted, grey, CMYK, palettes and 16-bit grey become RGB, what is
transparent lies on white, and of an animation the first frame is taken. Everything else is refused by
`ImageRefused`, whose reason is meant for a list that a person reads.

A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size (inside the DCT, several times faster) whenever
both of its sides stay at least `Preprocessing.draft_factor` times the size asked for. The rule looks only at
the picture and at `Preprocessing`, so that evaluation, extraction and search see the same pixels. Random
crops see a part of the picture, and so it stays three times the size for them.

Not covered: HEIC and SVG, video, wide-gamut or high dynamic range output, transforms on a GPU.
"""

import io
import math
import re
import struct
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

from namr import checks
from namr.data import resampling
from namr.data.resampling import Box, Colours
from namr.errors import ConfigError, ImageRefused, ShapeError

Interpolation = Literal["bilinear", "bicubic"]
Fit = Literal["squash", "crop"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 89_478_485


class Format(NamedTuple):
    """What kind of file an encoded image is."""

    extension: str
    """of its name in a shard"""
    media_type: str


_FIRST_BYTES = {
    Format("jpg", "image/jpeg"): rb"\xff\xd8\xff",
    Format("png", "image/png"): rb"\x89PNG",
    Format("gif", "image/gif"): rb"GIF8",
    Format("bmp", "image/bmp"): rb"BM",
    Format("tif", "image/tiff"): rb"II\*\0|MM\0\*",
    Format("webp", "image/webp"): rb"RIFF.{4}WEBP",
    Format("avif", "image/avif"): rb".{4}ftypavi[fs]",
}
"""A regular expression for what a file of each format begins with."""
DRAFT_FACTOR = 1.5
"""of models that are made now"""
_EARLIER_DRAFT_FACTOR = 3.0
_CROP_DRAFT_FACTOR = 3.0
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PROFILE_SPACE = {"RGB": "RGB", "RGBA": "RGB", "L": "GRAY", "CMYK": "CMYK"}
# What Pillow's decoders raise on damaged bytes (besides UnidentifiedImageError, which is an OSError).
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
    MemoryError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How pixels are made for a model; it is part of the model's identity."""

    size_px: int
    """Side of the square that the model sees."""
    mean: tuple[float, float, float]
    """Per channel, of values in 0..1."""
    std: tuple[float, float, float]
    """Per channel, of values in 0..1."""
    interpolation: Interpolation
    fit: Fit
    """"squash" resizes both sides to the square; "crop" takes the largest centred square."""
    draft_factor: float = _EARLIER_DRAFT_FACTOR
    """How many times `size_px` both sides of a JPEG keep that is decoded smaller than it is stored. Models
    that don't say it were made with 3."""

    def __post_init__(self) -> None:
        checks.in_range(self, "size_px", at_least=1, at_most=4096)
        checks.in_range(self, "draft_factor", at_least=1, at_most=16)
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ConfigError(f"interpolation is {self.interpolation!r}; expected bilinear or bicubic")
        if self.fit not in ("squash", "crop"):
            raise ConfigError(f"fit is {self.fit!r}; expected squash or crop")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean {self.mean}, std {self.std}: expected three numbers each, std above 0")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images."""

    min_area: float = 0.16
    """Smallest share of the image's area that a random crop keeps; 1 turns cropping off."""
    horizontal_flip: bool = True
    """Mirror every second image; turn off where left and right mean something (text, digits)."""
    color_jitter: float = 0.1
    """Brightness, contrast and saturation are each multiplied by 1 - j .. 1 + j; 0 turns it off."""

    def __post_init__(self) -> None:
        checks.in_range(self, "min_area", above=0, at_most=1)
        checks.in_range(self, "color_jitter", at_least=0, below=1)


def identity(prep: Preprocessing) -> dict[str, object]:
    """What of a preprocessing is part of a model's digest, by name; of models of before as it was then."""
    fields = asdict(prep)
    if prep.draft_factor == _EARLIER_DRAFT_FACTOR:
        del fields["draft_factor"]
    return fields


def format_of(data: bytes) -> Format | None:
    """The format that the first bytes call for; None if it is none that is read. Nothing is decoded."""
    begins = (each for each, start in _FIRST_BYTES.items() if re.match(start, data, re.DOTALL))
    return next(begins, None)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side_px: int | None = None) -> Image.Image:
    """The picture as upright RGB in sRGB; raises `ImageRefused`.

    With `min_side_px` a JPEG may come out smaller than it is stored, each side still at least that long.
    A profile or an EXIF block that can't be read is ignored; a pixel that can't be read is not.
    """
    if not data:
        raise ImageRefused("empty: 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.size, max_pixels)
        if min_side_px is not None and image.format in ("JPEG", "MPO"):  # MPO: two JPEGs, as phones write
            image.draft(None, (min_side_px, min_side_px))
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRefused(f"too large: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageRefused(f"not an image of a format that is read ({', '.join(FORMATS)})") from error
    except _DAMAGED as error:
        raise ImageRefused(f"damaged: {str(error) or type(error).__name__}") from error
    return _upright(_to_rgb(image), image)


def prepare(data: bytes, prep: Preprocessing, out: np.ndarray | None = None) -> np.ndarray:
    """Decode and resize: uint8 (3, size, size), written into `out` if there is one; raises `ImageRefused`."""
    image = decode(data, min_side_px=math.ceil(prep.draft_factor * prep.size_px))
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if prep.fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    return _rendered(image, prep, box, out)


def augment(
    data: bytes, prep: Preprocessing, config: AugmentConfig, *, seed: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Decode, then random resized crop, flip and colour jitter: uint8 (3, size, size), in `out` if given.

    The same bytes and seed give the same pixels, wherever they are drawn. The crop's area is uniform in
    min_area .. 1 of the image, its aspect log-uniform in 3/4 .. 4/3 of what `prep.fit` shows in search: of
    the whole image for "squash", of a square for "crop". Raises `ImageRefused`.
    """
    image = decode(data, min_side_px=math.ceil(_CROP_DRAFT_FACTOR * prep.size_px))
    draw = np.random.default_rng(seed).random(8)  # always eight, so that no option moves another's numbers
    width, height = image.size
    area, root_aspect = config.min_area + (1 - config.min_area) * draw[0], (4 / 3) ** (draw[1] - 0.5)
    if config.min_area == 1:
        root_aspect = 1.0
    base_width, base_height = (width, height) if prep.fit == "squash" else (math.sqrt(width * height),) * 2
    crop_width = min(width, base_width * math.sqrt(area) * root_aspect)
    crop_height = min(height, base_height * math.sqrt(area) / root_aspect)
    left, top = (width - crop_width) * draw[2], (height - crop_height) * draw[3]
    colours = None
    if config.color_jitter:
        colours = Colours(*(1 + config.color_jitter * (2 * draw[5:8] - 1)).tolist())
    mirrored = bool(config.horizontal_flip and draw[4] < 0.5)
    box = (left, top, left + crop_width, top + crop_height)
    return _rendered(image, prep, box, out, mirrored=mirrored, colours=colours)


def normalise(pixels: torch.Tensor, prep: Preprocessing) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32, (value / 255 - mean) / std per channel, on the pixels' device."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ShapeError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}; expected uint8 (B, 3, H, W)")
    mean = torch.tensor(prep.mean, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(prep.std, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def thumbnail(data: bytes, *, size_px: int) -> bytes:
    """A JPEG whose longer side is at most `size_px`, without metadata; raises `ImageRefused`."""
    image = decode(data, min_side_px=2 * size_px)
    image.thumbnail((size_px, size_px), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG of uint8 (H, W) grey or (H, W, 3) RGB."""
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ShapeError(f"pixels are {pixels.dtype} {pixels.shape}; expected uint8 (H, W) or (H, W, 3)")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageRefused(f"too large: {width} x {height} is {width * height} pixels, limit {max_pixels}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB in sRGB, on white."""
    picture = _eight_bit(image)
    if picture.mode not in _PROFILE_SPACE or "transparency" in picture.info:
        see_through = "transparency" in picture.info or picture.mode in ("LA", "PA", "La", "RGBa")
        picture = picture.convert("RGBA" if see_through else "RGB")
    transform = _transform(image.info.get("icc_profile"), picture.mode)
    if transform is not None:
        picture = ImageCms.applyTransform(picture, transform) or picture
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey by its high byte, as Pillow itself reads 16-bit colour; the rest as it is."""
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageRefused(f"32-bit grey (mode {image.mode}) whose black and white are not defined")
        return Image.fromarray((values >> 8).astype(np.uint8))
    return image


@lru_cache(maxsize=16)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile to sRGB; None where there is nothing to convert (none, sRGB, unreadable, foreign)."""
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _PROFILE_SPACE[mode]:
            return None
        if (source.profile.profile_description or "").startswith("sRGB"):
            return None
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        out_mode = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(source, target, mode, out_mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    """Turned as the EXIF block of `source` says (read after loading: TIFF turns itself while it loads)."""
    try:
        orientation = source.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGED:
        return picture
    return picture.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else picture


def _rendered(
    image: Image.Image,
    prep: Preprocessing,
    box: Box,
    out: np.ndarray | None,
    *,
    mirrored: bool = False,
    colours: Colours | None = None,
) -> np.ndarray:
    if out is None:
        out = np.empty((3, prep.size_px, prep.size_px), np.uint8)
    is_cubic = prep.interpolation == "bicubic"
    resampling.render(image, box, out, is_cubic=is_cubic, mirrored=mirrored, colours=colours)
    return out
