"""Enlarge pictures, or measure how well known pictures are restored.

python test.py                                         # the bundled picture, x3
python test.py --image-file photo.jpg --scale 2        # writes photo_srcnn_x2.png
python test.py --eval --image-file data/Set5 --scale 3 # PSNR and SSIM, the paper's way
"""

import argparse
import os
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from models import SelfEnsemble, back_project, enlarge, load_srcnn, pick_device, restore
from utils import (
    ArgumentParser,
    InputError,
    atomic_path,
    check_outputs,
    crop_to_multiple,
    degrade,
    find_images,
    number,
    open_image,
    read_levels,
    report,
    resize,
    rgb_to_ycbcr,
    run,
    shave,
    shaved_psnr,
    ssim,
    to_8bit,
    write_csv,
    ycbcr_to_rgb,
)

ROOT = Path(__file__).resolve().parent
# By the paper's protocol, and (enlarged) what users get: with back-projection.
METHODS = ("bicubic", "srcnn", "enlarged")
METRICS = [f"{method}_{metric}" for method in METHODS for metric in ("psnr", "ssim")]
# JPEG without subsampling (4:4:4); PNG a tenth larger than usual, in a third of the time.
SAVE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {"compress_level": 3}}


def weights_path(args: argparse.Namespace) -> Path:
    """The file of --weights-file, or the one that weights/ holds for --scale."""
    if args.weights_file is not None:
        return Path(args.weights_file)
    path = ROOT / "weights" / f"srcnn_x{args.scale}.pth"
    if not path.is_file():
        names = (found.stem for found in path.parent.glob("srcnn_x*.pth"))
        scales = ", ".join(sorted(name.removeprefix("srcnn_x") for name in names))
        cure = "choose one or pass --weights-file"
        raise InputError(f"--scale {args.scale}: there are weights for {scales}; {cure}")
    return path


def load_model(args: argparse.Namespace) -> nn.Module:
    """The network that the arguments ask for, on its device."""
    device = pick_device(args.device)
    model = load_srcnn(weights_path(args), device).to(memory_format=torch.channels_last)
    if args.half:
        if device.type != "cuda":
            raise InputError("--half: is for CUDA devices; drop it")
        model = model.half()
    return SelfEnsemble(model) if args.self_ensemble else model


def for_each(paths: list[Path], function: object) -> tuple[list, int]:
    """function(path) of all; a bad file among several is reported and the others done.

    Returns:
        The results, and the exit status: 2 where a file was bad.
    """
    results, status = [], 0
    for path in tqdm(paths, "pictures", leave=False, disable=None if len(paths) > 1 else True):
        try:
            results.append(function(path))
        except InputError as error:
            named = error if str(path) in str(error) else InputError(f"{path}: {error}")
            if len(paths) == 1:
                raise named from error
            report(named)
            status = 2
    return results, status


# --- enlarge --------------------------------------------------------------------------------


def enlarge_files(args: argparse.Namespace) -> int:
    """Enlarge every input; returns the exit status."""
    paths = find_images(args.image_file)
    several = len(paths) > 1 or Path(args.image_file[0]).is_dir()
    targets = dict(zip(paths, (output_path(path, args, several) for path in paths)))
    outputs = [(p, t) for p, target in targets.items() for t in {target, deep_path(target, args)}]
    check_outputs(outputs, [*paths, weights_path(args)])
    model = load_model(args)

    def enlarge_file(path: Path) -> None:
        image = open_image(path)
        target = targets[path]
        if image.mode in ("I", "F"):
            target = deep_path(target, args)
        enlarged = enlarge(image, model, args.scale, args.back_projection, args.tile)
        save_image(enlarged, target, carried_over(image, enlarged.mode))
        tqdm.write(str(target))

    return for_each(paths, enlarge_file)[1]


def output_path(path: Path, args: argparse.Namespace, several: bool) -> Path:
    """Where the result goes: beside the input, into a folder, or to the file named."""
    name = f"{path.stem}_srcnn_x{args.scale}.png"
    if args.output is None:
        return path.with_name(name)
    output = Path(args.output)
    is_folder = output.is_dir() or args.output.endswith(("/", os.sep)) or not output.suffix
    if several and not is_folder:
        raise InputError(f"--output {output}: is one file for several pictures; name a folder")
    return output / name if is_folder else output


def deep_path(target: Path, args: argparse.Namespace) -> Path:
    """Where a result of 32 bits goes, which PNG cannot hold, unless a file was named."""
    return target if target == Path(args.output or "") else target.with_suffix(".tif")


def carried_over(image: Image.Image, mode: str) -> dict:
    """Resolution and colour profile of the input, where they are valid and fit the result."""
    kept = {}
    dpi, profile = image.info.get("dpi"), image.info.get("icc_profile")
    if isinstance(dpi, tuple) and len(dpi) == 2 and all(1 <= float(d) < 65536 for d in dpi):
        kept["dpi"] = tuple(map(float, dpi))
    # A profile's header: bytes 16..19 its colours, 36..39 a signature (ICC.1, section 7.2).
    colours = b"GRAY" if mode[0] in "LIF" else b"RGB "
    if isinstance(profile, bytes) and profile[36:40] == b"acsp" and profile[16:20] == colours:
        kept["icc_profile"] = profile
    return kept


