"""Enlarge pictures, or measure how well known pictures are restored.

python test.py                                         # the bundled picture, x3
python test.py --image-file photo.jpg --scale 2        # writes photo_srcnn_x2.png
python test.py --eval --image-file data/Set5 --scale 3 # PSNR and SSIM, the paper's way
"""

import argparse
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from models import (
    SelfEnsemble,
    clamped_crop,
    evaluate,
    for_each_tile,
    load_srcnn,
    pick_device,
    restore_patch,
)
from utils import (
    InputError,
    Planes,
    atomic_path,
    crop_to_multiple,
    decode,
    degrade,
    int_at_least,
    list_images,
    mean,
    open_image,
    parser_for,
    read_levels,
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
METRICS = ("bicubic_psnr", "bicubic_ssim", "srcnn_psnr", "srcnn_ssim")
COLUMNS = ("image", "scale", *METRICS)
# JPEG without subsampling (4:4:4); PNG a tenth larger than usual, in a third of the time.
SAVE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {"compress_level": 3}}
REACH = 2  # low-resolution pixels that bicubic interpolation looks to each side


def load_model(args: argparse.Namespace) -> nn.Module:
    """The network of --weights-file, or the one that weights/ holds for --scale."""
    path = args.weights_file or ROOT / "weights" / f"srcnn_x{args.scale}.pth"
    if not args.weights_file and not path.is_file():
        names = (found.stem for found in path.parent.glob("srcnn_x*.pth"))
        scales = ", ".join(sorted(name.removeprefix("srcnn_x") for name in names))
        cure = "choose one or pass --weights-file"
        raise InputError(
            f"--scale {args.scale}: there are weights for {scales}; {cure}"
        )
    device = pick_device(args.device)
    model = load_srcnn(path, device).to(memory_format=torch.channels_last)
    if args.half:
        if device.type != "cuda":
            raise InputError("--half: is for CUDA devices; drop it")
        model = model.half()
    return SelfEnsemble(model) if args.self_ensemble else model


def find_images(names: list[str]) -> Iterator[Path]:
    """The files named, and the images in the folders named, but no results of ours."""
    for name in names:
        if Path(name).is_dir():
            paths = list_images(name)
            yield from (p for p in paths if not re.search(r"_srcnn_x\d+$", p.stem))
        else:
            yield Path(name)


# --- enlarge --------------------------------------------------------------------------


def enlarge(
    planes: Planes, model: nn.Module, scale: int, tile: int | None = None
) -> Image.Image:
    """A picture `scale` times as wide and high, made tile by tile.

    Luma goes through bicubic and the network, chroma and alpha through bicubic; all
    three colours go through a network of three channels.

    Raises:
        InputError: a network of three channels for a grey picture.
    """
    lr, learned = planes.levels(), model.num_channels
    if len(lr) < learned:
        raise InputError("is grey, but these weights are for RGB; take others")
    convert = learned < len(lr)
    lr = rgb_to_ycbcr(lr) if convert else lr
    height, width = (scale * length for length in lr.shape[1:])
    enlarged = Image.new(planes.mode, (width, height))
    weight = weighted = None
    if planes.alpha is not None:
        weight = planes.alpha[None].astype(np.float32) / 255
        lr = fill_transparent(lr, weight)
        weighted = lr * weight

    def interpolate(part: slice, box: tuple, margin: int) -> np.ndarray:
        colour = bicubic_box(lr[part], scale, box, margin)
        if weight is None:
            return colour
        # Colours weighted by alpha; where hardly any is left, dividing by it would
        # only amplify noise, and the filled-in colours take over.
        total = bicubic_box(weight, scale, box, margin)
        share = np.clip(4 * total - 1, 0, 1)
        parts = bicubic_box(weighted[part], scale, box, margin)
        return colour + share * (parts / np.maximum(total, 0.25) - colour)

    def enlarge_tile(*box: int) -> None:
        picture = interpolate(slice(learned), box, model.halo)
        picture = restore_patch(model, picture)
        if convert:
            chroma = interpolate(slice(learned, None), box, 0)
            picture = ycbcr_to_rgb(np.concatenate([picture, chroma]))
        if weight is not None:
            alpha = bicubic_box(weight * 255, scale, box, 0)
            picture = np.concatenate([picture, alpha])
        enlarged.paste(planes.to_image(picture), (box[2], box[0]))

    for_each_tile(model, enlarge_tile, height, width, tile)
    return enlarged


