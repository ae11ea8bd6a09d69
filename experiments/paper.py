"""The paper's experiments, each by one command; prints our figures beside the paper's.

python experiments/paper.py --list                # every experiment and variant
python experiments/paper.py filters               # run one
python experiments/paper.py all --steps 20000     # run all; goes on where it stopped
python experiments/figures.py                     # pictures of what they found
"""

import argparse
import csv
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before the standard library's own package `test`

import prepare
import test
import train
from datasets import Batches, H5Patches
from models import SRCNN, load_srcnn, pick_device, restore
from utils import ArgumentParser, InputError, exit_by_signal, number, on_stop_signals, run
from utils import Pair, atomic_path, bicubic_pair, check_outputs, images_in, read_levels, resize
from utils import crop_to_multiple, psnr, reading, rgb_to_ycbcr, shave, to_8bit, ycbcr_to_rgb
from utils import write_csv, write_whole

COLUMNS = ("experiment", "variant", "set", "paper_psnr", "psnr", "ssim", "parameters", "steps")
COLUMNS += ("batch", "seconds", "seed", "commit")
BATCH = 16
PLANES = ("Y", "Cb", "Cr", "joint", "RGB")  # joint: over the squared errors of Y, Cb and Cr


@dataclass(frozen=True)
class Variant:
    """A row of a table: what the paper says, and how it is found out here.

    paper: PSNR in dB on Set5, or of the PLANES; where: in the paper (TPAMI).
    flags: of train.py; data: all training pictures, half, an eighth, or drawn ones;
    function: what makes the rows.
    last_layer: its learning rate, as a fraction of the others'.
    """

    name: str
    paper: float | tuple | None
    where: str
    flags: str = ""
    scale: int = 3
    data: tuple[str, ...] = ("all",)
    last_layer: float = train.LAST_LAYER
    function: str = "train_and_score"


def network(kernels: str, filters: str = "64 32") -> str:
    """The flags of a network, in train.py's words."""
    return f"--optimizer muon --kernel-sizes {kernels.replace('-', ' ')} --filters {filters}"


def colour(name: str, *paper: float) -> Variant:
    """A row of the table of colour strategies; where nothing is given, the last is unknown."""
    return Variant(name, paper, "4.5, table 5", network("9-1-5"), function="score_colour")


SIZES = {"9-1-5": 32.52, "11-1-7": 32.57, "9-3-5": 32.66, "9-5-5": 32.75}
FILTERS = {"128-64": 32.60, "64-32": 32.52, "32-16": 32.26}
DEEP = {"9-1-1-5": "64 32 32", "9-1-1-1-5": "64 32 32 16"}
DEEP |= dict.fromkeys(("9-3-1-5", "9-5-1-5", "9-3-3-5", "9-3-3-3"), "64 32 16")
DRAWN = 91  # pictures, of which about as many patches can be cut as of T91
HOLD_OUT = {"half": ("--hold-out", 0.5), "eighth": ("--hold-out", 0.875)}
DATA = {"T91": ("all",), "drawn pictures": ("drawn",), "both": ("all", "drawn")}
DATA |= {"half of T91": ("half",), "an eighth of T91": ("eighth",)}
EXPERIMENTS = {
    "headline": [
        Variant(f"9-1-5 x{scale}", paper, "4.4, table 2", network("9-1-5"), scale)
        for scale, paper in ((2, 36.34), (3, 32.39), (4, 30.09))
    ],
    "filters": [
        Variant(name, paper, "4.3.1, table 1", network("9-1-5", name.replace("-", " ")))
        for name, paper in FILTERS.items()
    ],
    "sizes": [
        Variant(name, paper, "4.3.2, figure 7", network(name)) for name, paper in SIZES.items()
    ],
    "depth": [
        Variant(name, None, "4.3.3, curves", network(name, filters))
        for name, filters in DEEP.items()
    ],
    "data": [
        Variant(name, 32.39 if name == "T91" else None, "4.1", network("9-1-5"), data=data)
        for name, data in DATA.items()
    ],
    "colour": [
        colour("bicubic", 30.39, 45.44, 45.42, 34.57),
        colour("Y only", 32.39, 45.44, 45.42, 36.37),
        colour("YCbCr", 29.25, 43.30, 43.49, 33.47),
        colour("Y pre-train", 32.19, 46.49, 46.45, 36.32),
        colour("CbCr pre-train", 32.14, 46.38, 45.84, 36.25),
        colour("RGB", 32.33, 46.18, 46.20, 36.44),
    ],
    "convergence": [
        Variant("SGD, the paper's", None, "figures 1, 4", "--recipe paper --kernel-sizes 9 1 5"),
        Variant("Adam", None, "figures 1, 4", "--kernel-sizes 9 1 5"),
        Variant("Muon", None, "figures 1, 4", network("9-1-5")),
    ],
    "seen": [
        Variant(name, None, "4.2, figures 5, 6", function="draw")
        for name in ("filters, x2 and x3", "feature maps")
    ],
    "initialisation": [
        Variant(
            f"{init}, last layer {rate:g}",
            None,
            "3.3",
            f"--init {init} --kernel-sizes 9 1 5",
            last_layer=rate,
        )
        for init in ("gaussian", "default", "identity")
        for rate in (0.1, 1.0)
    ],
    "speed": [
        Variant(name, None, f"4.4{said}", flags, function="measure_speed")
        for name, flags, said in (
            ("bicubic", "", ""),
            ("9-1-5", network("9-1-5"), ": 0.18 s"),
            ("9-3-5", network("9-3-5"), ""),
            ("9-5-5", network("9-5-5"), ""),
            ("9-1-5, 128-64", network("9-1-5", "128 64"), "; 4.3.1, table 1: 0.60 s"),
        )
    ],
}


