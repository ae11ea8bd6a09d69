"""The paper's protocol, image files, LR/HR pairs, atomic files and the command line.

Images are float32 arrays of H x W or C x H x W in grey levels 0..255, unless a docstring states
something else. Nothing in this file needs torch.
"""

import argparse
import csv
import ctypes
import glob
import io
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError


class InputError(ValueError):
    """Unusable input. The message is one line: the file or flag, what is wrong, what to do."""


# --- colour ---------------------------------------------------------------------------------

# ITU-R BT.601, studio swing, from R'G'B' in 0..255 (MATLAB's rgb2ycbcr). Many ports have
# 64.738 / 256 for the first weight instead of 65.738 / 256 = 65.481 / 255: a typo.
BT601 = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])
BT601 /= 255
BT601_INVERSE = np.linalg.inv(BT601)
BT601_OFFSET = np.array([16.0, 128.0, 128.0])


def rgb_to_ycbcr(rgb: np.ndarray) -> np.ndarray:
    """Convert 3 x H x W, R'G'B' in 0..255, to Y in 16..235 and Cb, Cr in 16..240, not rounded."""
    dtype = np.result_type(rgb.dtype, np.float32)
    ycbcr = np.tensordot(BT601.astype(dtype), rgb, axes=1)
    ycbcr += BT601_OFFSET.astype(dtype)[:, None, None]  # in place, because images are large
    return ycbcr


def ycbcr_to_rgb(ycbcr: np.ndarray) -> np.ndarray:
    """Invert rgb_to_ycbcr; the result is neither rounded nor clipped."""
    dtype = np.result_type(ycbcr.dtype, np.float32)
    rgb = np.tensordot(BT601_INVERSE.astype(dtype), ycbcr, axes=1)
    rgb -= (BT601_INVERSE @ BT601_OFFSET).astype(dtype)[:, None, None]
    return rgb


def quantize(levels: np.ndarray, quantum: float = 1.0) -> np.ndarray:
    """Round half up to multiples of `quantum`, as MATLAB does, and clip to 0..255.

    Args:
        levels: any shape; the result has the same floating-point type.
        quantum: the distance of two values of the image file in grey levels: 1 for 8 bits,
            255 / 65535 for 16 bits; 0 (floating-point files) returns `levels` unchanged.
    """
    if not quantum:
        return levels
    rounded = levels / quantum + 0.5
    np.floor(rounded, out=rounded)
    rounded *= quantum
    return np.clip(rounded, 0, 255, out=rounded)


def luma(rgb: np.ndarray, quantum: float = 1.0) -> np.ndarray:
    """Return the rounded luma of rounded RGB: 3 x H x W to H x W, float32 (protocol step 1)."""
    return quantize(rgb_to_ycbcr(rgb.astype(np.float64))[0], quantum).astype(np.float32)


# --- resampling -----------------------------------------------------------------------------


def resize(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize like MATLAB's imresize(..., 'bicubic'): a = -0.5, antialiased, edges repeated.

    Pillow resamples float32 images with the same kernel but another border, so the border is
    padded first. The result agrees with the float64 formula within 1e-3 grey levels. Applied to
    the rows and then to the columns, with 8-bit rounding after each, it gives MATLAB's 8-bit
    image bit for bit.

    Args:
        planes: H x W or C x H x W, any units.
        size: (height, width), each a multiple or a divisor of the present side.

    Raises:
        ValueError: a side that is neither a multiple nor a divisor.
    """
    if planes.ndim == 3:
        return np.stack([resize(plane, size) for plane in planes])
    margins = []  # pixels to pad (before, after) resizing, for the rows and the columns
    for old, new in zip(planes.shape, size):
        if new < 1 or (old % new and new % old):
            raise ValueError(f"cannot resize {old} pixels to {new}: no multiple, no divisor")
        # The kernel spans two output pixels when downscaling, two input pixels when upscaling.
        margins.append((2 * max(1, old // new), 2 * max(1, new // old)) if old != new else (0, 0))
    (rows, top), (columns, left) = margins
    padded = np.pad(np.asarray(planes, np.float32), ((rows, rows), (columns, columns)), "edge")
    padded_size = size[1] + 2 * left, size[0] + 2 * top
    resized = Image.fromarray(padded).resize(padded_size, Image.Resampling.BICUBIC)
    return np.asarray(resized)[top : top + size[0], left : left + size[1]]


def crop_to_multiple(planes: np.ndarray, scale: int) -> np.ndarray:
    """Crop bottom and right so that both sides divide by `scale` (protocol step 2)."""
    height, width = planes.shape[-2:]
    return planes[..., : height - height % scale, : width - width % scale]


def shave(planes: np.ndarray, scale: int) -> np.ndarray:
    """Cut `scale` pixels off every side (protocol step 5); nothing at scale 1."""
    return planes[..., scale:-scale, scale:-scale] if scale > 1 else planes


# --- metrics --------------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE); infinite if equal."""
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def protocol_psnr(sr: np.ndarray, hr: np.ndarray, scale: int, quantum: float = 1.0) -> float:
    """Return the PSNR in dB as the paper measures it: rounded, then shaved (protocol step 5)."""
    return psnr(shave(quantize(sr, quantum), scale), shave(hr, scale))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the structural similarity (Wang et al., 2004): the mean where the window fits.

    11 x 11 Gaussian window, sigma 1.5, K1 = 0.01, K2 = 0.03, peak 255.

    Raises:
        ValueError: a side shorter than the window's 11 pixels.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError("SSIM needs images of at least 11 x 11 pixels")
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _gaussian_mean(a), _gaussian_mean(b)
    var_a, var_b = _gaussian_mean(a * a) - mean_a**2, _gaussian_mean(b * b) - mean_b**2
    covariance = _gaussian_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(np.mean(similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))))


