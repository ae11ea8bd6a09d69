"""The paper's protocol, pictures, files that appear whole or not at all, the command line.

Pictures are float32 planes, C x H x W or H x W, in grey levels 0..255, unless a docstring
says otherwise. Nothing here needs torch.
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
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# --- the protocol: luma, bicubic, PSNR, SSIM ------------------------------------------------

# ITU-R BT.601, studio swing, from R'G'B' in 0..255 (MATLAB's rgb2ycbcr). Many ports have
# 64.738 / 256 for the first weight, 65.738 / 256 = 65.481 / 255: a typo that darkens red.
BT601 = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])
BT601 /= 255
BT601_INVERSE = np.linalg.inv(BT601)
BT601_OFFSET = np.array([16.0, 128.0, 128.0])


def rgb_to_ycbcr(rgb: np.ndarray) -> np.ndarray:
    """3 x H x W, R'G'B' in 0..255, to Y in 16..235 and Cb, Cr in 16..240, not rounded."""
    dtype = np.result_type(rgb.dtype, np.float32)
    ycbcr = np.tensordot(BT601.astype(dtype), rgb, axes=1)
    ycbcr += BT601_OFFSET.astype(dtype)[:, None, None]  # in place: pictures are large
    return ycbcr


def ycbcr_to_rgb(ycbcr: np.ndarray) -> np.ndarray:
    """The inverse of rgb_to_ycbcr, neither rounded nor clipped."""
    dtype = np.result_type(ycbcr.dtype, np.float32)
    rgb = np.tensordot(BT601_INVERSE.astype(dtype), ycbcr, axes=1)
    rgb -= (BT601_INVERSE @ BT601_OFFSET).astype(dtype)[:, None, None]
    return rgb


def to_8bit(levels: np.ndarray, step: float = 1.0) -> np.ndarray:
    """Round half up, as MATLAB does, and clip to 0..255; stays floating point.

    Args:
        step: what is rounded to, in grey levels: 1 for sources of 8 bits, 255/65535 for
            16 bits, ...; 0 leaves the levels of a floating-point source as they are.
    """
    if not step:
        return levels
    rounded = levels / step + 0.5
    np.floor(rounded, out=rounded)
    rounded *= step
    return np.clip(rounded, 0, 255, out=rounded)