# --- the real commands ----------------------------------------------------------------------


def call(script: str, *words: object) -> None:
    """Print a command and run it, in this process: nothing is left running when it ends."""
    argv = [str(word) for word in words]
    print("$", shlex.join(["python", f"{script}.py", *argv]), flush=True)
    if script == "train":
        status = train.main(*train.parse_args(argv))
    else:
        module = {"prepare": prepare, "test": test}[script]
        status = module.main(module.get_args_parser().parse_args(argv))
    on_stop_signals(exit_by_signal)  # train.py only remembers them
    if status:
        sys.exit(status)


def stem(folder: str) -> str:
    """A folder's name, and a number for its place: others may have the name, too."""
    return f"{Path(folder).name}-{zlib.crc32(os.path.realpath(folder).encode()):08x}"


def h5_file(args: argparse.Namespace, name: str, scale: int, *flags: object) -> Path:
    """work-dir/NAME_xS.h5, made with these flags of prepare.py if it is not there."""
    path = Path(args.work_dir, f"{name}_x{scale}.h5")
    if not path.exists():
        call("prepare", *flags, "--output-path", path, "--scale", scale)
    return path


def h5_files(args: argparse.Namespace, variant: Variant, *flags: object) -> list[Path]:
    """A variant's training files, and behind them the evaluation file of the first set."""
    folder, suffix = args.images_dir, "".join(map(str, flags))
    files = []
    for data in variant.data:
        pictures = "--images-dir", folder, *HOLD_OUT.get(data, ())
        if data == "drawn":
            pictures = "--synthetic", DRAWN
        name = f"{stem(folder)}-{data}{suffix}"
        files.append(h5_file(args, name, variant.scale, *pictures, *flags))
    known = args.sets[0]
    pictures = "--images-dir", known, "--eval", *flags
    return [*files, h5_file(args, f"{stem(known)}{suffix}", variant.scale, *pictures)]


def trained(
    args: argparse.Namespace,
    variant: Variant,
    seed: int,
    files: list[Path],
    steps: int,
    init: Path | None = None,
) -> Path:
    """The last.pth of a network trained on these h5_files; a stopped run goes on.

    Variants of equal flags, of whatever experiment, share a run.
    """
    flags = [*variant.flags.split(), "--batch-size", BATCH, "--steps", steps, "--seed", seed]
    flags += ["--bf16"] * train.has_bf16(pick_device(None))
    words = [path.stem for path in (*files, init) if path] + flags
    words += ["last", variant.last_layer]
    folder = Path(args.work_dir, re.sub(r"[^\w.]+", "-", " ".join(map(str, words))))
    last = folder / f"x{variant.scale}" / "last.pth"
    flags += ["--init", init] if init else []
    usual, train.LAST_LAYER = train.LAST_LAYER, variant.last_layer
    if variant.last_layer != usual:
        print(f"# LAST_LAYER = {variant.last_layer} in train.py")
    if last.exists():
        call("train", "--resume", last)
    else:
        where = "--eval-file", files[-1], "--scale", variant.scale, "--outputs-dir", folder
        call("train", "--train-file", *files[:-1], *where, *flags)
    train.LAST_LAYER = usual
    write_whole(history(args, variant, seed), (last.parent / "history.csv").read_bytes())
    return last


