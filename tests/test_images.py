"""Image files of many kinds: how they are read, what is reported, and what results preserve.

Values are compared with the arrays that the files were made from, and with those of tifffile.
"""

import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT, noise, refused, spawn
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

from models import SRCNN
from utils import InputError, Planes, decode, open_image, psnr, resize

U8, U16, U32, F32 = np.uint8, np.uint16, np.uint32, np.float32
GREY, DEEP_GREY = noise(36, 40).astype(U8), (noise(36, 40) * 257).astype(U16)
RGB, DEEP_RGB = noise(36, 40, 3).astype(U8), (noise(36, 40, 3) * 257).astype(U16)
ORIENTATION, MAKER_NOTE = 0x0112, 0x927C


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def read(capfd) -> Callable[..., tuple[Planes, list[str]]]:
    """Decode an image file as test.py does; return the planes and the lines on stderr."""

    def read(path: str, value_range: tuple | None = None) -> tuple[Planes, list[str]]:
        capfd.readouterr()
        planes = decode(open_image(path), value_range)
        return planes, capfd.readouterr().err.splitlines()

    return read


@pytest.fixture
def upscaled(call) -> Callable[..., tuple[Image.Image, list[str]]]:
    """Upscale a file twofold by bicubic; return the result and the lines on stderr."""
    # An untrained network without further filters returns its input exactly.
    torch.save(SRCNN(1, (1, 1), (3, 1, 3)).state_dict(), "identity.pth")

    def upscaled(path: str, *argv: object, output: str = "result.png") -> tuple:
        flags = "--scale", 2, "--weights-file", "identity.pth", "--back-projection", 0
        result = call("test", path, "--output", output, *flags, *argv)
        assert result.status == 0, result.err
        return Image.open(output), result.err.splitlines()

    return upscaled


def colour_of(planes: Planes) -> np.ndarray:
    """Return the colour planes as H x W or H x W x 3."""
    return planes.colour.transpose(1, 2, 0).squeeze()


def bicubic(values: np.ndarray) -> np.ndarray:
    """Upscale H x W or H x W x C twofold."""
    planes = np.atleast_3d(values).transpose(2, 0, 1)
    large = resize(planes, (2 * planes.shape[1], 2 * planes.shape[2]))
    return large.transpose(1, 2, 0).squeeze()


def one_line(lines: list[str], path: str, *words: str) -> bool:
    """Assert a single line that begins with the path and contains these words."""
    assert len(lines) == 1 and lines[0].startswith(f"{path}: "), lines
    for word in words:
        assert word in lines[0]
    return True


def write_png(path: str, values: np.ndarray, *chunks: tuple[bytes, bytes]) -> str:
    """Write a PNG of 8 or 16 bits and 1 to 4 channels, with chunks in front of its pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    height, width, channels = np.atleast_3d(values).shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * values.itemsize, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    content = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in content))
    return path


def png_chunks(path: str) -> set[bytes]:
    """Return the names of a PNG's chunks."""
    content, names, position = Path(path).read_bytes(), set(), 8
    while position < len(content):
        (size,) = struct.unpack(">I", content[position : position + 4])
        names.add(content[position + 4 : position + 8])
        position += size + 12
    return names


# --- bit depths and bands -------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planar_16_bit_rgb_tiff_is_refused(call, compression):
    planar = {"planarconfig": "separate", "compression": compression}
    tifffile.imwrite("a.tif", DEEP_RGB.transpose(2, 0, 1), photometric="rgb", **planar)
    assert np.array_equal(tifffile.imread("a.tif"), DEEP_RGB.transpose(2, 0, 1))
    for flags in (), ("--eval",):
        assert refused(call("test", "a.tif", *flags), "a.tif: ", "planar 16-bit")
    argv = "--images-dir", ".", "--output-path", "a.h5", "--scale", 2
    assert refused(call("prepare", *argv), "a.tif: ", "planar 16-bit")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planar_8_bit_rgb_tiff_is_read(read, compression):
    planar = {"planarconfig": "separate", "compression": compression}
    tifffile.imwrite("a.tif", RGB.transpose(2, 0, 1), photometric="rgb", **planar)
    planes, lines = read("a.tif")
    assert np.array_equal(planes.colour, tifffile.imread("a.tif")) and not lines


