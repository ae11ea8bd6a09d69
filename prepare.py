"""Make h5 files, of patches to train on and of pictures to evaluate on, by bicubic.

python prepare.py --images-dir data/T91 --output-path t91_x3.h5 --scale 3
python prepare.py --images-dir data/Set5 --output-path set5_x3.h5 --scale 3 --eval
python prepare.py --synthetic 96 --output-path leaves_x3.h5 --scale 3  # drawn pictures
python prepare.py --download data                               # T91, Set5 and Set14
"""

import argparse
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is silent while libraries load

import hashlib
import io
import math
import os
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from utils import ArgumentParser, add_picture_flags, check_picture_flags, number, run
from utils import InputError, atomic_path, check_outputs, images_in, naming, write_whole
from utils import Pair, bicubic_pair, find_partner, levels_of, open_image, read_pair
from utils import reading, rgb_to_ycbcr

VERSION = 1  # of the h5 layout
CHUNK = 64 << 10  # bytes: small enough to read single patches, few enough to index
LARGEST = 16 << 20  # bytes that a picture of an archive may have: T91's have 0.3 MB at most
MANIFEST = Path(__file__).resolve().parent / "assets" / "datasets.sha256"
SOURCES = (
    "http://mmlab.ie.cuhk.edu.hk/projects/SRCNN/SRCNN_train.zip",
    "https://github.com/tegg89/SRCNN-Tensorflow/archive/refs/heads/master.zip",
)


# --- pictures to (ilr, hr) ------------------------------------------------------------------


def pillow_pair(image: Image.Image, scale: int, num_channels: int) -> Pair:
    """What the forks do: resize instead of crop, 8-bit RGB, luma not rounded."""
    small = image.width // scale, image.height // scale
    if not min(small):
        return Pair(np.empty((0, 0)), np.empty((0, 0)))
    large = small[0] * scale, small[1] * scale
    hr = image.convert("RGB").resize(large, Image.Resampling.BICUBIC)
    lr = hr.resize(small, Image.Resampling.BICUBIC)
    ilr = lr.resize(large, Image.Resampling.BICUBIC)
    ilr, hr = (np.asarray(rgb, np.float32).transpose(2, 0, 1) for rgb in (ilr, hr))
    if num_channels == 1:
        ilr, hr = rgb_to_ycbcr(ilr)[0], rgb_to_ycbcr(hr)[0]
    return Pair(ilr, hr)


def make_pairs(
    args: argparse.Namespace, names: list, known: list, partners: list[Path], factors: list[float]
) -> Iterator[tuple[object, Pair]]:
    """(name, Pair) of files, of all that are known, with their partners of --lr-dir where there
    are any, or of drawn pictures (a name is then a seed); each followed by its copies reduced by
    the factors."""
    for name in names:
        with naming(name):
            if partners:
                partner = find_partner(name, known, partners, args.scale, "--lr-dir")
                yield name, read_pair(name, partner, args.scale, args.num_channels, args.range)
                continue
            image = dead_leaves(name) if args.synthetic else open_image(name)
            if factors and image.mode in ("1", "P"):  # which Pillow does not interpolate
                image = image.convert("L" if image.mode == "1" else "RGB")
            for factor in (1, *factors):
                size = [max(1, round(factor * side)) for side in image.size]
                copy = image if factor == 1 else image.resize(size, Image.Resampling.BICUBIC)
                if args.degradation == "pillow":
                    yield name, pillow_pair(copy, args.scale, args.num_channels)
                else:
                    levels = levels_of(copy, args.num_channels, args.range)
                    yield name, bicubic_pair(*levels, args.scale)


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


# --- (ilr, hr) to h5 ------------------------------------------------------------------------


