"""Enlarge pictures, or measure how well known pictures are restored.

python test.py                                         # the bundled picture, x3
python test.py --image-file photo.jpg --scale 2        # writes photo_srcnn_x2.png
python test.py --eval --image-file data/Set5 --scale 3 # PSNR and SSIM, the paper's way
python test.py --export srcnn_x3.onnx --scale 3        # the network, for other programs
"""

import argparse
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is silent while libraries load

import io
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import h5py
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from datasets import read_eval_pairs
from models import SelfEnsemble, back_project, enlarge, load_srcnn, pick_device, restore, to_onnx
from utils import ArgumentParser, add_picture_flags, check_picture_flags, number, report, run
from utils import InputError, check_outputs, naming, write_csv, write_whole
from utils import Pair, bicubic_pair, decode, find_images, find_partner, images_in, open_image
from utils import crop_to_multiple, levels_of, read_levels, read_pair, rgb_to_ycbcr
from utils import psnr, rounded_luma, shave, ssim, to_8bit, ycbcr_to_rgb

ROOT = Path(__file__).resolve().parent
# JPEG without subsampling (4:4:4); PNG somewhat larger than usual, in a fraction of the time.
SAVE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {"compress_level": 1}}
NETWORKS = {"9-5-5": "srcnn", "9-1-5": "srcnn_9-1-5", "rgb": "srcnn_rgb"}  # files of weights/
LONGEST_SIDES = {"JPEG": 65535, "WEBP": 16383, "GIF": 65535}  # that the formats can hold


def choose_scale(args: argparse.Namespace) -> int:
    """--scale, else what --outscale needs, else what the name of the weights says, else 3."""
    path = Path(args.weights_file or "")
    said = re.search(r"(?:^|_)x(\d+)$", path.stem) or re.search(r"^x(\d+)$", path.parent.name)
    implied = int(said[1]) if said else 3
    if args.scale is None:
        return max(2, math.ceil(args.outscale)) if args.outscale and not said else implied
    if said and implied != args.scale:
        print(f"--scale {args.scale}: {path} looks like weights for {implied}", file=sys.stderr)
    return args.scale


def weights_path(args: argparse.Namespace) -> Path:
    """The file of --weights-file, or the one that weights/ holds for --network and --scale."""
    if args.weights_file is not None:
        return Path(args.weights_file)
    prefix = f"{NETWORKS[args.network or '9-5-5']}_x"
    path = ROOT / "weights" / f"{prefix}{args.scale}.pth"
    if not path.is_file():
        names = (found.stem for found in path.parent.glob(f"{prefix}*.pth"))
        scales = ", ".join(sorted(name.removeprefix(prefix) for name in names))
        asked = f"--outscale {args.outscale:g}, " if args.outscale else ""
        asked += f"--scale {args.scale}"
        cure = "choose one or pass --weights-file"
        raise InputError(f"{asked}: there are weights for {scales}; {cure}")
    return path


def load_model(args: argparse.Namespace) -> nn.Module:
    """The network that the arguments ask for, on its device."""
    device = pick_device(args.device, args.tf32)
    model = load_srcnn(weights_path(args), device).to(memory_format=torch.channels_last)
    if args.half:
        if device.type != "cuda":
            raise InputError("--half: is for CUDA devices; drop it")
        model = model.half()
    return SelfEnsemble(model) if args.self_ensemble else model


def for_each(paths: list[Path], function: Callable[[Path], object]) -> tuple[list, int]:
    """function(path) of all, and the exit status: 2 where a file was bad. Among several that one
    is reported and the others done."""
    results, status = [], 0
    for path in tqdm(paths, "files", leave=False, disable=None if len(paths) > 1 else True):
        try:
            with naming(path):
                results.append(function(path))
        except InputError as error:
            if len(paths) == 1:
                raise
            report(error)
            status = 2
    return results, status


# --- enlarge --------------------------------------------------------------------------------


def enlarge_files(args: argparse.Namespace) -> int:
    """Enlarge every input; returns the exit status."""
    paths = find_images(args.image_file)
    several = len(paths) > 1 or Path(args.image_file[0]).is_dir()
    ends = ".png", ".tif"  # the second for 32 bits, which PNG cannot hold
    targets = {path: [output_path(path, args, several, end) for end in ends] for path in paths}
    outputs = [(path, target) for path in paths for target in dict.fromkeys(targets[path])]
    check_outputs(outputs, [*paths, weights_path(args)])
    model = load_model(args)
    if model.num_channels not in (1, 3):
        reason = f"is for {model.num_channels} channels, pictures have 1 or 3; take others"
        raise InputError(f"--weights-file {weights_path(args)}: {reason}")

    def enlarge_file(path: Path) -> None:
        image = open_image(path)
        planes = decode(image, args.range)
        target = targets[path][image.mode in ("I", "F")]
        size = [round((args.outscale or args.scale) * side) for side in image.size]
        options = save_options(target, planes.mode, size) | carried_over(image, planes.mode)
        enlarged = enlarge(planes, model, args.scale, args.back_projection, tile=args.tile)
        if args.outscale:
            enlarged = reduce_image(enlarged, size, args.range)
        save_image(enlarged, target, options)
        tqdm.write(str(target))

    return for_each(paths, enlarge_file)[1]


