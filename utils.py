"""The paper's protocol, image files, LR/HR pairs, atomic files and the command line.

Images are float32 arrays of H x W or C x H x W in grey levels 0..255, unless a docstring states
something else. Nothing in this file needs torch. Docstrings refer to the steps of the protocol:

1. Luma: Y of BT.601 of the 8-bit RGB image, rounded; a greyscale image is its own luma.
2. Crop the bottom and right so that both sides divide by the scale.
3. Downscale and upscale by bicubic, as MATLAB's imresize does; the LR image is not rounded.
4. Apply the network to the upscaled image / 255, its edges repeated past the border.
5. Round the output to grey levels and clip it to 0..255; shave `scale` pixels off every side of
   it and of the ground truth; then PSNR with peak 255, and SSIM.
6. The score of a data set is the mean over its images.
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
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError
from PIL.ExifTags import IFD, Base as Tag


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
    margins = []  # for rows and columns: pixels to pad before and to cut off after resizing
    for old, new in zip(planes.shape, size):
        if new < 1 or (old % new and new % old):
            raise ValueError(f"cannot resize {old} pixels to {new}: no multiple, no divisor")
        # The kernel spans two output pixels when downscaling, two input pixels when upscaling.
        margins.append((2 * max(1, old // new), 2 * max(1, new // old)) if old != new else (0, 0))
    (pad_y, top), (pad_x, left) = margins
    padded = np.pad(np.asarray(planes, np.float32), ((pad_y, pad_y), (pad_x, pad_x)), "edge")
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


# --- finding and matching images ------------------------------------------------------------


def expand_patterns(names: Iterable[str | Path]) -> list[Path]:
    """Return names and matches of patterns such as `shard*.h5`, which not every shell expands."""
    paths = []
    for name in map(str, names):
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        paths += map(Path, matches or [name])
    return paths


def find_images(
    names: Iterable[str | Path],
    include_results: bool = False,
    folders_only: bool = False,
    ignored: list[Path] | None = None,
) -> dict[Path, Path]:
    """Return the named files, and the images in named folders and their subfolders, sorted.

    Args:
        names: files, folders, and patterns of them.
        include_results: whether to include what test.py writes (NAME_srcnn_x3.png, ...).
        folders_only: whether to refuse files.
        ignored: receives the other files in the folders.

    Returns:
        {path: its unique name, relative to the named folder}, see unique_names.

    Raises:
        InputError: a missing folder, or one without an image.
    """
    images: dict[Path, Path] = {}
    for path in expand_patterns(names):
        if not path.is_dir():
            if folders_only:
                raise InputError(f"{path}: no such folder; name a folder of images")
            images.setdefault(path, Path(path.name))
            continue
        files = sorted(walk(path))
        found = [file for file in files if is_image_name(file.relative_to(path), include_results)]
        if not found:
            raise InputError(f"{path}: no image in it (results of test.py are ignored)")
        if ignored is not None:
            ignored += set(files) - set(found)
        for file in found:  # a folder may be named beside its subfolder
            images.setdefault(file, file.relative_to(path))
    return unique_names(images)


def unique_names(images: dict[Path, Path]) -> dict[Path, Path]:
    """Return {path: name}; if two names are equal, all become relative to their common folder."""
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
        else:
            visited.add(real)
            yield from (Path(parent, name) for name in names)


def is_image_name(relative: Path, include_results: bool) -> bool:
    """Return whether a path has an image's extension and is not hidden, nor test.py's result."""
    image_format = Image.registered_extensions().get(relative.suffix.lower())
    # Pillow opens these three only with a decoder of another package.
    is_image = image_format in Image.OPEN and image_format not in ("BUFR", "GRIB", "HDF5")
    is_hidden = any(part.startswith(".") for part in relative.parts)
    is_result = re.search(r"_(srcnn|bicubic|comparison)_[xwh][\d.]+$", relative.stem)
    return is_image and not is_hidden and (include_results or not is_result)


def match_images(
    names: Sequence[str | Path],
    folders: Sequence[str | Path],
    scale: int,
    results_of: Container[Path] | None = None,
) -> dict[Path, list[Path]]:
    """Return for each image the files in `folders` with its subfolder and name, see pair_key.

    As many folders as names are matched in order. Where both contain the same files, those marked
    LR are matched to those marked HR or GT; if none has such a mark, the other files are meant.
    Two images with equal keys are listed as each other's match, so that only_match refuses both.

    Args:
        results_of: the images to match, if `folders` contain results instead of LR images.
    """
    groups = [(names, folders)]
    if len(names) == len(folders):
        groups = [([name], [folder]) for name, folder in zip(names, folders)]
    matches: dict[Path, list[Path]] = {}
    for group_names, group_folders in groups:
        images = find_images(group_names)
        candidates = find_images(group_folders, results_of is not None, folders_only=True)
        if results_of is not None:
            images = {path: name for path, name in images.items() if path in results_of}
        if len(without(images, candidates)) < len(images):
            lr_images = marked(candidates, "LR")
            if results_of is None:
                candidates = lr_images or candidates
            else:
                candidates = without(candidates, lr_images)
            images = marked(images, "HR|GT") or images
            images = without(images, candidates) or images
            candidates = without(candidates, images)
        by_key: dict[tuple, list[Path]] = {}
        for path, name in [*candidates.items(), *images.items()]:
            by_key.setdefault(pair_key(name, scale), []).append(path)
        for path, name in images.items():
            matches[path] = [match for match in by_key[pair_key(name, scale)] if match != path]
    return matches


def without(images: dict[Path, Path], others: Iterable[Path]) -> dict[Path, Path]:
    """Return the images that are not among the others, whatever links lead to them."""
    real_paths = set(map(os.path.realpath, others))
    return {p: name for p, name in images.items() if os.path.realpath(p) not in real_paths}


def marked(images: dict[Path, Path], role: str) -> dict[Path, Path]:
    """Return the images with a role, such as LR or HR|GT, in their name or a folder's name."""
    mark = re.compile(rf"(^|[-_. /])({role})(?![a-z])", re.I)
    return {path: name for path, name in images.items() if mark.search(name.as_posix())}


