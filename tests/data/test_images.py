"""Every kind of file that people have, made here, byte by byte where a library would not make it."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from namr.data import images
from namr.data.images import AugmentConfig, Preprocessing
from namr.errors import ConfigError, ImageRefused, ShapeError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def preprocessing(size_px: int = 32, fit: images.Fit = "squash") -> Preprocessing:
    return Preprocessing(
        size_px=size_px, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), interpolation="bicubic", fit=fit
    )


def to_bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def corners(width: int = 64, height: int = 48) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def natural(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Smooth random colours: nearer to a photograph than noise is."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def looks_like_corners(image: Image.Image, *, tolerance: int = 12) -> bool:
    width, height = image.size
    points = [(w * width // 4, h * height // 4) for h in (1, 3) for w in (1, 3)]
    found = np.array([image.getpixel(point) for point in points], dtype=int)
    return bool((abs(found - np.array([RED, GREEN, BLUE, WHITE])) <= tolerance).all())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_every_format_is_read(format: str) -> None:
    image = images.decode(to_bytes(corners(), format))
    assert image.mode == "RGB" and image.size == (64, 48) and looks_like_corners(image, tolerance=40)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    transpose = Image.Transpose
    inverse = {
        1: None, 2: transpose.FLIP_LEFT_RIGHT, 3: transpose.ROTATE_180, 4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE, 6: transpose.ROTATE_90, 7: transpose.TRANSVERSE, 8: transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = corners() if inverse is None else corners().transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = images.decode(to_bytes(stored, format, exif=exif.tobytes()))
    assert image.size == (64, 48) and looks_like_corners(image, tolerance=40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_is_ignored() -> None:
    data = to_bytes(corners(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30)
    assert looks_like_corners(images.decode(data))


def test_a_colour_profile_is_converted_to_srgb() -> None:
    """The same colour in linear light: 0.5 linear is 188 in sRGB."""
    linear = profile_with_gamma(1.0)
    data = to_bytes(Image.new("RGB", (8, 8), (128, 128, 128)), "PNG", icc_profile=linear)
    pixel = images.decode(data).getpixel((4, 4))
    assert isinstance(pixel, tuple) and all(abs(value - 188) <= 2 for value in pixel)


def test_transparency_survives_a_colour_profile() -> None:
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((128, 128, 128, 255), (0, 0, 4, 8))
    image = images.decode(to_bytes(half, "PNG", icc_profile=profile_with_gamma(1.0)))
    left, right = image.getpixel((1, 1)), image.getpixel((6, 6))
    assert isinstance(left, tuple) and abs(left[0] - 188) <= 2 and right == WHITE


def test_an_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = natural(40, 30)
    decoded = images.decode(to_bytes(picture, "PNG", icc_profile=profile))
    assert np.array_equal(np.asarray(decoded), np.asarray(picture))


@pytest.mark.parametrize("profile", [b"no profile at all", b"\0" * 200])
def test_a_damaged_profile_is_ignored(profile: bytes) -> None:
    assert looks_like_corners(images.decode(to_bytes(corners(), "PNG", icc_profile=profile)))


def test_a_profile_of_another_colour_space_is_ignored() -> None:
    grey = to_bytes(Image.new("L", (8, 8), 100), "PNG", icc_profile=profile_with_gamma(1.0))
    assert images.decode(grey).getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_grey_becomes_rgb(format: str) -> None:
    pixel = images.decode(to_bytes(Image.new("L", (8, 8), 77), format)).getpixel((4, 4))
    assert isinstance(pixel, tuple) and all(abs(value - 77) <= 1 for value in pixel)


def test_black_and_white_becomes_rgb() -> None:
    image = Image.new("1", (8, 8), 1)
    image.putpixel((0, 0), 0)
    decoded = images.decode(to_bytes(image))
    assert decoded.getpixel((0, 0)) == (0, 0, 0) and decoded.getpixel((4, 4)) == WHITE


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(format: str) -> None:
    data = to_bytes(corners().convert("CMYK"), format)
    assert looks_like_corners(images.decode(data), tolerance=20)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_on_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image.putpixel((7, 7), (0, 0, 0, 128))
    decoded = images.decode(to_bytes(image.convert(mode)))
    assert decoded.getpixel((0, 0)) == (0, 0, 0) and decoded.getpixel((6, 0)) == WHITE
    assert decoded.getpixel((7, 7)) == (127, 127, 127)


def test_a_palette_becomes_rgb() -> None:
    assert looks_like_corners(images.decode(to_bytes(corners().quantize(8))))


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_a_palette_with_transparency_lies_on_white(transparency: int | bytes) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((3, 3), 1)
    decoded = images.decode(to_bytes(image, transparency=transparency))
    assert decoded.getpixel((0, 0)) == WHITE and decoded.getpixel((3, 3)) == BLUE


def test_one_colour_that_means_transparent_lies_on_white() -> None:
    image = Image.new("RGB", (8, 8), RED)
    image.putpixel((3, 3), BLUE)
    decoded = images.decode(to_bytes(image, transparency=RED))
    assert decoded.getpixel((0, 0)) == WHITE and decoded.getpixel((3, 3)) == BLUE


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(format: str) -> None:
    values = np.array([[0, 255, 256], [0x1234, 0x80FF, 0xFFFF]], dtype=np.uint16)
    decoded = np.asarray(images.decode(to_bytes(Image.fromarray(values), format)))
    assert decoded[..., 0].tolist() == [[0, 0, 1], [0x12, 0x80, 0xFF]]
    assert (decoded == decoded[..., :1]).all()


def test_sixteen_bit_colour_is_read() -> None:
    rows = b"".join(b"\0" + struct.pack(">6H", 0x1234, 0x8000, 0xFFFF, 0, 0xFF00, 1) for _ in range(2))
    decoded = images.decode(png(2, 2, bit_depth=16, color_type=2, rows=rows))
    assert decoded.getpixel((0, 0)) == (0x12, 0x80, 0xFF) and decoded.getpixel((1, 1)) == (0, 0xFF, 0)


def test_floating_point_grey_is_refused() -> None:
    data = to_bytes(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(ImageRefused, match="32-bit grey"):
        images.decode(data)


@pytest.mark.parametrize("mode", ["LAB", "YCbCr"])
def test_other_colour_spaces_become_rgb(mode: Literal["LAB", "YCbCr"]) -> None:
    space = Image.new("RGB", (4, 4), (200, 200, 200)).convert("YCbCr")
    grey = Image.new("LAB", (4, 4), (204, 128, 128)) if mode == "LAB" else space
    pixel = images.decode(to_bytes(grey, "TIFF")).getpixel((1, 1))
    assert isinstance(pixel, tuple) and all(abs(value - 200) <= 6 for value in pixel)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_taken(format: str) -> None:
    others = [Image.new("RGB", (64, 48), BLUE), Image.new("RGB", (64, 48), GREEN)]
    data = to_bytes(corners(), format, save_all=True, append_images=others)
    assert looks_like_corners(images.decode(data), tolerance=40)


@pytest.mark.parametrize(
    ("name", "extension", "media_type"),
    [
        ("jpeg", "jpg", "image/jpeg"),
        ("png", "png", "image/png"),
        ("webp", "webp", "image/webp"),
        ("gif", "gif", "image/gif"),
        ("bmp", "bmp", "image/bmp"),
        ("tiff", "tif", "image/tiff"),
        ("avif", "avif", "image/avif"),
    ],
)
def test_an_image_tells_its_format(name: str, extension: str, media_type: str) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, name)
    assert images.format_of(sink.getvalue()) == (extension, media_type)
    for short in (b"", b"hello", sink.getvalue()[:1]):
        assert images.format_of(short) is None


def test_an_image_above_the_limit_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageRefused, match="too large: 64 x 48 is 3072 pixels, limit 3000"):
        images.decode(to_bytes(corners()), max_pixels=3000)


@pytest.mark.parametrize("side", [10_000, 100_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused(side: int) -> None:
    """A few hundred bytes that claim up to 4e18 pixels."""
    data = png(side, side, bit_depth=8, color_type=2, rows=b"\0" * 100)
    with pytest.raises(ImageRefused, match=r"too large|damaged"):
        images.decode(data)


def test_a_strip_of_extreme_shape_is_read() -> None:
    strip = to_bytes(Image.new("RGB", (60_000, 1), RED), "PNG")
    for fit in ("squash", "crop"):
        pixels = images.prepare(strip, preprocessing(16, fit=fit))
        assert pixels.shape == (3, 16, 16) and (pixels[0] == 255).all() and (pixels[1] == 0).all()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_truncated_image_is_refused(format: str, share: float) -> None:
    data = to_bytes(natural(200, 150), format)
    with pytest.raises(ImageRefused, match=r"damaged|not an image"):
        images.decode(data[: int(share * len(data))])


def test_zero_bytes_are_refused() -> None:
    with pytest.raises(ImageRefused, match="empty: 0 bytes"):
        images.decode(b"")


@pytest.mark.parametrize(
    "data", [b"hello, world", b"<svg xmlns='...'/>", b"%PDF-1.7", b"\0" * 5000, b"\xff\xd8\xff"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageRefused, match=r"not an image of a format that is read \(JPEG"):
        images.decode(data)


def test_formats_that_run_programs_are_not_opened() -> None:
    """Pillow reads PostScript by starting Ghostscript."""
    postscript = to_bytes(corners(), "EPS")
    with pytest.raises(ImageRefused, match="not an image of a format"):
        images.decode(postscript)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_damaged_bytes_are_refused_or_read_and_never_raise_anything_else(format: str) -> None:
    rng = np.random.default_rng(7)
    whole = np.frombuffer(to_bytes(natural(48, 40), format), np.uint8)
    num_refused = 0
    for _ in range(150):
        damaged = whole.copy()
        places = rng.integers(0, len(whole), size=rng.integers(1, 20))
        damaged[places] = rng.integers(0, 256, size=len(places))
        try:
            images.decode(damaged.tobytes(), max_pixels=100_000)
        except ImageRefused:
            num_refused += 1
    assert num_refused > 0


def test_prepare_squashes_or_crops() -> None:
    data = to_bytes(corners(64, 32), "PNG")
    squashed = images.prepare(data, preprocessing(16))
    assert squashed.shape == (3, 16, 16) and squashed.dtype == np.uint8
    assert squashed[:, 2, 2].tolist() == list(RED) and squashed[:, 13, 13].tolist() == list(WHITE)
    wide = Image.new("RGB", (90, 30), RED)
    wide.paste(GREEN, (30, 0, 60, 30))
    assert (images.prepare(to_bytes(wide), preprocessing(30, "crop")) == np.array(GREEN)[:, None, None]).all()


@pytest.mark.parametrize("format", ["JPEG", "MPO"])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(format: str) -> None:
    picture = natural(1600, 1200)
    more = {"save_all": True, "append_images": [picture]} if format == "MPO" else {}
    data = to_bytes(picture, format, quality=95, **more)
    assert images.decode(data, min_side_px=96).size == (200, 150)
    whole = picture.resize((32, 32), Image.Resampling.BICUBIC)
    for factor in (images.DRAFT_FACTOR, 3):
        prep = replace(preprocessing(32), draft_factor=factor)
        difference = images.prepare(data, prep).astype(int) - np.asarray(whole).transpose(2, 0, 1)
        assert abs(difference).mean() < 1 and abs(difference).max() < 12


def test_how_small_a_jpeg_is_decoded_is_a_matter_of_the_preprocessing() -> None:
    """A picture of 800 x 600 keeps 1/4 of its size for squares of 100 px at factor 1.5, and 1/2 at 3."""
    data = to_bytes(natural(800, 600), "JPEG", quality=95)

    def by_hand(size: tuple[int, int]) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        image.draft(None, size)
        assert image.size == size
        return np.asarray(image.resize((100, 100), Image.Resampling.BICUBIC)).transpose(2, 0, 1)

    new, earlier = replace(preprocessing(100), draft_factor=1.5), preprocessing(100)
    assert np.array_equal(images.prepare(data, new), by_hand((200, 150)))
    assert np.array_equal(images.prepare(data, earlier), by_hand((400, 300)))
    assert not np.array_equal(by_hand((200, 150)), by_hand((400, 300)))
    crops = [images.augment(data, prep, AugmentConfig(), seed=3) for prep in (new, earlier)]
    assert np.array_equal(*crops)


def test_only_a_draft_factor_of_its_own_is_part_of_a_models_identity() -> None:
    fields = {"size_px": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5), "interpolation": "bicubic"}
    assert images.identity(preprocessing()) == fields | {"fit": "squash"}
    new = replace(preprocessing(), draft_factor=2)
    assert images.identity(new) == fields | {"fit": "squash", "draft_factor": 2}
    with pytest.raises(ConfigError, match=r"draft_factor is 0\.5; expected 1 to 16"):
        replace(preprocessing(), draft_factor=0.5)


def test_augmentation_is_a_function_of_the_seed_alone() -> None:
    data, config = to_bytes(natural(80, 60), "JPEG"), AugmentConfig()
    first = images.augment(data, preprocessing(), config, seed=5)
    np.random.seed(0)
    assert np.array_equal(first, images.augment(data, preprocessing(), config, seed=5))
    assert not np.array_equal(first, images.augment(data, preprocessing(), config, seed=6))
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda s: images.augment(data, preprocessing(), config, seed=s), [5] * 16))
    assert all(np.array_equal(first, other) for other in again)


@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_crops_lie_inside_the_image_and_keep_the_area_asked_for(fit: images.Fit) -> None:
    """On a picture whose red is its x and whose green is its y, a crop's extent can be read off."""
    x, y = np.meshgrid(np.linspace(0, 255, 256), np.linspace(0, 255, 128))
    ramp = np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8)
    data = to_bytes(Image.fromarray(ramp))
    config = AugmentConfig(min_area=0.25, color_jitter=0)
    areas, mirrored = [], 0
    for seed in range(200):
        pixels = images.augment(data, preprocessing(32, fit), config, seed=seed).astype(int)
        assert pixels[2].max() == 0
        span_x, span_y = (np.ptp(pixels[channel]) / 255 * 32 / 31 for channel in (0, 1))
        areas.append(span_x * span_y)
        mirrored += int(pixels[0, 0, 0] > pixels[0, 0, -1])
        if fit == "squash":
            assert 0.7 < span_x / span_y < 1.4
    assert min(areas) > 0.22 and max(areas) <= 1.05 and np.ptp(areas) > 0.3
    assert 70 < mirrored < 130


