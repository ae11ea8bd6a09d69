"""Make h5 files, of patches to train on and of pictures to evaluate on, by bicubic.

python prepare.py --images-dir data/T91 --output-path t91_x3.h5 --scale 3
python prepare.py --images-dir data/Set5 --output-path set5_x3.h5 --scale 3 --eval
python prepare.py --synthetic 96 --output-path leaves_x3.h5 --scale 3  # drawn pictures
python prepare.py --download data                               # T91, Set5 and Set14
"""

import argparse
import hashlib
import io
import math
import shutil
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from utils import (
    InputError,
    atomic_path,
    crop_to_multiple,
    degrade,
    int_at_least,
    levels_of,
    list_images,
    number,
    open_image,
    parser_for,
    rgb_to_ycbcr,
    run,
    write_whole,
)

VERSION = 1  # of the h5 layout
CHUNK = 64 << 10  # bytes: small enough to read single patches, few enough to index
LARGEST = 16 << 20  # bytes that a picture of an archive may have
MANIFEST = Path(__file__).resolve().parent / "assets" / "datasets.sha256"
SOURCES = (
    "http://mmlab.ie.cuhk.edu.hk/projects/SRCNN/SRCNN_train.zip",
    "https://github.com/tegg89/SRCNN-Tensorflow/archive/refs/heads/master.zip",
)


# --- pictures to h5 -------------------------------------------------------------------


Pair = tuple[np.ndarray, np.ndarray]  # (ilr, hr), float32, 0..255, H x W or 3 x H x W


def degraded_pair(image: Image.Image, args: argparse.Namespace) -> Pair:
    """A picture and what is left of it after --degradation."""
    if args.degradation == "pillow":
        return pillow_pair(image, args.scale, args.num_channels)
    hr = crop_to_multiple(levels_of(image, args.num_channels), args.scale)
    return (degrade(hr, args.scale) if hr.size else hr), hr


def read_images(args: argparse.Namespace, paths: list[Path]) -> Iterator[Image.Image]:
    """The pictures of a folder, each followed by its copies of --shrink."""
    for path in paths:
        image = open_image(path)
        yield image
        for factor in args.shrink:
            size = [max(1, round(factor * side)) for side in image.size]
            yield image.resize(size, Image.Resampling.BICUBIC)


