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
from dataclasses import replace
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
from models import SelfEnsemble, back_project, back_projection_steps, load_srcnn, pick_device
from models import restore, to_onnx, upscale
from utils import add_image_flags, apply_image_flags, ArgumentParser, bicubic_pair, check_outputs
from utils import collect_warnings, count_of, crop_to_multiple, decode, find_images, InputError
from utils import luma, make_pair, match_images, number, only_match, open_image, Pair
from utils import Planes, protocol_psnr, psnr, quantize, read_levels, skip_on_error, rgb_to_ycbcr
from utils import run, shave, ssim, write_csv, write_file, ycbcr_to_rgb

ROOT = Path(__file__).resolve().parent
NETWORKS = "9-5-5", "9-1-5", "rgb", "photo", "photo-luma"
# Columns and labels in tables and images, which no folder of --results may have.
RESERVED_NAMES = ("original", "bicubic", "srcnn", "upscaled", "SRCNN")
HIGH_JPEG_QUALITY = 65  # from which photo and photo-luma have other weights
CLEAN_JPEG_QUALITY = 95  # from which a JPEG is upscaled like an uncompressed image


def upscale_files(args: argparse.Namespace) -> int:
    """Upscale every image; return the exit status."""
    ignored: list[Path] = []
    images = find_images(args.images, ignored=ignored)
    outputs = plan_outputs(images, args)
    networks, entries, failed, skipped = {}, [], [], 0
    for path in tqdm(images, "files", leave=False, disable=None if len(images) > 1 else True):
        results = [outputs[path][kind] for kind in ("result", "tiff") if kind in outputs[path]]
        if args.skip_existing and any(result.exists() for result in results):
            skipped += 1
            continue
        with skip_on_error(path, failed):
            upscale_file(path, outputs[path], networks, entries, args)
    written = len(images) - skipped - len(failed)
    if args.report and written:
        write_report(args, networks, entries, [], written)
    if len(images) > 1 or ignored:
        print(
            f"{written} written, {skipped} skipped, {len(failed)} failed; "
            f"{count_of(len(ignored), 'other file')} ignored"
        )
    return 2 if failed else 0


def upscale_file(
    path: Path, outputs: dict[str, Path], networks: dict, entries: list, args: argparse.Namespace
) -> None:
    """Upscale one image, print a line about it, and write what --save-images and --report show."""
    start = time.perf_counter()
    image = open_image(path)
    size, scale = target_size(image, args)
    model, name = load_network(args, scale, networks, image.info)
    if model.num_channels not in (1, 3):
        raise InputError(f"{args.weights_file}: is for {model.num_channels} channels, not 1 or 3")
    planes = decode(image, value_range(model, args))
    is_32_bit = planes.mode in ("I", "F")
    target = outputs["tiff"] if is_32_bit and "tiff" in outputs else outputs["result"]
    properties = metadata(image, planes.mode, target)
    # A format that cannot store the result is refused before the work begins.
    probe = Image.new(planes.mode, (max(size), 16))
    content = io.BytesIO(encode(probe, target, properties))
    if Image.registered_extensions()[target.suffix.lower()] in Image.OPEN:  # not only written
        stored = Image.open(content)
        if planes.mode[0] in "IF" and stored.mode[0] not in "IF":
            raise InputError(f"{target}: cannot store more than 8 bits; use .tif")
        loses_alpha = planes.alpha is not None and not stored.has_transparency_data
        if stored.size != probe.size or loses_alpha:
            raise InputError(f"{target}: cannot store this size or transparency; use .png")
    steps = back_projection_steps(model, args.back_projection)
    result = upscale(planes, model, scale, steps, edges=args.tile_edges)
    if result.size != size:
        result = downscale(result, size, (planes.low, planes.high), args.tile_edges)
    write_file(target, encode(result, target, properties))
    sizes = f"{image.width} x {image.height} -> {size[0]} x {size[1]}"
    seconds = time.perf_counter() - start
    tqdm.write(f"{target}  {sizes}  {name}, back-projection {steps}  {seconds:.1f} s")
    if args.save_images or args.report:
        bicubic = screen_image(planes).resize(size, Image.Resampling.BICUBIC)
        srcnn = screen_image(decode(result, (planes.low, planes.high)))
        write_visuals({"bicubic": bicubic, "SRCNN": srcnn}, str(path), outputs, entries, args)