def test_without_augmentation_a_picture_is_as_prepared() -> None:
    data = to_bytes(natural(80, 60))
    off = AugmentConfig(min_area=1, horizontal_flip=False, color_jitter=0)
    assert np.array_equal(
        images.augment(data, preprocessing(), off, seed=3), images.prepare(data, preprocessing())
    )


def test_an_option_turned_off_leaves_the_others_numbers_alone() -> None:
    data = to_bytes(natural(80, 60))
    plain = AugmentConfig(horizontal_flip=False, color_jitter=0)
    flipped = AugmentConfig(horizontal_flip=True, color_jitter=0)
    for seed in range(6):
        without = images.augment(data, preprocessing(), plain, seed=seed)
        with_flip = images.augment(data, preprocessing(), flipped, seed=seed)
        assert np.array_equal(without, with_flip) or np.array_equal(without, with_flip[:, :, ::-1])


def test_colour_jitter_is_light_and_keeps_grey_grey() -> None:
    config = AugmentConfig(min_area=1, horizontal_flip=False, color_jitter=0.1)
    grey = to_bytes(Image.new("RGB", (40, 40), (100, 100, 100)))
    values = []
    for seed in range(50):
        pixels = images.augment(grey, preprocessing(), config, seed=seed).astype(int)
        assert np.ptp(pixels) <= 1
        values.append(pixels.mean())
    assert 89 <= min(values) < 94 and 106 < max(values) <= 111


