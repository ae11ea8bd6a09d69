"""Upscale images, or measure how well images are restored after bicubic downscaling.

python test.py                                         # the bundled image, x3
python test.py --image-file photo.jpg --scale 2        # writes photo_srcnn_x2.png
python test.py --eval --image-file data/Set5 --scale 3 # PSNR and SSIM by the paper's protocol
python test.py --export srcnn_x3.onnx --scale 3        # the network for other programs
"""

import argparse
import io
import math
import os
import re
import sys
from pathlib import Path
from statistics import fmean

import h5py
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from datasets import read_eval_pairs
from models import SelfEnsemble, back_project, load_srcnn, pick_device, restore, to_onnx, upscale
from utils import ArgumentParser, add_image_flags, apply_image_flags, number, report_errors, run
from utils import InputError, check_outputs, write_csv, write_file
from utils import Pair, decode, find_images, find_match, index_images, open_image, read_levels
from utils import bicubic_pair, crop_to_multiple, read_pair, rgb_to_ycbcr, to_levels, ycbcr_to_rgb
from utils import luma, psnr, quantize, shave, ssim

ROOT = Path(__file__).resolve().parent
NETWORKS = {"9-5-5": "srcnn", "9-1-5": "srcnn_9-1-5", "rgb": "srcnn_rgb"}  # files in weights/


def upscale_files(args: argparse.Namespace) -> int:
    """Upscale every image; return the exit status."""
    images = find_images(args.image_file)
    targets = {path: output_path(path, args, len(images)) for path in images}
    check_outputs(targets.items(), [*images, weights_path(args)])
    model, failed = load_model(args), []
    for path in tqdm(images, "files", leave=False, disable=None if len(images) > 1 else True):
        with report_errors(path, failed):
            upscale_file(path, targets[path], model, args)
    return 2 if failed else 0


def upscale_file(path: Path, target: Path, model: nn.Module, args: argparse.Namespace) -> None:
    """Upscale one image and print the name of the result."""
    image = open_image(path)
    planes = decode(image, args.range)
    if args.output is None and planes.mode in ("I", "F"):
        target = target.with_suffix(".tif")  # PNG has no 32-bit values
    options = save_options(target, planes.mode) | metadata(image, planes.mode)
    result = upscale(planes, model, args.scale, args.back_projection)
    if args.outscale:
        result = downscale(result, [round(args.outscale * side) for side in image.size], args.range)
    save_image(result, target, options)
    tqdm.write(str(target))


def evaluate_files(args: argparse.Namespace, lr_index: dict) -> int:
    """Measure every image, print the scores, and write them on request; return the exit status."""
    images = find_images(args.image_file)
    result_images = {} if args.results is None else find_images([args.results], True, True)
    result_index = index_images(result_images, args.scale)
    outputs = [("--csv", args.csv)] if args.csv else []
    if args.save_images:
        methods = ("bicubic", "srcnn", "comparison")
        outputs += [(p, comparison_path(args, p, method)) for p in images for method in methods]
    lr_paths = [path for paths in lr_index.values() for path in paths]
    weights = [] if result_images else [weights_path(args)]
    check_outputs(outputs, [*images, *lr_paths, *result_images, *weights])
    model = None if result_images else load_model(args)
    rows, failed = [], []
    for path, relative in tqdm(images.items(), "files", leave=False, disable=None):
        with report_errors(path, failed):
            for name, pair in read_pairs(path, relative, lr_index, args, model):
                if result_images:
                    match = find_match(path, relative, result_index, args.scale, "--results")
                    sr_images = {"result": read_result(match, pair, args)}
                else:
                    sr_images = restore_pair(model, pair, args)
                rows.append(score(name, pair, {"bicubic": pair.ilr} | sr_images, args.scale))
                if args.save_images:
                    save_comparison(path, args, pair, sr_images["srcnn"], rows[-1])
    if rows:
        print_scores(rows, args.scale)
        if args.csv:
            write_csv(args.csv, max(rows, key=len), rows)
    return 2 if failed else 0


# --- upscale --------------------------------------------------------------------------------

# JPEG without chroma subsampling; PNG a little larger than usual in a fraction of the time.
SAVE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {"compress_level": 1}}


def choose_scale(args: argparse.Namespace) -> int:
    """Return --scale; without it what --outscale or the name of the weights implies, or 3."""
    path = Path(args.weights_file or "")
    name = re.search(r"(?:^|_)x(\d+)$", path.stem) or re.search(r"^x(\d+)$", path.parent.name)
    if args.scale is None and name is None:
        return max(2, math.ceil(args.outscale)) if args.outscale else 3
    if args.scale is None:
        return int(name[1])
    if name and int(name[1]) != args.scale:
        print(f"--scale {args.scale}: {path} looks like weights for {name[1]}", file=sys.stderr)
    return args.scale


