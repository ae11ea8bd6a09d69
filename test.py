"""Upscale images, or measure how well images are restored after bicubic downscaling.

python test.py photo.jpg scans/ --scale 2              # writes photo_srcnn_x2.png, ...
python test.py --eval data/Set5 --scale 3              # PSNR and SSIM by the paper's protocol
python test.py --export srcnn_x3.onnx --scale 3        # the network for other programs
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean

import h5py
import numpy as np
import PIL
import torch
from PIL import Image, ImageChops, ImageDraw
from torch import nn
from tqdm import tqdm

from datasets import read_eval_pairs
from models import SelfEnsemble, back_project, default_back_projection, load_srcnn, pick_device
from models import restore, to_onnx, upscale
from utils import add_image_flags, apply_image_flags, ArgumentParser, bicubic_pair
from utils import check_outputs, count_of, crop_to_multiple, decode, find_images, InputError
from utils import luma, match_images, number, only_match, open_image, Pair, Planes
from utils import protocol_psnr, psnr, quantize, read_pair, report_errors, rgb_to_ycbcr, run
from utils import shave, ssim, to_levels, unique_names, write_csv, write_file, ycbcr_to_rgb

ROOT = Path(__file__).resolve().parent
# Files in weights/.
NETWORKS = {"9-5-5": "srcnn", "9-1-5": "srcnn_9-1-5", "rgb": "srcnn_rgb", "photo": "srcnn_photo"}
CLEAN_JPEG_QUALITY = 95  # from which a JPEG is upscaled like an uncompressed image


def upscale_files(args: argparse.Namespace) -> int:
    """Upscale every image; return the exit status."""
    ignored: list[Path] = []
    images = find_images(args.images, ignored=ignored)
    targets = output_paths(images, args)
    comparisons = comparison_paths(images, args, ("comparison",))
    # PNG cannot store 32-bit images, which are written as TIFF.
    tiffs = {path: target.with_suffix(".tif") for path, target in targets.items()}
    check_outputs(
        [*targets.items(), *(tiffs.items() - targets.items()), *report_outputs(args, comparisons)],
        [*images, args.weights_file or ROOT / "weights"],
    )
    written, skipped, failed, entries = 0, 0, [], []
    for path in tqdm(images, "files", leave=False, disable=None if len(images) > 1 else True):
        if args.skip_existing and (targets[path].exists() or tiffs[path].exists()):
            skipped += 1
            continue
        with report_errors(path, failed):
            line, visuals = upscale_file(path, targets[path], args)
            tqdm.write(line)
            written += 1
            if args.save_images:
                save_comparison(visuals, comparisons[path])
            if args.report and len(entries) < MAX_REPORT_IMAGES:
                entries.append(report_entry(str(path), visuals))
    if args.report and written:
        write_report(args, entries, [], written)
    if len(images) > 1 or ignored:
        counts = f"{written} written, {skipped} skipped, {len(failed)} failed"
        print(f"{counts}; {count_of(len(ignored), 'other file')} ignored")
    return 2 if failed else 0


def upscale_file(path: Path, target: Path, args: argparse.Namespace) -> tuple[str, dict]:
    """Upscale one image; return a line about the result, and images to look at if asked for."""
    start = time.perf_counter()
    image = open_image(path)
    size, scale = target_size(image, args)
    network, reason = choose_network(image, args)
    model = load_network(args, scale, network)
    if model.num_channels not in (1, 3):
        raise InputError(f"{args.weights_file}: is for {model.num_channels} channels, not 1 or 3")
    planes = decode(image, value_range(args, model))
    if args.ext is None and target != Path(args.output or "") and planes.mode in ("I", "F"):
        target = target.with_suffix(".tif")
    options = save_options(target, planes.mode, size) | metadata(image, planes.mode, target)
    steps = back_projection_steps(args, model)
    result = upscale(planes, model, scale, steps, edges=args.tile_edges)
    if result.size != size:
        result = downscale(result, size, (planes.low, planes.high), args.tile_edges)
    save_image(result, target, options)
    sizes = f"{image.width} x {image.height} -> {size[0]} x {size[1]}"
    applied = f"{network} x{scale}{reason}, back-projection {steps}"
    line = f"{target}  {sizes}  {applied}  {time.perf_counter() - start:.1f} s"
    if not args.save_images and not args.report:
        return line, {}
    small, sr = (to_8_bits(decode(i, (planes.low, planes.high))) for i in (image, result))
    return line, {"bicubic": small.resize(size, Image.Resampling.BICUBIC), "SRCNN": sr}


def evaluate_files(args: argparse.Namespace) -> int:
    """Measure every image, print the scores, and write them on request; return the exit status."""
    images = find_images(args.images)
    lr_paths = match_images(args.images, args.lr_dir, args.scale) if args.lr_dir else {}
    if lr_paths:
        images = {path: relative for path, relative in images.items() if path in lr_paths}
    results = {d: match_images(args.images, [d], args.scale) for d in args.results}
    labels = method_labels(args.results)
    comparisons = comparison_paths(images, args, ("bicubic", "srcnn", "comparison"))
    inputs = [*images, args.weights_file or ROOT / "weights"]
    inputs += find_images([*(args.lr_dir or []), *args.results], results=True)
    check_outputs(report_outputs(args, comparisons), inputs)
    model = load_network(args, args.scale)
    rows, failed, entries = [], [], []
    for path, name in tqdm(unique_names(images).items(), "files", leave=False, disable=None):
        with report_errors(path, failed):
            for pair in read_pairs(path, name, lr_paths.get(path), args, model):
                sr_images = {"bicubic": pair.ilr} | restore_pair(model, pair, args)
                for folder, matches in results.items():
                    result = only_match(path, matches[path], f"--results {folder}")
                    sr_images[labels[folder]] = read_result(result, pair, args, model)
                rows.append(score(pair, sr_images, args))
                if args.save_images or args.report:
                    visuals = pair_visuals(path, lr_paths.get(path), pair, sr_images, args)
                if args.save_images:
                    save_comparison(visuals, comparisons[path], rows[-1])
                if args.report and len(entries) < MAX_REPORT_IMAGES:
                    entries.append(report_entry(pair.name, visuals))
    if rows:
        print_scores(rows, args)
        if args.csv:
            write_csv(args.csv, max(rows, key=len), rows)
        if args.report:
            write_report(args, entries, rows, len(rows))
    return 2 if failed else 0


# --- network --------------------------------------------------------------------------------


def choose_network(image: Image.Image, args: argparse.Namespace) -> tuple[str, str]:
    """Return the network for an image of open_image and, if it was chosen for it, the reason.

    Compressed JPEG images get `photo`, which removes the blocks that the others sharpen.
    """
    quality = image.info["jpeg_quality"]
    if args.weights_file is not None:
        return Path(args.weights_file).name, ""
    if args.network is None and quality is not None and quality < CLEAN_JPEG_QUALITY:
        return "photo", f" for JPEG of quality {quality}"
    return args.network or "9-5-5", ""


def weights_path(args: argparse.Namespace, scale: int, network: str | None = None) -> Path:
    """Return --weights-file, or the file in weights/ of a network (or --network) for a scale."""
    if args.weights_file is not None:
        return Path(args.weights_file)
    prefix = f"{NETWORKS[network or args.network or '9-5-5']}_x"
    path = ROOT / "weights" / f"{prefix}{scale}.pth"
    if not path.is_file():
        stems = sorted(found.stem for found in path.parent.glob(f"{prefix}*.pth"))
        scales = ", ".join(stem.removeprefix(prefix) for stem in stems)
        raise InputError(f"--scale {scale}: there are weights for {scales}; or use --weights-file")
    return path


def load_network(args: argparse.Namespace, scale: int, network: str | None = None) -> nn.Module:
    """Return a network on its device; args.networks has those loaded before."""
    path = weights_path(args, scale, network)
    if path not in args.networks:
        device = pick_device(args.device)
        model = load_srcnn(path, device).to(memory_format=torch.channels_last)
        if args.half:
            if device.type != "cuda":
                raise InputError("--half: needs a CUDA device; drop it")
            model = model.half()
        args.networks[path] = SelfEnsemble(model) if args.self_ensemble else model
    return args.networks[path]


def back_projection_steps(args: argparse.Namespace, model: nn.Module) -> int:
    """Return --back-projection, or what suits the degradation that the network was trained for."""
    return default_back_projection(model) if args.back_projection is None else args.back_projection


def value_range(args: argparse.Namespace, model: nn.Module) -> list[float] | dict | None:
    """Return --range, or the network's own for images of the bit depth it was trained on."""
    if args.range or "range" not in model.info:
        return args.range
    return {model.info["bit_depth"]: model.info["range"]}


