"""Colour, resampling, metrics, pictures, and files that appear whole or not at all.

Pictures are float32 planes, C x H x W or H x W, in grey levels 0..255, unless a
docstring says otherwise.
"""

import argparse
import csv
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


class InputError(Exception):
    """Unusable input; the message names the file or flag and the cure, in one line."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but an error is one line on stderr, without the usage above it."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parser_for(doc: str) -> ArgumentParser:
    """A parser whose --help opens with a script's docstring, commands included."""
    layout = argparse.RawDescriptionHelpFormatter
    return ArgumentParser(description=doc, formatter_class=layout)


def run(
    main: Callable[[argparse.Namespace], int | None],
    parse_args: Callable[[], argparse.Namespace],
) -> None:
    """Exit with main's status, with 2 and one line for bad input, 130 for Ctrl-C."""
    try:
        sys.exit(main(parse_args()))
    except InputError as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def int_at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number, `minimum` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of at least {minimum}"
            )
        return value

    return parse


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number, low or more and below high."""

    def parse(text: str) -> float:
        value = float(text)  # argparse words its ValueError
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value

    return parse


# --- colour ---------------------------------------------------------------------------

# ITU-R BT.601, studio swing, from R'G'B' in 0..255 (MATLAB's rgb2ycbcr). Many ports have
# 64.738 / 256 for the first weight, 65.738 / 256 = 65.481 / 255: a typo that darkens red.
BT601 = (
    np.array(
        [
            [65.481, 128.553, 24.966],
            [-37.797, -74.203, 112.0],
            [112.0, -93.786, -18.214],
        ]
    )
    / 255
)
BT601_INVERSE = np.linalg.inv(BT601)
BT601_OFFSET = np.array([16.0, 128.0, 128.0])


def rgb_to_ycbcr(rgb: np.ndarray) -> np.ndarray:
    """3 x H x W, R'G'B' in 0..255, to Y in 16..235 and Cb, Cr in 16..240, not rounded."""
    dtype = np.result_type(rgb.dtype, np.float32)
    return (
        np.tensordot(BT601.astype(dtype), rgb, axes=1)
        + BT601_OFFSET.astype(dtype)[:, None, None]
    )


def ycbcr_to_rgb(ycbcr: np.ndarray) -> np.ndarray:
    """The inverse of rgb_to_ycbcr, neither rounded nor clipped."""
    dtype = np.result_type(ycbcr.dtype, np.float32)
    shifted = ycbcr - BT601_OFFSET.astype(dtype)[:, None, None]
    return np.tensordot(BT601_INVERSE.astype(dtype), shifted, axes=1)


def to_8bit(levels: np.ndarray) -> np.ndarray:
    """Round half up, as MATLAB does, and clip to 0..255; stays floating point."""
    return np.clip(np.floor(levels + 0.5), 0, 255)


# --- resampling -----------------------------------------------------------------------


def resize(
    planes: np.ndarray, size: tuple[int, int], round_each_axis: bool = False
) -> np.ndarray:
    """MATLAB's imresize(..., 'bicubic'): a = -0.5, antialiased, edge pixels repeated.

    Pillow does the work on float32; the border, which it would treat in another way, is
    padded first. Rows are resized before columns. Agrees with the float64 formula within
    1e-3 grey levels, with MATLAB's 8-bit images bit for bit.

    Args:
        planes: H x W or C x H x W, any units.
        size: (height, width), each side a multiple or a divisor of the present one.
        round_each_axis: round and clip after each axis, as MATLAB does in 8 bits.

    Raises:
        ValueError: a side that is neither multiple nor divisor.
    """
    if planes.ndim == 3:
        return np.stack([resize(plane, size, round_each_axis) for plane in planes])
    plane = np.asarray(planes, np.float32)
    for length in size:  # rows, then (of the transposed picture) columns
        plane = _resize_rows(plane, length)
        plane = (to_8bit(plane) if round_each_axis else plane).T
    return np.ascontiguousarray(plane)