def reduce_image(
    image: Image.Image, size: list[int], value_range: list[float] | None
) -> Image.Image:
    """A picture reduced by bicubic; by way of floating point where Pillow cannot do 16 bits."""
    if image.mode not in ("I;16", "I"):
        return image.resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(image)
    low, high = value_range or (values.min(), values.max())
    levels = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    rounded = np.clip(np.rint(np.asarray(levels, np.float64)), low, high)
    return Image.fromarray(rounded.astype(values.dtype))


def output_path(path: Path, args: argparse.Namespace, several: bool, end: str) -> Path:
    """Where the result goes: beside the input, into a folder, or to the file named."""
    name = f"{path.stem}_srcnn_x{args.outscale or args.scale:g}{end}"
    if args.output is None:
        return path.with_name(name)
    output = Path(args.output)
    is_folder = output.is_dir() or args.output.endswith(("/", os.sep)) or not output.suffix
    if several and not is_folder:
        raise InputError(f"--output {output}: is one file for several pictures; name a folder")
    return output / name if is_folder else output


def carried_over(image: Image.Image, mode: str) -> dict:
    """Resolution and colour profile of the input, where they are valid and fit the result."""
    valid = {}
    dpi, profile = image.info.get("dpi"), image.info.get("icc_profile")
    if isinstance(dpi, tuple) and len(dpi) == 2 and all(1 <= float(d) < 65536 for d in dpi):
        valid["dpi"] = tuple(map(float, dpi))
    # A profile's header: bytes 16..19 its colours, 36..39 a signature (ICC.1, section 7.2).
    colours = b"GRAY" if mode[0] in "LIF" else b"RGB "
    if isinstance(profile, bytes) and profile[36:40] == b"acsp" and profile[16:20] == colours:
        valid["icc_profile"] = profile
    return valid