# --- upscale --------------------------------------------------------------------------------

# JPEG at 4:4:4; WebP without loss, because its chroma is always 4:2:0; PNG that is a little larger
# than usual in a fraction of the time.
SAVE_OPTIONS = {
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {"compress_level": 1},
    "WEBP": {"lossless": True},
}
MAX_SIDES = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535}  # that the formats can store


def target_size(image: Image.Image, args: argparse.Namespace) -> tuple[tuple[int, int], int]:
    """Return the size of the result, and the scale of the network that is used for it."""
    factor = args.outscale or args.scale
    if args.width or args.height:
        factor = args.width / image.width if args.width else args.height / image.height
    scale = args.scale or min(max(2, math.ceil(factor)), 4)
    if factor > scale:
        flags = f"--width {args.width}" if args.width else f"--height {args.height}"
        raise InputError(
            f"{flags}: is {factor:.4g} times the image's; the limit is --scale {scale}"
        )
    size = max(1, round(factor * image.width)), max(1, round(factor * image.height))
    return size, scale


def size_suffix(args: argparse.Namespace) -> str:
    """Return what the names of results tell of their size: x2, x2.5, w1920, h1080."""
    if args.width or args.height:
        return f"w{args.width}" if args.width else f"h{args.height}"
    return f"x{args.outscale or args.scale:g}"