def pair_key(relative: Path, scale: int) -> tuple[str, ...]:
    """Return what the paths of an HR image and of its LR image have in common.

    These are the parts without upper case and without HR, LR, GT, SR and the scale at their end:
    `HR/0801.png`, `LR/X2/0801x2.png` and `0801_SRF_2_LR.png` have the same key at scale 2.
    """
    roles = "hr|lr|gt|sr|srcnn|bicubic"
    marks = rf"((^|[-_. ])({roles}|srf_?{scale}|x{scale}|{scale}x)|x{scale})+$"
    parts = [re.sub(marks, "", part.lower()) for part in relative.with_suffix("").parts]
    return tuple(part for part in parts if part)


def only_match(path: Path, matches: Sequence[Path], flag: str) -> Path:
    """Return the single file that match_images has found for an image."""
    if len(matches) != 1:
        found = " and ".join(map(str, matches)) or "no file"
        raise InputError(f"{path}: {flag} has {found} of its subfolder and name; one is needed")
    return matches[0]


# --- reading images -------------------------------------------------------------------------

# Text and profiles of a PNG that are larger than Pillow's limit of 1 MB are harmless.
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20
Image.WARN_POSSIBLE_FORMATS = True  # tells why a valid TIFF cannot be decoded
HIGH_BIT_DEPTH = "I", "F"  # Pillow's modes of more than 8 bits begin so; all are greyscale
# EXIF that also holds for the upscaled image: not orientation, size, thumbnail, maker's data.
EXIF_TAGS = Tag.ImageDescription, Tag.Make, Tag.Model, Tag.Software, Tag.DateTime, Tag.Artist
EXIF_TAGS += (Tag.Copyright,)
EXIF_FOLDERS = IFD.Exif, IFD.GPSInfo
NOT_IN_FOLDERS = Tag.ExifImageWidth, Tag.ExifImageHeight, IFD.Interop, IFD.MakerNote