def weights_path(args: argparse.Namespace) -> Path:
    """Return --weights-file, or the file in weights/ for --network and --scale."""
    if args.weights_file is not None:
        return Path(args.weights_file)
    prefix = f"{NETWORKS[args.network or '9-5-5']}_x"
    path = ROOT / "weights" / f"{prefix}{args.scale}.pth"
    if not path.is_file():
        stems = sorted(found.stem for found in path.parent.glob(f"{prefix}*.pth"))
        scales = ", ".join(stem.removeprefix(prefix) for stem in stems)
        flag = f"--outscale {args.outscale:g}" if args.outscale else f"--scale {args.scale}"
        raise InputError(f"{flag}: there are weights for {scales}; or pass --weights-file")
    return path


def load_model(args: argparse.Namespace) -> nn.Module:
    """Return the network of the arguments on its device."""
    device = pick_device(args.device)
    model = load_srcnn(weights_path(args), device).to(memory_format=torch.channels_last)
    if args.half:
        if device.type != "cuda":
            raise InputError("--half: needs a CUDA device; drop it")
        model = model.half()
    return SelfEnsemble(model) if args.self_ensemble else model


def output_path(path: Path, args: argparse.Namespace, num_images: int) -> Path:
    """Return where the result goes: beside the image, into a folder, or to the named file."""
    name = f"{path.stem}_srcnn_x{args.outscale or args.scale:g}.png"
    if args.output is None:
        return path.with_name(name)
    output = Path(args.output)
    if output.is_dir() or args.output.endswith(("/", os.sep)) or not output.suffix:
        return output / name
    if num_images > 1:
        raise InputError(f"--output {output}: is one file for several images; name a folder")
    return output


def downscale(image: Image.Image, size: list[int], value_range: list[float] | None) -> Image.Image:
    """Downscale by bicubic; in floating point where Pillow cannot do it in 16 bits."""
    if image.mode not in ("I;16", "I"):
        return image.resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(image)
    low, high = value_range or (values.min(), values.max())
    resized = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    rounded = np.clip(np.rint(np.asarray(resized, np.float64)), low, high)
    return Image.fromarray(rounded.astype(values.dtype))


def metadata(image: Image.Image, mode: str) -> dict:
    """Return the resolution and colour profile, where they are valid and fit the result."""
    valid = {}
    dpi, profile = image.info.get("dpi"), image.info.get("icc_profile")
    if isinstance(dpi, tuple) and len(dpi) == 2 and all(1 <= float(d) < 65536 for d in dpi):
        valid["dpi"] = tuple(map(float, dpi))
    # In a profile's header bytes 16..19 are the colour space and 36..39 a signature (ICC.1, 7.2).
    colour_space = b"GRAY" if mode[0] in "LIF" else b"RGB "
    if isinstance(profile, bytes) and profile[36:40] == b"acsp" and profile[16:20] == colour_space:
        valid["icc_profile"] = profile
    return valid


def save_options(path: Path, mode: str) -> dict:
    """Return Pillow's options for a file; refuse what it cannot write before the work begins."""
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise InputError(f"{path}: cannot write {path.suffix!r} files; use .png")
    options = SAVE_OPTIONS.get(image_format, {})
    try:
        Image.new(mode, (16, 16)).save(io.BytesIO(), image_format, **options)
    except Exception as error:
        suffix = ".tif" if mode in ("I", "F") else ".png"
        raise InputError(
            f"{path}: {image_format} cannot store mode {mode}; use {suffix}"
        ) from error
    return dict(options)


def save_image(image: Image.Image, path: Path, options: dict) -> None:
    """Write an image in the format of its extension; it appears complete or not at all."""
    encoded = io.BytesIO()  # Pillow's encoders do not report every failed write to a file
    encoded.name = path.name
    try:
        image.save(encoded, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}); use .png") from error
    write_file(path, encoded.getvalue())


# --- evaluate -------------------------------------------------------------------------------