def output_paths(images: dict[Path, Path], args: argparse.Namespace) -> dict[Path, Path]:
    """Return where each result goes: beside the image, below a folder, or to the named file."""
    suffix = f"_srcnn_{size_suffix(args)}"
    extension = f".{args.ext.lstrip('.')}" if args.ext else ".png"
    if args.output is None:
        stems = unique_stems({path: path for path in images})
        return {path: Path(f"{stem}{suffix}{extension}") for path, stem in stems.items()}
    output = Path(args.output)
    if output.is_dir() or args.output.endswith(("/", os.sep)) or not output.suffix:
        stems = unique_stems(images)
        return {p: output / f"{stem}{suffix}{extension}" for p, stem in stems.items()}
    if len(images) > 1:
        raise InputError(f"--output {output}: is one file for several images; name a folder")
    return dict.fromkeys(images, output)


def unique_stems(images: dict[Path, Path]) -> dict[Path, Path]:
    """Return unique_names without their extension, unless it tells two names apart."""
    names = unique_names(images)
    counts = Counter(name.with_suffix("") for name in names.values())
    return {
        path: name if counts[name.with_suffix("")] > 1 else name.with_suffix("")
        for path, name in names.items()
    }


def downscale(
    image: Image.Image, size: tuple[int, int], limits: tuple[float, float], edges: str
) -> Image.Image:
    """Downscale by bicubic, within limits; in floating point where Pillow cannot do 16 bits."""
    values, box = np.asarray(image), (0, 0, *image.size)
    if edges == "wrap":
        margin = 2 * math.ceil(max(image.width / size[0], image.height / size[1])) + 1
        box = (margin, margin, margin + image.width, margin + image.height)
        widths = [(margin, margin), (margin, margin), (0, 0)]
        values = np.pad(values, widths[: values.ndim], "wrap")
    if image.mode not in ("I;16", "I"):
        return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC, box)
    levels = Image.fromarray(values.astype(np.float32))
    resized = np.asarray(levels.resize(size, Image.Resampling.BICUBIC, box), np.float64)
    return Image.fromarray(np.clip(np.rint(resized), *limits).astype(values.dtype))