def history(args: argparse.Namespace, variant: Variant, seed: int) -> Path:
    """Where a copy of a variant's history.csv goes, for figures.py."""
    name = f"{variant.name}-{args.steps}-{seed}.csv"
    return Path(args.work_dir, "histories", re.sub(r"[^\w.]+", "-", name))


# --- from a variant to its rows -------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The rows of a csv file that a script wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def parameters(model: SRCNN) -> int:
    """How many weights a network has, without biases, as the paper counts."""
    return sum(layer.weight.numel() for layer in model.layers)


def run_of(args: argparse.Namespace, last: Path) -> dict:
    """What a row says of a training run."""
    seconds = float(read_rows(last.parent / "history.csv")[-1]["seconds"])
    row = {"parameters": parameters(load_srcnn(last)), "seconds": round(seconds, 1)}
    return row | {"steps": args.steps, "batch": BATCH}


def train_and_score(args: argparse.Namespace, variant: Variant, seed: int) -> Iterator[dict]:
    """Train a network on luma and score it on every set."""
    last = trained(args, variant, seed, h5_files(args, variant), args.steps)
    of_run = run_of(args, last)
    for known in map(Path, args.sets):
        scores = last.with_name(f"{known.name}.csv")
        where = "--weights-file", last, "--scale", variant.scale, "--csv", scores
        call("test", "--eval", "--image-file", known, *where)
        rows = read_rows(scores)
        psnr, ssim = (
            fmean(float(row[f"srcnn_{what}"]) for row in rows) for what in ("psnr", "ssim")
        )
        paper = variant.paper if known.name == "Set5" else None
        figures = {"set": known.name, "paper_psnr": paper, "psnr": psnr, "ssim": ssim}
        yield of_run | figures


def score_colour(args: argparse.Namespace, variant: Variant, seed: int) -> Iterator[dict]:
    """A row of the table of colour strategies, as rows of its PLANES."""
    last = None
    if variant.name == "Y only":
        last = trained(args, variant, seed, h5_files(args, variant), args.steps)
    elif variant.name == "RGB":
        last = trained(
            args, variant, seed, h5_files(args, variant, "--num-channels", 3), args.steps
        )
    elif variant.name == "YCbCr":
        last = trained(args, variant, seed, ycbcr_files(args), args.steps)
    elif variant.name != "bicubic":
        files, half = ycbcr_files(args), args.steps // 2
        last = trained(args, variant, seed, files, half, pretrained(args, variant, seed, files[0]))
    model, of_run = (load_srcnn(last), run_of(args, last)) if last else (None, {})
    for known in args.sets:
        scores = [score_planes(model, variant.name, path) for path in images_in([known])]
        for plane, paper, values in zip(PLANES, (*variant.paper, None), zip(*scores)):
            figures = {"set": f"{Path(known).name} {plane}", "psnr": fmean(values)}
            figures["paper_psnr"] = paper if Path(known).name == "Set5" else None
            yield of_run | figures


def score_planes(model: SRCNN | None, strategy: str, path: Path) -> list[float]:
    """PSNR in dB of the PLANES of a picture that is reduced and restored."""
    rgb = crop_to_multiple(read_levels(path, 3)[0], 3)
    hr = to_8bit(rgb_to_ycbcr(rgb)).astype(np.float32)
    restored_rgb = bicubic_pair(rgb, 1, 3).ilr
    if strategy == "RGB":
        restored_rgb = to_8bit(restore(model, restored_rgb))
        restored = to_8bit(rgb_to_ycbcr(restored_rgb))
    else:
        restored = bicubic_pair(hr, 1, 3).ilr
        if strategy == "Y only":
            restored[0] = restore(model, restored[0])
        elif model:
            restored = restore(model, restored)
        restored = to_8bit(restored)
        restored_rgb = to_8bit(ycbcr_to_rgb(restored) if model else restored_rgb)
    pairs = [*zip(hr, restored), (hr, restored), (rgb, restored_rgb)]
    return [psnr(shave(truth, 3), shave(ours, 3)) for truth, ours in pairs]


