"""The paper's experiments, each by one command; prints our results beside the paper's.

python experiments/paper.py --list                # every experiment and variant
python experiments/paper.py filters               # run one
python experiments/paper.py all --steps 20000     # run all; a stopped call is resumed
python experiments/paper.py protocol              # how each deviation changes the PSNR
python experiments/figures.py                     # figures of the results
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from protocol import print_protocol
from utils import ArgumentParser, InputError, number, raise_exit, run, set_signal_handlers
from utils import Pair, atomic_path, bicubic_pair, check_outputs, find_images, open_input
from utils import crop_to_multiple, psnr, quantize, read_levels, resize, shave
from utils import rgb_to_ycbcr, write_csv, write_file, ycbcr_to_rgb

COLUMNS = ("experiment", "variant", "set", "paper_psnr", "psnr", "ssim", "parameters", "steps")
COLUMNS += ("batch", "seconds", "seed", "commit")
BATCH_SIZE = 16
PLANES = ("Y", "Cb", "Cr", "joint", "RGB")  # joint: over the squared errors of Y, Cb and Cr


@dataclass(frozen=True)
class Variant:
    """A row of a table: what the paper reports, and how it is measured here.

    paper: PSNR in dB on Set5, or of the PLANES; section: where the paper (TPAMI) reports it.
    measure: the function that returns the rows.
    flags: of train.py.
    data: what to train on: "all" of T91, "half", an "eighth", or "synthetic".
    """

    name: str
    paper: float | tuple | None
    section: str
    measure: Callable
    flags: str = ""
    scale: int = 3
    data: tuple[str, ...] = ("all",)
    needs_images: bool = True


# --- commands of this repository ------------------------------------------------------------


def call(script: str, *words: object) -> None:
    """Print a command and run it in this process, so that nothing outlives an interruption."""
    argv = [str(word) for word in words]
    print("$", shlex.join(["python", f"{script}.py", *argv]), flush=True)
    if script == "train":
        status = train.main(*train.parse_args(argv))
    else:
        module = {"prepare": prepare, "test": test}[script]
        status = module.main(module.get_args_parser().parse_args(argv))
    set_signal_handlers(raise_exit)  # train.py only remembers signals
    if status:
        raise SystemExit(status)


def unique_stem(folder: str) -> str:
    """Return a folder's name and a hash of its path, because other folders may have the name."""
    return f"{Path(folder).name}-{zlib.crc32(os.path.realpath(folder).encode()):08x}"


def h5_file(args: argparse.Namespace, name: str, scale: int, *flags: object) -> Path:
    """Return work-dir/NAME_xS.h5, made with these flags of prepare.py if it does not exist."""
    path = Path(args.work_dir, f"{name}_x{scale}.h5")
    if not path.exists():
        call("prepare", *flags, "--output-path", path, "--scale", scale)
    return path


NUM_SYNTHETIC = 91  # images, which give about as many patches as T91
HOLD_OUT = {"half": ("--hold-out", 0.5), "eighth": ("--hold-out", 0.875)}


def h5_files(args: argparse.Namespace, variant: Variant, *flags: object) -> list[Path]:
    """Return a variant's training files, followed by the evaluation file of the first set."""
    suffix, files = "".join(map(str, flags)), []
    for data in variant.data:
        images = "--images-dir", args.images_dir, *HOLD_OUT.get(data, ())
        if data == "synthetic":
            images = "--synthetic", NUM_SYNTHETIC
        name = f"{unique_stem(args.images_dir)}-{data}{suffix}"
        files.append(h5_file(args, name, variant.scale, *images, *flags))
    images = "--images-dir", args.sets[0], "--eval", *flags
    return [*files, h5_file(args, f"{unique_stem(args.sets[0])}{suffix}", variant.scale, *images)]


def trained(
    args: argparse.Namespace,
    variant: Variant,
    seed: int,
    files: list[Path],
    steps: int,
    init: Path | None = None,
) -> Path:
    """Train a network on these h5_files and return its last.pth; a stopped run is resumed.

    Variants of equal flags share a run, whatever their experiment.
    """
    flags = [*variant.flags.split(), "--batch-size", BATCH_SIZE, "--steps", steps, "--seed", seed]
    flags += ["--bf16"] if train.bf16_is_faster(pick_device()) else []
    words = [path.stem for path in (*files, init) if path] + flags
    folder = Path(args.work_dir, re.sub(r"[^\w.]+", "-", " ".join(map(str, words))))
    last = folder / f"x{variant.scale}" / "last.pth"
    flags += ["--init", init] if init else []
    data = "--train-file", *files[:-1], "--eval-file", files[-1], "--scale", variant.scale
    call("train", *data, "--outputs-dir", folder, *flags, "--auto-resume")
    write_file(history_path(args, variant, seed), (last.parent / "history.csv").read_bytes())
    return last