@contextmanager
def open_input(path: str | Path, kind: str, hint: str) -> Iterator[None]:
    """Convert any error while a file is read to an InputError of one line.

    Args:
        kind: what the file should be: "image", "h5 file", ...
        hint: what the user can do if it is not.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such {kind}; {hint}")
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except BlockingIOError as error:  # HDF5 locks the files that it writes
        raise InputError(f"{path}: open for writing in another process; close it there") from error
    except Exception as error:  # libraries raise many types for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a valid {kind} ({reason[:120]}); {hint}") from error


def open_image(path: str | Path) -> Image.Image:
    """Read and decode an image: the first full frame, rotated by its EXIF orientation.

    `info` gets portable EXIF, jpeg_quality and chroma_subsampled of a JPEG file, and for `decode`
    the path, notes on what is lost, the bits per value in the file and white_is_zero.

    Raises:
        InputError: missing, not an image, damaged, or larger than --max-pixels.
    """
    notes: list[str] = []
    with (
        open_input(path, "image", "name another"),
        collect_warnings(notes),
        open(path, "rb") as stream,  # Pillow maps a TIFF opened by name, and rotates it wrongly
        Image.open(stream) as image,
    ):
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        with suppress(EOFError):
            while tags.get(Tag.NewSubfileType, 0) & 1:  # a thumbnail in front of the full image
                image.seek(image.tell() + 1)
        bits = check_decodable(image, tags)
        if bits > 8 and not image.mode.startswith(HIGH_BIT_DEPTH):
            notes.append(f"{bits}-bit colour is read as 8 bits")
        ignored_bands = tags.get(Tag.SamplesPerPixel, 1) - len(image.getbands())
        if ignored_bands > 0:
            notes.append(f"{count_of(ignored_bands, 'further band')} ignored")
        orientation = tags.get(Tag.Orientation)  # load() rotates a TIFF and removes this tag
        image.load()  # before getexif, which decodes a PNG and hides its errors
        exif = Image.Exif()
        with suppress(Exception):  # damaged EXIF does not make an image unusable
            exif = image.getexif()
        orientation = orientation or exif.get(Tag.Orientation)
        # PNG text chunks share a dictionary with properties; a text named "dpi" is no dpi.
        image.info = {k: v for k, v in image.info.items() if not isinstance(v, str)}
        image.info.pop("exif", None)  # exif_transpose cannot write all EXIF that Pillow reads
        upright = ImageOps.exif_transpose(image)
        if orientation in (5, 6, 7, 8) and "dpi" in image.info:
            upright.info["dpi"] = image.info["dpi"][::-1]
        is_uint32 = bits == 32 and tags.get(Tag.SampleFormat, (1,))[0] == 1
        if image.mode == "I" and is_uint32 and np.asarray(image).min() < 0:
            raise InputError("has values above 2^31, which Pillow cannot decode; convert it")
        if image.mode == "I;16" and "transparency" in image.info:
            notes.append("transparency of 16-bit greyscale is ignored")
        upright.info |= {"exif": portable_exif(exif), "jpeg_quality": jpeg_quality(image)}
        is_subsampled = image.mode != "L" and JpegImagePlugin.get_sampling(image) != 0
        upright.info["chroma_subsampled"] = is_subsampled  # of a JPEG file
        upright.info |= {"path": path, "notes": notes, "bits": bits}
        upright.info["white_is_zero"] = tags.get(Tag.PhotometricInterpretation) == 0
        with suppress(Exception):  # there is no second frame, or it cannot be decoded
            image.seek(image.tell() + 1)
            # The second image of a phone's MPO is a preview, that of a TIFF may be a mask. The
            # first of a TIFF may have been a thumbnail.
            is_frame = image.format != "MPO" and not tags.get(Tag.NewSubfileType, 0)
            if is_frame and image.tell() == 1:
                notes.append(f"{image.n_frames} frames, only the first is used")
    return upright


def check_decodable(image: Image.Image, tags: dict) -> int:
    """Return the bits per value of a file; refuse kinds that Pillow decodes to other values."""
    bits = 16 if ";16" in str(image.tile) else 8  # as in PNG
    if tags:
        bits = max(tags.get(Tag.BitsPerSample, [bits]))
    elif image.format == "PPM" and image.tile[0].codec_name.startswith("ppm"):
        bits = 16 if image.tile[0].args[1] > 255 else 8
    elif image.format == "JPEG2000":  # byte 38 of the SIZ marker segment, see ISO 15444-1, A.5.1
        image.fp.seek(0)
        segment = image.fp.read(4096).partition(b"\xff\x4f\xff\x51")[2]
        bits = 1 + (segment[38] & 127) if segment else 8
    is_signed = tags.get(Tag.SampleFormat, (1,))[0] == 2
    is_planar = tags.get(Tag.PlanarConfiguration) == 2
    loses_bits = bits > 8 and not image.mode.startswith(HIGH_BIT_DEPTH)
    wrongly_decoded = {
        "thumbnail of an image in a SubIFD": tags.get(Tag.NewSubfileType, 0) & 1,
        "signed 8-bit TIFF": is_signed and bits == 8,
        "compressed big-endian TIFF of signed values": "BS'" in str(image.tile),
        "planar 16-bit TIFF": is_planar and loses_bits,
        "planar TIFF with alpha": is_planar and image.mode == "LA",
        "16-bit FITS file": image.format == "FITS" and image.mode == "I;16",
        "16-bit colour JPEG 2000": image.format == "JPEG2000" and loses_bits,
    }
    for kind, applies in wrongly_decoded.items():
        if applies:
            raise InputError(f"is a {kind}, which Pillow decodes wrongly; convert it")
    return bits


def encode_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return an image after encoding as JPEG (4:2:0)."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return Image.open(encoded)


def jpeg_quality(image: Image.Image) -> int | None:
    """Return libjpeg's quality, 1..100, of a JPEG file; None for other formats.

    Tables of other encoders get the quality at which libjpeg's luma table has about the same sum.
    """
    if image.format not in ("JPEG", "MPO"):
        return None
    table = image.quantization[min(image.quantization)]  # of luma
    return int(np.abs(libjpeg_table_sums() - sum(table)).argmin()) + 1


@cache  # a hundred encodings: once per run, not for each file
def libjpeg_table_sums() -> np.ndarray:
    """Return the sums of libjpeg's luma tables of qualities 1..100."""
    flat = Image.new("L", (8, 8))
    return np.array([sum(encode_jpeg(flat, q).quantization[0]) for q in range(1, 101)])