def read_pairs(
    path: Path, relative: Path, lr_index: dict, args: argparse.Namespace, model: nn.Module | None
) -> list[tuple[str, Pair]]:
    """Return (name, Pair) of an image, or of all images of an evaluation file."""
    if path.is_file() and h5py.is_hdf5(path):
        if args.save_images or args.results is not None:
            raise InputError("is an h5 file, and --save-images and --results need images")
        pairs, _ = read_eval_pairs(path, args.scale)
        named_pairs = [(f"{path.name}/{i}", pair) for i, pair in enumerate(pairs)]
    else:
        match = find_match(path, relative, lr_index, args.scale, "--lr-dir") if lr_index else None
        num_channels = model.num_channels if model else 1
        pair = read_pair(path, match, args.scale, num_channels, args.range)
        named_pairs = [(path.name, pair)]
    min_side = 11 + 2 * args.scale * (args.scale > 1)  # SSIM's window behind the shaved border
    for name, pair in named_pairs:
        if min(pair.hr.shape[-2:]) < min_side:
            raise InputError(f"{path.parent / name}: too small; needs {min_side} pixels per side")
    return named_pairs


def restore_pair(model: nn.Module, pair: Pair, args: argparse.Namespace) -> dict:
    """Return the network's output without and with back-projection."""
    if model.num_channels != pair.num_channels:
        raise InputError(f"has other channels than {weights_path(args)}; use other weights")
    sr_images = {"srcnn": restore(model, pair.ilr)}
    if pair.lr is not None:
        sr_images["upscaled"] = back_project(sr_images["srcnn"], pair.lr, args.back_projection)
    return sr_images


def read_result(path: Path, pair: Pair, args: argparse.Namespace) -> np.ndarray:
    """Return another program's image as the protocol measures it, of the size of `pair.hr`."""
    image = open_image(path)
    if pair.greyscale and Image.getmodebase(image.mode) != "L":
        image = image.convert("L")  # a greyscale image that was saved as RGB
    levels, _ = to_levels(image, 1, args.range)
    if levels.shape != pair.hr.shape:
        levels = crop_to_multiple(levels, args.scale)
    if levels.shape != pair.hr.shape:
        raise InputError(f"{path}: differs in size from its ground truth; pass uncropped results")
    return levels


def score(name: str, pair: Pair, sr_images: dict[str, np.ndarray], scale: int) -> dict:
    """Return the row of scores of an image; for RGB networks also the PSNR over RGB."""
    row, hr = {"image": name, "scale": scale}, shave(pair.hr, scale)
    for method, output in sr_images.items():
        sr = shave(quantize(output, pair.quantum), scale)
        luma_pair = (sr, hr)
        if pair.num_channels == 3 and pair.greyscale:  # a greyscale image is its own luma
            luma_pair = quantize(sr.mean(axis=0), pair.quantum), hr[0]
        elif pair.num_channels == 3:
            luma_pair = luma(sr, pair.quantum), luma(hr, pair.quantum)
        row |= {f"{method}_psnr": psnr(*luma_pair), f"{method}_ssim": ssim(*luma_pair)}
        if pair.num_channels == 3:
            row[f"{method}_rgb_psnr"] = psnr(sr, hr)
    return row


def print_scores(rows: list[dict], scale: int) -> None:
    """Print a table of the rows and of their means (protocol step 6)."""
    width = max(5, *(len(row["image"]) for row in rows))
    columns = [name for name in rows[0] if all(name in row for row in rows)][2:]
    titles = [re.sub("_psnr$", " dB", name.replace("_rgb", " RGB")) for name in columns]
    titles = [f"{'SSIM' if title.endswith('_ssim') else title:>8}" for title in titles]
    digits = [4 if name.endswith("_ssim") else 2 for name in columns]
    print(f"{f'x{scale}':{width}}  " + "  ".join(titles))
    means = {name: fmean(row[name] for row in rows) for name in columns}
    for row in [*rows, {"image": "mean", **means}]:
        cells = (f"{row[c]:{len(t)}.{n}f}" for c, t, n in zip(columns, titles, digits))
        print(f"{row['image']:{width}}  " + "  ".join(cells))


# --- comparison images ----------------------------------------------------------------------


def comparison_path(args: argparse.Namespace, path: Path, method: str) -> Path:
    """Return where an image of --save-images goes."""
    return Path(args.save_images, f"{path.stem}_{method}_x{args.scale}.png")