def metadata(image: Image.Image, mode: str, target: Path) -> dict:
    """Return resolution, colour profile and EXIF, where they are valid and fit the result."""
    valid = {}
    dpi, profile = image.info.get("dpi"), image.info.get("icc_profile")
    if isinstance(dpi, tuple) and len(dpi) == 2 and all(1 < float(d) < 65536 for d in dpi):
        valid["dpi"] = tuple(map(float, dpi))
    # In a profile's header bytes 16..19 are the colour space and 36..39 a signature (ICC.1, 7.2).
    colour_space = b"GRAY" if mode[0] in "LIF" else b"RGB "
    if isinstance(profile, bytes) and profile[36:40] == b"acsp" and profile[16:20] == colour_space:
        valid["icc_profile"] = profile
        if target.suffix.lower() == ".png" and len(profile) > 1 << 20:
            print(f"{target}: a colour profile above 1 MB is left out", file=sys.stderr)
            del valid["icc_profile"]
    if image.info.get("exif"):
        valid["exif"] = image.info["exif"]
    return valid


def save_options(path: Path, mode: str, size: tuple[int, int]) -> dict:
    """Return Pillow's options for a file; refuse what it cannot write before the work begins."""
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise InputError(f"{path}: cannot write {path.suffix!r} files; use .png")
    if max(size) > MAX_SIDES.get(image_format, math.inf):
        raise InputError(f"{path}: {image_format} cannot store {max(size)} pixels; use .png")
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
    path: Path, name: Path, lr_paths: list[Path] | None, args: argparse.Namespace, model: nn.Module
) -> list[Pair]:
    """Return the pair of an image, or all pairs of an evaluation file, with their names."""
    if path.is_file() and h5py.is_hdf5(path):
        if args.save_images or args.results or args.jpeg:
            raise InputError("is an h5 file; --save-images, --results and --jpeg need images")
        pairs = read_eval_pairs(path, args.scale)[0]
    else:
        lr_path = None if lr_paths is None else only_match(path, lr_paths, "--lr-dir")
        ranges = value_range(args, model)
        pairs = [read_pair(path, lr_path, args.scale, model.num_channels, ranges, args.jpeg)]
        pairs[0].name = name.as_posix()
    min_side = 11 + 2 * args.scale * (args.scale > 1)  # SSIM's window behind the shaved border
    for pair in pairs:
        if min(pair.hr.shape[-2:]) < min_side:
            raise InputError(f"{pair.name}: too small; needs {min_side} pixels per side")
    return pairs


def method_labels(folders: list[str]) -> dict[str, str]:
    """Return the names of the columns of --results: the folders' names, or their paths."""
    names = [Path(folder).name for folder in folders]
    taken = ("bicubic", "srcnn", "upscaled", "original", "SRCNN")
    return {
        folder: name if names.count(name) == 1 and name not in taken else folder
        for folder, name in zip(folders, names)
    }


def restore_pair(model: nn.Module, pair: Pair, args: argparse.Namespace) -> dict:
    """Return the network's output without and with back-projection."""
    if model.num_channels != pair.num_channels:
        raise InputError(f"has {pair.num_channels} channels, the network {model.num_channels}")
    sr_images = {"srcnn": restore(model, pair.ilr)}
    steps = back_projection_steps(args, model)
    if pair.lr is not None and steps:
        sr_images["upscaled"] = back_project(sr_images["srcnn"], pair.lr, steps)
    return sr_images


def read_result(path: Path, pair: Pair, args: argparse.Namespace, model: nn.Module) -> np.ndarray:
    """Return another program's image as the protocol measures it, of the size of `pair.hr`."""
    image = open_image(path)
    if pair.greyscale and Image.getmodebase(image.mode) != "L":
        image = image.convert("L")  # a greyscale image that was saved as RGB
    levels, _ = to_levels(image, pair.num_channels, value_range(args, model))
    if levels.shape != pair.hr.shape:
        levels = crop_to_multiple(levels, args.scale)
    if levels.shape != pair.hr.shape:
        raise InputError(f"{path}: differs in size from its ground truth; pass uncropped results")
    return levels