def resize(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """MATLAB's imresize(..., 'bicubic'): a = -0.5, antialiased, edge pixels repeated.

    Pillow does the work on float32; the border, which it would treat in another way, is
    padded first. Agrees with the float64 formula within 1e-3 grey levels; rows first, then
    columns, with a rounding to 8 bits after each, it is MATLAB's 8-bit picture bit for bit.

    Args:
        planes: H x W or C x H x W, any units.
        size: (height, width), each side a multiple or a divisor of the present one.

    Raises:
        ValueError: a side that is neither multiple nor divisor.
    """
    if planes.ndim == 3:
        return np.stack([resize(plane, size) for plane in planes])
    margins = []  # (before, after) resizing, rows and columns
    for old, new in zip(planes.shape, size):
        if new < 1 or (old % new and new % old):
            raise ValueError(f"cannot resize {old} pixels to {new}: no multiple, no divisor")
        # The kernel reaches two output pixels far when shrinking, else two input pixels.
        margins.append((2 * max(1, old // new), 2 * max(1, new // old)) if old != new else (0, 0))
    (rows, top), (columns, left) = margins
    padded = np.pad(np.asarray(planes, np.float32), ((rows, rows), (columns, columns)), "edge")
    padded_size = size[1] + 2 * left, size[0] + 2 * top
    resized = Image.fromarray(padded).resize(padded_size, Image.Resampling.BICUBIC)
    return np.asarray(resized)[top : top + size[0], left : left + size[1]]


def crop_to_multiple(planes: np.ndarray, scale: int) -> np.ndarray:
    """Cut bottom and right so that both sides divide by `scale` (protocol step 2)."""
    height, width = planes.shape[-2:]
    return planes[..., : height - height % scale, : width - width % scale]


def shave(planes: np.ndarray, scale: int) -> np.ndarray:
    """Cut `scale` pixels off every side (protocol step 5); none where nothing was enlarged."""
    return planes[..., scale:-scale, scale:-scale] if scale > 1 else planes


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE), or infinity."""
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def shaved_psnr(levels: np.ndarray, hr: np.ndarray, scale: int, step: float = 1.0) -> float:
    """PSNR in dB as the paper takes it: rounded to to_8bit's step, shaved (protocol step 5)."""
    return psnr(shave(to_8bit(levels, step), scale), shave(hr, scale))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), mean where the window fits.

    11 x 11 Gaussian window, sigma 1.5, K1 = 0.01, K2 = 0.03, peak 255.

    Raises:
        ValueError: a side shorter than the window's 11 pixels.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError("SSIM needs pictures of at least 11 x 11 pixels")
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _gaussian(a), _gaussian(b)
    var_a, var_b = _gaussian(a * a) - mean_a**2, _gaussian(b * b) - mean_b**2
    covariance = _gaussian(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(np.mean(similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))))


def _gaussian(planes: np.ndarray) -> np.ndarray:
    """11 x 11 Gaussian mean of sigma 1.5 where the window fits."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()
    height, width = planes.shape[-2] - 10, planes.shape[-1] - 10
    rows = sum(w * planes[..., i : i + height, :] for i, w in enumerate(window))
    return sum(w * rows[..., i : i + width] for i, w in enumerate(window))


# --- pictures -------------------------------------------------------------------------------


class InputError(Exception):
    """Unusable input; the message names the file or flag and the cure, in one line."""


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Put a file's name before an error that does not tell it."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path}: {error}") from error


@contextmanager
def needing(package: str, flag: str) -> Iterator[None]:
    """Import inside it what requirements.txt does not list and one flag alone needs."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{flag}: needs {package}; pip install {package}") from error


