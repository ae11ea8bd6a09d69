"""Draw the learning curves of runs: PSNR and loss from their history.csv.

python experiments/curves.py outputs/x3/history.csv --output curves.png
python experiments/curves.py outputs/*/history.csv --x minutes --lines paper=32.75 bicubic=30.39

Needs experiments/requirements.txt.
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from figures import pyplot, require_matplotlib, save
from utils import ArgumentParser, InputError, expand_patterns, open_input, run

# Set5: bicubic, the paper's 9-1-5 from 91 images, and its 9-5-5 from ImageNet.
PAPER = {
    2: {"bicubic": 33.66, "paper 9-1-5": 36.34, "paper 9-5-5": 36.66},
    3: {"bicubic": 30.39, "paper 9-1-5": 32.39, "paper 9-5-5": 32.75},
    4: {"bicubic": 28.42, "paper 9-1-5": 30.09, "paper 9-5-5": 30.49},
}
UNITS = {"steps": ("step", 1), "minutes": ("seconds", 1 / 60)}  # column of history.csv, factor


def read_history(path: Path, x: str) -> dict[str, list]:
    """Return x, loss and psnr of a history.csv; psnr is empty without --eval-file.

    Raises:
        InputError: missing, without rows, or without the columns of train.py.
    """
    column, factor = UNITS[x]
    hint = "pass a history.csv of train.py"
    with open_input(path, "history", hint), path.open(newline="") as file:
        rows = list(csv.DictReader(file))
        if not rows:
            raise InputError(f"has no rows; {hint}")
        return {
            "x": [float(row[column]) * factor for row in rows],
            "loss": [float(row["loss"]) for row in rows],
            "psnr": [float(row["psnr"]) for row in rows if row["psnr"]],
        }


def line(text: str) -> tuple[str, float]:
    """Parse NAME=DB."""
    name, _, value = text.rpartition("=")
    return name, float(value)


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("histories", nargs="+", metavar="history.csv", help="of one or several runs")
    add("--output", default="curves.png", metavar="FILE.png", help="(default: curves.png)")
    add("--x", choices=tuple(UNITS), default="steps", help="(default: steps)")
    scale = "draw bicubic's and the paper's results on Set5 at this scale (default: 3)"
    add("--scale", type=int, choices=tuple(PAPER), default=3, help=scale)
    lines = "dashed lines to draw instead, in dB"
    add("--lines", type=line, nargs="*", metavar="NAME=DB", help=lines)
    return parser


def main(args: argparse.Namespace) -> None:
    require_matplotlib()
    paths = expand_patterns(args.histories)
    histories = {path: read_history(path, args.x) for path in paths}
    figure, axes = pyplot.subplots(2, 1, figsize=(7, 7), sharex=True)
    for path, history in histories.items():
        label = "/".join(path.resolve().parts[-3:-1])
        if history["psnr"]:
            axes[0].plot(history["x"], history["psnr"], marker=".", label=label)
        axes[1].plot(history["x"], history["loss"], marker=".", label=label)
    lines = PAPER[args.scale].items() if args.lines is None else args.lines
    for name, value in lines:
        axes[0].axhline(value, color="grey", linestyle="--", linewidth=1)
        place = {"transform": axes[0].get_yaxis_transform(), "va": "bottom", "fontsize": 8}
        axes[0].text(0.01, value, f"{name} {value:.2f}", color="grey", **place)
    axes[0].set(ylabel="PSNR, dB")
    axes[1].set(ylabel="loss", xlabel=args.x, yscale="log")
    axes[1].legend()
    save(figure, Path(args.output))


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