def score(pair: Pair, sr_images: dict[str, np.ndarray], args: argparse.Namespace) -> dict:
    """Return the row of scores of an image; for RGB networks also the PSNR over RGB."""
    scale, row = args.scale, {"image": pair.name, "scale": args.scale}
    is_protocol = pair.lr is not None and not args.lr_dir and not args.jpeg
    for method, output in sr_images.items():
        sr_luma, hr_luma = (shave(luma_of(planes, pair), scale) for planes in (output, pair.hr))
        if method == "bicubic" and pair.num_channels == 3 and is_protocol:
            # The protocol's bicubic resizes luma.
            sr_luma = shave(luma_of(bicubic_pair(luma_of(pair.hr, pair), scale).ilr, pair), scale)
        row |= {f"{method}_psnr": psnr(sr_luma, hr_luma), f"{method}_ssim": ssim(sr_luma, hr_luma)}
        if pair.num_channels == 3:
            row[f"{method}_rgb_psnr"] = protocol_psnr(output, pair.hr, scale, pair.quantum)
    return row


def luma_of(planes: np.ndarray, pair: Pair) -> np.ndarray:
    """Return the rounded luma of an image of a pair; greyscale is its own luma."""
    if planes.ndim == 3 and pair.greyscale:
        planes = planes.mean(axis=0, dtype=np.float64).astype(np.float32)
    elif planes.ndim == 3 and len(planes) == 3:
        planes = luma(quantize(planes, pair.quantum), pair.quantum)
    return quantize(planes, pair.quantum)


def score_columns(rows: list[dict]) -> list[str]:
    """Return the names of the scores that all rows have."""
    return [name for name in rows[0] if all(name in row for row in rows)][2:] if rows else []


def column_title(column: str) -> str:
    """Return the title of a column of scores: srcnn_rgb_psnr is "srcnn RGB dB"."""
    title = column.replace("_rgb", " RGB").replace("_psnr", " dB")
    return title.replace("_ssim", " SSIM")


def print_scores(rows: list[dict], args: argparse.Namespace) -> None:
    """Print a table of the rows and of their means (protocol step 6)."""
    width = max(5, *(len(row["image"]) for row in rows))
    columns = score_columns(rows)
    means = {name: fmean(row[name] for row in rows) for name in columns}
    titles = ["SSIM" if c.endswith("_ssim") else column_title(c) for c in columns]
    print(f"{f'x{args.scale}':{width}}  " + "  ".join(f"{title:>8}" for title in titles))
    for row in [*rows, {"image": "mean", **means}]:
        cells = (
            f"{row[c]:{max(8, len(title))}.{4 if c.endswith('_ssim') else 2}f}"
            for c, title in zip(columns, titles)
        )
        print(f"{row['image']:{width}}  " + "  ".join(cells))
    loss = means["srcnn_psnr"] - means.get("upscaled_psnr", math.inf)
    if loss > 0:
        hint = "use --back-projection 0 with these images"
        print(f"back-projection lowers the PSNR by {loss:.2f} dB; {hint}", file=sys.stderr)


# --- comparison images and report -----------------------------------------------------------

MAX_REPORT_IMAGES = 60  # that are embedded in a report
MAX_VISUAL_PIXELS = 700_000  # of larger images, the report and comparisons show a detail
DETAIL = (900, 700)


def to_8_bits(planes: Planes) -> Image.Image:
    """Return an image for the screen: RGB, or RGBA if there is transparency."""
    levels = quantize(planes.levels()).astype(np.uint8)
    levels = np.repeat(levels, 3, axis=0) if len(levels) == 1 else levels
    alpha = [] if planes.alpha is None else [planes.alpha]
    return Image.fromarray(np.stack([*levels, *alpha], axis=-1))