def save_image(image: Image.Image, path: Path, extra: dict) -> None:
    """Write a picture in the format of its extension.

    Raises:
        InputError: an extension that Pillow cannot write, or a format that cannot hold the
            picture.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise InputError(f"{path}: cannot write {path.suffix!r} files; use .png")
    options = SAVE_OPTIONS.get(kind, {}) | extra
    with atomic_path(path) as partial:
        try:
            image.save(partial, kind, **options)
        except OSError as error:
            if error.errno:  # of the disk
                raise
            cure = "use .tif" if image.mode in ("I", "F") else "use .png"
            raise InputError(f"{path}: {kind} cannot hold mode {image.mode}; {cure}") from error
        except Exception as error:  # larger than the format allows, for instance
            raise InputError(f"{path}: {kind} cannot hold it ({error}); use .png") from error


# --- evaluate -------------------------------------------------------------------------------


def evaluate_files(args: argparse.Namespace) -> int:
    """Degrade and restore every picture; print, and on demand write, the scores."""
    paths = find_images(args.image_file)
    outputs = [("--csv", args.csv)] if args.csv else []
    check_outputs(outputs, [*paths, weights_path(args)])
    model = load_model(args)
    rows, status = for_each(paths, lambda path: evaluate_file(path, args, model))
    if not rows:
        return status
    width = max(5, *(len(row["image"]) for row in rows))
    print(f"{'x' + str(args.scale):{width}}" + "".join(f"{m:>9} dB    SSIM" for m in METHODS))
    averages = {name: fmean(row[name] for row in rows) for name in METRICS}
    for row in [*rows, {"image": "mean", **averages}]:
        scores = (f"{row[m + '_psnr']:12.2f}  {row[m + '_ssim']:.4f}" for m in METHODS)
        print(f"{row['image']:{width}}" + "".join(scores))
    if args.csv:
        write_csv(args.csv, ["image", "scale", *METRICS], rows)
    return status


def evaluate_file(path: Path, args: argparse.Namespace, model: nn.Module) -> dict:
    """The row of scores of one picture, taken as ground truth."""
    scale = args.scale
    hr = crop_to_multiple(read_levels(path, model.num_channels), scale)
    if min(hr.shape[-2:]) < 11 + 2 * scale:
        raise InputError(f"{path}: too small to measure; needs {11 + 2 * scale} pixels")
    lr = resize(hr, (hr.shape[-2] // scale, hr.shape[-1] // scale))
    ilr = resize(lr, hr.shape[-2:])
    srcnn = restore(model, ilr, args.tile)
    pictures = ilr, srcnn, back_project(srcnn, lr, args.back_projection)
    row = {"image": path.name, "scale": scale}
    for method, picture in zip(METHODS, pictures):
        row[f"{method}_psnr"] = shaved_psnr(picture, hr, scale)
        row[f"{method}_ssim"] = ssim(shave(to_8bit(picture), scale), shave(hr, scale))
    if args.save_images:
        save_comparison(path, args, hr, ilr, srcnn, row)
    return row


def save_comparison(
    path: Path,
    args: argparse.Namespace,
    hr: np.ndarray,
    ilr: np.ndarray,
    srcnn: np.ndarray,
    row: dict,
) -> None:
    """Write bicubic, SRCNN and a labelled row of original, bicubic and SRCNN."""
    pictures = [hr, to_8bit(ilr), to_8bit(srcnn)]
    rgb = crop_to_multiple(read_levels(path, 3), args.scale)
    if hr.ndim == 2 and np.ptp(rgb, axis=0).any():  # colour comes from bicubic
        chroma = rgb_to_ycbcr(rgb)[1:]
        chroma = [chroma] + 2 * [degrade(chroma, args.scale)]
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
        target = Path(args.save_images, f"{path.stem}_{name}_x{args.scale}.png")
        save_image(image, target, {})


# --- command line ---------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("pictures").add_argument
    chart = str(ROOT / "assets" / "chart.png")
    add("--image-file", nargs="+", default=[chart], help="pictures and folders of them")
    limit = Image.MAX_IMAGE_PIXELS
    add("--max-pixels", type=number(int, 1), default=limit, help=f"(default: {limit})")

    add = parser.add_argument_group("network").add_argument
    add("--scale", type=number(int, 2, 65), default=3, help="(default: 3)")
    add("--weights-file", help="(default: weights/srcnn_xS.pth of this repository)")
    add("--self-ensemble", action="store_true", help="mean of 8 flips; 8 times slower")
    steps = "steps that make the result agree with the input (default: 1)"
    add("--back-projection", type=number(int, 0, 101), default=1, metavar="N", help=steps)

    add = parser.add_argument_group("output").add_argument
    add("--output", help="file, or folder (default: NAME_srcnn_xS.png beside NAME)")
    add("--eval", action="store_true", help="pictures are ground truth: measure")
    add("--csv", metavar="FILE", help="with --eval: write the scores")
    add("--save-images", metavar="DIR", help="with --eval: write the pictures")

    add = parser.add_argument_group("where it runs").add_argument
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--half", action="store_true", help="half precision, on CUDA")
    add("--tile", type=number(int, 1, 4097), help="output pixels a side")
    return parser


def main(args: argparse.Namespace) -> int:
    Image.MAX_IMAGE_PIXELS = args.max_pixels
    for flag in ("csv", "save_images"):
        if getattr(args, flag) and not args.eval:
            raise InputError(f"--{flag.replace('_', '-')}: goes with --eval")
    return evaluate_files(args) if args.eval else enlarge_files(args)


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