def evaluate_files(args: argparse.Namespace) -> int:
    """Measure every image, print the scores, and write them on request; return the exit status."""
    images = find_images(args.images)
    if args.lr_dir:
        lr_paths = match_images(args.images, args.lr_dir, args.scale)
        images = {path: relative for path, relative in images.items() if path in lr_paths}
    results = {}
    for folder in args.results:
        results[folder] = match_images(args.images, [folder], args.scale, images)
        images = {path: relative for path, relative in images.items() if path in results[folder]}
    methods = [Path(folder).resolve().name for folder in results]
    if len(set(methods)) < len(methods) or set(methods) & set(RESERVED_NAMES):
        methods = [f"{folder}/" for folder in results]
    outputs = plan_outputs(images, args)
    networks, entries, failed, rows = {}, [], [], []
    model, _ = load_network(args, args.scale, networks)
    for path, relative in tqdm(images.items(), "files", leave=False, disable=None):
        with skip_on_error(path, failed):
            lr_path = only_match(path, lr_paths[path], "--lr-dir") if args.lr_dir else None
            for pair in read_pairs(path, lr_path, relative.as_posix(), model, args):
                sr_images = restore_pair(model, pair, args)
                for folder, method in zip(results, methods):
                    match = only_match(path, results[folder][path], f"--results {folder}")
                    sr_images[method] = read_result(match, pair, model, args)
                rows.append(score(pair, sr_images, args))
                if args.save_images or args.report:
                    visuals = pair_visuals(pair, sr_images)
                    write_visuals(visuals, pair.name, outputs[path], entries, args, rows[-1])
    if rows:
        print_scores(rows, args)
        if args.csv:
            write_csv(args.csv, max(rows, key=len), rows)
        if args.report:
            write_report(args, networks, entries, rows, len(rows))
    return 2 if failed else 0


def export(args: argparse.Namespace) -> int:
    """Write the network as an ONNX file; return the exit status."""
    if args.self_ensemble:
        raise InputError("--self-ensemble: cannot be combined with --export")
    networks = {}
    model, _ = load_network(args, args.scale, networks)
    check_outputs([("--export", args.export)], networks)
    write_file(args.export, to_onnx(model, args.scale))
    print(args.export)
    return 0


# --- network --------------------------------------------------------------------------------


def load_network(
    args: argparse.Namespace, scale: int, networks: dict, info: dict | None = None
) -> tuple[nn.Module, str]:
    """Return a network on its device, and a description such as "9-5-5 x3".

    Args:
        networks: those of this run by the paths of their files; each is loaded once.
        info: of an image of open_image. Without --network, compressed JPEG images get `photo`,
            which removes the blocks that the other networks sharpen, and restores the chroma that
            most JPEG files store at half the resolution; the others get `photo-luma`.
    """
    if args.weights_file:
        path = Path(args.weights_file)
        description = f"{path.name} x{scale}"
    else:
        network, reason = args.network or "9-5-5", ""
        quality = args.jpeg or (info or {}).get("jpeg_quality") or 100
        if info and not args.network and quality < CLEAN_JPEG_QUALITY:
            network = "photo" if info["chroma_subsampled"] else "photo-luma"
            reason = f" for JPEG of quality {quality}"
        if network.startswith("photo") and quality >= HIGH_JPEG_QUALITY:
            network += "-hq"
        name = "srcnn" if network == "9-5-5" else f"srcnn_{network}"
        path = ROOT / "weights" / f"{name}_x{scale}.pth"
        if not path.is_file():
            raise InputError(f"--scale {scale}: no {path}; use 2, 3 or 4, or --weights-file")
        description = f"{network} x{scale}{reason}"
    if path not in networks:
        device = pick_device(args.device)
        model = load_srcnn(path, device).to(memory_format=torch.channels_last)
        networks[path] = SelfEnsemble(model) if args.self_ensemble else model
    return networks[path], description


def value_range(model: nn.Module, args: argparse.Namespace) -> list[float] | dict:
    """Return --range, or the network's own for images of the bit depth it was trained on."""
    return args.range or {model.info.get("bit_depth"): model.info.get("range")}


# --- files ----------------------------------------------------------------------------------