def pair_visuals(
    path: Path, lr_paths: list[Path] | None, pair: Pair, sr_images: dict, args: argparse.Namespace
) -> dict[str, Image.Image]:
    """Return original, bicubic, SRCNN and the results of other programs for the screen.

    A luma network's colours are those of bicubic.
    """
    method = "upscaled" if "upscaled" in sr_images else "srcnn"
    visuals = {"original": pair.hr, "bicubic": pair.ilr, "SRCNN": sr_images[method]}
    visuals |= {name: sr_images[name] for name in method_labels(args.results).values()}
    if pair.greyscale:
        visuals = {label: luma_of(planes, pair) for label, planes in visuals.items()}
    if pair.num_channels == 1 and not pair.greyscale and not h5py.is_hdf5(path):
        lr_path = lr_paths[0] if lr_paths else None
        colour = read_pair(path, lr_path, args.scale, 3, args.range, args.jpeg)
        for label, planes in visuals.items():
            chroma = rgb_to_ycbcr(colour.hr if label == "original" else colour.ilr)[1:]
            visuals[label] = ycbcr_to_rgb(np.concatenate([planes[None], chroma]))
    colours = {label: np.atleast_3d(planes.T).T for label, planes in visuals.items()}
    return {
        label: to_8_bits(Planes(quantize(planes[:3]), None, 0, 255, "RGB"))
        for label, planes in colours.items()
    }