def bicubic_box(
    lr: np.ndarray, scale: int, box: tuple[int, int, int, int], margin: int
) -> np.ndarray:
    """A rectangle (top, bottom, left, right) of C x H x W enlarged, and a margin.

    Only the low-resolution pixels around it are touched; beyond the enlarged picture's
    border its edge pixel is repeated.
    """
    around, cut, pad = [], [], []
    for low, high, length in zip(box[::2], box[1::2], lr.shape[1:]):
        start, stop = max(low - margin, 0), min(high + margin, length * scale)
        around += [start // scale, -(-stop // scale)]
        cut.append(slice(start - start // scale * scale, stop - start // scale * scale))
        pad.append((start - (low - margin), high + margin - stop))
    patch = clamped_crop(lr, *around, REACH)
    patch = resize(patch, tuple(scale * length for length in patch.shape[1:]))
    patch = patch[:, REACH * scale :, REACH * scale :][:, cut[0], cut[1]]
    return np.pad(patch, ((0, 0), *pad), mode="edge")


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
    half = (-(-width // 2), -(-height // 2))

    def halved(values: np.ndarray) -> np.ndarray:
        pictures = (
            Image.fromarray(plane).resize(half, Image.Resampling.BOX)
            for plane in values
        )
        return np.stack([np.asarray(picture) for picture in pictures])

    weight = np.ascontiguousarray(weight)
    mass = halved(weight)
    coarse = halved(planes * weight) / np.maximum(mass, 1e-12)
    coarse = fill_transparent(coarse, mass)
    smooth = (
        Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)
        for plane in coarse
    )
    return np.where(weight > 0, planes, np.stack([np.asarray(s) for s in smooth]))


def enlarge_files(args: argparse.Namespace, model: nn.Module) -> int:
    """Enlarge every input; a bad one among several is reported and the others done."""
    paths = list(find_images(args.image_file))
    if not paths:
        raise InputError(f"{args.image_file[0]}: holds only pictures made by test.py")
    several = len(paths) > 1 or Path(args.image_file[0]).is_dir()
    taken = {path.resolve() for path in paths}
    failed = False
    for path in paths:
        try:
            target = enlarge_file(path, args, model, several, taken)
        except InputError as error:
            if not several:
                raise
            print(f"test.py: error: {error}", file=sys.stderr)
            failed = True
        else:
            print(target)
    return 2 if failed else 0


def enlarge_file(
    path: Path, args: argparse.Namespace, model: nn.Module, several: bool, taken: set
) -> Path:
    """Enlarge one file; `taken` are the files that must not be overwritten."""
    image = open_image(path)
    try:
        planes = decode(image)
        target = output_path(path, args, several, planes.mode)
        if target.resolve() in taken:
            raise InputError(f"would overwrite {target}; name another --output")
        options = check_format(target, planes.mode)
        enlarged = enlarge(planes, model, args.scale, args.tile)
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}")
    taken.add(target.resolve())
    kept = {"dpi": image.info.get("dpi")}
    if image.mode not in ("CMYK", "LAB"):  # their profiles would discolour RGB
        kept["icc_profile"] = image.info.get("icc_profile")
    options |= {name: value for name, value in kept.items() if value}
    with atomic_path(target) as partial:
        try:
            enlarged.save(partial, **options)
        except ValueError as error:  # larger than the format allows
            raise InputError(f"{target}: {error}; use .png") from error
    return target


def output_path(path: Path, args: argparse.Namespace, several: bool, mode: str) -> Path:
    """Where the result goes: beside the input, into a folder, or to the file named."""
    suffix = ".tif" if mode in ("I", "F") else ".png"
    name = f"{path.stem}_srcnn_x{args.scale}{suffix}"
    if not args.output:
        return path.with_name(name)
    output = Path(args.output)
    folder = several or output.is_dir() or args.output.endswith("/")
    return output / name if folder or not output.suffix else output


def check_format(path: Path, mode: str) -> dict:
    """Pillow's options for saving to `path`, after trying whether it can.

    Raises:
        InputError: an extension that Pillow cannot write, or that cannot hold the mode.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise InputError(f"{path}: cannot write {path.suffix!r} files; use .png")
    options = SAVE_OPTIONS.get(kind, {})
    try:
        Image.new(mode, (16, 16)).save(io.BytesIO(), kind, **options)
    except Exception as error:
        cure = "use .tif" if mode in ("I", "F") else "use .png"
        raise InputError(f"{path}: {kind} cannot hold mode {mode}; {cure}") from error
    return dict(options)


# --- evaluate -------------------------------------------------------------------------


def evaluate_files(args: argparse.Namespace, model: nn.Module) -> None:
    """Degrade and restore every picture; print, and on demand write, the scores."""
    rows = [evaluate_file(p, args, model) for p in find_images(args.image_file)]
    width = max(5, *(len(row["image"]) for row in rows))
    print(f"{'x' + str(args.scale):{width}}  bicubic dB    SSIM  SRCNN dB    SSIM")
    averages = {name: mean([row[name] for row in rows]) for name in METRICS}
    for row in [*rows, {"image": "mean", **averages}]:
        print(
            f"{row['image']:{width}}  {row['bicubic_psnr']:10.2f}  "
            f"{row['bicubic_ssim']:.4f}  {row['srcnn_psnr']:8.2f}  "
            f"{row['srcnn_ssim']:.4f}"
        )
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)


def evaluate_file(path: Path, args: argparse.Namespace, model: nn.Module) -> dict:
    """The row of scores of one picture, taken as ground truth."""
    scale = args.scale
    hr = crop_to_multiple(read_levels(path, model.num_channels), scale)
    if min(hr.shape[-2:]) < 11 + 2 * scale:
        raise InputError(f"{path}: too small to measure; needs {11 + 2 * scale} pixels")
    ilr = degrade(hr, scale)
    restored, srcnn_psnr = evaluate(model, ilr, hr, scale, args.tile)
    pictures, truth = (to_8bit(ilr), restored), shave(hr, scale)
    bicubic_ssim, srcnn_ssim = (ssim(shave(p, scale), truth) for p in pictures)
    scores = shaved_psnr(ilr, hr, scale), bicubic_ssim, srcnn_psnr, srcnn_ssim
    row = dict(zip(COLUMNS, (path.name, scale, *scores)))
    if args.save_images:
        save_comparison(path, args, hr, ilr, restored, row)
    return row


def save_comparison(
    path: Path,
    args: argparse.Namespace,
    hr: np.ndarray,
    ilr: np.ndarray,
    restored: np.ndarray,
    row: dict,
) -> None:
    """Write bicubic, SRCNN and a labelled row of original, bicubic and SRCNN."""
    pictures = [hr, to_8bit(ilr), restored]
    rgb = crop_to_multiple(read_levels(path, 3), args.scale)
    if hr.ndim == 2 and np.ptp(rgb, axis=0).any():  # colour comes from bicubic
        chroma = rgb_to_ycbcr(rgb)[1:]
        chroma = [chroma] + 2 * [degrade(chroma, args.scale)]
        pictures = [np.concatenate([y[None], c]) for y, c in zip(pictures, chroma)]
        pictures = [to_8bit(ycbcr_to_rgb(picture)) for picture in pictures]
    pictures = [np.atleast_3d(p.T).swapaxes(0, 1).astype(np.uint8) for p in pictures]
    images = [Image.fromarray(p.squeeze()).convert("RGB") for p in pictures]
    labels = ["original"]
    labels += [f"{m} {row[m.lower() + '_psnr']:.2f} dB" for m in ("bicubic", "SRCNN")]
    width, height = images[0].size
    strip = Image.new("RGB", (3 * width, height + 16), "white")
    for i, (image, label) in enumerate(zip(images, labels)):
        strip.paste(image, (i * width, 16))
        ImageDraw.Draw(strip).text((i * width + 4, 2), label, fill="black")
    names = "bicubic", "srcnn", "comparison"
    for name, image in zip(names, (*images[1:], strip)):
        target = Path(args.save_images, f"{path.stem}_{name}_x{args.scale}.png")
        with atomic_path(target) as partial:
            image.save(partial)


# --- command line ---------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    chart = str(ROOT / "assets" / "chart.png")
    add("--image-file", nargs="+", default=[chart], help="pictures and folders of them")
    add("--scale", type=int_at_least(2), default=3, help="(default: 3)")
    add("--weights-file", help="(default: weights/srcnn_xS.pth of this repository)")
    add("--output", help="file, or folder (default: NAME_srcnn_xS.png beside NAME)")
    add("--eval", action="store_true", help="pictures are ground truth: measure")
    add("--csv", metavar="FILE", help="with --eval: write the scores")
    add("--save-images", metavar="DIR", help="with --eval: write the pictures")
    add("--self-ensemble", action="store_true", help="mean of 8 flips; 8 times slower")
    add("--tile", type=int_at_least(1), help="output pixels a side")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--half", action="store_true", help="half precision, on CUDA")
    limit = Image.MAX_IMAGE_PIXELS
    add("--max-pixels", type=int_at_least(1), default=limit, help=f"(default: {limit})")
    return parser


def main(args: argparse.Namespace) -> int | None:
    Image.MAX_IMAGE_PIXELS = args.max_pixels
    for flag in ("csv", "save_images"):
        if getattr(args, flag) and not args.eval:
            raise InputError(f"--{flag.replace('_', '-')}: goes with --eval")
    model = load_model(args)
    return evaluate_files(args, model) if args.eval else enlarge_files(args, model)


if __name__ == "__main__":
    run(main, get_args_parser().parse_args)