def test_normalise_by_hand() -> None:
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    normalised = images.normalise(pixels, preprocessing())
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised.flatten(), torch.tensor([-2.5, 2.4, -0.2]))


def test_normalise_refuses_other_shapes() -> None:
    with pytest.raises(ShapeError, match=r"float32.*expected uint8 \(B, 3, H, W\)"):
        images.normalise(torch.zeros(1, 3, 4, 4), preprocessing())


def test_thumbnails_keep_their_shape_and_lose_their_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a secret"
    small = images.thumbnail(to_bytes(natural(400, 200), "JPEG", exif=exif.tobytes()), size_px=64)
    image = Image.open(io.BytesIO(small))
    assert image.size == (32, 64) and image.format == "JPEG" and b"secret" not in small
    tiny = images.thumbnail(to_bytes(Image.new("RGB", (3, 2))), size_px=64)
    assert Image.open(io.BytesIO(tiny)).size == (3, 2)


def test_png_goes_there_and_back() -> None:
    rng = np.random.default_rng(0)
    for shape in [(5, 7), (5, 7, 3)]:
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(images.encode_png(pixels)))), pixels)
    with pytest.raises(ShapeError, match="expected uint8"):
        images.encode_png(np.zeros((3, 4, 4), np.uint8))


def test_wrong_options_name_themselves() -> None:
    with pytest.raises(ConfigError, match="size_px is 0"):
        preprocessing(0)
    with pytest.raises(ConfigError, match=r"min_area is 1\.5"):
        AugmentConfig(min_area=1.5)
    with pytest.raises(ConfigError, match="color_jitter is -1"):
        AugmentConfig(color_jitter=-1)


def png(width: int, height: int, *, bit_depth: int, color_type: int, rows: bytes) -> bytes:
    """A PNG by hand: what its header claims and what it holds need not agree."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def profile_with_gamma(gamma: float) -> bytes:
    """An RGB matrix profile with sRGB's primaries and another tone curve, by hand (ICC.1, version 2)."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    name = b"linear\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 78
    description += b"\0" * (-len(description) % 4)
    tags = {
        b"desc": description,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.43607, 0.22249, 0.01392),
        b"gXYZ": xyz(0.38515, 0.71687, 0.09708),
        b"bXYZ": xyz(0.14307, 0.06061, 0.71410),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + xyz(0.9642, 1.0, 0.8249)[8:]
    return header + b"\0" * (128 - len(header)) + table + body