def save_options(path: Path, mode: str, size: list[int]) -> dict:
    """Pillow's options for writing such a picture to `path`, which refuse what cannot be
    written before work on it begins."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise InputError(f"{path}: cannot write {path.suffix!r} files; use .png")
    if max(size) > LONGEST_SIDES.get(kind, max(size)):
        raise InputError(f"{path}: {kind} cannot hold {size[0]} x {size[1]} pixels; use .png")
    options = SAVE_OPTIONS.get(kind, {})
    try:
        Image.new(mode, (16, 16)).save(io.BytesIO(), kind, **options)
    except Exception as error:
        cure = "use .tif" if mode in ("I", "F") else "use .png"
        raise InputError(f"{path}: {kind} cannot hold mode {mode}; {cure}") from error
    return dict(options)


def save_image(image: Image.Image, path: Path, options: dict) -> None:
    """Write a picture in the format of its extension, whole or not at all."""
    encoded = io.BytesIO()  # to files Pillow's encoders write on where a disk is full
    encoded.name = path.name
    try:
        image.save(encoded, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}); use .png") from error
    write_whole(path, encoded.getvalue())


# --- evaluate -------------------------------------------------------------------------------


def evaluate_files(args: argparse.Namespace, partners: list[Path]) -> int:
    """Degrade and restore every picture; print, and on demand write, the scores."""
    paths = find_images(args.image_file)
    results = images_in([args.results], results=True) if args.results is not None else []
    outputs = [("--csv", args.csv)] if args.csv else []
    if args.save_images:
        names = "bicubic", "srcnn", "comparison"
        outputs += [(p, comparison_path(args, p, name)) for p in paths for name in names]
    weights = [] if results else [weights_path(args)]
    check_outputs(outputs, [*paths, *partners, *results, *weights])
    model = None if results else load_model(args)
    channels = model.num_channels if model else 1

    def evaluate_path(path: Path) -> list[dict]:
        """The rows of a picture, or of all pictures of an evaluation file."""
        rows = []
        for name, pair in known_pairs(path, paths, partners, args, channels):
            with naming(path.parent / name):
                least = 11 + 2 * args.scale * (args.scale > 1)
                if min(pair.hr.shape[-2:]) < least:
                    raise InputError(f"too small to measure; needs {least} pixels")
                if results:
                    result = find_partner(path, paths, results, args.scale, "--results")
                    pictures = {"result": read_result(result, path, pair.hr, args)}
                else:
                    pictures = restore_pair(model, pair, args)
                rows.append(score(name, pair, {"bicubic": pair.ilr, **pictures}, args.scale))
            if args.save_images:
                save_comparison(path, args, pair, pictures["srcnn"], rows[-1])
        return rows

    found, status = for_each(paths, evaluate_path)
    rows = [row for rows in found for row in rows]
    if rows:
        print_scores(rows, args.scale)
        if args.csv:
            write_csv(args.csv, max(rows, key=len), rows)
    return status


def known_pairs(
    path: Path, paths: list[Path], partners: list[Path], args: argparse.Namespace, channels: int
) -> list[tuple[str, Pair]]:
    """(name, Pair) of a picture, with its partner of --lr-dir, or of an evaluation file."""
    if path.is_file() and h5py.is_hdf5(path):
        if args.save_images or args.results is not None:
            raise InputError(f"{path}: --save-images and --results are for pictures; drop them")
        pairs, _ = read_eval_pairs(path, args.scale)
        return [(f"{path.name}/{i}", pair) for i, pair in enumerate(pairs)]
    if partners:
        partner = find_partner(path, paths, partners, args.scale, "--lr-dir")
        return [(path.name, read_pair(path, partner, args.scale, channels, args.range))]
    levels = read_levels(path, channels, args.range)
    return [(path.name, bicubic_pair(*levels, args.scale))]


def restore_pair(model: nn.Module, pair: Pair, args: argparse.Namespace) -> dict:
    """What the network makes of a pair: by the protocol, and as users get it."""
    if model.num_channels != pair.num_channels:
        raise InputError(f"has other channels than {weights_path(args)}; take other weights")
    pictures = {"srcnn": restore(model, pair.ilr, args.tile)}
    if pair.lr is not None:
        pictures["enlarged"] = back_project(pictures["srcnn"], pair.lr, args.back_projection)
    return pictures


def read_result(result: Path, path: Path, hr: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Another program's picture, as the protocol takes it, of the size of `hr`."""
    with naming(result), Image.open(path) as truth:  # whose mode counts, no more
        image = open_image(result)
        if Image.getmodebase(truth.mode) == "L" != Image.getmodebase(image.mode):
            image = image.convert("L")  # a grey picture, saved as RGB
        levels, _ = levels_of(image, 1, args.range)
    levels = levels if levels.shape == hr.shape else crop_to_multiple(levels, args.scale)
    if levels.shape != hr.shape:
        raise InputError(f"{path} and {result}: differ in size; name whole results")
    return levels


def score(name: str, pair: Pair, pictures: dict[str, np.ndarray], scale: int) -> dict:
    """The row of scores of a picture, taken as ground truth; in colour also PSNR over RGB."""
    row, colour = {"image": name, "scale": scale}, pair.num_channels == 3
    for method, picture in pictures.items():
        shaved = [shave(p, scale) for p in (to_8bit(picture, pair.step), pair.hr)]
        luma = [rounded_luma(p, pair.step) for p in shaved] if colour else shaved
        row |= {f"{method}_psnr": psnr(*luma), f"{method}_ssim": ssim(*luma)}
        row |= {f"{method}_rgb_psnr": psnr(*shaved)} if colour else {}
    return row


def print_scores(rows: list[dict], scale: int) -> None:
    """A table of the rows, and of their means (protocol step 6)."""
    width = max(5, *(len(row["image"]) for row in rows))
    columns = [name for name in rows[0] if all(name in row for row in rows)][2:]
    titles = [re.sub("_psnr$", " dB", name.replace("_rgb", " RGB")) for name in columns]
    titles = [f"{'SSIM' if title.endswith('_ssim') else title:>8}" for title in titles]
    digits = [4 if name.endswith("_ssim") else 2 for name in columns]
    print(f"{f'x{scale}':{width}}  " + "  ".join(titles))
    averages = {name: fmean(row[name] for row in rows) for name in columns}
    for row in [*rows, {"image": "mean", **averages}]:
        cells = (f"{row[c]:{len(t)}.{n}f}" for c, t, n in zip(columns, titles, digits))
        print(f"{row['image']:{width}}  " + "  ".join(cells))


def comparison_path(args: argparse.Namespace, path: Path, name: str) -> Path:
    """Where a picture of --save-images goes."""
    return Path(args.save_images, f"{path.stem}_{name}_x{args.scale}.png")