def append_patches(file: h5py.File, ilr: np.ndarray, hr: np.ndarray, size: int, stride: int) -> int:
    """Append a picture's patches, at multiples of `stride`, to the datasets `lr` and `hr`, which
    are N x size x size or N x C x size x size; returns how many."""
    if min(hr.shape[-2:]) < size:
        return 0
    shape = *hr.shape[:-2], size, size
    for name, planes in ("lr", ilr), ("hr", hr):
        windows = np.lib.stride_tricks.sliding_window_view(planes, (size, size), (-2, -1))
        windows = windows[..., ::stride, ::stride, :, :]
        patches = np.moveaxis(windows, (-4, -3), (0, 1)).reshape(-1, *shape)
        if name not in file:
            chunk = max(1, CHUNK // (4 * math.prod(shape)))
            growing = {"maxshape": (None, *shape), "chunks": (chunk, *shape)}
            file.create_dataset(name, (0, *shape), "float32", **growing)
        start = len(file[name])
        file[name].resize(start + len(patches), axis=0)
        file[name][start:] = patches
    return len(patches)


def append_picture(file: h5py.File, ilr: np.ndarray, hr: np.ndarray) -> int:
    """Append a picture to the groups `lr` and `hr`; returns 1, or 0 where nothing is left."""
    if not hr.size:
        return 0
    for name, planes in ("lr", ilr), ("hr", hr):
        group = file.require_group(name)
        group.create_dataset(str(len(group)), data=planes)
    return 1


class H5Target(io.FileIO):
    """A file for HDF5, which ends in a segmentation fault where a write fails, as on a full disk.

    It is told that all went well; `check` raises the first error.
    """

    error: OSError | None = None

    def write(self, data: memoryview) -> int:
        written = 0
        try:
            while written < len(data):
                written += super().write(memoryview(data)[written:])
        except OSError as error:
            self.error = self.error or error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size

    def check(self) -> None:
        if self.error:
            raise self.error


def write_h5(
    path: str | Path,
    pairs: Iterable[tuple[object, Pair]],
    append: Callable[[h5py.File, np.ndarray, np.ndarray], int],
    attributes: dict,
) -> int:
    """Write (name, Pair), one after the other: memory stays flat; returns how many patches or
    pictures there are. Pictures of which `append` takes nothing are named and skipped.

    Args:
        path: of atomic_path, which tells of a full disk.

    Raises:
        InputError: no patch and no picture.
    """
    count, steps, skipped = 0, set(), []
    with H5Target(path, "w+") as target:
        with h5py.File(target, "w") as file:
            for name, pair in pairs:
                added = append(file, pair.ilr, pair.hr)
                target.check()
                if not added:
                    skipped.append(f"{name}: skipped, smaller than a patch or the scale")
                count += added
                steps.add(pair.step)
                if len(steps) > 1:
                    raise InputError(f"{name}: has another depth than those before; use one kind")
            if not count:
                cure = "lower it or name larger pictures"
                raise InputError(f"--patch-size, --scale: no picture is large enough; {cure}")
            file.attrs.update(attributes)
            if append is append_picture:
                file.attrs["rounding"] = steps.pop()  # so that train.py scores as test.py does
        target.check()
    for line in skipped:
        print(line, file=sys.stderr)
    return count


# --- download -------------------------------------------------------------------------------


def missing_files(folder: Path, manifest: Path) -> dict[str, str]:
    """The part of the manifest, a file of `sha256sum`, that `folder` does not hold, or holds
    damaged: the SHA-256 of each file's content, by name."""
    wanted = {}
    for line in manifest.read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wanted[name] = digest
    return wanted


def extract(archive: io.IOBase | str, folder: Path, wanted: dict[str, str]) -> None:
    """Write the wanted files of a zip archive to where the manifest puts them.

    They are found by content: the archive's own names, which might lead out of
    `folder`, are never used. What is no zip archive, or a corrupt one, raises many kinds.
    """
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            if entry.file_size > LARGEST:
                continue
            content = opened.read(entry)
            digest = hashlib.sha256(content).hexdigest()
            # Two pictures of T91 are the same: a content may have several names.
            for target in (name for name, wish in wanted.items() if wish == digest):
                write_whole(folder / target, content)


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
    wanted = missing_files(folder, manifest)
    if archive:
        with reading(archive, "file in zip format", "pass --archive FILE.zip"):
            extract(archive, folder, wanted)
        wanted = missing_files(folder, manifest)
    for url in [] if archive else sources:
        if not wanted:
            break
        bar = {"desc": url.rpartition("/")[2], "disable": None}
        try:
            with (
                urllib.request.urlopen(url, timeout=30) as response,
                tqdm.wrapattr(response, "read", response.length, **bar) as body,
                tempfile.TemporaryFile() as file,  # nameless: nothing is left behind
            ):
                shutil.copyfileobj(body, file)
                if response.length:
                    raise OSError(f"broke off, {response.length:,} bytes are missing")
                extract(file, folder, wanted)
        except Exception as error:  # no connection, one that broke off, a damaged archive
            print(f"{url}: {error}; trying the next source", file=sys.stderr)
        wanted = missing_files(folder, manifest)
    if wanted:
        names = ", ".join(sorted(wanted)[:3]) + ", ..." * (len(wanted) > 3)
        cure = f"fetch {SOURCES[0]} in another way and pass --archive FILE.zip"
        missing = f"{len(wanted)} files are missing ({names})"
        raise InputError(f"{archive or folder}: {missing}; {cure}")
    print(f"{folder}: T91, Set5 and Set14 are complete")


# --- command line ---------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("pictures, from one of the first three")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--images-dir", nargs="+", metavar="DIR", help="folders of pictures")
    drawn = "draw N pictures instead"
    source.add_argument("--synthetic", type=number(int, 1, 10_001), metavar="N", help=drawn)
    fetched = "fetch T91, Set5 and Set14 to this folder"
    source.add_argument("--download", type=Path, metavar="DIR", help=fetched)
    add = group.add_argument
    add("--archive", metavar="FILE.zip", help="with --download: take them from here")
    add_picture_flags(group)
    copies = "cut up copies reduced by these factors, too"
    add("--shrink", type=number(float, 0.01, 1), nargs="+", default=[], metavar="F", help=copies)
    how = "the paper's bicubic in floating point, or the forks' Pillow on 8-bit RGB"
    add("--degradation", choices=("matlab", "pillow"), default="matlab", help=how)
    add("--num-channels", type=int, choices=(1, 3), default=1, help="1: luma, 3: RGB")
    add("--seed", type=number(int, 0, 100), default=0, help="draws pictures, or those held out")

    add = parser.add_argument_group("h5 file").add_argument
    add("--output-path", metavar="FILE", help="the h5 file to write")
    add("--scale", type=number(int, 1, 65), metavar="N", help="reduction to be undone")
    add("--patch-size", type=number(int, 1, 4097), default=33, help="(default: 33)")
    add("--stride", type=number(int, 1, 4097), default=14, help="(default: 14)")
    add("--eval", action="store_true", help="whole pictures, to evaluate on")
    held = "write this part of the pictures to STEM_eval.h5 instead, to evaluate on"
    add("--hold-out", type=number(float, 1e-6, 1), metavar="PART", help=held)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that are missing or do not go together."""
    for flag in ("output_path", "scale"):
        if getattr(args, flag) is None:
            raise InputError(f"--{flag.replace('_', '-')}: is needed to make an h5 file")
    if args.lr_dir is not None and (args.synthetic or args.shrink):
        raise InputError("--lr-dir: goes with --images-dir, without --shrink")
    if args.degradation == "pillow" and (args.range or args.lr_dir is not None):
        raise InputError("--degradation pillow: goes without --range and --lr-dir")
    if args.scale == 1 and args.lr_dir is None:
        raise InputError("--scale 1: goes with --lr-dir and pictures of equal size")
    if args.hold_out and args.eval:
        raise InputError("--hold-out: makes an evaluation file by itself; drop --eval")


def plan(args: argparse.Namespace, names: list) -> list[tuple[str, list, bool]]:
    """(h5 file, its pictures, whether they stay whole) of the one or two that are wanted."""
    if not args.hold_out:
        return [(args.output_path, names, args.eval)]
    if len(names) < 2:
        raise InputError("--hold-out: needs two pictures at least")
    count = min(max(1, round(args.hold_out * len(names))), len(names) - 1)
    order = np.random.default_rng(args.seed).permutation(len(names))
    held, others = ([names[i] for i in sorted(part)] for part in np.split(order, [count]))
    held_path = f"{os.path.splitext(args.output_path)[0]}_eval.h5"
    return [(held_path, held, True), (args.output_path, others, False)]


def main(args: argparse.Namespace) -> None:
    if args.archive and not args.download:
        raise InputError("--archive: goes with --download DIR")
    if args.download:
        return download(args.download, args.archive)
    check_flags(args)
    partners = check_picture_flags(args)
    if args.synthetic:  # an evaluation file gets other pictures for a seed
        first = 1_000_000 * args.eval + 10_000 * args.seed
        names = list(range(first, first + args.synthetic))
    else:
        names = images_in(args.images_dir)
    jobs = plan(args, names)
    inputs = [] if args.synthetic else [*names, *partners]
    check_outputs([("--output-path", path) for path, _, _ in jobs], inputs)
    done = []
    with ExitStack() as files:  # none appears before all are made
        for path, chosen, whole_pictures in jobs:
            attributes = {"scale": args.scale, "version": VERSION}
            attributes["degradation"] = "given" if partners else args.degradation
            append, what = append_picture, "pictures"
            if not whole_pictures:
                append = partial(append_patches, size=args.patch_size, stride=args.stride)
                attributes |= {"patch_size": args.patch_size, "stride": args.stride}
                what = "patches"
            factors = args.shrink if whole_pictures == args.eval else []  # none of those held out
            pairs = make_pairs(args, chosen, names, partners, factors)
            total = len(chosen) * (1 + len(factors))
            bar = tqdm(pairs, "pictures", total, leave=False, disable=None)
            count = write_h5(files.enter_context(atomic_path(path)), bar, append, attributes)
            done.append(f"{path}: {count} {what} for x{args.scale}")
    print(*done, sep="\n")


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