def most_different(a: Image.Image, b: Image.Image, size: tuple[int, int]) -> tuple:
    """Return the box of a size, at most the image's, where two images differ most."""
    width, height = min(size[0], a.width), min(size[1], a.height)
    difference = ImageChops.difference(a.convert("L"), b.convert("L"))
    cells = max(1, 2 * a.width // width - 1), max(1, 2 * a.height // height - 1)
    mean = np.asarray(difference.resize(cells, Image.Resampling.BOX))
    row, column = np.unravel_index(mean.argmax(), mean.shape)
    left = round((column + 0.5) * a.width / cells[0] - width / 2)
    top = round((row + 0.5) * a.height / cells[1] - height / 2)
    left, top = min(max(left, 0), a.width - width), min(max(top, 0), a.height - height)
    return left, top, left + width, top + height


def crop_visuals(visuals: dict[str, Image.Image]) -> tuple[dict[str, Image.Image], str]:
    """Crop large images to the detail that differs most; return the images and a note."""
    bicubic, srcnn = visuals["bicubic"], visuals["SRCNN"]
    if srcnn.width * srcnn.height <= MAX_VISUAL_PIXELS:
        return visuals, ""
    box = most_different(bicubic, srcnn, DETAIL)
    note = f"detail of {srcnn.width} x {srcnn.height} pixels at {box[:2]}, which differs most"
    return {label: image.crop(box) for label, image in visuals.items()}, note


def comparison_paths(
    images: dict[Path, Path], args: argparse.Namespace, methods: tuple[str, ...]
) -> dict[Path, dict[str, Path]]:
    """Return for each image where the images of --save-images go, below its subfolder."""
    if not args.save_images:
        return {}
    suffix = f"{size_suffix(args)}.png"
    return {
        path: {m: Path(args.save_images, f"{stem}_{m}_{suffix}") for m in methods}
        for path, stem in unique_stems(images).items()
    }


def report_outputs(args: argparse.Namespace, comparisons: dict) -> list[tuple]:
    """Return (what asks for it, path) of all outputs but the upscaled images."""
    outputs = [(path, p) for path, paths in comparisons.items() for p in paths.values()]
    flags = ("csv", "report")
    return outputs + [(f"--{flag}", getattr(args, flag)) for flag in flags if getattr(args, flag)]


def save_comparison(
    visuals: dict[str, Image.Image], targets: dict[str, Path], row: dict | None = None
) -> None:
    """Write the images side by side, above the magnified detail that differs most."""
    for method, label in ("bicubic", "bicubic"), ("srcnn", "SRCNN"):
        if method in targets:
            save_image(visuals[label], targets[method], {})
    visuals, _ = crop_visuals(visuals)
    width, height = visuals["SRCNN"].size
    box = most_different(
        visuals["bicubic"], visuals["SRCNN"], (max(1, width // 4), max(1, height // 4))
    )
    strip = Image.new("RGB", (len(visuals) * width, 2 * height + 16), "white")
    draw = ImageDraw.Draw(strip)
    for i, (label, image) in enumerate(visuals.items()):
        score_name = f"{label.lower()}_psnr"
        score_db = f" {row[score_name]:.2f} dB" if row and score_name in row else ""
        draw.text((i * width + 4, 2), label + score_db, fill="black")
        strip.paste(image, (i * width, 16))
        detail = image.crop(box).resize((width, height), Image.Resampling.NEAREST)
        strip.paste(detail, (i * width, 16 + height))
    save_image(strip, targets["comparison"], {})


def report_entry(name: str, visuals: dict[str, Image.Image]) -> dict:
    """Return an image of the report: its name, a note, and data URIs of what can be compared."""
    visuals, note = crop_visuals(visuals)
    uris = {}
    for label, image in visuals.items():
        encoded = io.BytesIO()
        image.save(encoded, "WEBP", lossless=True)
        uris[label] = f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    return {"name": name, "note": note, "images": uris}


def write_report(
    args: argparse.Namespace, entries: list[dict], rows: list[dict], total: int
) -> None:
    """Write a self-contained page with scores and a viewer, from assets/report.html."""
    protocol = "none: the originals are unknown"
    if args.eval:
        protocol = f"luma (BT.601), rounded, {args.scale} pixels shaved off each side, peak 255"
    facts = [["command", shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])]]
    facts += [["protocol", protocol]]
    for path, model in args.networks.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        facts += [["network", f"{model.architecture}, {path.name}, SHA-256 {digest}"]]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    facts += [["versions", f"{versions}, numpy {np.__version__}, Pillow {PIL.__version__}"]]
    columns = score_columns(rows)
    table = [["mean", *(fmean(row[c] for row in rows) for c in columns)]] if rows else []
    table += [[row["image"], *(row[c] for c in columns)] for row in rows]
    table = [
        [v if not isinstance(v, float) or math.isfinite(v) else str(v) for v in r] for r in table
    ]
    data = {
        "facts": facts,
        "columns": ["image", *map(column_title, columns)] if rows else [],
        "rows": table,
        "note": f"{len(entries)} of {count_of(total, 'image')} below.",
        "images": entries,
    }
    template = (ROOT / "assets" / "report.html").read_text()
    content = json.dumps(data).replace("<", "\\u003c")  # no name can end the script element
    write_file(args.report, template.replace("__DATA__", content).encode(errors="backslashreplace"))
    print(args.report)


# --- arguments ------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> int:
    """Write the network as an ONNX file."""
    for flag in ("eval", "output", "outscale", "width", "height", "half", "self_ensemble"):
        if getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')}: cannot be combined with --export")
    path = weights_path(args, args.scale)
    check_outputs([("--export", args.export)], [path])
    write_file(args.export, to_onnx(load_srcnn(path), args.scale))
    print(args.export)
    return 0


def whole_scale(text: str) -> int:
    """Parse --scale; a fraction needs --outscale."""
    if re.fullmatch(r"\d+\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number; use --outscale {text}")
    return number(int, 1, 65)(text)


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("images")
    images = "images and folders of images; with --eval also h5 files of prepare.py --eval"
    group.add_argument("images", nargs="*", metavar="IMAGE", help=images)
    group.add_argument("-i", "--input", "--image-file", nargs="+", default=[], help="the same")
    add_image_flags(group)

    add = parser.add_argument_group("network").add_argument
    scale = "(default: from --weights-file, --outscale, --width or --height, or 3)"
    add("-s", "--scale", type=whole_scale, help=scale)
    network = "in weights/ (default: photo for compressed JPEG images, else 9-5-5)"
    add("--network", choices=tuple(NETWORKS), help=network)
    add("--weights-file", help="other weights than those of --network")
    add(
        "--self-ensemble", action="store_true", help="mean of 8 flips and rotations; 8 times slower"
    )
    steps = "adjust the result so that downscaling it reproduces the input (default: 1 step, or 0 "
    steps += "for weights trained on pairs)"
    add("--back-projection", type=number(int, 0, 101), metavar="STEPS", help=steps)

    group = parser.add_argument_group("output")
    add = group.add_argument
    add("-o", "--output", help="file or folder (default: NAME_srcnn_xS.png beside NAME)")
    size = group.add_mutually_exclusive_group()
    outscale = "any factor: upscale by the next whole scale, then downscale by bicubic"
    size.add_argument("--outscale", type=number(float, 1, 64), metavar="F", help=outscale)
    size.add_argument("--width", type=number(int, 1), metavar="N", help="of the result, in pixels")
    size.add_argument("--height", type=number(int, 1), metavar="N", help="of the result, in pixels")
    add("--ext", metavar="png|jpg|...", help="format of the results (default: png)")
    add("--skip-existing", action="store_true", help="do not write results that exist")
    edges = "wrap: the image is a seamless texture (default: edge)"
    add("--tile-edges", choices=("edge", "wrap"), default="edge", help=edges)
    add("--save-images", metavar="DIR", help="write bicubic and SRCNN side by side")
    add("--report", metavar="FILE.html", help="write a page to compare bicubic and SRCNN")
    onnx = "write the network for other programs; use it with --network or --weights-file"
    add("--export", metavar="FILE.onnx", help=onnx)

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="images are ground truth: downscale, restore, measure")
    results = "also measure the images in these folders, made by other programs"
    add("--results", nargs="+", default=[], metavar="DIR", help=results)
    jpeg = "save the LR images as JPEG of this quality, 1 to 100"
    add("--jpeg", type=number(int, 1, 101), metavar="Q", help=jpeg)
    add("--csv", metavar="FILE", help="write the scores")

    add = parser.add_argument_group("where it runs").add_argument
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if available)")
    add("--half", action="store_true", help="half precision, on CUDA")
    return parser