def save_comparison(
    path: Path, args: argparse.Namespace, pair: Pair, srcnn: np.ndarray, row: dict
) -> None:
    """Write bicubic, SRCNN and a labelled row of original, bicubic and SRCNN."""
    pictures = [to_8bit(picture) for picture in (pair.hr, pair.ilr, srcnn)]
    rgb = crop_to_multiple(read_levels(path, 3, args.range)[0], args.scale)
    # Colour comes from bicubic; that of a pair is not known, and grey is shown.
    if args.lr_dir is None and pair.hr.ndim == 2 and np.ptp(rgb, axis=0).any():
        chroma = rgb_to_ycbcr(rgb)[1:]
        chroma = [chroma] + 2 * [bicubic_pair(chroma, 0, args.scale).ilr]
        pictures = [np.concatenate([y[None], c]) for y, c in zip(pictures, chroma)]
        pictures = [to_8bit(ycbcr_to_rgb(picture)) for picture in pictures]
    pictures = [np.atleast_3d(p.T).swapaxes(0, 1).astype(np.uint8) for p in pictures]
    images = [Image.fromarray(p.squeeze()).convert("RGB") for p in pictures]
    labels = ["original", f"bicubic {row['bicubic_psnr']:.2f} dB"]
    labels += [f"SRCNN {row['srcnn_psnr']:.2f} dB"]
    width, height = images[0].size
    strip = Image.new("RGB", (3 * width, height + 16), "white")
    for i, (image, label) in enumerate(zip(images, labels)):
        strip.paste(image, (i * width, 16))
        ImageDraw.Draw(strip).text((i * width + 4, 2), label, fill="black")
    for name, image in zip(("bicubic", "srcnn", "comparison"), (*images[1:], strip)):
        save_image(image, comparison_path(args, path, name), {})


# --- export ---------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> int:
    """Write the network as an ONNX file."""
    for flag in ("eval", "output", "outscale", "half", "self_ensemble"):
        if getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')}: goes without --export")
    path = weights_path(args)
    check_outputs([("--export", args.export)], [path])
    write_whole(args.export, to_onnx(load_srcnn(path), args.scale))
    print(args.export)
    return 0


# --- command line ---------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("pictures")
    chart = str(ROOT / "assets" / "chart.png")
    text = "pictures and folders of them; with --eval also h5 files of prepare.py --eval"
    group.add_argument("--image-file", nargs="+", default=[chart], help=text)
    add_picture_flags(group)

    add = parser.add_argument_group("network").add_argument
    text = "(default: what the name of --weights-file says, else 3)"
    add("--scale", type=number(int, 1, 65), help=text)
    add("--network", choices=tuple(NETWORKS), help="of weights/ (default: 9-5-5; 9-1-5 is faster)")
    add("--weights-file", help="weights of your own, instead of those of --network")
    add("--self-ensemble", action="store_true", help="mean of 8 flips; 8 times slower")
    steps = "steps that make the result agree with the input (default: 1)"
    add("--back-projection", type=number(int, 0, 101), default=1, metavar="N", help=steps)

    add = parser.add_argument_group("output").add_argument
    add("--output", help="file, or folder (default: NAME_srcnn_xS.png beside NAME)")
    text = "enlarge by any number: by the next whole scale, then reduced by bicubic"
    add("--outscale", type=number(float, 1, 64), metavar="F", help=text)

    text = "write the network for other programs; goes with --network or --weights-file, --scale"
    add("--export", metavar="FILE.onnx", help=text)

    add = parser.add_argument_group("measuring").add_argument
    add("--eval", action="store_true", help="pictures are ground truth: measure")
    text = "score the pictures of this folder, made by any program, instead of the network's"
    add("--results", metavar="DIR", help=text)
    add("--csv", metavar="FILE", help="write the scores")
    add("--save-images", metavar="DIR", help="write bicubic, SRCNN and a comparison")

    add = parser.add_argument_group("where it runs").add_argument
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--half", action="store_true", help="half precision, on CUDA")
    add("--tf32", action="store_true", help="faster, less exact products on a GPU")
    add("--tile", type=number(int, 1, 4097), help="output pixels a side")
    return parser


def main(args: argparse.Namespace) -> int:
    partners = check_picture_flags(args)
    for flag in ("csv", "save_images", "results", "lr_dir"):
        if getattr(args, flag) is not None and not args.eval:
            raise InputError(f"--{flag.replace('_', '-')}: goes with --eval")
    if args.results is not None and args.save_images:
        raise InputError("--save-images: goes without --results")
    if args.network and args.weights_file is not None:
        raise InputError("--network: goes without --weights-file")
    args.scale = choose_scale(args)
    if args.export is not None:
        return export(args)
    if args.outscale and args.eval:
        raise InputError("--outscale: goes without --eval")
    if args.outscale and args.outscale > args.scale:
        limit = f"the network's scale is {args.scale}; lower it"
        raise InputError(f"--outscale {args.outscale:g}: {limit}")
    return evaluate_files(args, partners) if args.eval else enlarge_files(args)


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