@contextmanager
def reading(path: str | Path, kind: str, cure: str) -> Iterator[None]:
    """The one boundary of every input file: whatever a decoder raises becomes one line.

    Args:
        kind: what the file should be: "picture", "h5 file", ...
        cure: what the user can do about it.

    Raises:
        InputError: no regular file, not readable, or not what it should be.
    """
    with naming(path):
        try:
            if not Path(path).is_file():
                reason = "is no regular file" if Path(path).exists() else f"no such {kind}"
                raise InputError(f"{reason}; {cure}")
            yield
        except InputError:
            raise
        except PermissionError as error:
            raise InputError("may not be read; change its permissions") from error
        except MemoryError as error:
            raise InputError(f"does not fit into the memory; take a smaller {kind}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
            raise InputError(f"{limit}; if you trust the file, raise --max-pixels") from error
        except Exception as error:  # decoders raise many kinds for damaged files
            raise InputError(f"empty, truncated or no {kind}; {cure}") from error


def expand(names: Iterable[str | Path]) -> list[Path]:
    """Names and patterns (`shard*.h5`, which not every shell expands) as paths."""
    paths = []
    for name in map(str, names):
        found = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        paths += map(Path, found or [name])
    return paths


def find_images(names: Iterable[str | Path], results: bool = False) -> list[Path]:
    """The files named, and the images in the folders named and their subfolders, by name.

    Hidden files in a folder are left out, and what test.py made (NAME_srcnn_xS.png, ...)
    unless `results` is set.

    Raises:
        InputError: a folder without an image.
    """
    readable = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    readable -= {".bufr", ".grib", ".h5", ".hdf"}  # Pillow knows them, but cannot read them
    paths = []
    for path in expand(names):
        if not path.is_dir():
            paths.append(path)
            continue
        found = [
            p
            for p in sorted(path.rglob("*"))
            if p.suffix.lower() in readable
            and not p.is_dir()
            and not any(part.startswith(".") for part in p.relative_to(path).parts)
            and (results or not re.search(r"_(srcnn|bicubic|comparison)_x[\d.]+$", p.stem))
        ]
        if not found:
            reason = "no image in it (results of test.py do not count)"
            raise InputError(f"{path}: {reason}; name pictures")
        paths += found
    return list(dict.fromkeys(paths))  # a folder may be named beside its subfolder


def images_in(folders: Iterable[str | Path], results: bool = False) -> list[Path]:
    """find_images, of folders alone."""
    paths = expand(folders)
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; name one of pictures")
    return find_images(paths, results)


def find_partner(
    path: Path, paths: Sequence[Path], candidates: Sequence[Path], scale: int, flag: str
) -> Path:
    """The one of the candidates that belongs to `path`, one of the `paths`.

    That is the one of the same stem, else the only one whose stem goes on after it (0801x3
    or 0801_SRF_3_srcnn beside 0801), else the only such one that names the scale, else the
    only one in a folder of the same name; where other folders have the stem, always in that.

    Raises:
        InputError: none, or several.
    """
    pattern = re.compile(re.escape(path.stem) + r"([-_x].*)?")
    others = {p.stem for p in paths} - {path.stem}
    found = [p for p in candidates if pattern.fullmatch(p.stem) and p.stem not in others]
    if any(p.stem == path.stem and p.parent != path.parent for p in paths):
        found = [p for p in found if p.parent.name == path.parent.name]
    for fits in (
        lambda p: p.stem == path.stem,
        lambda p: True,
        lambda p: re.search(rf"(x|SRF_){scale}(?!\d)", p.stem[len(path.stem) :]),
        lambda p: p.parent.name == path.parent.name,
    ):
        matching = [p for p in found if fits(p)]
        if len(matching) == 1:
            return matching[0]
    number = f"{len(found)} pictures fit it" if found else "no picture of its name or folder"
    where = f"{flag} {candidates[0].parent}"
    raise InputError(f"{path}: {number} in {where}; name its partner {path.stem}.*")


def open_image(path: str | Path) -> Image.Image:
    """Read and decode a picture, first frame, turned upright as its EXIF says.

    Raises:
        InputError: missing, no image, damaged, or above Pillow's guard against
            decompression bombs.
    """
    with reading(path, "picture", "name one that Pillow opens"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Not by its name: Pillow maps such TIFFs into the memory, and turns them wrongly.
        with open(path, "rb") as stream, Image.open(stream) as image:
            deep = image.mode != "I;16" and ";16" in str(image.tile)
            orientation = image.tag_v2.get(0x0112) if image.format == "TIFF" else None
            image.load()  # turns a TIFF upright
            # Texts of a PNG stand beside the properties: one named "dpi" is no resolution.
            image.info = {k: v for k, v in image.info.items() if not isinstance(v, str)}
            if not image.info.get("exif", b"II").startswith((b"Exif\0\0", b"II", b"MM")):
                del image.info["exif"]
            orientation = orientation or image.getexif().get(0x0112)
            frames = getattr(image, "n_frames", 1)
            upright = ImageOps.exif_transpose(image)
            if orientation in (5, 6, 7, 8) and "dpi" in image.info:
                upright.info["dpi"] = image.info["dpi"][::-1]
            upright.info["upper_bytes_only"] = deep and upright.mode in ("RGB", "RGBA")
        if upright.mode == "F" and not np.isfinite(np.asarray(upright)).all():
            raise InputError("holds NaN or infinity; replace them by numbers")
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

    @property
    def step(self) -> float:
        """The grey levels between two values, 0 in floating point; see to_8bit."""
        return 0.0 if self.mode == "F" else 255 / (self.high - self.low)

    def levels(self) -> np.ndarray:
        """`colour` in grey levels, float32, 0..255."""
        values = np.asarray(self.colour, np.float32)
        return (values - self.low) * np.float32(255 / (self.high - self.low))

    def to_image(self, levels: np.ndarray) -> Image.Image:
        """The inverse: C x H x W grey levels, alpha as a last plane, rounded."""
        planes = []
        for i, plane in enumerate(levels):  # one by one: pictures are large
            known = i < len(self.colour)
            low, high, step = (self.low, self.high, self.step) if known else (0, 255, 1.0)
            values = to_8bit(plane, step) * ((high - low) / 255) + low
            dtype = self.colour.dtype
            if step:
                values = np.clip(np.rint(values), np.iinfo(dtype).min, np.iinfo(dtype).max)
            planes.append(values.astype(dtype))
        return Image.fromarray(np.stack(planes, axis=-1) if len(planes) > 1 else planes[0])


def decode(image: Image.Image, value_range: Sequence[float] | None = None) -> Planes:
    """Any of Pillow's modes as planes: grey stays grey and 16 bits stay 16 bits.

    Args:
        value_range: the values that stand for the grey levels 0 and 255; by default those
            of the type. Grey of 32 bits or in floating point has none: its own is used.
    """
    if value_range and image.info.get("upper_bytes_only"):
        raise InputError("--range: Pillow reads 16-bit colour as 8 bits; use grey pictures")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if image.mode != "F" and low >= 0 and high <= 65535:
            return Planes(values.astype(np.uint16)[None], None, *value_range or (0, 65535), "I;16")
        mode = "F" if image.mode == "F" else "I"
        high = high if high > low else low + max(1.0, abs(low))
        return Planes(values[None], None, *value_range or (low, high), mode)
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("L" if grey else "RGB") + ("A" if image.has_transparency_data else "")
    values = np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)
    alpha = values[-1] if mode.endswith("A") else None
    return Planes(values[: 1 if grey else 3], alpha, *value_range or (0, 255), mode)


def levels_of(
    image: Image.Image, num_channels: int = 1, value_range: Sequence[float] | None = None
) -> tuple[np.ndarray, float]:
    """A picture as the protocol takes it: its luma, rounded, H x W, float32; and its step.

    A grey picture's levels are used as they are. With three channels: RGB, 3 x H x W.

    Raises:
        InputError: a picture of no known range.
    """
    planes = decode(image, value_range)
    if planes.mode in ("I", "F") and value_range is None:
        cure = "say with --range LOW HIGH what stands for black and white"
        raise InputError(f"has no range of its own (mode {planes.mode}); {cure}")
    step = planes.step
    levels = to_8bit(planes.levels(), step).clip(0, 255)  # beyond the range: black or white
    if num_channels == 3:
        return (np.repeat(levels, 3, axis=0) if len(levels) == 1 else levels), step
    return (levels[0] if len(levels) == 1 else rounded_luma(levels, step)), step


def rounded_luma(rgb: np.ndarray, step: float) -> np.ndarray:
    """The luma of a rounded picture, rounded: 3 x H x W to H x W, float32 (protocol step 1)."""
    return to_8bit(rgb_to_ycbcr(rgb.astype(np.float64))[0], step).astype(np.float32)


@dataclass
class Pair:
    """A picture that is known, and what the network gets of it; float32, 0..255.

    ilr, hr: H x W or C x H x W.
    lr: the small picture of which ilr is the enlargement, or None.
    step: what the source rounds to, see to_8bit.
    """

    ilr: np.ndarray
    hr: np.ndarray
    lr: np.ndarray | None = None
    step: float = 1.0

    @property
    def num_channels(self) -> int:
        """C, which is 1 for H x W."""
        return 1 if self.hr.ndim == 2 else len(self.hr)


def bicubic_pair(hr: np.ndarray, step: float, scale: int) -> Pair:
    """The protocol's pair, steps 2 and 3; empty where the picture is smaller than the scale."""
    hr = crop_to_multiple(hr, scale)
    if not hr.size:
        return Pair(hr, hr, None, step)
    lr = resize(hr, (hr.shape[-2] // scale, hr.shape[-1] // scale))
    return Pair(resize(lr, hr.shape[-2:]), hr, lr, step)


def read_pair(
    path: Path, lr_path: Path, scale: int, num_channels: int, value_range: Sequence[float] | None
) -> Pair:
    """A pair of two files: one S times smaller is enlarged, one of equal size is used as it is.

    Raises:
        InputError: sizes that do not fit, and what open_image and levels_of raise.
    """
    (hr, step), (lr, _) = (read_levels(p, num_channels, value_range) for p in (path, lr_path))
    if lr.shape == hr.shape:
        return Pair(lr, hr, None, step)
    sizes = [f"{p.shape[-1]} x {p.shape[-2]}" for p in (hr, lr)]
    hr = crop_to_multiple(hr, scale)
    if scale == 1 or tuple(scale * side for side in lr.shape[-2:]) != hr.shape[-2:]:
        cure = "pairs have equal sizes, or sides that differ by --scale"
        raise InputError(f"{path} and {lr_path}: {' and '.join(sizes)} pixels; {cure}")
    return Pair(resize(lr, hr.shape[-2:]), hr, lr, step)


def read_levels(
    path: str | Path, num_channels: int = 1, value_range: Sequence[float] | None = None
) -> tuple[np.ndarray, float]:
    """levels_of a picture file; raises as open_image and levels_of do."""
    with naming(path):
        return levels_of(open_image(path), num_channels, value_range)


def fill_transparent(planes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Give invisible pixels the colours around them, so that no edge is seen there.

    Pull and push: halve the picture by weighted means until no gap is left, then fill
    from coarse to fine (Gortler et al., "The lumigraph", 1996).

    Args:
        planes: C x H x W.
        weight: 1 x H x W, 0 where a pixel is invisible.
    """
    height, width = planes.shape[1:]
    if weight.all() or max(height, width) == 1:
        return planes

    def resized(values: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
        images = (Image.fromarray(np.ascontiguousarray(plane)) for plane in values)
        return np.stack([np.asarray(image.resize(size, how)) for image in images])

    smaller = -(-width // 2), -(-height // 2)
    mass = resized(weight, smaller, Image.Resampling.BOX)
    means = resized(planes * weight, smaller, Image.Resampling.BOX) / np.maximum(mass, 1e-12)
    filled = fill_transparent(means, mass)
    return np.where(weight > 0, planes, resized(filled, (width, height), Image.Resampling.BILINEAR))


# --- files ----------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` at the end: a file appears whole or not.

    Folders that are missing are made at the end, too.

    Raises:
        InputError: the folder or the file cannot be written, or the disk is full.
    """
    partial, target = None, Path(os.path.realpath(path))  # a link stays one
    try:
        if os.path.isdir(path) or str(path).endswith(("/", os.sep)):
            raise InputError(f"{path}: is a folder; name a file")
        if Path(path).exists() and not Path(path).is_file():  # a pipe, a device: written as it is
            yield Path(path)
            return
        folder = next((f for f in target.parents if f.exists()), target.parent)
        partial = folder / f".part-{uuid.uuid4().hex}"
        LEFTOVERS.append(partial)
        partial.touch(0o600 if target.exists() else 0o666, exist_ok=False)
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
            clear_up([partial])
            LEFTOVERS.remove(partial)


class Untouched(Exception):
    """Leaves atomic_path, which has found out that it could write, without a file."""


LEFTOVERS: list[Path] = []  # partial files, to be removed at any end


def clear_up(paths: Iterable[Path]) -> None:
    """Remove partial files, if they were not renamed."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


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
    write_whole(path, text.getvalue().encode(errors="backslashreplace"))


def check_outputs(
    outputs: Iterable[tuple[str | Path, str | Path]], inputs: Iterable[str | Path]
) -> None:
    """Refuse outputs, each (the flag or file that asks for it, where it goes), that would
    overwrite an input or one another, also through links, or that cannot be written."""
    places = {os.path.normcase(os.path.realpath(path)): path for path in inputs}
    for name, output in outputs:
        place = os.path.normcase(os.path.realpath(output))
        if place in places:
            where = f"{output} would overwrite {places[place]}"
            raise InputError(f"{name}: {where}; name another output")
        places[place] = f"the output of {name}"
        with suppress(Untouched), atomic_path(output):
            raise Untouched


def available_memory() -> int:
    """Bytes that may still be taken: of the machine, or of the container if that has less.

    8 GB where the system does not say (no /proc, as on Windows and macOS).
    """
    free = [8 << 30]
    with suppress(OSError, IndexError, ValueError):
        text = Path("/proc/meminfo").read_text()
        free = [1024 * int(text.split("MemAvailable:")[1].split()[0])]
    with suppress(OSError, ValueError):  # no limit is the word "max"
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        free.append(int(limit) - int(used))
    return max(0, min(free))


# --- command line ---------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but --help opens with a script's docstring, commands included, and an error
    is one line on stderr, without the usage above it."""

    def __init__(self, description: str) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout)

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
        if "" in argv:  # an unset variable of a shell; as a path it would be this folder
            self.error(f"{' '.join(argv[: argv.index('')][-1:])} '': is empty; give it a value")
        return super().parse_args(argv)

    def exit(self, status: int = 0, message: str | None = None) -> None:
        print(end="", flush=True)  # what --help prints: here run() sees an error
        super().exit(status, message)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def add_picture_flags(group: argparse._ArgumentGroup) -> None:
    """What prepare.py and test.py ask of every picture."""
    limit = Image.MAX_IMAGE_PIXELS
    text = f"refuse larger pictures (default: {limit})"
    group.add_argument("--max-pixels", type=number(int, 1), default=limit, metavar="N", help=text)
    text = "values that stand for black and white (default: those of the file's type)"
    finite = number(float, -math.inf)
    group.add_argument("--range", type=finite, nargs=2, metavar=("LOW", "HIGH"), help=text)
    text = "the network's input, matched by name: S times smaller, or of equal size"
    group.add_argument("--lr-dir", metavar="DIR", help=text)


def check_picture_flags(args: argparse.Namespace) -> list[Path]:
    """Check and apply the flags of add_picture_flags; returns the pictures of --lr-dir."""
    Image.MAX_IMAGE_PIXELS = args.max_pixels
    if args.range and not 1e-30 < args.range[1] - args.range[0] < 1e30:
        raise InputError("--range: LOW must be below HIGH")
    return images_in([args.lr_dir], results=True) if args.lr_dir is not None else []


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or a float, `low` or more and below `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value < high:
            limit = f"of at least {low}" if high == math.inf else f"from {low} to below {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limit}")
        return value

    parse.__name__ = kind.__name__  # argparse words kind's ValueError with it
    return parse


def run(main: Callable[[], int | None]) -> None:
    """Exit with main's status, with 2 and one line for bad input, with 128 + N for signal N."""
    on_stop_signals(exit_by_signal)
    # To give the memory of large arrays back and fetch it again, page by page, takes a tenth of
    # the time of training and enlarging. Where there is no glibc, nothing happens.
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX: else every thread keeps memory of its own
    with suppress(AttributeError):  # names that the terminal cannot print are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    status = 2
    try:
        done = main()
        print(end="", flush=True)
        status = done
    except InputError as error:
        report(error)
    except BrokenPipeError:  # who reads what is printed has had enough, like `head`
        exit_by_signal(13, None)
    except OSError as error:
        where = error.filename or "stdout or the system"
        report(InputError(f"{where}: {error.strerror or error}; name another place"))
        if not error.filename:
            sys.stdout = None  # or the end would try to print, too
    sys.exit(status)


def on_stop_signals(handler: Callable | signal.Handlers) -> None:
    """Handle what ends a program: Ctrl-C, a batch system's SIGTERM, a closing terminal."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum and signal.getsignal(signum) != signal.SIG_IGN:  # nohup's stays ignored
            signal.signal(signum, handler)


def exit_by_signal(signum: int, frame: object) -> None:
    """A signal handler that ends the program at once, wherever it is; nothing partial is left."""
    clear_up(LEFTOVERS)
    os._exit(128 + signum)


def ignore_signals(worker: int) -> None:
    """A DataLoader's worker_init_fn: what signals mean is the parent's to decide."""
    on_stop_signals(signal.SIG_IGN)


def report(error: InputError) -> None:
    """Print an error as one line on stderr, names quoted exactly."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