def save_comparison(
    path: Path, args: argparse.Namespace, pair: Pair, srcnn: np.ndarray, row: dict
) -> None:
    """Write bicubic, SRCNN, and a labelled row of original, bicubic and SRCNN."""
    levels = [quantize(image) for image in (pair.hr, pair.ilr, srcnn)]
    rgb, planes = read_levels(path, 3, args.range)
    # A luma network's colours come from bicubic; those of LR images are unknown.
    if args.lr_dir is None and pair.num_channels == 1 and len(planes.colour) == 3:
        chroma = rgb_to_ycbcr(crop_to_multiple(rgb, args.scale))[1:]
        bicubic_chroma = bicubic_pair(chroma, args.scale).ilr
        all_chroma = (chroma, bicubic_chroma, bicubic_chroma)
        ycbcr = [np.concatenate([y[None], cbcr]) for y, cbcr in zip(levels, all_chroma)]
        levels = [quantize(ycbcr_to_rgb(image)) for image in ycbcr]
    arrays = [np.atleast_3d(image.T).swapaxes(0, 1).astype(np.uint8) for image in levels]
    images = [Image.fromarray(array.squeeze()).convert("RGB") for array in arrays]
    bicubic_db, srcnn_db = row["bicubic_psnr"], row["srcnn_psnr"]
    labels = ["original", f"bicubic {bicubic_db:.2f} dB", f"SRCNN {srcnn_db:.2f} dB"]
    width, height = images[0].size
    strip = Image.new("RGB", (3 * width, height + 16), "white")
    for i, (image, label) in enumerate(zip(images, labels)):
        strip.paste(image, (i * width, 16))
        ImageDraw.Draw(strip).text((i * width + 4, 2), label, fill="black")
    for method, image in ("bicubic", images[1]), ("srcnn", images[2]), ("comparison", strip):
        save_image(image, comparison_path(args, path, method), {})


# --- arguments ------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> int:
    """Write the network as an ONNX file."""
    for flag in ("eval", "output", "outscale", "half", "self_ensemble"):
        if getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')}: cannot be combined with --export")
    path = weights_path(args)
    check_outputs([("--export", args.export)], [path])
    write_file(args.export, to_onnx(load_srcnn(path), args.scale))
    print(args.export)
    return 0


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("images")
    chart = str(ROOT / "assets" / "chart.png")
    image_file = "images and folders of images; with --eval also h5 files of prepare.py --eval"
    group.add_argument("--image-file", nargs="+", default=[chart], help=image_file)
    add_image_flags(group)

    add = parser.add_argument_group("network").add_argument
    scale = "(default: from the name of --weights-file, or 3)"
    add("--scale", type=number(int, 1, 65), help=scale)
    add("--network", choices=tuple(NETWORKS), help="in weights/ (default: 9-5-5; 9-1-5 is faster)")
    add("--weights-file", help="other weights than those of --network")
    add(
        "--self-ensemble", action="store_true", help="mean of 8 flips and rotations; 8 times slower"
    )
    steps = "back-projection steps: downscaling the result reproduces the input (default: 1)"
    add("--back-projection", type=number(int, 0, 101), default=1, metavar="N", help=steps)

    add = parser.add_argument_group("output").add_argument
    add("--output", help="file or folder (default: NAME_srcnn_xS.png beside NAME)")
    outscale = "any factor: upscale by the next whole scale, then downscale by bicubic"
    add("--outscale", type=number(float, 1, 64), metavar="F", help=outscale)
    onnx = "write the network for other programs; use it with --network or --weights-file"
    add("--export", metavar="FILE.onnx", help=onnx)

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="images are ground truth: downscale, restore, measure")
    results = "measure the images in this folder, made by any program, instead of a network"
    add("--results", metavar="DIR", help=results)
    add("--csv", metavar="FILE", help="write the scores")
    add("--save-images", metavar="DIR", help="write bicubic, SRCNN and a comparison")

    add = parser.add_argument_group("where it runs").add_argument
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if available)")
    add("--half", action="store_true", help="half precision, on CUDA")
    return parser


def main(args: argparse.Namespace) -> int:
    for flag in ("csv", "save_images", "results", "lr_dir"):
        if getattr(args, flag) is not None and not args.eval:
            raise InputError(f"--{flag.replace('_', '-')}: use it with --eval")
    if args.results is not None and args.save_images:
        raise InputError("--save-images: cannot be combined with --results")
    if args.network and args.weights_file is not None:
        raise InputError("--network: cannot be combined with --weights-file")
    args.scale = choose_scale(args)
    lr_index = apply_image_flags(args)
    if args.export is not None:
        return export(args)
    if args.outscale and args.eval:
        raise InputError("--outscale: cannot be combined with --eval")
    if args.outscale and args.outscale > args.scale:
        raise InputError(f"--outscale {args.outscale:g}: exceeds the network's scale {args.scale}")
    return evaluate_files(args, lr_index) if args.eval else upscale_files(args)


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