def ycbcr_files(args: argparse.Namespace) -> list[Path]:
    """Training and evaluation file of Y, Cb and Cr, each rounded to 8 bits."""

    def pairs(folder: str) -> Iterator[tuple[Path, Pair]]:
        for path in images_in([folder]):
            rgb, step = read_levels(path, 3)
            yield path, bicubic_pair(to_8bit(rgb_to_ycbcr(rgb)).astype(np.float32), step, 3)

    patches = partial(prepare.append_patches, size=33, stride=14)
    files = []
    for folder, append in (args.images_dir, patches), (args.sets[0], prepare.append_picture):
        path = Path(args.work_dir, f"{stem(folder)}-ycbcr_x3.h5")
        if not path.exists():
            with atomic_path(path) as partial_path:
                prepare.write_h5(partial_path, pairs(folder), append, {"scale": 3})
        files.append(path)
    return files


def pretrained(args: argparse.Namespace, variant: Variant, seed: int, file: Path) -> Path:
    """Weights after half of the steps with a loss over Y alone, or over Cb and Cr."""
    path = Path(args.work_dir, f"{variant.name}-{args.steps}-{seed}.pth".replace(" ", "-"))
    if path.exists():
        return path
    print(f"# pre-training: {variant.name}", flush=True)
    channels = slice(0, 1) if variant.name.startswith("Y") else slice(1, 3)
    torch.manual_seed(seed)
    device, kernels = pick_device(None), (9, 1, 5)
    model = SRCNN(3, kernel_sizes=kernels).to(device, memory_format=torch.channels_last)
    optimizers = train.make_optimizers(model, "muon", train.LEARNING_RATES["muon"])
    patches = H5Patches([file], 3, model.halo)
    batches = Batches(patches, BATCH, seed, device, crop=model.halo)
    schedule = argparse.Namespace(warmup=100, schedule="cosine")
    pairs = chain.from_iterable(map(batches.epoch, count(1)))
    for step, (ilr, hr) in zip(range(args.steps - args.steps // 2), pairs):
        train.set_learning_rate(optimizers, schedule, step, 2 * step / args.steps)
        model.zero_grad()
        F.mse_loss(model(ilr, valid=True)[:, channels], hr[:, channels]).backward()
        for optimizer in optimizers:
            optimizer.step()
    write_whole(path, train.to_bytes(train.weights_of(model)))
    return path


def measure_speed(args: argparse.Namespace, variant: Variant, seed: int) -> Iterator[dict]:
    """Seconds a picture of the last set at x3: bicubic, or the network behind it."""
    model = None
    if variant.flags:
        words = train.get_args_parser().parse_args(variant.flags.split())
        model = SRCNN(filters=words.filters, kernel_sizes=words.kernel_sizes)
        model = model.to(memory_format=torch.channels_last)
    pairs = [bicubic_pair(*read_levels(path), 3) for path in images_in([args.sets[-1]])]
    seconds = []
    for _ in range(3):  # the fastest counts: what slows a round down is something else
        start = time.perf_counter()
        for pair in pairs:
            ilr = resize(pair.lr, pair.hr.shape)
            if model:
                restore(model, ilr)
        seconds.append((time.perf_counter() - start) / len(pairs))
    row = {"set": Path(args.sets[-1]).name, "seconds": round(min(seconds), 4)}
    yield row | ({"parameters": parameters(model)} if model else {})


def draw(args: argparse.Namespace, variant: Variant, seed: int) -> list:
    """Nothing to measure: figures.py draws it from the weights of this repository."""
    print("$ python experiments/figures.py")
    return []


# --- results --------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict]:
    """The rows of results.csv so far.

    Raises:
        InputError: a file of other columns, which is left as it is.
    """
    if not path.exists():
        return []
    cure = "name another --results"
    with reading(path, "results file", cure), path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"has other columns than {', '.join(COLUMNS)}; {cure}")
        return list(reader)


def matching(rows: list[dict], args: argparse.Namespace, experiment: str, variant: Variant) -> list:
    """The rows of a variant at this number of steps, or that needed none."""
    return [
        row
        for row in rows
        if (row["experiment"], row["variant"]) == (experiment, variant.name)
        and row["steps"] in ("", str(args.steps))
    ]


def print_table(rows: list[dict], args: argparse.Namespace, experiment: str) -> None:
    """Ours beside the paper's, mean over the seeds, with the range."""
    print(f"\n{experiment:28}{'set':14}{'paper':>8}{'ours':>8}   seeds, from - to, parameters, s")
    for variant in EXPERIMENTS[experiment]:
        found = matching(rows, args, experiment, variant)
        for name in dict.fromkeys(row["set"] for row in found):
            of_set = [row for row in found if row["set"] == name]
            values = [float(row["psnr"]) for row in of_set if row["psnr"]]
            ours = f"{fmean(values):8.2f}   {len(values)}, " if values else f"{'':11}"
            ours += f"{min(values):.2f} - {max(values):.2f}, " if values else ""
            ours += f"{of_set[0]['parameters'] or '-'}, {of_set[0]['seconds'] or '-'}"
            print(f"{variant.name:28}{name:14}{of_set[0]['paper_psnr']:>8}{ours}")


def commit() -> str:
    """The commit of this repository, or nothing where git does not know it."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# --- command line ---------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("experiment", nargs="*", help=f"all, or of {', '.join(EXPERIMENTS)}")
    add("--list", action="store_true", help="print every experiment, variant and paper's figure")
    add("--steps", type=number(int, 2), default=20_000, help="of training (default: 20000)")
    add("--seeds", type=number(int, 0, 1 << 32), nargs="+", default=[1], help="(default: 1)")
    add("--images-dir", default="data/T91", help="training pictures (default: data/T91)")
    add("--sets", nargs="+", default=["data/Set5", "data/Set14"], metavar="DIR", help="to score")
    work = Path(__file__).with_name("work")
    add("--work-dir", default=str(work), help="h5 files, weights, histories (default: %(default)s)")
    add("--results", default=str(work.with_name("results.csv")), help="(default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.list:
        for experiment, variants in EXPERIMENTS.items():
            for variant in variants:
                paper = variant.paper or "-"
                paper = paper if isinstance(paper, (str, float)) else " / ".join(map(str, paper))
                print(f"{experiment:16}{variant.name:30}{paper!s:32}{variant.where}")
        return
    chosen = args.experiment
    if not chosen or not {*chosen} <= {*EXPERIMENTS, "all"}:
        raise InputError(
            f"{' '.join(chosen) or 'no experiment'}: choose of all, {', '.join(EXPERIMENTS)}"
        )
    chosen = list(EXPERIMENTS) if "all" in chosen else chosen
    path = Path(args.results)
    sets = {f"{Path(s).name} {plane}".strip() for s in args.sets for plane in ("", *PLANES)}
    check_outputs([("--results", args.results)], [])
    rows = read_results(path)
    jobs = [(e, v, seed) for e in chosen for v in EXPERIMENTS[e] for seed in args.seeds]
    for i, (experiment, variant, seed) in enumerate(jobs, 1):
        print(f"\n[{i}/{len(jobs)}] {experiment}: {variant.name}, seed {seed}", flush=True)
        done = matching(rows, args, experiment, variant)
        if any(row["seed"] == str(seed) and row["set"] in sets for row in done):
            continue
        if variant.function != "draw":
            images_in(args.sets)
        known = dict.fromkeys(COLUMNS) | {"experiment": experiment, "variant": variant.name}
        known |= {"seed": seed, "commit": commit()}
        found = list(globals()[variant.function](args, variant, seed))
        write_csv(path, COLUMNS, rows + [known | row for row in found])
        rows = read_results(path)  # all values as text, like those of before
    for experiment in chosen:
        print_table(rows, args, experiment)


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