# JPEG at 4:4:4; WebP without loss, because its chroma is always 4:2:0; PNG that is a little larger
# than usual in a fraction of the time.
SAVE_OPTIONS = {
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {"compress_level": 1},
    "WEBP": {"lossless": True},
}


def plan_outputs(images: dict[Path, Path], args: argparse.Namespace) -> dict[Path, dict[str, Path]]:
    """Return the files that a run writes for each image, after checking all its outputs.

    Returns:
        For each image the "result" (and as "tiff" its name for values that PNG cannot store),
        and "comparison", "bicubic" and "srcnn" of --save-images.
    """
    if args.width:
        size_suffix = f"w{args.width}"
    elif args.height:
        size_suffix = f"h{args.height}"
    else:
        size_suffix = f"x{args.outscale or args.scale:g}"
    outputs: dict[Path, dict[str, Path]] = {path: {} for path in images}
    if args.save_images:
        for path, stem in unique_stems(images).items():
            for method in ("bicubic", "srcnn", "comparison") if args.eval else ("comparison",):
                outputs[path][method] = Path(args.save_images, f"{stem}_{method}_{size_suffix}.png")
    if not args.eval:
        extension = f".{args.ext.lstrip('.')}" if args.ext else ".png"
        output = Path(args.output or "")
        is_file = output.suffix and not output.is_dir() and not args.output.endswith(("/", os.sep))
        if is_file and (
            len(images) > 1 or (args.ext and output.suffix.lower() != extension.lower())
        ):
            raise InputError(f"--output {output}: names one file in one format; name a folder")
        # Below --output subfolders are mirrored; without it the results lie beside the images.
        stems = unique_stems(images if args.output else {path: path for path in images})
        for path, stem in stems.items():
            result = output if is_file else output / f"{stem}_srcnn_{size_suffix}{extension}"
            outputs[path]["result"] = result
            if not is_file and not args.ext:
                outputs[path]["tiff"] = result.with_suffix(".tif")
    planned = [(path, p) for path, paths in outputs.items() for p in paths.values()]
    planned += [(f, p) for f, p in (("--csv", args.csv), ("--report", args.report)) if p]
    weights = [args.weights_file] if args.weights_file else (ROOT / "weights").glob("*.pth")
    compared = find_images([*(args.lr_dir or []), *args.results], include_results=True)
    check_outputs(planned, [*images, *weights, *compared])
    return outputs


def unique_stems(names: dict[Path, Path]) -> dict[Path, Path]:
    """Return the names without their extension, unless it tells two names apart."""
    counts = Counter(name.with_suffix("") for name in names.values())
    return {
        path: name if counts[name.with_suffix("")] > 1 else name.with_suffix("")
        for path, name in names.items()
    }


def metadata(image: Image.Image, mode: str, target: Path) -> dict:
    """Return resolution, colour profile and EXIF, where they are valid and fit the result."""
    dpi = tuple(map(float, image.info.get("dpi", ())))
    valid = {"dpi": dpi} if dpi and all(1 < d < 65536 for d in dpi) else {}
    if image.info.get("exif"):
        valid["exif"] = image.info["exif"]
    # In a profile's header bytes 16..19 are the colour space and 36..39 a signature (ICC.1, 7.2).
    profile = image.info.get("icc_profile") or b""
    if profile[36:40] == b"acsp" and profile[16:20] == (b"GRAY" if mode[0] in "LIF" else b"RGB "):
        if target.suffix.lower() == ".png" and len(profile) > 1 << 20:
            print(f"{target}: the colour profile exceeds 1 MB and is not written", file=sys.stderr)
        else:
            valid["icc_profile"] = profile
    return valid


def encode(image: Image.Image, path: Path, properties: dict | None = None) -> bytes:
    """Return the content of an image file, in the format of the path's extension.

    Raises:
        InputError: the format is unknown, or cannot store such an image.
    """
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise InputError(f"{path}: is of no format that can be written; use .png")
    options = SAVE_OPTIONS.get(image_format, {}) | (properties or {})
    content = io.BytesIO()  # Pillow's encoders do not report every failed write to a file
    content.name = path.name
    try:
        with collect_warnings([]):  # libjpeg prints what is wrong
            image.save(content, **options)
    except Exception as error:  # encoders raise many types
        raise InputError(
            f"{path}: cannot store mode {image.mode} with sides of {max(image.size)} pixels; "
            f"use {'.tif' if image.mode in ('I', 'F') else '.png'}"
        ) from error
    return content.getvalue()