def _resize_rows(plane: np.ndarray, length: int) -> np.ndarray:
    old = plane.shape[0]
    if length == old:
        return plane
    if length < 1 or (old % length and length % old):
        raise ValueError(
            f"cannot resize {old} rows to {length}: neither multiple nor divisor"
        )
    # The kernel reaches two output pixels far when shrinking, else two input pixels.
    source, target = (2 * old // length, 2) if old > length else (2, 2 * length // old)
    padded = np.pad(plane, ((source, source), (0, 0)), mode="edge")
    resized = Image.fromarray(padded).resize(
        (plane.shape[1], length + 2 * target), Image.Resampling.BICUBIC
    )
    return np.asarray(resized)[target:-target]


def crop_to_multiple(planes: np.ndarray, scale: int) -> np.ndarray:
    """Cut bottom and right so that both sides divide by `scale` (protocol step 2)."""
    height, width = planes.shape[-2:]
    return planes[..., : height - height % scale, : width - width % scale]


def degrade(hr: np.ndarray, scale: int) -> np.ndarray:
    """ILR of a cropped picture: bicubic down and up, not rounded (protocol step 3)."""
    height, width = hr.shape[-2:]
    return resize(resize(hr, (height // scale, width // scale)), (height, width))


# --- metrics --------------------------------------------------------------------------


def shave(planes: np.ndarray, border: int) -> np.ndarray:
    """Cut `border` pixels off every side (protocol step 5)."""
    return planes[..., border:-border, border:-border] if border else planes


def psnr(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(peak^2 / MSE), or infinity."""
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * math.log10(peak**2 / mse) if mse else math.inf


def shaved_psnr(levels: np.ndarray, hr: np.ndarray, scale: int) -> float:
    """PSNR in dB as the paper takes it: rounded, clipped, shaved (protocol step 5)."""
    return psnr(shave(to_8bit(levels), scale), shave(hr, scale))


def ssim(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> float:
    """Structural similarity (Wang et al. 2004), mean where the window fits.

    11 x 11 Gaussian window, sigma 1.5, K1 = 0.01, K2 = 0.03.

    Raises:
        ValueError: a side shorter than the window's 11 pixels.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError("SSIM needs pictures of at least 11 x 11 pixels")
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _gaussian(a), _gaussian(b)
    var_a, var_b = _gaussian(a * a) - mean_a**2, _gaussian(b * b) - mean_b**2
    covariance = _gaussian(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(
        np.mean(similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    )


def _gaussian(planes: np.ndarray) -> np.ndarray:
    """11 x 11 Gaussian mean of sigma 1.5 where the window fits."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()
    rows = sum(
        w * planes[..., i : planes.shape[-2] - 10 + i, :] for i, w in enumerate(window)
    )
    return sum(
        w * rows[..., i : planes.shape[-1] - 10 + i] for i, w in enumerate(window)
    )


# --- pictures -------------------------------------------------------------------------


def list_images(folder: str | Path) -> list[Path]:
    """The files of a folder whose extension Pillow reads, by name.

    Raises:
        InputError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    readable = {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN
    }
    paths = sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in readable and not p.name.startswith(".")
    )
    if not paths:
        raise InputError(f"{folder}: no image in it; name a folder of .png, .jpg, ...")
    return paths


def open_image(path: str | Path) -> Image.Image:
    """Read and decode a picture, first frame, turned upright as its EXIF says.

    Raises:
        InputError: missing, no image, damaged, or above Pillow's guard against
            decompression bombs.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
            frames = getattr(image, "n_frames", 1)
            upright = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        cure = "if you trust the file, raise the limit with --max-pixels"
        raise InputError(f"{path}: {limit}; {cure}") from error
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = "empty, truncated or another kind of file"
        raise InputError(f"{path}: not a readable image ({reason})") from error
    if frames > 1:
        print(f"{path}: {frames} frames, only the first is used", file=sys.stderr)
    return upright


@dataclass
class Planes:
    """A decoded picture.

    colour: C x H x W, 1 (grey) or 3 (RGB), uint8, uint16, int32 or float32.
    alpha: H x W, uint8, or None.
    low, high: the values of `colour` that stand for the grey levels 0 and 255.
    mode: Pillow's, of a picture made of such planes.
    """

    colour: np.ndarray
    alpha: np.ndarray | None
    low: float
    high: float
    mode: str

    def levels(self) -> np.ndarray:
        """`colour` in grey levels, float32, 0..255."""
        values = np.asarray(self.colour, np.float32)
        return (values - self.low) * np.float32(255 / (self.high - self.low))

    def to_image(self, levels: np.ndarray) -> Image.Image:
        """The inverse: C x H x W grey levels, alpha as a last plane, rounded."""
        if self.colour.dtype == np.uint8:
            values = to_8bit(levels).astype(np.uint8)
        else:
            values = levels * ((self.high - self.low) / 255) + self.low
            if self.colour.dtype != np.float32:
                values = np.clip(np.rint(values), self.low, self.high)
            values = values.astype(self.colour.dtype)
        if len(values) == 1:
            return Image.fromarray(values[0])
        return Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))


def decode(image: Image.Image) -> Planes:
    """Any of Pillow's modes as planes: grey stays grey and 16 bits stay 16 bits.

    Grey of 32 bits or in floating point has no fixed range: its own is used.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if image.mode != "F" and 0 <= low and high <= 65535:
            return Planes(values.astype(np.uint16)[None], None, 0, 65535, "I;16")
        if not math.isfinite(high - low):
            raise InputError("holds NaN or infinity")
        mode = "F" if image.mode == "F" else "I"
        return Planes(values[None], None, low, max(high, low + 1e-9), mode)
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("L" if grey else "RGB") + ("A" if image.has_transparency_data else "")
    values = np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)
    alpha = values[-1] if mode.endswith("A") else None
    return Planes(values[: 1 if grey else 3], alpha, 0, 255, mode)


def levels_of(image: Image.Image, num_channels: int = 1) -> np.ndarray:
    """A picture as the protocol takes it: its luma, rounded, H x W, float32.

    A grey picture's levels are used as they are. With three channels: RGB, 3 x H x W.
    """
    levels = decode(image).levels()
    if num_channels == 3:
        return np.repeat(levels, 3, axis=0) if len(levels) == 1 else levels
    if len(levels) == 1:
        return levels[0]
    return to_8bit(rgb_to_ycbcr(levels.astype(np.float64))[0]).astype(np.float32)


def read_levels(path: str | Path, num_channels: int = 1) -> np.ndarray:
    """levels_of a picture file; raises as open_image does."""
    return levels_of(open_image(path), num_channels)


# --- files ----------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` at the end: a file appears whole or not.

    Raises:
        InputError: the folder or the file cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    if path.exists() and not path.is_file():  # a pipe or a device is written as it is
        yield path
        return
    target = Path(os.path.realpath(path))  # a link stays one
    # The name keeps its extension: Pillow reads the format off it.
    partial = target.with_name(f".part-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(f"{path}: cannot be written ({reason})") from error
    finally:
        with suppress(OSError):  # renamed, or its folder could not be made
            partial.unlink()


def write_whole(path: str | Path, content: bytes) -> None:
    """Write bytes to a file that appears whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def write_csv(path: str | Path, columns: Sequence[str], rows: list[dict]) -> None:
    """Write rows of these columns, below a line that names them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def mean(values: Sequence[float]) -> float:
    """The mean of the scores of a set (protocol step 6)."""
    return sum(values) / len(values)
