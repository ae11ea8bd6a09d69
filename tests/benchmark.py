"""Measure the speed of training and upscaling as ratios within one run, on an idle machine.

python tests/benchmark.py train
python tests/benchmark.py upscale
python tests/benchmark.py time-to-psnr "--recipe fast --minutes 1" "--minutes 4" --seeds 1 2
"""

import argparse
import csv
import itertools
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare
from datasets import Batches, H5Patches
from models import SRCNN, load_srcnn, pick_device, restore

OPERATIONS = 2 * 57_184  # of the network for a pixel: multiplications and additions


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rate(function: object, device: torch.device, seconds: float = 3.0) -> float:
    """Return calls per second; a first call is not counted."""
    function()
    wait(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        function()
        calls += 1
        if device.type != "cuda" or calls % 20 == 0:
            wait(device)
    wait(device)
    return calls / (time.perf_counter() - start)


def matmul_rate(device: torch.device, size: int = 2048) -> float:
    """Return operations per second of a large float32 matrix product: the machine's peak."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 * rate(lambda: a @ b, device, 2.0)


# --- train --------------------------------------------------------------------------


class TheirDataset(Dataset):
    """yjn870's data set: the file is opened for every item."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        with h5py.File(self.path) as file:
            return len(file["lr"])

    def __getitem__(self, i: int) -> tuple:
        with h5py.File(self.path) as file:
            pair = (file[name][i] / 255 for name in ("lr", "hr"))
            return tuple(np.expand_dims(patch, 0) for patch in pair)


def their_loop(path: Path, device: torch.device, seconds: float) -> float:
    """Return patches per second of yjn870's training loop."""
    warnings.simplefilter("ignore")  # of more workers than cores, and no pinned memory
    layers = [nn.Conv2d(1, 64, 9, padding=4), nn.Conv2d(64, 32, 5, padding=2)]
    last = nn.Conv2d(32, 1, 5, padding=2)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), last).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    loader = DataLoader(TheirDataset(path), 16, shuffle=True, num_workers=8, pin_memory=True)
    start, patches = time.perf_counter(), 0
    while True:
        for lr, hr in loader:
            loss = F.mse_loss(model(lr.to(device)), hr.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            patches += len(lr)
            if time.perf_counter() - start > seconds:
                return patches / (time.perf_counter() - start)


def our_loop(path: Path, device: torch.device, bf16: bool, seconds: float) -> float:
    """Return patches per second of train.py as a user calls it, loading and EMA included."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Path(folder, "eval.h5")
        argv = ["--synthetic", "1", "--scale", "3", "--eval", "--output-path", evaluation]
        prepare.main(prepare.get_args_parser().parse_args(map(str, argv)))
        command = [ROOT / "train.py", "--train-file", path, "--eval-file", evaluation]
        command += ["--scale", 3, "--outputs-dir", folder, "--minutes", seconds / 60]
        command += ["--device", device.type, *["--bf16"] * bf16]
        run([*command, "--num-workers", 0])
        state = torch.load(Path(folder, "x3", "last.pth"), weights_only=True)
    return 16 * state["global_step"] / state["seconds"]


def run(command: list) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def benchmark_train(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.h5")
        argv = ["--synthetic", 64, "--scale", 3, "--output-path", path]
        prepare.main(prepare.get_args_parser().parse_args(map(str, argv)))
        theirs = their_loop(path, device, args.seconds)
        ours = our_loop(path, device, False, args.seconds)
        bf16 = our_loop(path, device, True, args.seconds)
        start = time.perf_counter()
        batches = Batches(H5Patches([path], 3, 8), 16, 1, device, crop=8)
        print(f"loading {len(batches.patches)} patches: {time.perf_counter() - start:.1f} s")
    model = SRCNN().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    lr, hr = next(batches.epoch(1))

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(lr, valid=True), hr).backward()
        optimizer.step()

    peak = matmul_rate(device)
    steps = rate(step, device)
    s1, s2, s3 = 25, 21, 17
    operations = 2 * (2 * 5_184 * s1**2 + 3 * 51_200 * s2**2 + 3 * 800 * s3**2)
    print(f"float32 matmul                  {peak / 1e9:8.0f} GFLOP/s")
    print(f"training step, 16 patches       {16 * steps:8.0f} patches/s", end="")
    print(f" = {16 * steps * operations / peak:.0%} of matmul")
    print(f"textbook loop, end to end       {theirs:8.0f} patches/s")
    print(f"train.py, end to end            {ours:8.0f} patches/s = {ours / theirs:.1f} x")
    print(f"train.py --bf16, end to end     {bf16:8.0f} patches/s = {bf16 / theirs:.1f} x")


# --- upscale ------------------------------------------------------------------------


def peak_memory(command: list) -> tuple[float, float]:
    """Run a python process; return (seconds, peak resident GB)."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s*(\d+)", status)
        peak = max(peak, int(found[1])) if found else peak
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, peak * 1024 / 1e9