def portable_exif(exif: Image.Exif) -> bytes:
    """Return EXIF that also holds for the upscaled image; empty if Pillow cannot write it."""
    portable = Image.Exif()
    with suppress(Exception):
        portable.update({tag: exif[tag] for tag in EXIF_TAGS if tag in exif})
        for folder in EXIF_FOLDERS:
            values = exif.get_ifd(folder).items()
            if values := {k: v for k, v in values if k not in NOT_IN_FOLDERS}:
                portable[folder] = values
        content = portable.tobytes() if portable else b""
        if len(content) < 60_000:  # a JPEG stores less than 65,536 bytes
            return content
    return b""


@contextmanager
def collect_warnings(notes: list[str]) -> Iterator[None]:
    """Append the first warning of Pillow, or of a C library that prints to stderr, to `notes`."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(f"{error}; raise --max-pixels") from error
        except UnidentifiedImageError as error:
            reasons = [str(w.message) for w in caught if str(w.message).startswith("TIFF")]
            raise ValueError(reasons[0] if reasons else "unknown format") from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        lines = [str(w.message) for w in caught] + file.read().decode(errors="replace").splitlines()
        notes += [line[:200] for line in lines[:1]]


# --- decoding -------------------------------------------------------------------------------


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
    def sample_format(self) -> dict:
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
        """Make an image from C x H x W grey levels, alpha last; integers are rounded, clipped."""
        dtype, planes = self.colour.dtype, []
        for i, plane in enumerate(levels):  # one by one, because images are large
            is_alpha = i >= len(self.colour)
            low, high, quantum = (0, 255, 1.0) if is_alpha else (self.low, self.high, self.quantum)
            values = quantize(plane, quantum) * ((high - low) / 255) + low
            if quantum:
                values = np.clip(np.rint(values), np.iinfo(dtype).min, np.iinfo(dtype).max)
            planes.append(values.astype(dtype))
        return Image.fromarray(np.stack(planes, axis=-1) if len(planes) > 1 else planes[0])


def decode(
    image: Image.Image, value_range: Sequence[float] | dict | None = None, needs_range: bool = False
) -> Planes:
    """Convert an image of any Pillow mode; greyscale and 16-bit greyscale are preserved.

    What is lost is printed in one line.

    Args:
        value_range: the values that stand for the grey levels 0 and 255, or a dict of them by
            bit depth. The default is the range of the type; for 32-bit and floating-point images,
            their minimum and maximum.
        needs_range: whether to refuse images without a value range of their own.

    Raises:
        InputError: NaN or infinity, no value range, or one that cannot be applied.
    """
    path, notes = image.info.get("path", "image"), image.info.pop("notes", None)
    is_deep = image.mode.startswith(HIGH_BIT_DEPTH)
    low, high, alpha = 0, 255, None
    if is_deep:
        values, mode = np.asarray(image)[None], image.mode[0]
        low, high = float(values.min()), float(values.max())
        if mode == "I" and low >= 0 and high <= 65535:
            values, mode, low, high = values.astype(np.uint16), "I;16", 0, 65535
    else:
        is_grey, has_alpha = image.mode in ("1", "L", "LA", "La"), image.has_transparency_data
        mode = ("L" if is_grey else "RGB") + ("A" if has_alpha else "")
        values = np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)
        values, alpha = (values[:-1], values[-1]) if has_alpha else (values, None)
    loses_bits = image.info.get("bits", 8) > 8 and not is_deep
    if isinstance(value_range, dict):
        value_range = value_range.get(8 * values.itemsize)
    elif value_range and loses_bits:
        raise InputError(f"{path}: 16-bit colour is read as 8 bits; --range needs greyscale images")
    if not math.isfinite(low + high):
        raise InputError(f"{path}: contains NaN or infinity; replace them by numbers")
    if value_range:
        low, high = value_range
    elif mode in ("I", "F") and (needs_range or high - low >= 1e30):
        raise InputError(f"{path}: has values from {low:g} to {high:g}; pass --range LOW HIGH")
    elif mode == "I;16" and notes is not None and 0 < values.max() < 4096:
        notes.append("values below 4096 of 65535; --range 0 4095 reads images as 12 bits")
    if notes:
        print(f"{path}: {'; '.join(notes)}", file=sys.stderr)
    if low == high:  # one value has no range
        high = low + max(1.0, abs(low))
    if mode == "F":  # a value that means "no data" may be -3.4e38
        values = np.clip(values, np.float32(low), np.float32(high))
    if is_deep and image.info.get("white_is_zero"):  # Pillow inverts 8 bits itself
        inverted = low + high - values.astype(np.float64)
        values = inverted.clip(low, high).astype(values.dtype)
    return Planes(values, alpha, low, high, mode)


def fill_transparent(planes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Give invisible pixels the colours around them, so that no edge is left at their border.

    The colour is the mean over the smallest of several neighbourhoods with a visible pixel. The
    largest exceeds the reach of the network and of bicubic.

    Args:
        planes: C x H x W.
        weight: 1 x H x W, 0 where a pixel is invisible.
    """
    height, width = planes.shape[1:]
    filled, missing = planes.copy(), weight[0] == 0
    weighted = np.concatenate([planes * weight, weight])
    for factor in (2, 4, 8, 16, 32):
        if not missing.any():
            break
        size = math.ceil(width / factor), math.ceil(height / factor)
        means = [Image.fromarray(p).resize(size, Image.Resampling.BOX) for p in weighted]
        means = [m.resize((width, height), Image.Resampling.BILINEAR) for m in means]
        *colours, total = map(np.asarray, means)
        reached = missing & (total > 1e-6)
        filled[:, reached] = np.stack(colours)[:, reached] / total[reached]
        missing &= ~reached
    return filled