def choose_scale(args: argparse.Namespace) -> int | None:
    """Return --scale or what the weights or --outscale imply; None if each image has its own."""
    implied = None
    if args.weights_file is not None:
        path = Path(args.weights_file)
        name = re.search(r"(?:^|_)x(\d+)$", path.stem) or re.search(r"^x(\d+)$", path.parent.name)
        implied = load_srcnn(path).info.get("scale", int(name[1]) if name else None)
    if args.scale is not None:
        if implied not in (None, args.scale):
            line = f"--scale {args.scale}: {args.weights_file} looks like weights for {implied}"
            print(line, file=sys.stderr)
        return args.scale
    if implied is None and args.outscale:
        return max(2, min(math.ceil(args.outscale), 4))
    return None if implied is None and (args.width or args.height) else implied or 3


def main(args: argparse.Namespace) -> int:
    args.networks = {}
    args.images = args.images + args.input or [str(ROOT / "assets" / "astronaut.png")]
    for flag in ("csv", "results", "lr_dir", "jpeg"):
        if getattr(args, flag) and not args.eval:
            raise InputError(f"--{flag.replace('_', '-')}: use it with --eval")
    if args.jpeg and args.lr_dir:
        raise InputError("--jpeg: cannot be combined with --lr-dir")
    if args.network and args.weights_file is not None:
        raise InputError("--network: cannot be combined with --weights-file")
    args.scale = choose_scale(args)
    apply_image_flags(args)
    if args.export is not None:
        return export(args)
    if args.eval and (args.outscale or args.width or args.height):
        raise InputError("--outscale, --width, --height: cannot be combined with --eval")
    if args.outscale and args.outscale > args.scale:
        raise InputError(f"--outscale {args.outscale:g}: exceeds the network's scale {args.scale}")
    return evaluate_files(args) if args.eval else upscale_files(args)


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