# --- upscale --------------------------------------------------------------------------------


def target_size(image: Image.Image, args: argparse.Namespace) -> tuple[tuple[int, int], int]:
    """Return the size of the result, and the scale of the network that is used for it."""
    factor = args.outscale or args.scale
    if args.width or args.height:
        factor = args.width / image.width if args.width else args.height / image.height
    scale = args.scale or min(max(2, math.ceil(factor)), 4)
    if factor > scale:
        raise InputError(
            f"--width, --height: {factor:.4g} times the image's is too much; the limit is that of "
            f"--scale {scale}"
        )
    return (max(1, round(factor * image.width)), max(1, round(factor * image.height))), scale


def downscale(
    image: Image.Image, size: tuple[int, int], limits: tuple[float, float], edges: str
) -> Image.Image:
    """Downscale by bicubic; `limits` are those of 16-bit values."""
    values, margin = np.asarray(image), 0
    if edges == "wrap":
        margin = 2 * math.ceil(max(image.width / size[0], image.height / size[1])) + 1
        values = np.pad(values, [(margin, margin)] * 2 + [(0, 0)] * (values.ndim - 2), "wrap")
    box = margin, margin, margin + image.width, margin + image.height
    if not image.mode.startswith("I"):
        return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC, box)
    # Pillow resizes 16 bits in floating point only.
    levels = Image.fromarray(values.astype(np.float32))
    resized = np.asarray(levels.resize(size, Image.Resampling.BICUBIC, box), np.float64)
    return Image.fromarray(np.clip(np.rint(resized), *limits).astype(values.dtype))


# --- evaluate -------------------------------------------------------------------------------


def read_pairs(
    path: Path, lr_path: Path | None, name: str, model: nn.Module, args: argparse.Namespace
) -> list[Pair]:
    """Return the pair of an image, or those of an evaluation file."""
    if h5py.is_hdf5(path):
        if args.save_images or args.results or args.jpeg:
            raise InputError("is an h5 file; --save-images, --results and --jpeg need images")
        return read_eval_pairs(path, args.scale)[0]
    images = [open_image(path), open_image(lr_path) if lr_path else None]
    flags = value_range(model, args), args.jpeg
    pair = make_pair(*images, args.scale, model.num_channels, *flags)
    pair.name = name
    if pair.num_channels == 1 and not pair.greyscale and (args.save_images or args.report):
        pair.colour = make_pair(*images, args.scale, 3, *flags)
    return [pair]


def read_result(path: Path, pair: Pair, model: nn.Module, args: argparse.Namespace) -> np.ndarray:
    """Return another program's image as the protocol measures it, of the size of `pair.hr`."""
    # Many programs save greyscale as RGB.
    num_channels = 3 if pair.greyscale else pair.num_channels
    levels, _ = read_levels(path, num_channels, value_range(model, args))
    if levels.shape[-2:] != pair.hr.shape[-2:]:
        levels = crop_to_multiple(levels, args.scale)
    if levels.shape[-2:] != pair.hr.shape[-2:]:
        raise InputError(f"{path}: differs in size from its ground truth; pass uncropped results")
    return levels


