"""Draw figures of the results of paper.py, and of what the networks in weights/ have learned.

python experiments/figures.py                     # after paper.py; writes experiments/*.png

Needs experiments/requirements.txt. The photograph of the feature maps is scikit-image's `chelsea`
(CC0, Stéfan van der Walt).
"""

import argparse
import io
import sys
from itertools import cycle
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before the standard library's own package `test`

try:
    import matplotlib
    from matplotlib import pyplot
    from skimage import data as skimage_data
except ImportError:
    matplotlib = pyplot = None  # see require_matplotlib

from models import load_srcnn
from paper import BATCH_SIZE, EXPERIMENTS, history_path, matching, read_results, read_rows
from utils import ArgumentParser, InputError, bicubic_pair, luma, number, run, write_file

# Other methods on Set5 x3, which the paper's figure of convergence shows as lines.
OTHER_METHODS = {"bicubic": 30.39, "SC": 31.42, "KK": 32.28, "A+": 32.59}


def require_matplotlib() -> None:
    """Select the backend that writes files; the error tells how to install matplotlib."""
    if matplotlib is None:
        raise InputError("matplotlib: missing; pip install -r experiments/requirements.txt")
    matplotlib.use("agg")


def save(figure: object, path: Path) -> None:
    """Write a figure as PNG; equal data gives equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    write_file(path, buffer.getvalue())
    print(path)


def draw_curves(args: argparse.Namespace, experiment: str, path: Path) -> None:
    """Draw PSNR over backpropagations for an experiment's variants, from their histories."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for variant in EXPERIMENTS[experiment]:
        history = history_path(args, variant, args.seed)
        if not history.is_file():
            command = f"paper.py {experiment} --results FILE"
            print(f"{history}: missing; run {command} first", file=sys.stderr)
            continue
        rows = read_rows(history)
        steps = np.linspace(0, args.steps, len(rows) + 1)[1:]
        axes.plot(steps * BATCH_SIZE, [float(row["psnr"]) for row in rows], label=variant.name)
    if not axes.lines:
        pyplot.close(figure)
        return
    for name, psnr in OTHER_METHODS.items():
        axes.axhline(psnr, color="grey", linestyle=":", linewidth=1)
        place = {"transform": axes.get_yaxis_transform(), "va": "bottom", "fontsize": 8}
        axes.text(0.01, psnr, name, color="grey", **place)
    axes.set(xlabel="backpropagations (steps x batch)", ylabel="PSNR on Set5 x3, dB")
    axes.set(xlim=(0, args.steps * BATCH_SIZE), ylim=(30.2, None))
    axes.legend(loc="lower right")
    save(figure, path)


def draw_sizes(args: argparse.Namespace, path: Path) -> None:
    """Draw PSNR over the number of parameters: ours, and the paper's from ImageNet."""
    rows = read_results(Path(args.results))
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    looks = (
        ("sizes", "o", [(7, -4)]),
        ("filters", "s", [(-6, 6)]),
        ("depth", "^", [(4, 5), (-4, 5)]),
    )
    for experiment, marker, places in looks:
        points, papers = [], []
        for variant, place in zip(EXPERIMENTS[experiment], cycle(places)):
            found = matching(rows, args, experiment, variant)
            found = [row for row in found if row["set"] == "Set5"]
            if found:
                psnr = fmean(float(row["psnr"]) for row in found)
                points.append((int(found[0]["parameters"]), psnr))
                papers += [(points[-1][0], variant.paper)] if variant.paper else []
                where = {"textcoords": "offset points", "ha": "right" if place[0] < 0 else "left"}
                axes.annotate(variant.name, points[-1], place, fontsize=8, **where)
        if points:
            axes.plot(*zip(*points), marker, label=f"{experiment}, ours (91 images)")
        if papers:
            axes.plot(
                *zip(*papers),
                marker,
                mfc="none",
                color="grey",
                label=f"{experiment}, paper (ImageNet)",
            )
    if not axes.lines:
        pyplot.close(figure)
        print("no rows of sizes, filters or depth; run paper.py sizes first", file=sys.stderr)
        return
    axes.set(xscale="log", xlabel="parameters", ylabel="PSNR on Set5 x3, dB", xlim=(2500, 1e5))
    axes.set_xticks([4000, 8000, 16000, 32000, 64000])
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.get_xaxis().set_minor_formatter("")
    axes.legend(loc="lower right", fontsize=8)
    save(figure, path)


def tile(planes: np.ndarray, columns: int) -> np.ndarray:
    """Arrange N x H x W in a grid with lines between; each plane is scaled to 0..1."""
    low, high = (end((1, 2), keepdims=True) for end in (planes.min, planes.max))
    planes = (planes - low) / np.maximum(high - low, 1e-12)
    planes = np.pad(planes, ((0, -len(planes) % columns), (1, 1), (1, 1)), constant_values=1)
    count, height, width = planes.shape
    grid = planes.reshape(count // columns, columns, height, width).transpose(0, 2, 1, 3)
    return grid.reshape(-1, columns * width)


def draw_filters(path: Path) -> None:
    """Draw the first layer's filters, sorted by variance, at x2 and x3."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 5))
    for ax, scale in zip(axes, (2, 3)):
        filters = load_srcnn(ROOT / "weights" / f"srcnn_x{scale}.pth").conv1.weight[:, 0]
        filters = filters.detach().numpy()
        order = np.argsort(filters.var(axis=(1, 2)))[::-1]
        ax.imshow(tile(filters[order], 8), cmap="gray")
        ax.set(title=f"conv1, x{scale}", xticks=[], yticks=[])
    save(figure, path)


def draw_features(path: Path) -> None:
    """Draw the activations of the first two layers for a photograph, at x3."""
    rgb = np.asarray(skimage_data.chelsea(), np.float32).transpose(2, 0, 1)[:, :300, 60:390]
    pair = bicubic_pair(luma(rgb), 3)
    model = load_srcnn(ROOT / "weights" / "srcnn_x3.pth")
    x, grids = torch.tensor(pair.ilr)[None, None] / 255, []
    with torch.no_grad():
        for layer in model.layers[:2]:
            x = torch.relu(layer(x))
            order = x[0].flatten(1).var(1).argsort(descending=True)[:16]
            grids.append(tile(x[0, order].sqrt().numpy(), 4))
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5))
    titles = "input: bicubic, x3", "conv1, 16 of 64", "conv2, 16 of 32"
    for ax, image, title in zip(axes, (pair.ilr, *grids), titles):
        ax.imshow(image, cmap="gray")
        ax.set(title=title, xticks=[], yticks=[])
    save(figure, path)


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    add, here = parser.add_argument, Path(__file__).parent
    add("--steps", type=number(int, 2), default=20_000, help="of paper.py (default: 20000)")
    add("--seed", type=number(int, 0, 1 << 32), default=1, help="whose curves (default: 1)")
    add("--work-dir", default=str(here / "work"), help="of paper.py (default: %(default)s)")
    add("--results", default=str(here / "results.csv"), help="of paper.py (default: %(default)s)")
    add("--output-dir", default=str(here), type=Path, help="(default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    require_matplotlib()
    draw_filters(args.output_dir / "filters.png")
    draw_features(args.output_dir / "features.png")
    draw_curves(args, "convergence", args.output_dir / "convergence.png")
    draw_curves(args, "depth", args.output_dir / "depth.png")
    draw_sizes(args, args.output_dir / "sizes.png")


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