# --- LR/HR pairs ----------------------------------------------------------------------------


@dataclass
class Pair:
    """The ground truth and the network's input; float32, 0..255.

    ilr: H x W or C x H x W, the LR image upscaled by bicubic.
    hr: the ground truth, of the same shape.
    lr: the LR image, or None where only ilr is known.
    quantum: of the HR image file, see quantize.
    greyscale: whether that is greyscale; its RGB has three equal channels.
    sample_format: its value range and bit depth, see Planes.sample_format.
    name: for tables.
    colour: the RGB pair of a luma pair, for the screen; None where luma is all there is.
    """

    ilr: np.ndarray
    hr: np.ndarray
    lr: np.ndarray | None = None
    quantum: float = 1.0
    greyscale: bool = False
    sample_format: dict = field(default_factory=dict)
    name: str = ""
    colour: "Pair | None" = None

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
        InputError: the errors of `decode`, and an image without a value range of its own.
    """
    planes = decode(image, value_range, needs_range=True)
    levels = quantize(planes.levels(), planes.quantum).clip(0, 255)
    if len(levels) == 1:
        levels = np.repeat(levels, 3, axis=0) if num_channels == 3 else levels[0]
    elif num_channels != 3:
        levels = luma(levels, planes.quantum)
    return levels, planes


def read_levels(
    path: str | Path, num_channels: int = 1, value_range: Sequence[float] | dict | None = None
) -> tuple[np.ndarray, Planes]:
    """Return to_levels of an image file; the errors are those of open_image and to_levels."""
    return to_levels(open_image(path), num_channels, value_range)


def bicubic_pair(hr: np.ndarray, scale: int, quantum: float = 1.0) -> Pair:
    """Make the protocol's pair (steps 2 and 3); empty if the image is smaller than the scale."""
    hr = crop_to_multiple(hr, scale)
    if not hr.size:
        return Pair(hr, hr, None, quantum)  # callers skip it
    lr = resize(hr, (hr.shape[-2] // scale, hr.shape[-1] // scale))
    return Pair(resize(lr, hr.shape[-2:]), hr, lr, quantum)


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
        jpeg: round the protocol's LR image to 8 bits and save it as JPEG of this quality.

    Raises:
        InputError: sizes that do not fit, and the errors of to_levels.
    """
    hr, planes = to_levels(hr_image, num_channels, value_range)
    if jpeg and min(hr.shape[-2:]) >= scale:
        rgb = crop_to_multiple(planes.levels().clip(0, 255), scale)
        rgb = quantize(resize(rgb, (rgb.shape[1] // scale, rgb.shape[2] // scale)))
        rgb = rgb.astype(np.uint8)
        lr_image = Image.fromarray(rgb[0] if len(rgb) == 1 else rgb.transpose(1, 2, 0))
        lr_image, value_range = encode_jpeg(lr_image, jpeg), None  # its range is 0..255
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
            raise InputError(
                f"{lr_image.info.get('path', 'LR image')}: {lr_image.width} x {lr_image.height} "
                f"pixels do not fit {hr_image.width} x {hr_image.height} by --scale {scale}"
            )
    pair.greyscale, pair.sample_format = len(planes.colour) == 1, planes.sample_format
    return pair


# --- atomic files ---------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, renamed to `path` at the end: a file appears complete or not.

    Raises:
        InputError: the folder or the file cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))  # a symbolic link is followed, not replaced
    if target.exists() and not target.is_file() and not target.is_dir():
        yield Path(path)  # a pipe or a device cannot be renamed
        return
    folder = next(f for f in target.parents if f.exists())  # no folder is left by an error
    partial = folder / f".part-{uuid.uuid4().hex}"
    try:
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
    """Raise InputError, before the work begins, for an output that cannot be written.

    Args:
        outputs: (the flag or file that asks for it, the path); links are followed.
        inputs: files that no output may overwrite; nor may two outputs be one file.
    """
    claimed = {os.path.realpath(path): path for path in inputs}
    for asked_by, output in outputs:
        place = os.path.realpath(output)
        if place in claimed:
            raise InputError(f"{asked_by}: {output} would overwrite {claimed[place]}; name another")
        claimed[place] = f"the output of {asked_by}"
        folder = next(f for f in Path(place).parents if f.exists())
        is_folder = os.path.isdir(output) or str(output).endswith(("/", os.sep))
        if is_folder or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"{output}: cannot be written; name a file in a writable folder")


# --- errors and command line ----------------------------------------------------------------


def report(error: InputError) -> None:
    """Print an error as one line on stderr, with control characters escaped."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)


@contextmanager
def skip_on_error(path: object, failed: list) -> Iterator[None]:
    """Report an InputError in one line that names `path`, append the path to `failed`, go on."""
    try:
        yield
    except InputError as error:
        named = str(error).startswith(str(path))
        report(error if named else InputError(f"{path}: {error}"))
        failed.append(path)


def count_of(number: int, noun: str) -> str:
    """Return "1 image", "2 images", "2,000 patches"."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


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
            raise InputError(f"{flag} '': is empty; pass a value")
        return super().parse_args(argv)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see --help)")


def add_image_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that prepare.py and test.py share."""
    group.add_argument(
        "--max-pixels",
        type=number(int, 1),
        default=Image.MAX_IMAGE_PIXELS,
        metavar="N",
        help="refuse larger images (default: %(default)s)",
    )
    group.add_argument(
        "--range",
        type=number(float, -math.inf),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values of black and white (default: those of the file's type)",
    )
    group.add_argument(
        "--lr-dir",
        nargs="+",
        metavar="DIR",
        help="LR images, S times smaller or of equal size, matched by subfolder and name",
    )


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
            raise argparse.ArgumentTypeError(f"{text!r} is not from {low} to below {high}")
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
        try:
            status = main()
        finally:  # a closed pipe is an error here, also after --help
            sys.stdout.flush()
    except InputError as error:
        report(error)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        status, sys.stdout = 128 + 13, None  # SIGPIPE; Python would flush stdout again at exit
    except OSError as error:
        place = error.filename or "stdout or the system"
        report(InputError(f"{place}: {error.strerror or error}; name another place"))
        sys.stdout = None
    if status == 128 + signal.SIGINT:  # a shell's loop over runs stops only if SIGINT ends this one
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