def restore_pair(model: nn.Module, pair: Pair, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return bicubic, and the network's output without and with back-projection."""
    if min(shave(pair.hr, args.scale).shape[-2:]) < 11:
        raise InputError(f"{pair.name}: too small; SSIM needs 11 x 11 pixels within the border")
    sr_images = {"bicubic": pair.ilr, "srcnn": restore(model, pair.ilr)}
    steps = back_projection_steps(model, args.back_projection)
    if pair.lr is not None and steps:
        sr_images["upscaled"] = back_project(sr_images["srcnn"], pair.lr, steps)
    return sr_images


def score(pair: Pair, sr_images: dict[str, np.ndarray], args: argparse.Namespace) -> dict:
    """Return the row of scores of an image; for RGB networks also the PSNR over RGB."""
    scale, row = args.scale, {"image": pair.name, "scale": args.scale}
    hr_luma = luma_of(pair.hr, pair)
    is_protocol = pair.lr is not None and not args.lr_dir and not args.jpeg
    for method, sr in sr_images.items():
        sr_luma = luma_of(sr, pair)
        if method == "bicubic" and pair.num_channels == 3 and is_protocol:
            # The protocol resizes the luma, not RGB.
            sr_luma = quantize(bicubic_pair(hr_luma, scale).ilr, pair.quantum)
        shaved = shave(sr_luma, scale), shave(hr_luma, scale)
        row |= {f"{method}_psnr": psnr(*shaved), f"{method}_ssim": ssim(*shaved)}
        if pair.num_channels == 3:
            row[f"{method}_rgb_psnr"] = protocol_psnr(sr, pair.hr, scale, pair.quantum)
    return row


def luma_of(planes: np.ndarray, pair: Pair) -> np.ndarray:
    """Return the rounded luma of an image of a pair; greyscale is its own luma."""
    if planes.ndim == 3 and pair.greyscale:
        planes = planes.mean(axis=0, dtype=np.float64).astype(np.float32)
    elif planes.ndim == 3 and len(planes) == 3:
        planes = luma(quantize(planes, pair.quantum), pair.quantum)
    return quantize(planes, pair.quantum)


def mean_scores(rows: list[dict]) -> dict:
    """Return the means of the scores that all images have (protocol step 6)."""
    columns = [name for name in rows[0] if all(name in row for row in rows)]
    columns = [name for name in columns if name not in ("image", "scale")]
    return {"image": "mean"} | {name: fmean(row[name] for row in rows) for name in columns}


def print_scores(rows: list[dict], args: argparse.Namespace) -> None:
    """Print a table of the rows and of their means."""
    means = mean_scores(rows)
    titles = {}
    for column in list(means)[1:]:
        title = column.replace("_rgb", " RGB").replace("_psnr", " dB")
        titles[column] = "SSIM" if column.endswith("_ssim") else title
    width = max(5, *(len(row["image"]) for row in rows))
    print("  ".join([f"{f'x{args.scale}':{width}}", *(f"{t:>8}" for t in titles.values())]))
    for row in [*rows, means]:
        cells = [f"{row['image']:{width}}"]
        for column, title in titles.items():
            cells.append(f"{row[column]:{max(8, len(title))}.{4 if title == 'SSIM' else 2}f}")
        print("  ".join(cells))
    if "upscaled_psnr" in means and means["upscaled_psnr"] < means["srcnn_psnr"]:
        drop = means["srcnn_psnr"] - means["upscaled_psnr"]
        print(
            f"back-projection lowers the PSNR by {drop:.2f} dB; "
            "use --back-projection 0 with these images",
            file=sys.stderr,
        )


# --- comparison images and report -----------------------------------------------------------

MAX_REPORT_IMAGES = 60  # that are embedded in a report
MAX_VISUAL_PIXELS = 700_000  # of larger images, the report and comparisons show a detail
MAX_VISUAL_SIDE = 8_000  # likewise; WebP stores at most 16,383
DETAIL = (900, 700)


def screen_image(planes: Planes) -> Image.Image:
    """Return an 8-bit image, RGB or RGBA."""
    colour = []
    for plane in planes.colour[:3]:  # one by one, because images are large
        colour.append(quantize(replace(planes, colour=plane).levels()).astype(np.uint8))
    colour = 3 * colour if len(colour) == 1 else colour
    alpha = [] if planes.alpha is None else [planes.alpha]
    return Image.fromarray(np.stack([*colour, *alpha], axis=-1))


def on_white(image: Image.Image) -> Image.Image:
    """Return an RGB image: invisible pixels have the colour of a white page."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def pair_visuals(pair: Pair, sr_images: dict[str, np.ndarray]) -> dict[str, Image.Image]:
    """Return original, bicubic, SRCNN and the results of other programs for the screen.

    A luma network's colours are those of bicubic.
    """
    srcnn = sr_images.get("upscaled", sr_images["srcnn"])
    images = {"original": pair.hr, "bicubic": pair.ilr, "SRCNN": srcnn}
    images |= {name: planes for name, planes in sr_images.items() if name not in RESERVED_NAMES}
    visuals = {}
    for label, planes in images.items():
        shown = luma_of(planes, pair) if pair.greyscale else planes
        if pair.colour:
            colours = pair.colour.hr if label == "original" else pair.colour.ilr
            shown = ycbcr_to_rgb(np.concatenate([planes[None], rgb_to_ycbcr(colours)[1:]]))
        shown = shown if shown.ndim == 3 else shown[None]
        visuals[label] = screen_image(Planes(shown, None, 0, 255, "RGB"))
    return visuals


def most_different(a: Image.Image, b: Image.Image, size: tuple[int, int]) -> tuple:
    """Return the box of a size, at most the image's, where two images differ most."""
    width, height = min(size[0], a.width), min(size[1], a.height)
    difference = ImageChops.difference(on_white(a).convert("L"), on_white(b).convert("L"))
    cells = max(1, 2 * a.width // width - 1), max(1, 2 * a.height // height - 1)
    mean = np.asarray(difference.resize(cells, Image.Resampling.BOX))
    row, column = np.unravel_index(mean.argmax(), mean.shape)
    left = round((column + 0.5) * a.width / cells[0] - width / 2)
    top = round((row + 0.5) * a.height / cells[1] - height / 2)
    left, top = min(max(left, 0), a.width - width), min(max(top, 0), a.height - height)
    return left, top, left + width, top + height


def write_visuals(
    visuals: dict[str, Image.Image],
    name: str,
    outputs: dict[str, Path],
    entries: list[dict],
    args: argparse.Namespace,
    row: dict | None = None,
) -> None:
    """Write the images of --save-images, and append the image of --report to `entries`.

    Of large images both show the detail that differs most.
    """
    for method, label in ("bicubic", "bicubic"), ("srcnn", "SRCNN"):
        if method in outputs:
            write_file(outputs[method], encode(visuals[label], outputs[method]))
    width, height = visuals["SRCNN"].size
    note = ""
    if width * height > MAX_VISUAL_PIXELS or max(width, height) > MAX_VISUAL_SIDE:
        box = most_different(visuals["bicubic"], visuals["SRCNN"], DETAIL)
        note = f"detail of {width} x {height} pixels at {box[:2]}, which differs most"
        visuals = {label: image.crop(box) for label, image in visuals.items()}
    if args.save_images:
        comparison = compare_side_by_side(visuals, row or {})
        write_file(outputs["comparison"], encode(comparison, outputs["comparison"]))
    if args.report and len(entries) < MAX_REPORT_IMAGES:
        uris = {}
        for label, image in visuals.items():
            content = base64.b64encode(encode(image, Path(f"{name}.webp"))).decode()
            uris[label] = f"data:image/webp;base64,{content}"
        size = visuals["SRCNN"].size
        entries.append({"name": name, "note": note, "size": size, "images": uris})


def compare_side_by_side(visuals: dict[str, Image.Image], row: dict) -> Image.Image:
    """Return the images with their PSNR, above the magnified detail that differs most."""
    visuals = {label: on_white(image) for label, image in visuals.items()}
    width, height = visuals["SRCNN"].size
    detail_size = max(1, width // 4), max(1, height // 4)
    box = most_different(visuals["bicubic"], visuals["SRCNN"], detail_size)
    canvas = Image.new("RGB", (len(visuals) * width, 2 * height + 16), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (label, image) in enumerate(visuals.items()):
        method = ("upscaled" if "upscaled_psnr" in row else "srcnn") if label == "SRCNN" else label
        score_db = f" {row[f'{method}_psnr']:.2f} dB" if f"{method}_psnr" in row else ""
        draw.text((i * width + 4, 2), label + score_db, fill="black")
        canvas.paste(image, (i * width, 16))
        detail = image.crop(box).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(detail, (i * width, 16 + height))
    return canvas


def write_report(
    args: argparse.Namespace, networks: dict, entries: list[dict], rows: list[dict], total: int
) -> None:
    """Write a self-contained page with scores and a viewer, from assets/report.html."""
    facts = [("command", shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]))]
    for path, model in networks.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        facts.append(("network", f"{model.architecture}, {path.name}, SHA-256 {digest}"))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    facts.append(("versions", f"{versions}, numpy {np.__version__}, Pillow {PIL.__version__}"))
    means = mean_scores(rows) if rows else {}
    data = {"facts": facts, "means": means, "rows": rows, "images": entries, "total": total}
    content = json.dumps(data).replace("<", "\\u003c")  # no name can end the script element
    page = (ROOT / "assets" / "report.html").read_text().replace("__DATA__", content)
    write_file(args.report, page.encode(errors="backslashreplace"))
    print(args.report)


# --- arguments ------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("images", nargs="*", metavar="IMAGE", help="images, folders; with --eval also h5 files")
    add("-i", "--input", "--image-file", nargs="+", default=[], help="the same")
    add_image_flags(group)

    group = parser.add_argument_group("network")
    add, one_of = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("-s", "--scale", type=whole_scale, help="default: from the flags below, or 3")
    one_of("--network", choices=NETWORKS, help="default: by the file, 9-5-5 or a photo network")
    one_of("--weights-file", help="other weights (train.py stores their scale)")
    add("--self-ensemble", action="store_true", help="mean of 8 flips, rotations; 8 times slower")
    add(
        "--back-projection",
        type=number(int, 0, 101),
        metavar="STEPS",
        help="adjust the result so that downscaling it reproduces the input (default: 1 step, or 0 "
        "for weights trained on pairs or JPEG)",
    )

    group = parser.add_argument_group("output and evaluation")
    add, one_of = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("-o", "--output", help="file or folder (default: NAME_srcnn_xS.png beside NAME)")
    one_of("--outscale", type=number(float, 1, 64), metavar="F", help="any factor up to 4")
    one_of("--width", type=number(int, 1), metavar="N", help="of the result, in pixels")
    one_of("--height", type=number(int, 1), metavar="N", help="of the result, in pixels")
    add("--ext", metavar="png|jpg|...", help="format of the results (default: png)")
    add("--skip-existing", action="store_true", help="do not write results that exist")
    add("--tile-edges", choices=("edge", "wrap"), default="edge", help="wrap: seamless texture")
    add("--save-images", metavar="DIR", help="write bicubic and SRCNN, also side by side")
    add("--report", metavar="FILE.html", help="write a page to compare bicubic and SRCNN")
    one_of("--export", metavar="FILE.onnx", help="write the network for other programs")
    one_of("--eval", action="store_true", help="downscale the images, restore them, and measure")
    add("--results", nargs="+", default=[], metavar="DIR", help="images of other programs")
    add("--jpeg", type=number(int, 1, 101), metavar="Q", help="save LR images as JPEG, 1 to 100")
    add("--csv", metavar="FILE", help="write the scores")

    add = parser.add_argument_group("where it runs").add_argument
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if available)")
    return parser


def whole_scale(text: str) -> int:
    """Parse --scale; a fraction needs --outscale."""
    if "." in text:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number; use --outscale {text}")
    return number(int, 1, 65)(text)


def choose_scale(args: argparse.Namespace) -> int | None:
    """Return --scale, that of --weights-file, or 3; None if each image's size decides."""
    implied = None
    if args.weights_file is not None:
        path = Path(args.weights_file)
        name = re.search(r"(?:^|_)x(\d+)$", path.stem) or re.search(r"^x(\d+)$", path.parent.name)
        implied = load_srcnn(path).info.get("scale", int(name[1]) if name else None)
    if args.scale and implied not in (None, args.scale):
        print(
            f"--scale {args.scale}: {args.weights_file} was trained for x{implied}", file=sys.stderr
        )
    size_is_set = args.outscale or args.width or args.height
    return args.scale or implied or (None if size_is_set else 3)


def main(args: argparse.Namespace) -> int:
    """Upscale, evaluate or export; return the exit status."""
    args.images = args.images + args.input or [str(ROOT / "assets" / "astronaut.png")]
    for flag in ("csv", "results", "lr_dir", "jpeg"):
        if getattr(args, flag) and not args.eval:
            raise InputError(f"--{flag.replace('_', '-')}: use it with --eval")
    if args.jpeg and args.lr_dir:
        raise InputError("--jpeg: cannot be combined with --lr-dir")
    if args.output and (args.eval or args.export):
        raise InputError("--output: cannot be combined with --eval and --export")
    apply_image_flags(args)
    args.scale = choose_scale(args)
    if args.outscale and args.outscale > (args.scale or 4):
        raise InputError(f"--outscale {args.outscale:g}: the limit is --scale {args.scale or 4}")
    if args.export:
        return export(args)
    return evaluate_files(args) if args.eval else upscale_files(args)


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