def pillow_pair(image: Image.Image, scale: int, num_channels: int) -> Pair:
    """What the forks do: resize instead of crop, 8-bit RGB, luma not rounded."""
    small = max(image.width // scale, 1), max(image.height // scale, 1)
    large = small[0] * scale, small[1] * scale
    hr = image.convert("RGB").resize(large, Image.Resampling.BICUBIC)
    ilr = hr.resize(small, Image.Resampling.BICUBIC)
    ilr = ilr.resize(large, Image.Resampling.BICUBIC)
    ilr, hr = (np.asarray(rgb, np.float32).transpose(2, 0, 1) for rgb in (ilr, hr))
    return (
        (ilr, hr) if num_channels == 3 else (rgb_to_ycbcr(ilr)[0], rgb_to_ycbcr(hr)[0])
    )


def cut_patches(planes: np.ndarray, size: int, stride: int) -> np.ndarray:
    """All patches at multiples of `stride`: N x size x size or N x C x size x size."""
    view = np.lib.stride_tricks.sliding_window_view
    windows = view(planes, (size, size), axis=(-2, -1))[..., ::stride, ::stride, :, :]
    if planes.ndim == 2:
        return windows.reshape(-1, size, size)
    return np.moveaxis(windows, 0, 2).reshape(-1, len(planes), size, size)


class TrainWriter:
    """Appends the patches of one picture after another to `lr` and `hr`."""

    def __init__(self, file: h5py.File, args: argparse.Namespace) -> None:
        file.attrs.update(patch_size=args.patch_size, stride=args.stride)
        self.size, self.stride, self.count = args.patch_size, args.stride, 0
        shape = (args.num_channels,) * (args.num_channels > 1) + (self.size, self.size)
        chunk = max(1, CHUNK // (4 * math.prod(shape)))
        growing = {"maxshape": (None, *shape), "chunks": (chunk, *shape)}
        self.datasets = [
            file.create_dataset(name, (0, *shape), "float32", **growing)
            for name in ("lr", "hr")
        ]

    def add(self, ilr: np.ndarray, hr: np.ndarray) -> bool:
        """Append a picture's patches; False where the picture is smaller than one."""
        if min(hr.shape[-2:]) < self.size:
            return False
        for dataset, planes in zip(self.datasets, (ilr, hr)):
            patches = cut_patches(planes, self.size, self.stride)
            dataset.resize(self.count + len(patches), axis=0)
            dataset[self.count :] = patches
        self.count += len(patches)
        return True


class EvalWriter:
    """Appends whole pictures to the groups `lr` and `hr`."""

    def __init__(self, file: h5py.File) -> None:
        self.groups, self.count = [file.create_group("lr"), file.create_group("hr")], 0

    def add(self, ilr: np.ndarray, hr: np.ndarray) -> bool:
        """Append a picture; False where nothing of it is left."""
        if not hr.size:
            return False
        for group, planes in zip(self.groups, (ilr, hr)):
            group.create_dataset(str(self.count), data=planes)
        self.count += 1
        return True


def write_h5(
    args: argparse.Namespace, names: list, images: Iterator[Image.Image]
) -> None:
    """Write all pictures to args.output_path, one after the other: memory stays flat.

    Those that are too small are named and skipped.
    """
    with atomic_path(args.output_path) as partial, h5py.File(partial, "w") as file:
        stated = {"scale": args.scale, "degradation": args.degradation}
        file.attrs.update(stated, version=VERSION)
        writer = EvalWriter(file) if args.eval else TrainWriter(file, args)
        progress = tqdm(zip(names, images), "pictures", len(names), disable=None)
        for name, image in progress:
            if not writer.add(*degraded_pair(image, args)):
                limit = "the scale" if args.eval else "a patch"
                tqdm.write(f"{name}: skipped, smaller than {limit}", sys.stderr)
        if not writer.count:
            cure = "lower --patch-size or name larger pictures"
            raise InputError(f"{args.images_dir}: no picture is large enough; {cure}")
    what = "pictures" if args.eval else "patches"
    print(f"{args.output_path}: {writer.count} {what} for x{args.scale}")


# --- drawn pictures -------------------------------------------------------------------


def dead_leaves(seed: int, side: int = 256, oversampling: int = 4) -> Image.Image:
    """A picture of discs that cover one another: edges and areas as in photographs.

    Radii have a density ~ r^-3 between one pixel and the picture's side (Lee, Mumford,
    Huang, "Occlusion models for natural images", IJCV 2001; for training: Achddou,
    Gousseau, Ladjal, 2021). Drawn `oversampling` times as large, for soft edges.
    """
    rng = np.random.default_rng(seed)
    big = side * oversampling
    image = Image.new("RGB", (big, big), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    count = side * side // 16
    low, high = float(oversampling), float(big)
    # Inverse of the distribution function of a density ~ r^-3 on low..high.
    radii = (low**-2 - rng.random(count) * (low**-2 - high**-2)) ** -0.5
    colours = rng.integers(0, 256, (count, 3)).tolist()
    for (x, y), r, colour in zip(rng.random((count, 2)) * big, radii, colours):
        draw.ellipse((x - r, y - r, x + r, y + r), tuple(colour))
    return image.resize((side, side), Image.Resampling.BOX)


def draw_images(args: argparse.Namespace) -> Iterator[Image.Image]:
    """args.synthetic drawn pictures; an evaluation file gets others for a seed."""
    first = 1_000_000 * args.eval + 10_000 * args.seed
    return map(dead_leaves, range(first, first + args.synthetic))


# --- download -------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, str]:
    """The SHA-256 of each file's content, by name (a file of `sha256sum`)."""
    pairs = (line.split(maxsplit=1) for line in path.read_text().splitlines())
    return {name: digest for digest, name in pairs}


def missing_files(folder: Path, manifest: dict[str, str]) -> dict[str, str]:
    """The part of the manifest that `folder` does not hold, or holds damaged."""

    def present(name: str, digest: str) -> bool:
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        return hashlib.sha256(content).hexdigest() == digest

    return {name: d for name, d in manifest.items() if not present(name, d)}


def extract(
    archive: str | Path | io.IOBase, name: str, folder: Path, wanted: dict[str, str]
) -> None:
    """Write the wanted files of a zip archive to where the manifest puts them.

    They are found by content: the archive's own names, which might lead out of
    `folder`, are never used.

    Raises:
        InputError: no zip archive, or a corrupt one; `name` is what it is called.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if entry.file_size > LARGEST:
                    continue
                content = opened.read(entry)
                digest = hashlib.sha256(content).hexdigest()
                # Two pictures of T91 are the same: a content may have several names.
                for target in (n for n, wish in wanted.items() if wish == digest):
                    write_whole(folder / target, content)
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file; pass --archive FILE.zip") from error
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = f"no zip archive, or a corrupt one ({error})"
        raise InputError(f"{name}: {reason}; fetch it again") from error


def fetch(url: str, file: io.IOBase) -> None:
    """Download to an open file, with a progress bar.

    Raises:
        InputError: no connection, an error status, or a connection that broke off.
    """
    bar = {"desc": url.rpartition("/")[2], "disable": None}
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(response, "read", size or None, **bar) as body:
                shutil.copyfileobj(body, file)
    except (OSError, ValueError) as error:  # refused connections are OSErrors, too
        raise InputError(f"{url}: {getattr(error, 'reason', error)}") from error
    if size and file.tell() != size:
        raise InputError(f"{url}: broke off after {file.tell():,} of {size:,} bytes")


def download(
    folder: Path,
    archive: str | None = None,
    sources: Sequence[str] = SOURCES,
    manifest: Path = MANIFEST,
) -> None:
    """Lay out folder/T91, folder/Set5 and folder/Set14, from an archive or a source.

    What is already there is kept: an interrupted call goes on where it stopped.

    Raises:
        InputError: files are still missing afterwards.
    """
    wanted = missing_files(folder, read_manifest(manifest))
    if archive:
        extract(archive, archive, folder, wanted)
        wanted = missing_files(folder, wanted)
    for url in [] if archive else sources:
        if not wanted:
            break
        try:
            with tempfile.TemporaryFile() as file:  # nameless: nothing is left behind
                fetch(url, file)
                extract(file, url, folder, wanted)
        except InputError as error:
            print(f"{error}; trying the next source", file=sys.stderr)
        wanted = missing_files(folder, wanted)
    if wanted:
        names = ", ".join(sorted(wanted)[:3]) + ", ..." * (len(wanted) > 3)
        cure = f"fetch {SOURCES[0]} in another way and pass --archive FILE.zip"
        missing = f"{len(wanted)} files are missing ({names})"
        raise InputError(f"{archive or folder}: {missing}; {cure}")
    print(f"{folder}: T91, Set5 and Set14 are complete")


# --- command line ---------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images-dir", metavar="DIR", help="folder of pictures")
    drawn = "draw N pictures instead"
    source.add_argument("--synthetic", type=int_at_least(1), metavar="N", help=drawn)
    fetched = "fetch T91, Set5 and Set14 to this folder"
    source.add_argument("--download", type=Path, metavar="DIR", help=fetched)
    add = parser.add_argument
    add("--archive", metavar="FILE.zip", help="with --download: take them from here")
    add("--output-path", metavar="FILE", help="the h5 file to write")
    add("--scale", type=int_at_least(2), metavar="N", help="reduction to be undone")
    add("--patch-size", type=int_at_least(1), default=33, help="(default: 33)")
    add("--stride", type=int_at_least(1), default=14, help="(default: 14)")
    add("--eval", action="store_true", help="whole pictures, to evaluate on")
    add("--num-channels", type=int, choices=(1, 3), default=1, help="1: luma, 3: RGB")
    copies = "cut up copies reduced by these factors, too"
    add("--shrink", type=number(0, 1), nargs="+", default=[], metavar="F", help=copies)
    how = "the paper's bicubic in floating point, or the forks' Pillow on 8-bit RGB"
    add("--degradation", choices=("matlab", "pillow"), default="matlab", help=how)
    add("--seed", type=int_at_least(0), default=0, help="of --synthetic (default: 0)")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.archive and not args.download:
        raise InputError("--archive: goes with --download DIR")
    if args.download:
        return download(args.download, args.archive)
    for flag in ("output_path", "scale"):
        if getattr(args, flag) is None:
            raise InputError(
                f"--{flag.replace('_', '-')}: is needed to make an h5 file"
            )
    if args.synthetic:
        return write_h5(args, list(range(args.synthetic)), draw_images(args))
    paths = list_images(args.images_dir)
    copies = 1 + len(args.shrink)
    names = [path for path in paths for _ in range(copies)]
    write_h5(args, names, read_images(args, paths))


if __name__ == "__main__":
    run(main, get_args_parser().parse_args)