def history_path(args: argparse.Namespace, variant: Variant, seed: int) -> Path:
    """Return where a copy of a variant's history.csv is, for figures.py."""
    name = f"{variant.name}-{args.steps}-{seed}.csv"
    return Path(args.work_dir, "histories", re.sub(r"[^\w.]+", "-", name))


# --- from a variant to its rows -------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a csv file that a script wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def num_parameters(model: SRCNN) -> int:
    """Return the number of weights without biases, as the paper counts."""
    return sum(layer.weight.numel() for layer in model.layers)


def training_columns(args: argparse.Namespace, last: Path) -> dict:
    """Return the columns that describe a training run."""
    seconds = round(float(read_rows(last.parent / "history.csv")[-1]["seconds"]), 1)
    row = {"parameters": num_parameters(load_srcnn(last)), "seconds": seconds}
    return row | {"steps": args.steps, "batch": BATCH_SIZE}


def train_and_score(args: argparse.Namespace, variant: Variant, seed: int) -> Iterator[dict]:
    """Train a network on luma and score it on every set."""
    last = trained(args, variant, seed, h5_files(args, variant), args.steps)
    common = training_columns(args, last)
    for folder in map(Path, args.sets):
        csv_path = last.with_name(f"{folder.name}.csv")
        weights = "--weights-file", last, "--scale", variant.scale
        call("test", "--eval", "--image-file", folder, *weights, "--csv", csv_path)
        rows = read_rows(csv_path)
        scores = {m: fmean(float(row[f"srcnn_{m}"]) for row in rows) for m in ("psnr", "ssim")}
        paper = variant.paper if folder.name == "Set5" else None
        yield common | {"set": folder.name, "paper_psnr": paper} | scores