def _gaussian_mean(planes: np.ndarray) -> np.ndarray:
    """Return the mean under an 11 x 11 Gaussian window of sigma 1.5 wherever it fits."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()
    height, width = planes.shape[-2] - 10, planes.shape[-1] - 10
    rows = sum(w * planes[..., i : i + height, :] for i, w in enumerate(window))
    return sum(w * rows[..., i : i + width] for i, w in enumerate(window))


# --- reading and writing images -------------------------------------------------------------


@contextmanager
def open_input(path: str | Path, kind: str, hint: str) -> Iterator[None]:
    """Convert any error while a file is read to an InputError of one line.

    Args:
        kind: what the file should be: "image", "h5 file", ...
        hint: what the user can do if it is not.
    """
    if not Path(path).is_file():
        problem = "is not a regular file" if Path(path).exists() else f"no such {kind}"
        raise InputError(f"{path}: {problem}; {hint}")
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except BlockingIOError as error:  # HDF5 locks the files that it writes
        raise InputError(
            f"{path}: is open for writing in another process; close it there"
        ) from error
    except Exception as error:  # libraries raise many types for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a valid {kind} ({reason[:120]}); {hint}") from error


def expand_patterns(names: Iterable[str | Path]) -> list[Path]:
    """Return names and matches of patterns such as `shard*.h5`, which not every shell expands."""
    paths = []
    for name in map(str, names):
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        paths += map(Path, matches or [name])
    return paths


def find_images(
    names: Iterable[str | Path],
    results: bool = False,
    folders_only: bool = False,
    ignored: list[Path] | None = None,
) -> dict[Path, Path]:
    """Return the named files, and the images in named folders and their subfolders, sorted.

    Args:
        names: files, folders, and patterns of them.
        results: whether to include what test.py writes (NAME_srcnn_x3.png, ...).
        folders_only: whether to refuse files.
        ignored: receives the other files in the folders.

    Returns:
        For each file its path relative to the named folder; for a named file its name.

    Raises:
        InputError: a missing folder, or one without an image.
    """
    images: dict[Path, Path] = {}
    for path in expand_patterns(names):
        if folders_only and not path.is_dir():
            raise InputError(f"{path}: no such folder; name a folder of images")
        if not path.is_dir():
            images.setdefault(path, Path(path.name))
            continue
        found = {file: file.relative_to(path) for file in sorted(walk(path))}
        if ignored is not None:
            ignored += [file for file, r in found.items() if not is_image_name(r, results)]
        found = {file: r for file, r in found.items() if is_image_name(r, results)}
        if not found:
            raise InputError(f"{path}: no image in it (results of test.py are ignored)")
        for file, relative in found.items():  # a folder may be named beside its subfolder
            images.setdefault(file, relative)
    return images


def unique_names(images: dict[Path, Path]) -> dict[Path, Path]:
    """Return find_images' relative paths; if some are equal, relative to the common folder."""
    if len(set(images.values())) == len(images):
        return images
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in images])
    return {path: Path(os.path.relpath(path, common)) for path in images}


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder; linked folders are followed, each real folder once."""
    visited = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        yield from (Path(parent, name) for name in names)


def is_image_name(relative: Path, results: bool) -> bool:
    """Return whether a path has an image's extension and is not hidden, nor test.py's result."""
    extensions = Image.registered_extensions()
    readable = extensions.get(relative.suffix.lower()) in Image.OPEN
    unreadable = {"BUFR", "GRIB", "HDF5"}  # registered by Pillow, which cannot decode them
    hidden = any(part.startswith(".") for part in relative.parts)
    is_result = re.search(r"_(srcnn|bicubic|comparison)_[xwh][\d.]+$", relative.stem)
    known = readable and extensions[relative.suffix.lower()] not in unreadable
    return known and not hidden and (results or not is_result)


# Text and profiles of a PNG that are larger than Pillow's limit of 1 MB are harmless.
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20
# Tags of TIFF and EXIF.
NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 0x00FE, 0x0102, 0x0106, 0x0112
SAMPLES_PER_PIXEL, PLANAR_CONFIGURATION, SAMPLE_FORMAT = 0x0115, 0x011C, 0x0153
Image.WARN_POSSIBLE_FORMATS = True  # tells why a valid TIFF cannot be decoded


def open_image(path: str | Path) -> Image.Image:
    """Read and decode an image: the first full frame, rotated by its EXIF orientation.

    `info` gets the jpeg_quality, and for `decode` the path, notes on what is lost,
    reduced_to_8_bits and white_is_zero.

    Raises:
        InputError: missing, not an image, damaged, or larger than --max-pixels.
    """
    notes: list[str] = []
    with (
        open_input(path, "image", "name another, or raise --max-pixels"),
        collect_warnings(notes),
        open(path, "rb") as stream,  # Pillow maps a TIFF opened by name, and rotates it wrongly
        Image.open(stream) as image,
    ):
        tags = skip_thumbnails(image) if image.format == "TIFF" else {}
        bits = max(tags.get(BITS_PER_SAMPLE, (stored_bits(image, stream),)))
        reduced_to_8_bits = bits > 8 and not image.mode.startswith(("I", "F"))
        check_decodable(image, tags, bits, reduced_to_8_bits)
        if reduced_to_8_bits:
            notes.append(f"{bits}-bit colour is read as 8 bits")
        ignored_bands = tags.get(SAMPLES_PER_PIXEL, 1) - len(image.getbands())
        if ignored_bands > 0:
            notes.append(f"{count_of(ignored_bands, 'further band')} ignored")
        if image.mode == "I;16" and "transparency" in image.info:
            notes.append("transparency of 16-bit greyscale is ignored")
        raw_exif = image.info.get("exif", b"II")
        if not isinstance(raw_exif, bytes) or not raw_exif.startswith((b"Exif\0\0", b"II", b"MM")):
            del image.info["exif"]
        exif = image.getexif()
        orientation = tags.get(ORIENTATION) or exif.get(ORIENTATION)
        image.load()  # rotates a TIFF
        # PNG text chunks share a dictionary with properties; a text named "dpi" is no dpi.
        image.info = {k: v for k, v in image.info.items() if not isinstance(v, str)}
        image.info.pop("exif", None)  # Pillow cannot write all that it reads
        upright = ImageOps.exif_transpose(image)
        if orientation in (5, 6, 7, 8) and "dpi" in image.info:
            upright.info["dpi"] = image.info["dpi"][::-1]
        upright.info["exif"] = portable_exif(exif)
        upright.info["jpeg_quality"] = jpeg_quality(getattr(image, "quantization", None))
        upright.info["path"] = path
        upright.info["reduced_to_8_bits"] = reduced_to_8_bits
        upright.info["white_is_zero"] = tags.get(PHOTOMETRIC) == 0 and bits > 8
        if upright.mode == "F" and not np.isfinite(np.asarray(upright)).all():
            raise InputError("contains NaN or infinity; replace them by numbers")
        is_unsigned = tags.get(SAMPLE_FORMAT, (1,))[0] == 1
        if upright.mode == "I" and bits == 32 and is_unsigned and np.asarray(upright).min() < 0:
            raise InputError("has values above 2^31, which Pillow cannot decode")
        with suppress(Exception):  # further pages need not be images
            is_first = image.tell() == 0 and image.format != "MPO"  # of phones, with a preview
            if is_first and getattr(image, "n_frames", 1) > 1 and not has_overviews(image):
                notes.append(f"{image.n_frames} frames, only the first is used")
    upright.info["notes"] = notes
    return upright


def stored_bits(image: Image.Image, stream: io.BufferedReader) -> int:
    """Return the bits per value in a file that is not a TIFF, as far as Pillow does not hide it."""
    if image.format == "PPM" and image.tile[0].codec_name.startswith("ppm"):
        return 16 if image.tile[0].args[1] > 255 else 8
    if image.format == "SGI":
        return 8 * os.pread(stream.fileno(), 1, 3)[0]
    if image.format == "JPEG2000":  # byte 38 of the SIZ marker segment, see ISO 15444-1, A.5.1
        header = os.pread(stream.fileno(), 4096, 0)
        start = header.find(b"\xff\x4f\xff\x51")
        return 1 + (header[start + 42] & 127) if start >= 0 else 8
    return 16 if ";16" in str(image.tile) else 8


def check_decodable(image: Image.Image, tags: dict, bits: int, reduced_to_8_bits: bool) -> None:
    """Refuse kinds of files that Pillow decodes to other values, without an error."""
    is_signed = tags.get(SAMPLE_FORMAT, (1,))[0] == 2
    is_planar = tags.get(PLANAR_CONFIGURATION) == 2
    kinds = {
        "signed 8-bit TIFF": is_signed and bits == 8,
        "compressed big-endian TIFF of signed values": "BS'" in str(image.tile),
        "planar 16-bit TIFF": is_planar and reduced_to_8_bits,
        "planar TIFF with alpha": is_planar and image.mode == "LA",
        "16-bit FITS file": image.format == "FITS" and image.mode == "I;16",
        "16-bit colour JPEG 2000": image.format == "JPEG2000" and reduced_to_8_bits,
    }
    for kind, applies in kinds.items():
        if applies:
            raise InputError(f"is a {kind}, which Pillow decodes wrongly; convert it")


def has_overviews(image: Image.Image) -> bool:
    """Return whether the second page of a TIFF is a smaller copy or a mask of the first."""
    image.seek(1)
    return image.format == "TIFF" and image.tag_v2.get(NEW_SUBFILE_TYPE, 0) != 0


def skip_thumbnails(image: Image.Image) -> dict:
    """Select the first page of a TIFF that is not a reduced-resolution one; return its tags."""
    page = 0
    while image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1:
        page += 1
        try:
            image.seek(page)
        except EOFError as error:
            raise InputError("contains only a thumbnail that Pillow can decode") from error
    return image.tag_v2


def jpeg_quality(tables: dict | None) -> int | None:
    """Return libjpeg's quality, 1..100, for a JPEG's quantisation tables; None without tables.

    Tables of other encoders get the quality at which libjpeg's luma table has about the same sum.
    """
    if not tables:
        return None
    return int(np.abs(libjpeg_table_sums() - sum(tables[0])).argmin()) + 1


@cache
def libjpeg_table_sums() -> np.ndarray:
    """Return the sums of libjpeg's luma tables of qualities 1..100, which scale that of 50."""
    encoded = io.BytesIO()
    Image.new("L", (8, 8)).save(encoded, "JPEG", quality=50)
    table = np.array(Image.open(encoded).quantization[0])
    quality = np.arange(1, 101)
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)[:, None]
    return ((table * percent + 50) // 100).clip(1, 255).sum(axis=1)


def portable_exif(exif: Image.Exif) -> bytes:
    """Return description, camera, date, author, settings and GPS position, as far as they fit.

    Orientation, size, thumbnail and the maker's own data do not hold for another image.
    """
    portable = Image.Exif()
    tags = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
    portable.update({tag: exif[tag] for tag in tags if tag in exif})
    content = b""
    with suppress(Exception):  # Pillow cannot write all that it reads
        for folder in (0x8769, 0x8825):
            values = dict(exif.get_ifd(folder))
            for tag in (0xA002, 0xA003, 0xA005, 0x927C):
                values.pop(tag, None)
            if values:
                portable[folder] = values
        content = portable.tobytes() if len(portable) else b""
    return content if len(content) < 60_000 else b""  # a JPEG stores less than 65,536 bytes


@contextmanager
def collect_warnings(notes: list[str]) -> Iterator[None]:
    """Append the first warning of Pillow or of a C library below it to `notes`."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except UnidentifiedImageError as error:
            reasons = [str(w.message) for w in caught if str(w.message).startswith("TIFF")]
            raise ValueError(reasons[0] if reasons else "unknown format") from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        lines = [str(w.message) for w in caught] + file.read().decode(errors="replace").splitlines()
        notes += [line[:200] for line in lines[:1]]


@dataclass
class Planes:
    """A decoded image.

    colour: C x H x W, 1 (greyscale) or 3 channels (RGB); uint8, uint16, int32 or float32.
    alpha: H x W, uint8, or None.
    low, high: the values of `colour` that stand for the grey levels 0 and 255.
    mode: Pillow's mode of an image made from such planes.
    """

    colour: np.ndarray
    alpha: np.ndarray | None
    low: float
    high: float
    mode: str

    @property
    def source(self) -> dict:
        """The value range and the bit depth, as h5 files and weights store them."""
        return {"range": [float(self.low), float(self.high)], "bit_depth": 8 * self.colour.itemsize}

    @property
    def quantum(self) -> float:
        """The distance of two values in grey levels, 0 for floating point; see quantize."""
        return 0.0 if self.mode == "F" else 255 / (self.high - self.low)

    def levels(self) -> np.ndarray:
        """Return `colour` in grey levels, float32."""
        values = np.asarray(self.colour, np.float32)
        return (values - self.low) * np.float32(255 / (self.high - self.low))

    def to_image(self, levels: np.ndarray) -> Image.Image:
        """Make an image from C x H x W grey levels, alpha as the last plane: rounded, clipped."""
        dtype, planes = self.colour.dtype, []
        for i, plane in enumerate(levels):  # one by one, because images are large
            is_alpha = i >= len(self.colour)
            low, high, quantum = (0, 255, 1.0) if is_alpha else (self.low, self.high, self.quantum)
            values = quantize(plane, quantum) * ((high - low) / 255) + low
            if quantum:
                values = np.clip(np.rint(values), np.iinfo(dtype).min, np.iinfo(dtype).max)
            planes.append(values.astype(dtype))
        return Image.fromarray(np.stack(planes, axis=-1) if len(planes) > 1 else planes[0])


def decode(image: Image.Image, value_range: Sequence[float] | dict | None = None) -> Planes:
    """Convert an image of any Pillow mode; greyscale and 16-bit greyscale are preserved.

    What is lost is printed in one line.

    Args:
        value_range: the values that stand for the grey levels 0 and 255, or a dict of them by
            bit depth. The default is the range of the type; for 32-bit and floating-point images,
            their minimum and maximum.
    """
    mode, values = image.mode, None
    path, notes = image.info.pop("path", None), image.info.pop("notes", [])
    if mode.startswith("I") or mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        mode = "F" if mode == "F" else "I"
        if mode == "I" and low >= 0 and high <= 65535:
            values, mode = values.astype(np.uint16), "I;16"
    bit_depth = 8 if values is None else 8 * values.itemsize
    if isinstance(value_range, dict):
        value_range = value_range.get(bit_depth)
    if value_range and image.info.get("reduced_to_8_bits"):
        raise InputError("--range: Pillow reads 16-bit colour as 8 bits; use greyscale images")
    if notes:
        print(f"{path}: {'; '.join(notes)}", file=sys.stderr)
    if values is not None:
        if mode == "I;16" and value_range is None and path and 0 < high < 4096:
            suggest_range(path, high)
        if mode != "I;16" and value_range is None and not high - low < 1e30:
            raise InputError(f"has values from {low:g} to {high:g}; pass --range LOW HIGH")
        if high == low:  # one value has no range
            high = low + max(1.0, abs(low))
        default = (0, 65535) if mode == "I;16" else (low, high)
        if value_range and mode == "F":  # a value that means "no data" may be -3.4e38
            values = np.clip(values, *map(np.float32, value_range))
        low, high = value_range or default
        if image.info.get("white_is_zero"):
            inverted = low + high - values.astype(np.float64)
            values = inverted.clip(low, high).astype(values.dtype)
        return Planes(values[None], None, low, high, mode)
    greyscale = image.mode in ("1", "L", "LA", "La")
    mode = ("L" if greyscale else "RGB") + ("A" if image.has_transparency_data else "")
    values = np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)
    alpha = values[-1] if mode.endswith("A") else None
    return Planes(values[: 1 if greyscale else 3], alpha, *value_range or (0, 255), mode)


RANGE_SUGGESTED: set[Path] = set()  # folders


def suggest_range(path: str | Path, maximum: float) -> None:
    """Print once per folder that 16-bit images seem to have 12 bits."""
    if Path(path).parent not in RANGE_SUGGESTED:
        RANGE_SUGGESTED.add(Path(path).parent)
        note = f"values up to {maximum:.0f} of 65535; --range 0 4095 reads images as 12 bits"
        print(f"{path}: {note}", file=sys.stderr)


def fill_transparent(planes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Give invisible pixels the colours around them, so that no edge is left at their border.

    Pull and push: downscale by weighted means until no gap is left, then fill from coarse to
    fine (Gortler et al., "The lumigraph", 1996).

    Args:
        planes: C x H x W.
        weight: 1 x H x W, 0 where a pixel is invisible.
    """
    height, width = planes.shape[1:]
    if weight.all() or max(height, width) == 1:
        return planes

    def resample(values: np.ndarray, size: tuple[int, int], kernel: Image.Resampling) -> np.ndarray:
        images = (Image.fromarray(np.ascontiguousarray(plane)) for plane in values)
        return np.stack([np.asarray(image.resize(size, kernel)) for image in images])

    half = -(-width // 2), -(-height // 2)
    coarse_weight = resample(weight, half, Image.Resampling.BOX)
    means = resample(planes * weight, half, Image.Resampling.BOX) / np.maximum(coarse_weight, 1e-12)
    filled = fill_transparent(means, coarse_weight)
    return np.where(
        weight > 0, planes, resample(filled, (width, height), Image.Resampling.BILINEAR)
    )


# --- LR/HR pairs ----------------------------------------------------------------------------


@dataclass
class Pair:
    """The ground truth and the network's input; float32, 0..255.

    ilr: H x W or C x H x W, the LR image upscaled by bicubic.
    hr: the ground truth, of the same shape.
    lr: the LR image, or None where only ilr is known.
    quantum: of the HR image file, see quantize.
    greyscale: whether that is greyscale; its RGB has three equal channels.
    source: its value range and bit depth, see Planes.source.
    name: for tables.
    """

    ilr: np.ndarray
    hr: np.ndarray
    lr: np.ndarray | None = None
    quantum: float = 1.0
    greyscale: bool = False
    source: dict = field(default_factory=dict)
    name: str = ""

    @property
    def num_channels(self) -> int:
        """C, which is 1 for H x W."""
        return 1 if self.hr.ndim == 2 else len(self.hr)


def to_levels(
    image: Image.Image, num_channels: int = 1, value_range: Sequence[float] | dict | None = None
) -> tuple[np.ndarray, Planes]:
    """Return the image that the protocol measures, and the decoded planes.

    Returns:
        One channel: H x W, the rounded luma; a greyscale image is its own luma. Three channels:
        3 x H x W, RGB; a greyscale image is repeated.

    Raises:
        InputError: an image without a value range of its own.
    """
    planes = decode(image, value_range)
    if isinstance(value_range, dict):
        value_range = value_range.get(planes.source["bit_depth"])
    if planes.mode in ("I", "F") and value_range is None:
        raise InputError("has no value range; pass those of black and white by --range LOW HIGH")
    levels = quantize(planes.levels(), planes.quantum).clip(0, 255)
    if num_channels == 3:
        levels = np.repeat(levels, 3, axis=0) if len(levels) == 1 else levels
    else:
        levels = levels[0] if len(levels) == 1 else luma(levels, planes.quantum)
    return levels, planes


def read_levels(
    path: str | Path, num_channels: int = 1, value_range: Sequence[float] | dict | None = None
) -> tuple[np.ndarray, Planes]:
    """Return to_levels of an image file; the errors are those of open_image and to_levels."""
    image = open_image(path)
    with open_input(path, "image", "name another"):
        return to_levels(image, num_channels, value_range)


def bicubic_pair(hr: np.ndarray, scale: int, quantum: float = 1.0) -> Pair:
    """Make the protocol's pair (steps 2 and 3); empty if the image is smaller than the scale."""
    hr = crop_to_multiple(hr, scale)
    if not hr.size:
        return Pair(hr, hr, None, quantum)
    lr = resize(hr, (hr.shape[-2] // scale, hr.shape[-1] // scale))
    return Pair(resize(lr, hr.shape[-2:]), hr, lr, quantum)


def jpeg_lr_image(hr: Planes, scale: int, quality: int) -> Image.Image:
    """Downscale by bicubic, round to 8 bits, encode as JPEG (4:2:0) and decode: a photograph."""
    levels = crop_to_multiple(hr.levels().clip(0, 255), scale)
    lr = quantize(resize(levels, (levels.shape[1] // scale, levels.shape[2] // scale)))
    encoded = io.BytesIO()
    image = Image.fromarray(lr.astype(np.uint8).transpose(1, 2, 0).squeeze())
    image.save(encoded, "JPEG", quality=quality)
    return Image.open(encoded)


def make_pair(
    hr_image: Image.Image,
    lr_image: Image.Image | None,
    scale: int,
    num_channels: int = 1,
    value_range: Sequence[float] | dict | None = None,
    jpeg: int | None = None,
) -> Pair:
    """Return the pair of an HR and an LR image; without an LR image, of the protocol's bicubic.

    An LR image `scale` times smaller is upscaled by bicubic; one of equal size is used directly.

    Args:
        jpeg: use jpeg_lr_image of this quality.

    Raises:
        InputError: sizes that do not fit, and the errors of to_levels.
    """
    hr, planes = to_levels(hr_image, num_channels, value_range)
    if jpeg and min(hr.shape[-2:]) >= scale:
        lr_image, value_range = jpeg_lr_image(planes, scale, jpeg), None
    if lr_image is None:
        pair = bicubic_pair(hr, scale, planes.quantum)
    else:
        lr, _ = to_levels(lr_image, num_channels, value_range)
        cropped = crop_to_multiple(hr, scale)
        if lr.shape == hr.shape:
            pair = Pair(lr, hr, None, planes.quantum)
        elif scale > 1 and tuple(scale * side for side in lr.shape[-2:]) == cropped.shape[-2:]:
            pair = Pair(resize(lr, cropped.shape[-2:]), cropped, lr, planes.quantum)
        else:
            sizes = f"{hr_image.width} x {hr_image.height} and {lr_image.width} x {lr_image.height}"
            raise InputError(f"{sizes} pixels do not differ by --scale {scale}")
    pair.greyscale, pair.source = len(planes.colour) == 1, planes.source
    return pair


def read_pair(path: Path, lr_path: Path | None, *args: object) -> Pair:
    """Return make_pair(image, LR image, *args) of files; without lr_path there is no LR image.

    Raises:
        InputError: what open_image and make_pair raise.
    """
    images = [open_image(path), open_image(lr_path) if lr_path else None]
    try:
        return make_pair(*images, *args)
    except InputError as error:
        paths = f"{path} and {lr_path}" if lr_path else path
        raise InputError(f"{paths}: {error}") from error


def pair_key(relative: Path, scale: int) -> tuple[str, ...]:
    """Return what the paths of an HR image and of its LR image have in common.

    These are the parts without upper case and without HR, LR, GT, SR and the scale at their end:
    `HR/0801.png`, `LR/X2/0801x2.png` and `0801_SRF_2_LR.png` have the same key at scale 2.
    """
    roles = "HR|LR|GT|SR|srcnn|bicubic"
    marks = rf"((^|[-_. ])({roles}|SRF_?{scale}|x{scale}|{scale}x)|x{scale})+$"
    parts = [*relative.parts[:-1], relative.stem]
    return tuple(filter(None, (re.sub(marks, "", part.lower(), flags=re.I) for part in parts)))


def match_images(
    names: Sequence[str | Path], folders: Sequence[str | Path], scale: int
) -> dict[Path, list[Path]]:
    """Return for each image the files in `folders` with its subfolder and name, see pair_key.

    As many folders as names are matched in order. Where both are one folder, files marked LR are
    the LR images, and those marked HR or GT, or else all others, the HR images.
    """
    groups = [(names, folders)]
    if len(names) == len(folders):
        groups = [([name], [folder]) for name, folder in zip(names, folders)]
    matches: dict[Path, list[Path]] = {}
    for group_names, group_folders in groups:
        images = find_images(group_names)
        candidates = find_images(group_folders, results=True, folders_only=True)
        if images.keys() & candidates.keys():
            images, candidates = (
                select_role(images, "HR|GT", "LR"),
                select_role(images, "LR", "HR|GT"),
            )
        by_key: dict[tuple, list[Path]] = {}
        for path, relative in unique_names(candidates).items():
            by_key.setdefault(pair_key(relative, scale), []).append(path)
        keys = {path: pair_key(name, scale) for path, name in unique_names(images).items()}
        by_image: dict[tuple, list[Path]] = {}
        for path, key in keys.items():
            by_image.setdefault(key, []).append(path)
        for path, key in keys.items():  # a match of several images belongs to none of them
            others = [other for other in by_image[key] if other != path]
            matches[path] = by_key.get(key, []) + others
    return matches


def select_role(images: dict[Path, Path], role: str, other_role: str) -> dict[Path, Path]:
    """Return the images that are marked with a role in their path, or else not with the other."""

    def marked(relative: Path, role: str) -> bool:
        return re.search(rf"(^|[-_. /])({role})(?![a-z])", relative.as_posix(), re.I) is not None

    selected = {path: r for path, r in images.items() if marked(r, role)}
    return selected or {path: r for path, r in images.items() if not marked(r, other_role)}


def only_match(path: Path, matches: Sequence[Path], flag: str) -> Path:
    """Return the single file that match_images has found for an image."""
    if len(matches) != 1:
        number = " and ".join(map(str, matches)) or "no file"
        raise InputError(f"{path}: {flag} has {number} of its subfolder and name; one is needed")
    return matches[0]


# --- atomic files ---------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, renamed to `path` at the end: a file appears complete or not.

    Raises:
        InputError: the folder or the file cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))  # a symbolic link is followed, not replaced
    partial = None
    try:
        if target.exists() and not target.is_file():  # a pipe or a device cannot be renamed
            yield Path(path)
            return
        folder = next(f for f in target.parents if f.exists())  # no folder is left by an error
        partial = folder / f".part-{uuid.uuid4().hex}"
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(target)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(f"{path}: cannot be written ({reason}); name another place") from error
    finally:
        if partial:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes) -> None:
    """Write bytes to a file that appears complete or not at all."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def write_csv(path: str | Path, columns: Sequence[str], rows: list[dict]) -> None:
    """Write rows of these columns below a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode(errors="backslashreplace"))


def check_outputs(
    outputs: Iterable[tuple[str | Path, str | Path]], inputs: Iterable[str | Path]
) -> None:
    """Check before the work begins that outputs can be written and overwrite no input.

    Args:
        outputs: (the flag or file that asks for it, the path); links are followed.

    Raises:
        InputError: an output that is an input, another output, a folder, or not writable.
    """
    claimed = {os.path.normcase(os.path.realpath(path)): path for path in inputs}
    for source, output in outputs:
        place = os.path.normcase(os.path.realpath(output))
        if place in claimed:
            raise InputError(f"{source}: {output} would overwrite {claimed[place]}; name another")
        claimed[place] = f"the output of {source}"
        if os.path.isdir(output) or str(output).endswith(("/", os.sep)):
            raise InputError(f"{output}: is a folder; name a file")
        folder = next(f for f in Path(place).parents if f.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"{output}: cannot be written in {folder}; name another place")


# --- errors and command line ----------------------------------------------------------------


def report(error: InputError) -> None:
    """Print an error as one line on stderr, with control characters escaped."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)


def count_of(number: int, noun: str) -> str:
    """Return "1 image", "2 images", "2,000 patches"."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


@contextmanager
def report_errors(path: object, failed: list) -> Iterator[None]:
    """Report an InputError as one line that names `path`, note the path in `failed`."""
    try:
        yield
    except InputError as error:
        message = str(error)
        report(error if message.startswith(str(path)) else InputError(f"{path}: {message}"))
        failed.append(path)


@contextmanager
def optional_import(package: str, flag: str) -> Iterator[None]:
    """Import inside this block what only one flag needs; say how to install it if it is missing."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{flag}: needs {package}; pip install {package}") from error


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the script's docstring as --help, and errors of one line without the usage."""

    def __init__(self, description: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
        if "" in argv:  # an unset shell variable, which as a path would be the current folder
            flag = " ".join(argv[: argv.index("")][-1:])
            self.error(f"{flag} '': is empty; pass a value")
        return super().parse_args(argv)

    def exit(self, status: int = 0, message: str | None = None) -> None:
        sys.stdout.flush()  # a closed pipe is then an error inside run()
        super().exit(status, message)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def add_image_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that prepare.py and test.py share."""
    add, limit = group.add_argument, Image.MAX_IMAGE_PIXELS
    max_pixels = "refuse larger images (default: %(default)s)"
    add("--max-pixels", type=number(int, 1), default=limit, metavar="N", help=max_pixels)
    value_range = "values of black and white (default: those of the file's type)"
    finite = number(float, -math.inf)
    add("--range", type=finite, nargs=2, metavar=("LOW", "HIGH"), help=value_range)
    lr_dir = "LR images, S times smaller or of equal size, matched by subfolder and name"
    add("--lr-dir", nargs="+", metavar="DIR", help=lr_dir)


def apply_image_flags(args: argparse.Namespace) -> None:
    """Check and apply the flags of add_image_flags."""
    Image.MAX_IMAGE_PIXELS = args.max_pixels
    if args.range and not 1e-30 < args.range[1] - args.range[0] < 1e30:
        raise InputError("--range: LOW must be below HIGH")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: an int or a float of at least `low` and below `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value < high:
            limit = f"of at least {low}" if high == math.inf else f"from {low} to below {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limit}")
        return value

    parse.__name__ = kind.__name__  # argparse uses it in its message for a ValueError
    return parse


def run(main: Callable[[], int | None]) -> None:
    """Exit with main's status, with 2 after one line for bad input, or by the signal received."""
    set_signal_handlers(raise_exit)
    keep_freed_memory()
    with suppress(AttributeError):  # names that the terminal cannot print are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    status = 2
    try:
        status = main()
        sys.stdout.flush()
    except InputError as error:
        report(error)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except OSError as error:
        if isinstance(
            error, BrokenPipeError
        ):  # the reader of a pipe, such as `head`, has closed it
            status = 128 + 13  # SIGPIPE
        else:
            place = error.filename or "stdout or the system"
            report(InputError(f"{place}: {error.strerror or error}; name another place"))
        if not error.filename:
            sys.stdout = None  # otherwise Python flushes it once more at exit
    if status == 128 + signal.SIGINT:  # a shell's loop over runs stops only if SIGINT ends this one
        with suppress(OSError):
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    sys.exit(status)


def set_signal_handlers(handler: Callable | signal.Handlers) -> None:
    """Handle Ctrl-C, a batch system's SIGTERM and a closing terminal, unless nohup ignores it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def raise_exit(signum: int, frame: object) -> None:
    """End the program by an exception, so that `finally` blocks remove partial files."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed arrays: returning it takes a tenth of the run time."""
    with suppress(OSError, AttributeError, TypeError):  # where there is no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX, because every thread's arena would keep memory
