"""Make h5 files of LR/HR pairs: patches to train on, or whole images to evaluate on.

python prepare.py --images-dir data/T91 --output-path t91_x3.h5 --scale 3
python prepare.py --images-dir data/Set5 --output-path set5_x3.h5 --scale 3 --eval
python prepare.py --synthetic 96 --output-path leaves_x3.h5 --scale 3  # no photographs needed
python prepare.py --download data                               # T91, Set5 and Set14
"""

import argparse
import hashlib
import io
import itertools
import math
import os
import shutil
import sys
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from utils import add_image_flags, apply_image_flags, ArgumentParser, atomic_path, check_outputs
from utils import count_of, find_images, InputError, make_pair, match_images, number, only_match
from utils import open_image, Pair, raise_exit, skip_on_error, run, set_signal_handlers, write_file

LAYOUT_VERSION = 1
CHUNK_BYTES = 64 << 10  # small enough to read single patches, large enough for a short index

# --- degradations ---------------------------------------------------------------------------


def make_pairs(
    args: argparse.Namespace, images: dict, lr_paths: dict, factors: list[float], failed: list
) -> Iterator[tuple[object, Pair]]:
    """Yield (path, Pair) for every image, and (None, Pair) for its copies by the factors.

    The LR image is that of --lr-dir, with --jpeg a JPEG of random quality, or the protocol's.

    Args:
        images: names by path, or by seed for synthetic images.
        lr_paths: match_images of --lr-dir, or empty.
        failed: receives the paths of images that cannot be used, which are reported.
    """
    rng = np.random.default_rng(args.seed)
    for path, name in images.items():
        with skip_on_error(path, failed):
            image, lr_image = dead_leaves(path) if args.synthetic else open_image(path), None
            if lr_paths:
                lr_image = open_image(only_match(path, lr_paths[path], "--lr-dir"))
            if factors and image.mode in ("1", "P"):  # Pillow does not interpolate these
                image = image.convert("L" if image.mode == "1" else "RGB")
            for factor in (1, *factors):
                size = [max(1, round(factor * side)) for side in image.size]
                copy = image if factor == 1 else image.resize(size, Image.Resampling.BICUBIC)
                quality = int(rng.integers(args.jpeg[0], args.jpeg[1] + 1)) if args.jpeg else None
                pair = make_pair(copy, lr_image, args.scale, args.num_channels, args.range, quality)
                pair.name = name
                yield path if factor == 1 else None, pair


# --- synthetic images -----------------------------------------------------------------------


def dead_leaves(seed: int, side: int = 256, oversampling: int = 4) -> Image.Image:
    """Draw discs that cover one another: edges and areas with the statistics of photographs.

    The radii have a density ~ r^-3 between one pixel and the image's side (Lee, Mumford, Huang,
    "Occlusion models for natural images", IJCV 2001; for training: Achddou, Gousseau, Ladjal,
    2021). An `oversampling` times larger drawing gives soft edges.
    """
    rng = np.random.default_rng(seed)
    drawn_side = side * oversampling
    background = tuple(rng.integers(0, 256, 3).tolist())
    image = Image.new("RGB", (drawn_side, drawn_side), background)
    draw = ImageDraw.Draw(image)
    count = side * side // 16
    low, high = float(oversampling), float(drawn_side)
    # The inverse of the cumulative distribution of a density ~ r^-3 on low..high.
    radii = (low**-2 - rng.random(count) * (low**-2 - high**-2)) ** -0.5
    colours = rng.integers(0, 256, (count, 3)).tolist()
    for (x, y), r, colour in zip(rng.random((count, 2)) * drawn_side, radii, colours):
        draw.ellipse((x - r, y - r, x + r, y + r), tuple(colour))
    return image.resize((side, side), Image.Resampling.BOX)


# --- h5 writing -----------------------------------------------------------------------------