@pytest.mark.parametrize("name", ["a.png", "alpha.png", "a.tif", "zip.tif", "big-endian.tif"])
def test_16_bit_colour_is_read_as_8_bits_with_one_line(read, upscaled, name):
    values = DEEP_RGB
    if name.endswith("png"):
        values = np.dstack([values, DEEP_GREY]) if name == "alpha.png" else values
        write_png(name, values)
    else:
        compression = "zlib" if name == "zip.tif" else None
        byteorder = ">" if name == "big-endian.tif" else "<"
        options = {"compression": compression, "byteorder": byteorder, "photometric": "rgb"}
        tifffile.imwrite(name, values, **options)
    planes, lines = read(name)
    assert one_line(lines, name, "16-bit", "8 bits")
    assert np.abs(colour_of(planes) - DEEP_RGB / 257).max() < 1
    if name == "alpha.png":
        assert np.abs(planes.alpha - DEEP_GREY / 257).max() < 1
    assert one_line(upscaled(name)[1], name, "16-bit")
    if name == "a.png":  # these weights have the range of 8 bits
        rgb = ROOT / "weights" / "srcnn_rgb_x2.pth"
        assert one_line(upscaled(name, "--weights-file", rgb)[1], name, "16-bit")


@pytest.mark.parametrize("damage", ["an inverted byte", "truncated"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_damaged_pixels_are_refused_as_pillow_refuses_them(call, photo, suffix, damage):
    path = Path(f"a.{suffix}")
    Image.fromarray(photo).save(path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with suppress(Exception):
        Image.open(path).load()
        return  # Pillow decodes it
    assert refused(call("test", path, "--scale", 2), path.name)
    assert not Path("a_srcnn_x2.png").exists()


def test_16_bit_ppm_is_read_as_8_bits_with_one_line(read):
    Path("a.ppm").write_bytes(b"P6 40 36 65535\n" + DEEP_RGB.astype(">u2").tobytes())
    planes, lines = read("a.ppm")
    assert np.abs(colour_of(planes) - DEEP_RGB / 257).max() < 1
    assert one_line(lines, "a.ppm", "16-bit")


def test_16_bit_colour_in_jpeg_2000_is_right_or_refused(read):
    """Pillow rounds values above 65,407 to 256, which 8 bits store as 0."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: opencv-python-headless")
    values = np.repeat(np.linspace(0, 65535, 128).astype(U16)[:, None], 128, axis=1)
    if not cv2.imwrite(
        "a.jp2", np.dstack([values] * 3), [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    ):
        pytest.skip("this OpenCV does not write JPEG 2000")
    assert np.abs(cv2.imread("a.jp2", -1)[..., 0].astype(int) - values).max() < 257
    try:
        planes, lines = read("a.jp2")
    except InputError:
        return
    assert one_line(lines, "a.jp2", "16-bit")
    assert np.abs(planes.colour[0] - values / 257).max() < 2


def test_16_bit_greyscale_is_preserved(read):
    tifffile.imwrite("a.tif", DEEP_GREY), tifffile.imwrite("b.tif", DEEP_GREY, byteorder=">")
    Image.fromarray(DEEP_GREY).save("c.png")
    for path in "a.tif", "b.tif", "c.png":
        planes, lines = read(path)
        assert np.array_equal(colour_of(planes), DEEP_GREY) and not lines


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "float32"])
def test_other_types_of_values_are_right_or_refused(read, dtype, byteorder, compression):
    values = np.linspace(-100, 127, 20 * 30).reshape(20, 30).astype(dtype)
    if dtype == "uint32":
        values = np.abs(np.linspace(-100, 127, 600)).reshape(20, 30).astype(dtype) << 20
    options = {"byteorder": byteorder, "compression": compression, "photometric": "minisblack"}
    tifffile.imwrite("a.tif", values, **options)
    try:
        planes, lines = read("a.tif")
    except InputError:
        return
    assert np.array_equal(colour_of(planes), tifffile.imread("a.tif")) and not lines


@pytest.mark.parametrize("low", [2**31 - 300, 2**31, 2**32 - 400])
def test_32_bit_values_above_2_to_31_are_right_or_refused(call, low):
    values = np.linspace(low, low + 399, 400).reshape(20, 20).astype(U32)
    tifffile.imwrite("a.tif", values, photometric="minisblack")
    result = call("test", "a.tif", "--scale", 2, "--output", "b.tif")
    if result.status:
        assert refused(result, "a.tif: ", "2^31")
    else:
        assert np.abs(tifffile.imread("b.tif") - bicubic(values.astype(float))).max() < 9


@pytest.mark.parametrize(("bit_pix", "offset"), [(16, 0), (16, 32768), (32, 0), (-32, 0)])
def test_fits_is_right_or_refused(read, bit_pix, offset):
    """16-bit FITS is signed; unsigned values are stored with an offset of 32768."""
    dtype = {16: ">i2", 32: ">i4", -32: ">f4"}[bit_pix]
    values = np.linspace(offset - 3000, offset + 3000, 36 * 40).reshape(36, 40).round()
    cards = {"SIMPLE": "T", "BITPIX": bit_pix, "NAXIS": 2, "NAXIS1": 40, "NAXIS2": 36}
    cards |= {"BZERO": offset} if offset else {}
    header = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items()) + "END"
    content = (values[::-1] - offset).astype(dtype).tobytes()  # the lowest row comes first
    blocks = header.ljust(2880).encode() + content
    Path("a.fits").write_bytes(blocks.ljust(-(-len(blocks) // 2880) * 2880, b"\0"))
    try:
        planes, lines = read("a.fits")
    except InputError:
        return
    assert np.array_equal(colour_of(planes), values) and not lines


def test_a_tiff_that_pillow_cannot_decode_is_refused_for_the_reason_of_pillow():
    """In another process, because pytest records Python's warnings, which tell the reason."""
    tifffile.imwrite("a.tif", GREY.astype(np.float64), photometric="minisblack")
    four_bands = np.dstack([DEEP_GREY] * 4)
    tifffile.imwrite("b.tif", four_bands, photometric="minisblack", planarconfig="contig")
    result = spawn(ROOT / "test.py", "a.tif", "b.tif")
    for line, path in zip(result.stderr.splitlines(), ("a.tif", "b.tif"), strict=True):
        assert line.startswith(f"test.py: error: {path}: ") and "pixel mode" in line
        assert "_io.BufferedReader" not in line


EXTRA_BANDS = {
    "fourth": (np.dstack([RGB, GREY]), "contig", "rgb", None),
    "fourth, zip": (np.dstack([RGB, GREY]), "contig", "rgb", "zlib"),
    "fourth and fifth": (np.dstack([RGB, GREY, GREY]), "contig", "rgb", "zlib"),
    "fourth, planar": (np.dstack([RGB, GREY]).transpose(2, 0, 1), "separate", "rgb", "zlib"),
    "second of greyscale": (np.dstack([GREY, GREY[::-1]]), "contig", "minisblack", None),
    "second, planar": (np.stack([GREY, GREY[::-1]]), "separate", "minisblack", "zlib"),
    "second, 16 bits": (np.stack([DEEP_GREY] * 2), "separate", "minisblack", "zlib"),
}


@pytest.mark.parametrize("kind", EXTRA_BANDS)
def test_an_unspecified_band_is_ignored_with_one_line_or_refused(read, kind):
    values, planarconfig, photometric, compression = EXTRA_BANDS[kind]
    bands = values.shape[0 if planarconfig == "separate" else 2]
    extra = {"extrasamples": ["unspecified"] * (bands - (3 if photometric == "rgb" else 1))}
    options = {"planarconfig": planarconfig, "compression": compression} | extra
    tifffile.imwrite("a.tif", values, photometric=photometric, **options)
    try:
        planes, lines = read("a.tif")
    except InputError:
        return
    expected = values if planarconfig == "separate" else values.transpose(2, 0, 1)
    assert np.array_equal(planes.colour, expected[: len(planes.colour)]) and planes.alpha is None
    assert one_line(lines, "a.tif", "band")


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
def test_ycbcr_tiff_has_no_fourth_band(read, photo, compression):
    ycbcr = Image.fromarray(photo).convert("YCbCr")
    if compression == "jpeg":
        ycbcr.save("a.tif", compression="jpeg", quality=95)
    else:  # libtiff converts it to RGB and an unused byte
        options = {"compression": "zlib", "subsampling": (1, 1)}
        tifffile.imwrite("a.tif", np.asarray(ycbcr), photometric="ycbcr", **options)
    planes, lines = read("a.tif")
    assert np.abs(colour_of(planes).astype(int) - photo).mean() < 3 and not lines


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_of_a_tiff_is_right_or_refused(read, channels, planarconfig, compression):
    values = np.dstack([GREY] * (channels == 2) + [RGB] * (channels == 4) + [RGB[..., 1]])
    photometric = "minisblack" if channels == 2 else "rgb"
    options = {"extrasamples": ["unassalpha"], "compression": compression}
    stored = values.transpose(2, 0, 1) if planarconfig == "separate" else values
    options |= {"photometric": photometric, "planarconfig": planarconfig}
    tifffile.imwrite("a.tif", stored, **options)
    try:
        planes, lines = read("a.tif")
    except InputError:
        return
    assert np.array_equal(np.dstack([*planes.colour, planes.alpha]), values) and not lines


def test_transparency_of_16_bit_greyscale_is_preserved_or_reported(read):
    transparent = DEEP_GREY[0, 0]
    chunk = b"tRNS", struct.pack(">H", transparent)
    planes, lines = read(write_png("a.png", DEEP_GREY, chunk))
    assert np.array_equal(colour_of(planes), DEEP_GREY)
    if planes.alpha is None:
        assert one_line(lines, "a.png", "transparency")
    else:
        assert np.array_equal(planes.alpha == 0, transparent == DEEP_GREY)


def test_transparency_of_8_bit_greyscale_is_preserved(read):
    transparent = GREY[0, 0]
    chunk = b"tRNS", struct.pack(">H", transparent)
    planes, lines = read(write_png("a.png", GREY, chunk))
    assert np.array_equal(planes.alpha == 0, transparent == GREY) and not lines


# --- white is zero, values without data -----------------------------------------------------


@pytest.mark.parametrize("dtype", [U8, U16, F32])
def test_white_is_zero_is_inverted(read, upscaled, dtype):
    values = np.linspace(10, 200, 36 * 40).reshape(36, 40).astype(dtype)
    tifffile.imwrite("a.tif", values, photometric="miniswhite")
    assert np.array_equal(tifffile.imread("a.tif"), values)  # tifffile does not invert
    white = {U8: 255, U16: 65535, F32: 210}[dtype]  # in floating point the sum of the extremes
    planes, _ = read("a.tif")
    assert np.allclose(colour_of(planes), white - values.astype(float), atol=1e-4)
    result, _ = upscaled("a.tif", output="b.tif")
    assert np.abs(result - bicubic(white - values.astype(F32))).max() <= 1


def test_white_is_zero_is_inverted_in_the_range(read, upscaled):
    values = np.linspace(0, 4095, 36 * 40).reshape(36, 40).astype(U16)
    tifffile.imwrite("a.tif", values, photometric="miniswhite")
    planes, lines = read("a.tif", (0, 4095))
    assert np.array_equal(colour_of(planes), 4095 - values) and not lines
    result, _ = upscaled("a.tif", "--range", 0, 4095)
    assert result.mode == "I;16"
    assert np.abs(result - bicubic(F32(4095) - values).clip(0, 4095)).max() <= 1


@pytest.mark.parametrize("dtype", [U16, F32])
def test_inverted_values_outside_of_the_range_become_black_and_white(upscaled, dtype):
    values = np.repeat([[0] * 12 + [60_000] * 12], 24, axis=0).astype(dtype)
    tifffile.imwrite("a.tif", values, photometric="miniswhite")
    result, _ = upscaled("a.tif", "--range", 1000, 4095, output="b.tif")
    levels = np.asarray(result).astype(float)
    assert levels[:, :20].min() >= 4000 and levels[:, 28:].max() <= 1100


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_a_value_without_data_needs_a_range(call, upscaled, photometric):
    values = np.linspace(0, 1, 36 * 40).reshape(36, 40).astype(F32)
    values[20:, 20:] = -3.4e38
    tifffile.imwrite("a.tif", values, photometric=photometric)
    for flags in (), ("--eval",):
        assert refused(call("test", "a.tif", "--scale", 2, *flags), "a.tif: ", "--range LOW HIGH")
    result, lines = upscaled("a.tif", "--range", 0, 1, output="b.tif")
    expected = values.clip(0, 1) if photometric == "minisblack" else 1 - values.clip(0, 1)
    assert np.abs(np.clip(result, 0, 1) - bicubic(expected).clip(0, 1)).max() < 1e-4 and not lines
    assert call("test", "a.tif", "--scale", 2, "--eval", "--range", 0, 1)[::2] == (0, "")


# --- orientation and pages ------------------------------------------------------------------

ROTATIONS = {3: lambda x: np.rot90(x, 2), 5: lambda x: x.swapaxes(0, 1)}
ROTATIONS |= {6: lambda x: np.rot90(x, -1), 8: np.rot90}


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("orientation", ROTATIONS)
def test_orientation_in_raw_profile_type_exif_is_applied(read, orientation, is_compressed):
    """ImageMagick writes EXIF into PNG as a text of hexadecimal digits."""
    exif, texts = Image.Exif(), PngImagePlugin.PngInfo()
    exif[ORIENTATION] = orientation
    content = exif.tobytes()
    digits = content.hex()
    lines = [digits[i : i + 72] for i in range(0, len(digits), 72)]
    profile = "\n".join(["", "exif", f"{len(content):8}", *lines, ""])
    texts.add_text("Raw profile type exif", profile, zip=is_compressed)
    Image.fromarray(RGB).save("a.png", pnginfo=texts)
    planes, lines = read("a.png")
    assert np.array_equal(colour_of(planes), ROTATIONS[orientation](RGB)) and not lines


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "lzw.tif", "webp"])
@pytest.mark.parametrize("orientation", ROTATIONS)
def test_orientation_is_applied_once_in_all_formats(read, orientation, suffix):
    values, exif = np.zeros((32, 48, 3), U8), Image.Exif()
    values[:16, :16], values[16:, :16], exif[ORIENTATION] = 250, 120, orientation
    options = {"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}
    Image.fromarray(values).save(f"a.{suffix}", exif=exif, **options)
    planes, _ = read(f"a.{suffix}")
    expected = ROTATIONS[orientation](values)
    assert colour_of(planes).shape == expected.shape
    assert np.abs(colour_of(planes).astype(int) - expected).mean() < 4


def test_a_thumbnail_in_front_of_the_full_page_is_skipped(read, upscaled):
    for count, full in (1, RGB), (2, RGB), (1, DEEP_GREY):
        with tifffile.TiffWriter("a.tif") as file:
            for i in range(count):
                file.write(RGB[:: 4 >> i, :: 4 >> i], photometric="rgb", subfiletype=1)
            file.write(full, photometric="rgb" if full is RGB else "minisblack")
        planes, lines = read("a.tif")
        assert np.array_equal(colour_of(planes), full) and len(lines) <= 1
    assert upscaled("a.tif")[0].size == (80, 72)


def test_orientation_is_that_of_the_full_page(read):
    with tifffile.TiffWriter("a.tif") as file:
        file.write(RGB[::4, ::4], photometric="rgb", subfiletype=1)
        file.write(RGB, photometric="rgb", extratags=[(ORIENTATION, "H", 1, 6)])
    assert np.array_equal(colour_of(read("a.tif")[0]), np.rot90(RGB, -1))


def test_a_thumbnail_whose_full_page_pillow_cannot_find_is_refused(call):
    with tifffile.TiffWriter("a.tif") as file:  # as a DNG, with the image in a SubIFD
        file.write(RGB[::4, ::4], photometric="rgb", subfiletype=1, subifds=1)
        file.write(DEEP_GREY, photometric="minisblack")
    Path("a.dng.tif").write_bytes(Path("a.tif").read_bytes())
    assert refused(call("test", "a.dng.tif"), "a.dng.tif: ", "thumbnail")


@pytest.mark.parametrize("with_mask", [False, True])
def test_first_page_of_a_cloud_optimised_geotiff_is_used(read, upscaled, with_mask):
    tiles = {"tile": (16, 16), "compression": "zlib"}
    with tifffile.TiffWriter("a.tif") as file:
        for step in 1, 2:
            part, is_overview = RGB[::step, ::step], step > 1
            file.write(part, photometric="rgb", subfiletype=int(is_overview), **tiles)
            if with_mask:
                mask, page_type = np.ones(part.shape[:2], bool), 4 + is_overview
                file.write(mask, photometric="mask", subfiletype=page_type, **tiles)
    planes, lines = read("a.tif")
    assert np.array_equal(colour_of(planes), RGB) and len(lines) <= 1
    result, lines = upscaled("a.tif")
    assert result.size == (80, 72) and len(lines) <= 1


def test_second_image_of_a_phones_mpo_needs_no_line(read, upscaled):
    first, second = Image.fromarray(RGB), Image.fromarray(GREY[::2, ::2])
    first.save("a.mpo", save_all=True, append_images=[second])
    first.save("b.jpg", "MPO", save_all=True, append_images=[second])
    for path in "a.mpo", "b.jpg":
        assert Image.open(path).n_frames == 2
        planes, lines = read(path)
        assert np.array_equal(colour_of(planes), np.asarray(Image.open(path))) and not lines
        result, lines = upscaled(path)
        assert result.size == (80, 72) and not lines


# --- metadata -------------------------------------------------------------------------------


def long_profile(size: int) -> bytes:
    """Return a colour profile for RGB of this size."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return struct.pack(">I", size) + profile[4:] + noise(size - len(profile)).astype(U8).tobytes()


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("size", [900_000, 1_200_000])
def test_a_profile_above_1_mb_is_left_out_of_a_png_with_one_line(read, upscaled, suffix, size):
    profile = long_profile(size)
    Image.fromarray(RGB).save("a.tif", icc_profile=profile)
    result, lines = upscaled("a.tif", output=f"b.{suffix}")
    if suffix == "png" and size > 1 << 20:
        assert one_line(lines, "b.png", "profile")
        assert b"iCCP" not in png_chunks("b.png")
    else:
        assert result.info["icc_profile"] == profile and not lines
    planes, lines = read(f"b.{suffix}")
    assert planes.mode == "RGB" and not lines


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_a_png_with_2_mb_of_text_is_read(read, upscaled, kind):
    text = noise(2 << 20).astype(U8) % 26 + 65
    start = {b"tEXt": b"a\0", b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind]
    content = text.tobytes() if kind == b"tEXt" else zlib.compress(text.tobytes())
    planes, lines = read(write_png("a.png", RGB, (kind, start + content)))
    assert np.array_equal(colour_of(planes), RGB) and not lines
    assert not upscaled("a.png")[1]


@pytest.mark.parametrize("unit", [None, 1, 2, 3])
def test_only_a_tiff_with_a_resolution_gives_the_result_one(upscaled, unit):
    options = {"resolution": (100, 100), "resolutionunit": unit} if unit else {}
    if unit is None:
        Image.fromarray(RGB).save("a.tif")
        assert not {282, 283, 296} & set(Image.open("a.tif").tag_v2)
    else:
        tifffile.imwrite("a.tif", RGB, photometric="rgb", **options)
    for output in "b.png", "b.jpg", "b.tif":
        result, lines = upscaled("a.tif", output=output)
        dpi = {2: 100, 3: 254}.get(unit)  # 1 is no unit, 3 the centimetre
        assert not lines
        if dpi:
            assert result.info["dpi"] == pytest.approx((dpi, dpi), abs=0.1)
        elif output == "b.jpg":  # Pillow reads 72 dpi from EXIF without a resolution
            assert result.info["jfif_unit"] == 0 and 0x011A not in result.getexif()
        elif output == "b.tif":  # of a TIFF without a resolution, 1 dpi
            assert not {282, 283} & set(result.tag_v2)
        else:
            assert "dpi" not in result.info and 0x011A not in result.getexif()


THUMBNAIL = b"\xff\xd8thumbnail\xff\xd9"


def camera_exif() -> bytes:
    """Return what a phone writes: camera, date, position, orientation, and a thumbnail."""
    date, exif = "2024:05:06 07:08:09", Image.Exif()
    exif.update({0x010F: "Maker", 0x0110: "Model", 0x0132: date, ORIENTATION: 6})
    exif[0x8769] = {0x9003: date, 0x829A: 0.01, 0x8827: 100, MAKER_NOTE: b"maker note"}
    exif[0x8769] |= {0xA002: 40, 0xA003: 36}
    exif[0x8825] = {1: "N", 2: (48.0, 30.0, 12.5), 3: "E", 4: (9.0, 15.0, 0.5)}
    content = bytearray(exif.tobytes()[6:])  # "Exif\0\0" comes first
    order = "<" if content.startswith(b"II") else ">"
    (start,) = struct.unpack(f"{order}I", content[4:8])
    (count,) = struct.unpack(f"{order}H", content[start : start + 2])
    position = start + 2 + 12 * count  # of the offset of the next directory, the thumbnail's
    content[position : position + 4] = struct.pack(f"{order}I", len(content))
    entries = (0x0103, 3, 1, 6 if order == "<" else 6 << 16), (0x0201, 4, 1, len(content) + 42)
    entries += ((0x0202, 4, 1, len(THUMBNAIL)),)
    directory = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    directory = struct.pack(f"{order}H", 3) + directory + bytes(4)
    return b"Exif\0\0" + bytes(content) + directory + THUMBNAIL


OUTPUTS = ["jpg", "png", "tif", "webp"] + ["avif"] * features.check("avif")


@pytest.mark.parametrize(
    ("source", "output"), [("jpg", o) for o in OUTPUTS] + [(s, "jpg") for s in OUTPUTS[1:]]
)
def test_exif_is_preserved_without_orientation_and_thumbnail(upscaled, source, output):
    Image.fromarray(RGB).save(f"a.{source}", exif=camera_exif())
    if source == "jpg":  # the input has what the result must not have
        assert Image.open("a.jpg").getexif().get_ifd(ExifTags.IFD.IFD1)[0x0201]
        assert THUMBNAIL in Path("a.jpg").read_bytes()
    result, lines = upscaled(f"a.{source}", output=f"b.{output}")
    assert not lines
    assert result.size == (72, 80)  # rotated by 90 degrees
    exif = result.getexif()
    assert exif.get(ORIENTATION, 1) == 1
    assert (exif[0x010F], exif[0x0110], exif[0x0132]) == ("Maker", "Model", "2024:05:06 07:08:09")
    settings, position = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    assert (settings[0x9003], settings[0x8827]) == ("2024:05:06 07:08:09", 100)
    assert float(settings[0x829A]) == pytest.approx(0.01)
    assert not {0xA002, 0xA003, MAKER_NOTE} & set(settings)  # size and offsets of another image
    assert (position[1], position[3]) == ("N", "E")
    assert [float(x) for x in position[2]] == [48, 30, 12.5]
    assert not exif.get_ifd(ExifTags.IFD.IFD1) and THUMBNAIL not in Path(f"b.{output}").read_bytes()


def test_exif_of_an_unusual_type_does_not_prevent_reading(read, upscaled):
    content = camera_exif()
    for order in "<", ">":
        latitude, wrong = (struct.pack(f"{order}HHI", 2, kind, 3) for kind in (5, 2))
        content = content.replace(latitude, wrong)  # text instead of three rational numbers
    assert content != camera_exif()
    Image.fromarray(RGB).save("a.jpg", exif=content)
    planes, lines = read("a.jpg")
    assert planes.colour.shape == (3, 40, 36) and len(lines) <= 1
    assert upscaled("a.jpg", output="b.jpg")[0].size == (72, 80)


# --- outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["webp", *["avif"] * features.check("avif")])
def test_webp_and_avif_are_as_close_to_the_pixels_as_jpeg(upscaled, photo, suffix):
    Image.fromarray(photo).save("a.png")
    exact, jpeg, other = (
        np.asarray(upscaled("a.png", output=f"b.{name}")[0].convert("RGB"))
        for name in ("png", "jpg", suffix)
    )
    assert 40 < psnr(jpeg, exact) <= psnr(other, exact)


# --- warnings -------------------------------------------------------------------------------


DECODE = "from PIL import Image; import sys; [Image.open(p).load() for p in sys.argv[1:]]"


def write_damaged_fax(path: str) -> None:
    """Write a fax image with errors in several rows; libtiff prints each."""
    Image.fromarray(np.repeat(noise(64, 16) > 128, 3, axis=1)).save(path, compression="group4")
    with Image.open(path) as image:
        start, size = image.tag_v2[273][0], image.tag_v2[279][0]
    content = bytearray(Path(path).read_bytes())
    for position in range(start + size // 4, start + size // 2, 7):
        content[position] ^= 0x55
    Path(path).write_bytes(content)


def write_lost_tags(path: str) -> None:
    """Write a TIFF with two tags beyond its end; Pillow warns of each."""
    Image.fromarray(RGB).save(path, compression="tiff_lzw", dpi=(72, 72))
    content = Path(path).read_bytes()
    for tag in 282, 283:
        start = content.index(struct.pack("<HHI", tag, 5, 1))
        content = content[: start + 8] + struct.pack("<I", 1 << 24) + content[start + 12 :]
    Path(path).write_bytes(content)


def test_several_warnings_about_a_file_are_one_line_that_names_it():
    """In other processes, because pytest records Python's warnings itself."""
    write_damaged_fax("fax.tif")
    write_lost_tags("tags.tif")
    for path in "fax.tif", "tags.tif":
        assert spawn("-W", "always", "-c", DECODE, path).stderr.count("\n") > 1
    result = spawn("-W", "always", ROOT / "test.py", "fax.tif", "tags.tif", "--scale", 2)
    assert result.returncode == 0 and Path("tags_srcnn_x2.png").is_file()
    lines = result.stderr.splitlines()
    for line, path in zip(lines, ("fax.tif", "tags.tif"), strict=True):
        assert line.startswith(f"{path}: ")
        assert "site-packages" not in line and "Plugin.py" not in line


def test_warnings_about_a_file_that_is_refused_add_no_line(call):
    write_damaged_fax("a.tif")
    content = Path("a.tif").read_bytes()
    Path("a.tif").write_bytes(content.replace(struct.pack("<HHI", 257, 3, 1), bytes(8), 1))
    assert refused(call("test", "a.tif"), "a.tif: ")


def test_a_jpeg_whose_table_has_another_number_has_the_same_quality(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(16, 16).astype(np.uint8)).save(path, quality=60)
    content = path.read_bytes()
    table = content.index(b"\xff\xdb") + 4
    component = content.index(b"\xff\xc0") + 12
    assert (content[table], content[component]) == (0, 0)
    numbered = bytearray(content)
    numbered[table] = numbered[component] = 1
    path.write_bytes(numbered)
    assert open_image(path).info["jpeg_quality"] == 60