def benchmark_upscale(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    model = load_srcnn(ROOT / "weights" / "srcnn_x3.pth", device)
    plain = load_srcnn(ROOT / "weights" / "srcnn_x3.pth", device)
    model = model.to(memory_format=torch.channels_last)
    if args.half:
        model = model.half()
    height, width = args.size
    y = np.random.default_rng(0).uniform(0, 255, (height, width)).astype(np.float32)
    x = torch.from_numpy(y)[None, None].to(device) / 255

    def whole() -> None:
        with torch.no_grad():
            z = F.pad(x, [8] * 4, mode="replicate")
            for layer in plain.layers[:-1]:
                z = F.relu(layer(z))
            plain.layers[-1](z)

    tiled, naive, peaks = [], [], []
    for _ in range(3):  # alternating, so that a slow moment affects both
        peaks.append(matmul_rate(device))
        tiled.append(rate(lambda: restore(model, y, args.tile), device))
        naive.append(rate(whole, device))
    peak, pixels = max(peaks), height * width
    print(f"float32 matmul            {peak / 1e9:8.0f} GFLOP/s")
    for name, rates in (("plain whole-image forward", naive), ("restore(), in tiles", tiled)):
        share = max(rates) * pixels * OPERATIONS / peak
        print(f"{name:25} {max(rates) * pixels / 1e6:8.2f} MP/s = {share:.0%} of matmul")
    print(f"ratio                     {max(tiled) / max(naive):8.2f}")
    image = prepare.dead_leaves(0, 1024, 1)
    with tempfile.TemporaryDirectory() as folder:
        for size in (1155, 770), (2560, 1440):
            path = Path(folder, "in.png")
            image.resize(size, Image.Resampling.BICUBIC).save(path)
            command = [ROOT / "test.py", "--image-file", path, "--device", device.type]
            seconds, memory = peak_memory(command)
            megapixels = 9 * size[0] * size[1] / 1e6
            share = megapixels / seconds / (max(tiled) * pixels / 1e6)
            print(
                f"test.py to {3 * size[0]} x {3 * size[1]}: {seconds:.1f} s, "
                f"{megapixels / seconds:.2f} MP/s = {share:.0%} of restore(), "
                f"peak {memory:.2f} GB"
            )


# --- time to PSNR -------------------------------------------------------------------


def benchmark_time_to_psnr(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = []
        size = ["--patch-size", args.patch_size, "--stride", args.stride]
        size += ["--shrink", *args.shrink] if args.shrink else []
        for name, more in ("T91", size), ("Set5", ["--eval"]):
            files.append(Path(folder, f"{name}.h5"))
            images = ["--images-dir", ROOT / "data" / name, "--scale", args.scale]
            argv = [*images, "--output-path", files[-1], *more]
            prepare.main(prepare.get_args_parser().parse_args(list(map(str, argv))))
        command = [ROOT / "train.py", "--train-file", files[0], "--eval-file", files[1]]
        command += ["--scale", args.scale, "--outputs-dir", folder]
        targets = args.target or [32.39, 32.75]
        for seed, recipe in itertools.product(args.seeds, args.recipes):  # alternating
            run([*command, "--seed", seed, *shlex.split(recipe)])
            with Path(folder, f"x{args.scale}", "history.csv").open() as file:
                rows = [(float(r["psnr"]), float(r["seconds"])) for r in csv.DictReader(file)]
            print(f"seed {seed}, {recipe}:", end="")
            for target in targets:
                passed = [f"after {seconds:.1f} s" for psnr, seconds in rows if psnr >= target]
                print(f"  {target:.2f} dB {passed[0] if passed else 'not reached'}", end="")
            print(f"  last {rows[-1][0]:.3f} dB after {rows[-1][1]:.1f} s", flush=True)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train")
    train.add_argument("--seconds", type=float, default=20)
    train.set_defaults(main=benchmark_train)
    upscale = commands.add_parser("upscale")
    upscale.add_argument("--size", type=int, nargs=2, default=(1080, 1920))
    upscale.add_argument("--tile", type=int)
    upscale.add_argument("--half", action="store_true", help="the network in half precision")
    upscale.set_defaults(main=benchmark_upscale)
    psnr = commands.add_parser("time-to-psnr")
    psnr.add_argument("--target", type=float, action="append")
    psnr.add_argument("--scale", type=int, default=3)
    psnr.add_argument("--patch-size", type=int, default=64)
    psnr.add_argument("--stride", type=int, default=16)
    psnr.add_argument("--shrink", nargs="+", default=[])
    psnr.add_argument("--seeds", type=int, nargs="+", default=[1])
    psnr.add_argument("recipes", nargs="+", help="flags of train.py in quotes, run alternately")
    psnr.set_defaults(main=benchmark_time_to_psnr)
    return parser


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    arguments.main(arguments)