def append_patches(file: h5py.File, pair: Pair, size: int, stride: int) -> int:
    """Append the patches at multiples of `stride` to the datasets `lr` and `hr`.

    Returns:
        The number of patches, 0 where the image is smaller than `size`.
    """
    if min(pair.hr.shape[-2:]) < size:
        return 0
    shape = *pair.hr.shape[:-2], size, size
    for name, planes in ("lr", pair.ilr), ("hr", pair.hr):
        windows = np.lib.stride_tricks.sliding_window_view(planes, (size, size), (-2, -1))
        windows = windows[..., ::stride, ::stride, :, :]
        patches = np.moveaxis(windows, (-4, -3), (0, 1)).reshape(-1, *shape)
        if name not in file:
            rows = max(1, CHUNK_BYTES // (4 * math.prod(shape)))
            file.create_dataset(
                name, (0, *shape), "float32", maxshape=(None, *shape), chunks=(rows, *shape)
            )
        start = len(file[name])
        file[name].resize(start + len(patches), axis=0)
        file[name][start:] = patches
    return len(patches)


def append_image(file: h5py.File, pair: Pair) -> int:
    """Append an image to the groups `lr` and `hr`; return 1, or 0 where it is empty."""
    if not pair.hr.size:
        return 0
    for name, planes in ("lr", pair.ilr), ("hr", pair.hr):
        group = file.require_group(name)
        dataset = group.create_dataset(str(len(group)), data=planes)
        name_in_utf8 = pair.name.encode(errors="backslashreplace").decode()
        dataset.attrs.update({"name": name_in_utf8, "greyscale": pair.greyscale})
    return 1


class DeferredErrors(io.FileIO):
    """A file for HDF5, which crashes where a write fails or is interrupted, as on a full disk.

    Failed writes seem to succeed and signals are remembered, until `check` raises the first.
    """

    def __init__(self, path: str | Path) -> None:
        self.error, self.signum = None, 0
        set_signal_handlers(self.remember)
        super().__init__(path, "w+")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error

    def remember(self, signum: int, frame: object) -> None:
        self.signum = self.signum or signum

    def write(self, data: memoryview) -> None:
        with self.deferred():
            while len(data):
                data = data[super().write(data) :]

    def truncate(self, size: int | None = None) -> None:
        with self.deferred():
            super().truncate(size)

    def check(self) -> None:
        """Raise the exception of the first signal, or the first error."""
        if self.signum:
            raise_exit(self.signum, None)
        if self.error:
            raise self.error


def write_h5(path: str | Path, pairs: Iterable[tuple[object, Pair]], attributes: dict) -> int:
    """Write pairs one by one, so that memory use is constant; report and skip those too small.

    Args:
        path: a temporary path of atomic_path.
        attributes: of the file; with "patch_size" and "stride" it has patches, else whole images.

    Returns:
        The number of patches or images; 0 if no image is large enough, and then no attributes.

    Raises:
        InputError: images of different value ranges or bit depths.
    """
    count, sample_format = 0, None
    with DeferredErrors(path) as target:
        with h5py.File(target, "w") as file:
            for name, pair in pairs:
                if "patch_size" in attributes:
                    size, stride = attributes["patch_size"], attributes["stride"]
                    added = append_patches(file, pair, size, stride)
                else:
                    added = append_image(file, pair)
                target.check()
                if not added:
                    if name:  # that a copy is too small is no news
                        print(
                            f"{name}: skipped, smaller than a patch or the scale", file=sys.stderr
                        )
                    continue
                if sample_format not in (None, pair.sample_format):
                    raise InputError(
                        f"{name}: has {pair.sample_format['bit_depth']} bits per value, the "
                        f"others {sample_format['bit_depth']}; prepare them separately"
                    )
                count, sample_format, quantum = count + added, pair.sample_format, pair.quantum
            if count:  # "rounding" is the quantum to which train.py rounds before it measures PSNR
                file.attrs.update(attributes | sample_format | {"rounding": quantum})
        set_signal_handlers(raise_exit)
        target.check()
    return count


def hold_out(images: dict, part: float, seed: int) -> tuple[dict, dict]:
    """Split images at random into those to train on and those to evaluate on."""
    if len(images) < 2:
        raise InputError("--hold-out: needs at least two images")
    count = min(max(1, round(part * len(images))), len(images) - 1)
    order = np.random.default_rng(seed).permutation(len(images))
    names = list(images)
    held_out = {names[i]: images[names[i]] for i in sorted(order[:count])}
    return {n: images[n] for n in names if n not in held_out}, held_out


# --- download -------------------------------------------------------------------------------

MANIFEST = Path(__file__).resolve().parent / "assets" / "datasets.sha256"
SOURCES = (
    "http://mmlab.ie.cuhk.edu.hk/projects/SRCNN/SRCNN_train.zip",
    "https://github.com/tegg89/SRCNN-Tensorflow/archive/refs/heads/master.zip",
)


def missing_files(folder: Path) -> dict[str, str]:
    """Return {name: SHA-256} of the files of sha256sum's manifest that are missing or damaged."""
    missing = {}
    for line in MANIFEST.read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            missing[name] = digest
    return missing


def read_archive(source: str) -> BinaryIO:
    """Return the content of a local file or of a URL; an archive has some tens of MB."""
    if not source.startswith("http"):
        if not Path(source).is_file():  # zipfile would wait for a FIFO
            raise OSError("no such zip file")
        return io.BytesIO(Path(source).read_bytes())
    content = io.BytesIO()
    with urllib.request.urlopen(source, timeout=30) as response:
        name, total = Path(source).name, response.length
        with tqdm.wrapattr(response, "read", total, desc=name, disable=None) as body:
            shutil.copyfileobj(body, content)
    return content


def extract(source: str, folder: Path, missing: dict[str, str]) -> None:
    """Write the missing files of a zip archive to their places in the manifest.

    They are found by content. The names in the archive, which might lead out of `folder`, are
    never used.
    """
    with zipfile.ZipFile(read_archive(source)) as archive:
        for entry in archive.infolist():
            content = archive.read(entry)
            digest = hashlib.sha256(content).hexdigest()
            for name, wanted in missing.items():  # two images of T91 are equal
                if wanted == digest:
                    write_file(folder / name, content)


def download(folder: Path, archive: str | None = None) -> None:
    """Create folder/T91, folder/Set5 and folder/Set14 from an archive or the first good source.

    Raises:
        InputError: files are missing afterwards.
    """
    missing, problem = missing_files(folder), ""
    for source in [archive] if archive else SOURCES:
        if not missing:
            break
        if problem:
            print(f"{problem}; trying the next source", file=sys.stderr)
        try:
            extract(source, folder, missing)
        except Exception as error:  # no connection, an interrupted one, a damaged archive
            problem = f"{source}: {error}"
        missing = missing_files(folder)
    if missing:
        raise InputError(
            f"{problem or archive or folder}: {len(missing)} files are missing "
            f"({', '.join(sorted(missing)[:3])}, ...); fetch {SOURCES[0]} in another way and pass "
            "--archive FILE.zip"
        )
    print(f"{folder}: T91, Set5 and Set14 are complete")


# --- arguments ------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("images, from one of the first three")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--images-dir", nargs="+", metavar="DIR", help="folders of HR images")
    add("--synthetic", type=number(int, 1, 10_001), metavar="N", help="make N dead-leaves images")
    add("--download", type=Path, metavar="DIR", help="only download T91, Set5 and Set14 to DIR")
    add = group.add_argument
    add("--archive", metavar="FILE.zip", help="with --download: a local copy of the archive")
    add_image_flags(group)
    add(
        "--shrink",
        type=number(float, 0.01, 1),
        nargs="+",
        default=[],
        metavar="F",
        help="also use copies downscaled by these factors",
    )
    add(
        "--jpeg",
        type=number(int, 1, 101),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="save the LR images as JPEG of a random quality in this range",
    )
    add("--num-channels", type=int, choices=(1, 3), default=1, help="1: luma (default), 3: RGB")
    add("--seed", type=number(int, 0, 100), default=0, help="of --synthetic, --hold-out and --jpeg")

    group = parser.add_argument_group("h5 file")
    add = group.add_argument
    add("--output-path", metavar="FILE", help="the h5 file to write")
    add("--scale", type=number(int, 1, 65), metavar="N", help="upscaling factor")
    add("--patch-size", type=number(int, 1, 4097), default=33, help="(default: 33)")
    add("--stride", type=number(int, 1, 4097), default=14, help="(default: 14)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--eval", action="store_true", help="whole images, to evaluate on")
    add(
        "--hold-out",
        type=number(float, 1e-6, 1),
        metavar="PART",
        help="write this part of the images to STEM_eval.h5 instead, to evaluate on",
    )
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that are missing or contradict each other."""
    if args.archive:
        raise InputError("--archive: use it with --download DIR")
    if args.output_path is None or args.scale is None:
        raise InputError("--output-path, --scale: both are required")
    if args.lr_dir and (args.synthetic or args.shrink or args.jpeg):
        raise InputError("--lr-dir: use it with --images-dir, without --shrink and --jpeg")
    if args.jpeg and args.jpeg[0] > args.jpeg[1]:
        raise InputError("--jpeg: LOW must not exceed HIGH")
    if args.scale == 1 and not args.lr_dir:
        raise InputError("--scale 1: use it with --lr-dir and images of equal size")


def main(args: argparse.Namespace) -> int:
    if args.download:
        download(args.download, args.archive)
        return 0
    check_flags(args)
    apply_image_flags(args)
    lr_paths = match_images(args.images_dir, args.lr_dir, args.scale) if args.lr_dir else {}
    if args.synthetic:  # a seed gives other images to an evaluation file than to a training file
        first = 1_000_000 * args.eval + 10_000 * args.seed
        images = {seed: f"synthetic/{seed}" for seed in range(first, first + args.synthetic)}
    else:
        images = find_images(args.images_dir, folders_only=True)
        images = {path: name.with_suffix("").as_posix() for path, name in images.items()}
    if args.lr_dir:
        images = {path: name for path, name in images.items() if path in lr_paths}
    # (h5 file, images, whether they stay whole, factors of additional copies)
    jobs = [(args.output_path, images, args.eval, args.shrink)]
    if args.hold_out:
        train_images, eval_images = hold_out(images, args.hold_out, args.seed)
        eval_path = f"{os.path.splitext(args.output_path)[0]}_eval.h5"
        jobs = [(eval_path, eval_images, True, [])]
        jobs += [(args.output_path, train_images, False, args.shrink)]
    inputs = [] if args.synthetic else [*images, *itertools.chain(*lr_paths.values())]
    check_outputs([("--output-path", path) for path, *_ in jobs], inputs)

    common = {"scale": args.scale, "version": LAYOUT_VERSION}
    common["degradation"] = "pairs" if args.lr_dir else "jpeg" if args.jpeg else "bicubic"
    if args.jpeg:
        common["jpeg"] = args.jpeg
    failed, summary = [], []
    with ExitStack() as files:  # no file appears before all are complete
        for path, job_images, is_eval, factors in jobs:
            pairs = make_pairs(args, job_images, lr_paths, factors, failed)
            total = len(job_images) * (1 + len(factors))
            pairs = tqdm(pairs, "images", total, leave=False, disable=None)
            attributes = dict(common)
            if not is_eval:
                attributes |= {"patch_size": args.patch_size, "stride": args.stride}
            partial_path = files.enter_context(atomic_path(path))
            count = write_h5(partial_path, pairs, attributes)
            if not count and failed:
                raise SystemExit(2)  # the error of each image has been printed
            if not count:
                raise InputError("--patch-size, --scale: no image is large enough; lower them")
            noun = "image" if is_eval else "patch"
            summary.append(f"{path}: {count_of(count, noun)} for x{args.scale}")
            if args.hold_out and is_eval:
                summary.append(f"held out: {', '.join(job_images.values())}")
    print(*summary, sep="\n")
    return 2 if failed else 0


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