def score_colour(args: argparse.Namespace, variant: Variant, seed: int) -> Iterator[dict]:
    """Return a row of the table of colour strategies for each of the PLANES."""
    last = None
    if variant.name == "Y only":
        last = trained(args, variant, seed, h5_files(args, variant), args.steps)
    elif variant.name == "RGB":
        files = h5_files(args, variant, "--num-channels", 3)
        last = trained(args, variant, seed, files, args.steps)
    elif variant.name == "YCbCr":
        last = trained(args, variant, seed, ycbcr_files(args), args.steps)
    elif variant.name != "bicubic":
        files = ycbcr_files(args)
        init = pretrained(args, variant, seed, files[0])
        last = trained(args, variant, seed, files, args.steps // 2, init)
    model = load_srcnn(last) if last else None
    common = training_columns(args, last) if last else {}
    for folder in args.sets:
        scores = [score_planes(model, variant.name, path) for path in find_images([folder])]
        for plane, paper, values in zip(PLANES, (*variant.paper, None), zip(*scores)):
            row = {"set": f"{Path(folder).name} {plane}", "psnr": fmean(values)}
            row["paper_psnr"] = paper if Path(folder).name == "Set5" else None
            yield common | row


def score_planes(model: SRCNN | None, strategy: str, path: Path) -> list[float]:
    """Return the PSNR in dB of the PLANES of an image that is downscaled and restored."""
    rgb = crop_to_multiple(read_levels(path, 3)[0], 3)
    hr = quantize(rgb_to_ycbcr(rgb)).astype(np.float32)
    restored_rgb = bicubic_pair(rgb, 3).ilr
    if strategy == "RGB":
        restored_rgb = quantize(restore(model, restored_rgb))
        restored = quantize(rgb_to_ycbcr(restored_rgb))
    else:
        restored = bicubic_pair(hr, 3).ilr
        if strategy == "Y only":
            restored[0] = restore(model, restored[0])
        elif model:
            restored = restore(model, restored)
        restored = quantize(restored)
        restored_rgb = quantize(ycbcr_to_rgb(restored) if model else restored_rgb)
    pairs = [*zip(hr, restored), (hr, restored), (rgb, restored_rgb)]
    return [psnr(shave(truth, 3), shave(ours, 3)) for truth, ours in pairs]


def ycbcr_files(args: argparse.Namespace) -> list[Path]:
    """Return a training and an evaluation file of Y, Cb and Cr, each rounded to 8 bits."""

    def pairs(folder: str) -> Iterator[tuple[Path, Pair]]:
        for path in find_images([folder]):
            rgb, planes = read_levels(path, 3)
            ycbcr = quantize(rgb_to_ycbcr(rgb)).astype(np.float32)
            yield path, bicubic_pair(ycbcr, 3, planes.quantum)

    files, patches = [], {"patch_size": 33, "stride": 14}
    for folder, attributes in (args.images_dir, patches), (args.sets[0], {}):
        path = Path(args.work_dir, f"{unique_stem(folder)}-ycbcr_x3.h5")
        if not path.exists():
            with atomic_path(path) as partial_path:
                prepare.write_h5(partial_path, pairs(folder), attributes | {"scale": 3})
        files.append(path)
    return files


def pretrained(args: argparse.Namespace, variant: Variant, seed: int, file: Path) -> Path:
    """Return weights after half of the steps with a loss over Y alone, or over Cb and Cr."""
    path = Path(args.work_dir, f"{variant.name}-{args.steps}-{seed}.pth".replace(" ", "-"))
    if path.exists():
        return path
    print(f"# pre-training: {variant.name}", flush=True)
    channels = slice(0, 1) if variant.name.startswith("Y") else slice(1, 3)
    torch.manual_seed(seed)
    model = SRCNN(3, kernel_sizes=(9, 1, 5)).to(pick_device(), memory_format=torch.channels_last)
    flags, _ = train.parse_args(["--train-file", str(file), "--optimizer", "muon"])
    optimizers = train.make_optimizers(model, flags)
    patches = H5Patches([file], 3, model.halo)
    batches = Batches(patches, BATCH_SIZE, seed, pick_device(), crop=model.halo)
    pairs = chain.from_iterable(map(batches.epoch, count(1)))
    for step, (ilr, hr) in zip(range(args.steps - args.steps // 2), pairs):
        train.set_learning_rate(optimizers, flags, step, 2 * step / args.steps)
        model.zero_grad()
        F.mse_loss(model(ilr, valid=True)[:, channels], hr[:, channels]).backward()
        for optimizer in optimizers:
            optimizer.step()
    write_file(path, train.to_bytes(train.weights_of(model)))
    return path


def measure_speed(args: argparse.Namespace, variant: Variant, seed: int) -> Iterator[dict]:
    """Measure the seconds per image of the last set at x3: bicubic alone, or with a network."""
    model = None
    if variant.flags:
        flags = train.get_args_parser().parse_args(variant.flags.split())
        model = SRCNN(filters=flags.filters, kernel_sizes=flags.kernel_sizes)
        model = model.to(memory_format=torch.channels_last)
    pairs = [bicubic_pair(read_levels(path)[0], 3) for path in find_images([args.sets[-1]])]
    seconds = []
    for _ in range(3):  # the fastest round counts, because other work only slows a round down
        start = time.perf_counter()
        for pair in pairs:
            ilr = resize(pair.lr, pair.hr.shape)
            if model:
                restore(model, ilr)
        seconds.append((time.perf_counter() - start) / len(pairs))
    row = {"set": Path(args.sets[-1]).name, "seconds": round(min(seconds), 4)}
    yield row | ({"parameters": num_parameters(model)} if model else {})


def draw(args: argparse.Namespace, variant: Variant, seed: int) -> list:
    """Measure nothing: figures.py draws this from the weights of this repository."""
    print("$ python experiments/figures.py")
    return []


# --- experiments ----------------------------------------------------------------------------


def network(kernels: str, filters: str = "64 32") -> str:
    """Return the flags of train.py for a network."""
    return f"--optimizer muon --kernel-sizes {kernels.replace('-', ' ')} --filters {filters}"


def trained_variant(name: str, paper: float | None, section: str, flags: str, **kwargs) -> Variant:
    """Return a variant that is trained on luma and scored."""
    return Variant(name, paper, section, train_and_score, flags, **kwargs)


SIZES = {"9-1-5": 32.52, "11-1-7": 32.57, "9-3-5": 32.66, "9-5-5": 32.75}
FILTERS = {"128-64": 32.60, "64-32": 32.52, "32-16": 32.26}
DEEP = {"9-1-1-5": "64 32 32", "9-1-1-1-5": "64 32 32 16"}
DEEP |= dict.fromkeys(("9-3-1-5", "9-5-1-5", "9-3-3-5", "9-3-3-3"), "64 32 16")
DATA = {"T91": ("all",), "synthetic images": ("synthetic",), "both": ("all", "synthetic")}
DATA |= {"half of T91": ("half",), "an eighth of T91": ("eighth",)}
COLOUR = {
    "bicubic": (30.39, 45.44, 45.42, 34.57),
    "Y only": (32.39, 45.44, 45.42, 36.37),
    "YCbCr": (29.25, 43.30, 43.49, 33.47),
    "Y pre-train": (32.19, 46.49, 46.45, 36.32),
    "CbCr pre-train": (32.14, 46.38, 45.84, 36.25),
    "RGB": (32.33, 46.18, 46.20, 36.44),
}
SPEED = {
    "bicubic": ("", "4.4"),
    "9-1-5": (network("9-1-5"), "4.4: 0.18 s"),
    "9-3-5": (network("9-3-5"), "4.4"),
    "9-5-5": (network("9-5-5"), "4.4"),
    "9-1-5, 128-64": (network("9-1-5", "128 64"), "4.3.1, table 1: 0.60 s"),
}
EXPERIMENTS = {
    "headline": [
        trained_variant(f"9-1-5 x{s}", paper, "4.4, table 2", network("9-1-5"), scale=s)
        for s, paper in ((2, 36.34), (3, 32.39), (4, 30.09))
    ],
    "filters": [
        trained_variant(name, paper, "4.3.1, table 1", network("9-1-5", name.replace("-", " ")))
        for name, paper in FILTERS.items()
    ],
    "sizes": [
        trained_variant(name, paper, "4.3.2, figure 7", network(name))
        for name, paper in SIZES.items()
    ],
    "depth": [
        trained_variant(name, None, "4.3.3, curves", network(name, filters))
        for name, filters in DEEP.items()
    ],
    "data": [
        trained_variant(name, 32.39 if name == "T91" else None, "4.1", network("9-1-5"), data=data)
        for name, data in DATA.items()
    ],
    "colour": [
        Variant(name, paper, "4.5, table 5", score_colour, network("9-1-5"))
        for name, paper in COLOUR.items()
    ],
    "convergence": [
        trained_variant(name, None, "figures 1, 4", flags)
        for name, flags in (
            ("SGD, the paper's", "--recipe paper --kernel-sizes 9 1 5"),
            ("Adam", "--kernel-sizes 9 1 5"),
            ("Muon", network("9-1-5")),
        )
    ],
    "seen": [Variant("filters, feature maps", None, "4.2, figures 5, 6", draw, needs_images=False)],
    "initialisation": [
        trained_variant(
            f"{init}, last layer {lr:g}",
            None,
            "3.3",
            f"--init {init} --kernel-sizes 9 1 5 --last-layer-lr {lr:g}",
        )
        for init in ("gaussian", "default", "identity")
        for lr in (0.1, 1.0)
    ],
    "speed": [
        Variant(name, None, section, measure_speed, flags)
        for name, (flags, section) in SPEED.items()
    ],
}


# --- results --------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict]:
    """Return the rows of results.csv, none where it does not exist.

    Raises:
        InputError: a file with other columns, which is not changed.
    """
    if not path.exists():
        return []
    hint = "name another --results"
    with open_input(path, "results file", hint), path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"has other columns than {', '.join(COLUMNS)}; {hint}")
        return list(reader)


def matching(rows: list[dict], args: argparse.Namespace, experiment: str, variant: Variant) -> list:
    """Return the rows of a variant with this number of steps, or without steps."""
    return [
        row
        for row in rows
        if (row["experiment"], row["variant"]) == (experiment, variant.name)
        and row["steps"] in ("", str(args.steps))
    ]


def print_table(rows: list[dict], args: argparse.Namespace, experiment: str, path: Path) -> None:
    """Print our PSNR beside the paper's: the mean over the seeds, and the range."""
    titles = f"{'set':14}{'paper dB':>10}{'our dB':>10}  {'range over seeds':22}"
    print(f"\n{experiment:28}{titles}{'parameters':>10}{'seconds':>10}")
    sources = set()
    for variant in EXPERIMENTS[experiment]:
        found = matching(rows, args, experiment, variant)
        sources |= {(row["commit"], row["seed"]) for row in found}
        for name in dict.fromkeys(row["set"] for row in found):
            of_set = [row for row in found if row["set"] == name]
            values = [float(row["psnr"]) for row in of_set if row["psnr"]]
            paper = f"{float(of_set[0]['paper_psnr']):.2f}" if of_set[0]["paper_psnr"] else "-"
            ours = f"{fmean(values):.2f}" if values else "-"
            spread = ""
            if len(values) > 1:
                spread = f"{len(values)} seeds: {min(values):.2f} to {max(values):.2f}"
            end = f"{of_set[0]['parameters'] or '-':>10}{of_set[0]['seconds'] or '-':>10}"
            print(f"{variant.name:28}{name:14}{paper:>10}{ours:>10}  {spread:22}{end}")
    commits, seeds = (", ".join(sorted({s[i] for s in sources if s[i]})) for i in (0, 1))
    print(f"from {path} (commit {commits}; seed {seeds}); --results FILE trains again")


def current_commit() -> str:
    """Return the commit of this repository, or nothing where git does not know it."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# --- command line ---------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("experiment", nargs="*", help=f"all, some of {', '.join(EXPERIMENTS)}, or protocol")
    add("--list", action="store_true", help="print every experiment, variant and paper's result")
    add("--steps", type=number(int, 2), default=20_000, help="of training (default: 20000)")
    add("--seeds", type=number(int, 0, 1 << 32), nargs="+", default=[1], help="(default: 1)")
    add("--images-dir", default="data/T91", help="training images (default: data/T91)")
    add("--sets", nargs="+", default=["data/Set5", "data/Set14"], metavar="DIR", help="to score")
    work = Path(__file__).with_name("work")
    add("--work-dir", default=str(work), help="h5 files, weights, histories (default: %(default)s)")
    add("--results", help="file to which rows are added (default: results.csv, which is only read)")
    return parser


def print_list() -> None:
    """Print every experiment, variant, result of the paper, and section."""
    for experiment, variants in EXPERIMENTS.items():
        for variant in variants:
            paper = variant.paper if isinstance(variant.paper, tuple) else (variant.paper or "-",)
            results = " / ".join(map(str, paper))
            print(f"{experiment:16}{variant.name:30}{results:32}{variant.section}")


def main(args: argparse.Namespace) -> None:
    if args.list:
        print_list()
        return
    experiments = args.experiment
    if experiments == ["protocol"]:
        print_protocol(args.sets[0])
        return
    if not experiments or not {*experiments} <= {*EXPERIMENTS, "all"}:
        names = " ".join(experiments) or "no experiment"
        raise InputError(f"{names}: choose from all, protocol, {', '.join(EXPERIMENTS)}")
    experiments = list(EXPERIMENTS) if "all" in experiments else experiments
    path = Path(args.results or Path(__file__).with_name("results.csv"))
    set_names = {f"{Path(s).name} {plane}".strip() for s in args.sets for plane in ("", *PLANES)}
    if args.results:
        check_outputs([("--results", path)], [])
    rows = read_results(path)
    jobs = [(e, v, seed) for e in experiments for v in EXPERIMENTS[e] for seed in args.seeds]
    for i, (experiment, variant, seed) in enumerate(jobs, 1):
        done = matching(rows, args, experiment, variant)
        if any(row["seed"] == str(seed) and row["set"] in set_names for row in done):
            continue
        if not args.results and variant.needs_images:
            raise InputError(
                f"{experiment}: {path} has no row with these flags; pass --results FILE to train"
            )
        print(f"\n[{i}/{len(jobs)}] {experiment}: {variant.name}, seed {seed}", flush=True)
        if variant.needs_images:
            find_images(args.sets, folders_only=True)
        common = dict.fromkeys(COLUMNS) | {"experiment": experiment, "variant": variant.name}
        common |= {"seed": seed, "commit": current_commit()}
        new_rows = [common | row for row in variant.measure(args, variant, seed)]
        if new_rows:
            write_csv(path, COLUMNS, rows + new_rows)
            rows = read_results(path)  # all values as text
    for experiment in experiments:
        if any(row["experiment"] == experiment for row in rows):
            print_table(rows, args, experiment, path)


if __name__ == "__main__":
    run(lambda: main(get_args_parser().parse_args()))
