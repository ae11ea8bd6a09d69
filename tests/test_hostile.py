"""Hostile input, full disks, damaged checkpoints, and other systems, for all three scripts."""

import io
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import FULL_DISK, ROOT, Result, noise, refused, spawn, tree
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from models import SRCNN

ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
TEST = "test --weights-file small.pth --image-file "
TRAIN = "train --train-file train.h5 --eval-file eval.h5 --batch-size 4 --outputs-dir out "
TRAIN += "--filters 8 4 --kernel-sizes 5 3 5 --num-epochs 1 "
LAST = Path("out/x3/last.pth")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, photo, weights, h5_files) -> Path:
    """The working folder with the small weights, both h5 files and in/a.png."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    for path, name in zip((weights, *h5_files), ("small.pth", "train.h5", "eval.h5")):
        shutil.copy(path, name)
    Path("in").mkdir()
    Image.fromarray(photo[:36, :40]).save("in/a.png")
    return tmp_path


@pytest.fixture
def do(call) -> Callable[..., Result]:
    """Run a command line such as "test --scale 3", split into words, with further words added."""
    return lambda line, *words: call(*shlex.split(line), *words)


def snapshot() -> tuple:
    """Return all names in the working folder, and the content of the files."""
    return sorted(map(str, Path().rglob("*"))), tree(Path())


def script(line: str) -> list:
    """Return the arguments with which Python runs a command line."""
    name, *argv = line.split()
    return [ROOT / f"{name}.py", *argv]


def run_process(*command: object, **env: str) -> Result:
    """Run Python in another process."""
    done = spawn(*command, env=ENV | env)
    return Result(done.returncode, done.stdout, done.stderr)


# --- faithful images ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_an_image_of_one_colour_stays_one_colour(do, scale):
    inputs = {}
    for i, colour in enumerate([0, 16, 128, 255, (255, 0, 40), (0, 0, 255)]):
        rgb = np.full((7, 9, 3), colour, np.uint8)
        inputs |= {f"rgb{i}": rgb, f"rgba{i}": np.dstack([rgb, rgb[..., :1] // 2 + 90])}
        if i < 4:
            inputs |= {f"l{i}": rgb[..., 0], f"deep{i}": rgb[..., 0].astype(np.uint16) * 257}
    for name, values in inputs.items():
        Image.fromarray(values).save(f"in/{name}.png")
    assert do(f"test --image-file in --scale {scale} --output out").status == 0
    for name, values in inputs.items():
        upscaled = np.asarray(Image.open(f"out/{name}_srcnn_x{scale}.png")).astype(int)
        assert upscaled.shape == (7 * scale, 9 * scale, *values.shape[2:])
        tolerance = 257 if name.startswith("deep") else 1
        assert np.abs(upscaled - values[0, 0]).max() <= tolerance, name


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_text_stays_black_on_white(do, scale):
    page = Image.new("L", (120, 60), 255)
    ImageDraw.Draw(page).text((2, 0), "Solid", 0, ImageFont.load_default(24))
    ImageDraw.Draw(page).rectangle((20, 36, 100, 54), 0)
    page.save("page.png")
    assert do(f"test --image-file page.png --output o.png --scale {scale}").status == 0
    upscaled = np.asarray(Image.open("o.png"))
    assert upscaled[41 * scale : 50 * scale, 25 * scale : 96 * scale].max() <= 1
    assert upscaled[:, 106 * scale :].min() >= 254
    assert upscaled[: 30 * scale].min() <= 1  # the letters are black, too


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "lzw.tif"])
def test_a_resolution_is_rotated_with_the_image(do, suffix):
    exif, values = Image.Exif(), np.arange(0, 256, 4, np.uint8).reshape(4, 16).repeat(2, 0)
    exif[0x0112] = 6
    options = {"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}
    Image.fromarray(values).save(f"a.{suffix}", dpi=(75, 150), exif=exif, **options)
    assert do(TEST + f"a.{suffix} --output o.png")[::2] == (0, "")
    upscaled = Image.open("o.png")
    assert upscaled.info["dpi"] == pytest.approx((150, 75), abs=0.1)
    downscaled = np.asarray(upscaled.reduce(3)).astype(float)
    assert np.abs(downscaled - np.rot90(values, -1)).mean() < 8


@pytest.mark.parametrize("rational", [(0, 0), (0, 1), (2**32 - 1, 1), (1, 2**32 - 1)])
def test_an_impossible_resolution_is_dropped(do, rational):
    Image.new("L", (9, 5), 7).save("a.tif", dpi=(77, 77))
    old, new = struct.pack("<II", 77, 1), struct.pack("<II", *rational)
    Path("a.tif").write_bytes(Path("a.tif").read_bytes().replace(old, new))
    assert do(TEST + "a.tif --output o.png")[::2] == (0, "")
    assert "dpi" not in Image.open("o.png").info


@pytest.mark.parametrize("key", ["dpi", "icc_profile", "transparency", "exif"])
def test_a_text_with_the_name_of_a_property_is_ignored(do, key):
    texts = PngImagePlugin.PngInfo()
    texts.add_text(key, "12, <>")
    Image.new("RGB", (9, 9)).save("a.png", pnginfo=texts)
    assert do(TEST + "a.png --output o.png")[::2] == (0, "")
    upscaled = Image.open("o.png")
    assert (upscaled.mode, {"dpi", "icc_profile"} & set(upscaled.info)) == ("RGB", set())


# --- the user's files -----------------------------------------------------------------------


def test_a_run_that_starts_renames_an_older_run(do):
    assert do(TRAIN).status == 0
    Path("out/x3/notes.txt").write_text("mine")
    old, before = tree(Path("out/x3")), snapshot()
    refused_flags = "--scale 2", "--train-file no.h5", "--init no.pth", "--device cuda:9"
    for flags in (*refused_flags, "--filters 0", "--kernel-sizes 4 3 5"):
        assert refused(do(TRAIN + flags))
        assert snapshot() == before
    result = do(TRAIN + "--seed 5")
    assert (result.status, "x3-1" in result.out) == (0, True)
    assert sorted(tree(Path("out/x3"))) == ["best.pth", "history.csv", "last.pth"]
    assert do(f"train --resume {LAST} --num-epochs 2").status == 0
    assert sorted(os.listdir("out")) == ["x3", "x3-1"]
    assert do(TRAIN).status == 0
    assert (tree(Path("out/x3-1")), Path("out/x3-2/last.pth").is_file()) == (old, True)


def test_resuming_repairs_missing_and_damaged_files_of_the_run(do):
    assert do(TRAIN).status == 0
    before = tree(LAST.parent)
    for damage in (Path.unlink, lambda path: path.write_bytes(b"other")):
        damage(LAST.with_name("best.pth"))
        damage(LAST.with_name("history.csv"))
        assert do(f"train --resume {LAST}").status == 0
        assert tree(LAST.parent) | {"last.pth": b""} == before | {"last.pth": b""}


@pytest.mark.parametrize("limit", [0, 2000, 300_000])
@pytest.mark.parametrize("flags", ["--synthetic 1", "--synthetic 1 --eval"])
def test_prepare_survives_a_full_disk(flags, limit):
    Path("o.h5").write_bytes(b"old")
    before, line = snapshot(), f"prepare {flags} --scale 3 --output-path o.h5"
    result = run_process("-c", FULL_DISK.replace("2000", str(limit)), *script(line))
    assert refused(result, "o.h5: cannot be written")
    assert snapshot() == before


def test_a_disk_that_is_full_after_the_first_of_two_files_leaves_both_old_ones():
    for name in ("o.h5", "o_eval.h5"):
        Path(name).write_bytes(b"old")
    line = "prepare --synthetic 2 --hold-out 0.5 --scale 3 --output-path o.h5"
    before = snapshot()
    result = run_process("-c", FULL_DISK.replace("2000", "1_000_000"), *script(line))
    assert refused(result, "o.h5: cannot be written")
    assert snapshot() == before
    assert run_process(*script(line)).status == 0
    sizes = [Path(name).stat().st_size for name in ("o_eval.h5", "o.h5")]
    assert sizes[0] < 1_000_000 < sizes[1]  # only the second file exceeds the limit


# --- damaged checkpoints --------------------------------------------------------------------


def resize_tensors(tensors: dict) -> None:
    """Double the first axis of every tensor, as in a network of twice as many filters."""
    for name, value in tensors.items():
        if torch.is_tensor(value) and value.ndim:
            tensors[name] = torch.cat([value, value])


DAMAGED_FILES = {
    "empty": lambda content: b"",
    "first byte": lambda content: content[:1],
    "truncated": lambda content: content[: len(content) // 2],
    "without the last byte": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"last.pth",
    "weights": lambda content: Path("small.pth").read_bytes(),
    "h5 file": lambda content: Path("train.h5").read_bytes(),
    "image": lambda content: Path("in/a.png").read_bytes(),
}
KEYS = "version", "data", "global_step", "seconds", "history", "best", "best_psnr", "model", "ema"
KEYS += "optimizers", "loss_sum", "max_lr", "evaluated_step", "next_evaluation"
DAMAGED_STATES = {
    "an earlier version": lambda state: state.update(version=2),
    "without a layer": lambda state: state["model"].pop("conv2.weight"),
    "without an optimizer": lambda state: state["optimizers"].pop(),
    "model of other shapes": lambda state: resize_tensors(state["model"]),
    "EMA of other shapes": lambda state: resize_tensors(state["ema"]),
    "without the evaluation file's data": lambda state: state["data"].pop("eval"),
} | {f"without {key}": methodcaller("pop", key) for key in KEYS}


@pytest.fixture(scope="module")
def last_pth(tmp_path_factory, h5_files) -> bytes:
    """The content of the last.pth of a finished run with the files train.h5 and eval.h5."""
    working_folder = tmp_path_factory.mktemp("run")
    for path, name in zip(h5_files, ("train.h5", "eval.h5")):
        shutil.copy(path, working_folder / name)
    done = spawn(*script(TRAIN), cwd=working_folder, env=ENV)
    assert done.returncode == 0, done.stderr
    return (working_folder / LAST).read_bytes()


@pytest.mark.parametrize("damage", [*DAMAGED_FILES, *DAMAGED_STATES])
def test_a_damaged_checkpoint_is_refused(do, last_pth, damage):
    LAST.parent.mkdir(parents=True)
    if damage in DAMAGED_FILES:
        LAST.write_bytes(DAMAGED_FILES[damage](last_pth))
    else:
        state = torch.load(io.BytesIO(last_pth), weights_only=True)
        DAMAGED_STATES[damage](state)
        torch.save(state, LAST)
    before = snapshot()
    assert refused(do(f"train --resume {LAST} --num-epochs 2"), str(LAST))
    assert snapshot() == before


def test_the_checkpoint_that_these_tests_damage_can_be_resumed(do, last_pth):
    LAST.parent.mkdir(parents=True)
    LAST.write_bytes(last_pth)
    assert set(torch.load(LAST, weights_only=True)) == {*KEYS, "args"}
    assert do(f"train --resume {LAST} --num-epochs 2").status == 0


# --- input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loop", "fifo", "socket", "folder"])
def test_inputs_that_are_no_regular_files_are_refused_at_once(do, kind):
    odd = Path("in/odd/a.png")
    odd.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        make = {"loop": lambda: odd.symlink_to("a.png"), "socket": lambda: server.bind(str(odd))}
        (make | {"fifo": lambda: os.mkfifo(odd), "folder": odd.mkdir})[kind]()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(30)
    before, image = snapshot(), TEST + "in/a.png "
    lines = [TEST, image + "--weights-file", image + "--eval --lr-dir", image + "--eval --results"]
    lines += ["prepare --scale 2 --output-path a.h5 --images-dir", "train --resume"]
    lines += ["prepare --download d --archive", TRAIN + "--init"]
    for line in [*lines, TRAIN + "--train-file", TRAIN + "--eval-file"]:
        assert refused(do(line, odd), str(odd)), line
        assert snapshot() == before, line
    result = do(TEST + "in")  # the regular file among them is upscaled
    signal.alarm(0)
    assert Path("in/a_srcnn_x3.png").is_file()
    assert result.status == 0 if kind == "folder" else refused(result, str(odd))


def test_a_bad_file_is_reported_and_the_others_are_scored(do):
    Path("in/bad.png").write_bytes(b"no")
    shutil.copy("in/a.png", "in/c.png")
    assert refused(do(TEST + "in --eval --csv s.csv"), "bad.png")
    rows = [line.split(",") for line in Path("s.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["image", "a.png", "c.png"]
    assert {"srcnn_psnr", "upscaled_psnr", "upscaled_ssim"} <= set(rows[0])
    Path("results").mkdir()
    shutil.copy("in/a.png", "results/a_srcnn_x3.png")
    assert refused(do(TEST + "results --eval"), "results: no image in it")


@pytest.mark.parametrize(
    "stem", ["a  b", "new\nline", os.fsdecode(b"\xff"), "[1]*", "-x", "\u2603"]
)
def test_unusual_names_work_and_are_printed_exactly(do, folder, stem):
    if stem == "\u2603":  # a character that this terminal cannot print

        def do(line, *words):
            return run_process(*script(line), *words, PYTHONIOENCODING="ascii")

    name, h5 = folder / f"in/{stem}.png", folder / f"{stem}.h5"
    Path("in/a.png").rename(name)
    prepare = "prepare --images-dir in --scale 3 --eval --output-path"
    lines = [
        (TEST, name),
        (TEST, name, "--eval", "--csv", folder / f"{stem}.csv", "--save-images", folder / stem),
        (prepare, h5),
        (TRAIN + "--eval-file", h5, "--outputs-dir", folder / stem),
        ("train --resume", folder / stem / "x3/last.pth"),
    ]
    for line, *words in lines[: 3 if stem == "\u2603" else 5]:  # processes are slow
        assert do(line, *words)[::2] == (0, ""), line
    assert Path(f"in/{stem}_srcnn_x3.png").is_file()
    name.write_bytes(b"no")
    shown = ascii(stem)[1:-1]
    assert refused(do(TEST, name), f"in/{shown}.png")
    assert refused(do(prepare, folder / "b.h5"), f"in/{shown}.png")


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK"])
def test_a_rank_that_is_no_number_is_one_line(do, monkeypatch, name):
    monkeypatch.setenv(name, "abc")
    assert do(TEST + "in/a.png --device cpu").status == 0
    assert refused(do(TEST + "in/a.png --device cuda"), "--device")
    assert do(TRAIN + "--device cpu").status == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(do(TRAIN + "--device cpu"), "RANK")


def test_shrink_applies_to_synthetic_images_and_h5_files_among_images_are_ignored(do):
    counts = []
    line = "prepare --scale 3 --output-path in/a.h5 "
    for flags in "--synthetic 1", "--synthetic 1 --shrink 0.5", "--images-dir in":
        assert do(line + flags)[::2] == (0, "")
        with h5py.File("in/a.h5") as file:
            counts.append(len(file["lr"]))
    assert counts[1] > counts[0] > counts[2] > 0


@pytest.mark.parametrize("line", ["prepare --help", "test --help", TEST + "in --output new/"])
def test_a_closed_pipe_gives_no_traceback(line):
    command = [sys.executable, *map(str, script(line))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | ENV, **pipes) as process:
        process.stdout.close()
        assert (process.wait(timeout=60), process.stderr.read()) == (141, "")


# --- refused command lines, for all three scripts -------------------------------------------

# A word of the error message: the command line.
REFUSED = """\
overwrite in/a.png: test --image-file in/a.png --output link.png
overwrite in/a.png: test --image-file in/a.png --output by/a.png
two.png: test --image-file in/a.png more/b.png --output two.png
new: test --image-file in/a.png in/../in/a.png --output new/
new/a_srcnn_w40.png: test in/a.png --width 40 --output new/ --report new/a_srcnn_w40.png
new/a_comparison_x3.png: test in/a.png --save-images new --report new/a_comparison_x3.png
overwrite in/a.png: test in/a.png --report link.png
overwrite in/a.png: test in/a.png --ext png --output by/a.png
w.pth: test --image-file in/a.png --weights-file w.pth --output ./w.pth
overwrite in/a.png: test --image-file in --eval --csv link.png
w.pth: test --image-file in --eval --weights-file w.pth --csv w.pth
new: test --image-file in --eval --csv new/a_srcnn_x3.png --save-images new
lr/a.png: test --image-file in/a.png --eval --scale 2 --lr-dir lr --csv lr/a.png
lr/a.png: test in --eval --scale 2 --lr-dir lr --results more lr --csv lr/a.png
w.pth: test --weights-file w.pth --export link.pth
overwrite in/a.png: prepare --images-dir in --scale 2 --output-path link.png
lr/a.png: prepare --images-dir in --lr-dir lr --scale 2 --output-path lr/a.png
bad.png: prepare --images-dir spoilt --scale 3 --output-path new/x/a.h5
bad.png: test --image-file spoilt/bad.png --output new/x/a.png
bad.png: test --image-file spoilt/bad.png --eval --save-images new/x
nan.tif: prepare --images-dir nan --scale 3 --output-path new/x/a.h5 --range 0 1
lower them: prepare --images-dir in --scale 64 --eval --output-path new/x/a.h5
a.png: prepare --images-dir in/a.png --scale 3 --output-path new/x/a.h5
bad.zip: prepare --download new --archive bad.zip
--max-pixels: prepare --images-dir in --scale 3 --output-path new/x/a.h5 --max-pixels 100
bad.png: prepare --images-dir spoilt more --scale 3 --output-path new/x/a.h5 --hold-out 0.5
bad.png: prepare --images-dir spoilt more --scale 3 --output-path a.h5 --hold-out 0.5 --seed 2
small.png: test --image-file small.png --eval --csv new/x/a.csv
--outscale 4.1: test --image-file in/a.png --outscale 4.1
4 channels: test in/a.png --weights-file four.pth --output new/x/a.png
xyz: test in/a.png --ext xyz --output new/x/
--jpeg: test in/a.png --jpeg 40
--jpeg: test in --eval --scale 2 --lr-dir lr --jpeg 40
--jpeg: test eval.h5 --eval --scale 3 --jpeg 40
--jpeg: prepare --images-dir in --lr-dir lr --scale 2 --output-path new/x/a.h5 --jpeg 20 40
--jpeg: prepare --images-dir in --scale 2 --output-path new/x/a.h5 --jpeg 40 20
--width: test --export new/x/a.onnx --width 90
--height: test --export new/x/a.onnx --height 90
--width: test in/a.png --outscale 2 --width 90
--width: test in/a.png --eval --width 90
--scale 2: test in/a.png --scale 2 --width 90 --output new/x/
no such folder: test --image-file in --eval --results none
no such folder: test --image-file in --eval --results more none
no such folder: test --image-file in --eval --lr-dir none
no such folder: test in lr --eval --scale 2 --lr-dir lr none
no such folder: prepare --images-dir in --lr-dir none --scale 3 --output-path new/x/a.h5
no.h5: train --train-file train.h5 --eval-file eval.h5 no.h5 --outputs-dir new
train.h5: train --train-file train.h5 --eval-file eval.h5 train.h5 --outputs-dir new
in/a.png: test --image-file in --eval --lr-dir more
in/a.png: test --image-file in --eval --results more
in/a.png: prepare --images-dir in --lr-dir more --scale 3 --output-path new/x/a.h5
name a file: test --image-file in --eval --csv new/
name a file: test in/a.png --report new/
name a file: test --export new/
name a file: prepare --images-dir in --scale 3 --output-path new/
in/a.png/: test --image-file in more --eval --save-images in/a.png
in/a.png/: test --image-file in more --output in/a.png/
in/a.png/: train --train-file train.h5 --outputs-dir in/a.png
empty: test --image-file ''
empty: test ''
empty: test in/a.png --report ''
empty: test in/a.png --ext ''
empty: test --image-file in/a.png --eval --lr-dir ''
empty: test --image-file in/a.png --eval --results ''
eval.h5: test --image-file eval.h5 --eval --scale 3 --results in
--csv: test --image-file in/a.png --eval --csv ''
--save-images: test --image-file in/a.png --eval --save-images ''
--output: test --image-file in/a.png --output ''
--weights-file: test --image-file in/a.png --weights-file ''
--images-dir: prepare --scale 2 --output-path a.h5 --images-dir ''
--output-path: prepare --synthetic 1 --scale 2 --output-path ''
--train-file: train --train-file ''
no*.x: test --image-file no*.x
no*.x: test no*.x
no*.x: train --train-file no*.x
no*.x: prepare --scale 2 --output-path a.h5 --images-dir no*.x
"""
# Weights files with which test.py and train.py cannot work.
SPOILT_WEIGHTS = "huge", "oblong", "missing", "numbers", "list", "two"
# Lines of flags for the command line above them, each to be added on its own.
ABSURD = """\
test --weights-file w.pth --image-file long.png
scale 999999, outscale 1e300, outscale nan, back-projection -1
back-projection 999999, output new/x/a.jpg, output new/x/a.webp, device cuda, device cuda:99
range 1 0, range nan 1, max-pixels 0, width 0, width nan, height -1, height 2.5, ext webp
tile-edges mirror, scale 2.5, jpeg 0, jpeg 101, network photos
prepare --synthetic 1 --scale 2 --output-path new/x/a.h5
scale 999999, patch-size 999999, patch-size 500, stride 999999, stride 0, synthetic 9999999999
shrink nan, shrink 2, seed 100, range nan 1, range 0 1e-40, hold-out 0.5, hold-out nan
jpeg 0 50, jpeg 20 101, jpeg 50 20, jpeg nan 50
TRAIN
scale 999999, filters 9999999999 9999999999, filters 99999999999999999999 4, warmup nan
seed 9999999999999, minutes inf, ema nan, batch-size 0, device cuda, device meta, lr -1
lr nan, last-layer-lr -1, bf16 nan, save-every -1, steps 0, eval-every 0, eval-every 0.5
"""


def cases() -> list[tuple[str, str]]:
    """Return (a word of the error message, command line)."""
    found, command = [tuple(line.split(": ", 1)) for line in REFUSED.splitlines()], ""
    for kind in SPOILT_WEIGHTS:
        word, flag = "weights" if kind == "huge" else kind, f"--weights-file {kind}.pth"
        found.append((word, f"test --image-file in/a.png --output new/x/a.png {flag}"))
        found.append((word, f"test --image-file in/a.png --eval --csv new/x/a.csv {flag}"))
        if kind != "huge":
            found.append((kind, TRAIN + f"--init {kind}.pth"))
    for line in ABSURD.replace("TRAIN", TRAIN).splitlines():
        if " --" in line:
            command = line
            continue
        for flag in line.split(", "):
            word = flag.split()[1 if flag.startswith(("output", "ext")) else 0]
            found.append((word, f"{command} --{flag}"))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory, weights, h5_files) -> Path:
    """A folder with all files of the cases; no case changes one of them."""
    world = tmp_path_factory.mktemp("world")
    for path, name in zip((weights, *h5_files), ("w.pth", "train.h5", "eval.h5")):
        shutil.copy(path, world / name)
    for name in "in", "more", "spoilt", "nan", "lr":
        (world / name).mkdir()
    Image.fromarray(noise(40, 36, 3).astype(np.uint8)).save(world / "in/a.png")
    Image.fromarray(noise(20, 18, 3).astype(np.uint8)).save(world / "lr/a.png")
    torch.save(SRCNN(4, (4, 4), (3, 1, 3)).state_dict(), world / "four.pth")
    shutil.copy(world / "in/a.png", world / "more/b.png")
    (world / "spoilt/bad.png").write_bytes((world / "in/a.png").read_bytes()[:200])
    (world / "link.png").symlink_to("in/a.png")
    (world / "link.pth").symlink_to("w.pth")
    (world / "by").symlink_to("in")
    Image.new("RGB", (2, 5)).save(world / "small.png")
    Image.fromarray(np.full((40, 40), np.nan, np.float32)).save(world / "nan/nan.tif")
    Image.new("1", (22_000, 4)).save(world / "long.png")  # too long for JPEG and WebP at x3
    with zipfile.ZipFile(world / "bad.zip", "w") as file:
        file.writestr("\u00fcx.png", b"not an image")
    content = (world / "bad.zip").read_bytes().replace("\u00fcx".encode(), b"\xff\xfex")
    (world / "bad.zip").write_bytes(content)
    state = SRCNN(1, (4, 4), (3, 1, 3)).state_dict()
    spoilt = [
        {name: torch.full_like(w, 3e38) for name, w in state.items()},  # the output is infinite
        state | {"conv2.weight": torch.zeros(4, 4, 1, 3)},
        {name: w for name, w in state.items() if name != "conv3.weight"},
        dict.fromkeys(state, 1),
        [state],
        SRCNN(2, (4, 4), (3, 1, 3)).state_dict(),
    ]
    for kind, content in zip(SPOILT_WEIGHTS, spoilt, strict=True):
        torch.save(content, world / f"{kind}.pth")
    return world


@pytest.mark.parametrize(("word", "line"), cases())
def test_a_refused_command_is_one_line_and_changes_nothing(do, world, monkeypatch, word, line):
    monkeypatch.chdir(world)
    before, result = snapshot(), do(line)
    *others, last = result.err.splitlines()
    assert (result.status, word in last, "None" in last) == (2, True, False), result
    if not others or "skipped" not in others[0]:  # an image that is too small has its own line
        assert refused(result)
    assert snapshot() == before


@pytest.mark.parametrize("flags", ["--lr-dir lr", "--results lr"])
def test_no_file_in_a_folder_of_pairs_or_results_is_overwritten(do, flags):
    Path("lr").mkdir()
    for name in "a.png", "b.png":  # b.png belongs to no image
        Image.fromarray(noise(36, 40, 3).astype(np.uint8)).save(f"lr/{name}")
    before = snapshot()
    assert refused(do(f"{TEST} in --eval {flags} --csv lr/b.png"), "overwrite lr/b.png")
    assert snapshot() == before


# --- other systems --------------------------------------------------------------------------


def test_the_scripts_expand_patterns(do):
    shutil.copy("train.h5", "train2.h5")
    shutil.copytree("in", "in2")
    assert "\npatches     128 of 1 x 33 x 33" in do(TRAIN + "--train-file train*.h5").out
    out = do("prepare --scale 3 --eval --output-path o.h5 --images-dir in*").out
    assert out == "o.h5: 2 images for x3\n"
    assert do(TEST + "in2/?.png --output new/").out.split()[0] == "new/a_srcnn_x3.png"
    assert (
        do("test --weights-file small.pth in?/a.png -o out/").out.split()[0] == "out/a_srcnn_x3.png"
    )


# Lines of Python that remove what some systems lack.
LACKS = {
    "glibc": "import ctypes as c; g = c.CDLL.__getattr__; c.CDLL.__getattr__ = "
    "lambda self, name: g(self, 'no_' * (name == 'mallopt') + name)",
    "signals of Unix": "import signal; del signal.SIGHUP, signal.SIGCHLD",
    "torch.distributed": "import torch.distributed as d; d.is_available = lambda: False",
    "fork": "import multiprocessing as m; m.set_start_method('spawn')",
}


@pytest.mark.parametrize("lack", LACKS)
def test_training_needs_nothing_that_other_systems_lack(lack):
    # Workers are started again after each evaluation, which takes seconds without fork.
    line = TRAIN + "--stream --num-workers 2 --eval-every 99" if lack == "fork" else TRAIN
    start = "runpy.run_path(sys.argv[0], {}, '__main__')"
    lines = ["import runpy, sys; sys.argv = sys.argv[1:]", LACKS[lack], start]
    assert run_process("-c", "\n".join(lines), *script(line))[::2] == (0, "")
    assert sorted(tree(LAST.parent)) == ["best.pth", "history.csv", "last.pth"]


@pytest.mark.parametrize("line", [TEST, "prepare --scale 3 --output-path a.h5 --images-dir", TRAIN])
def test_no_file_is_left_open(line):
    words = [] if line == TRAIN else ["in"]
    strict = ["-X", "dev", "-W", "error::ResourceWarning"]
    strict += ["-W", "ignore:Implicitly cleaning up"]  # torch 2.6 leaves that to the end
    assert run_process(*strict, *script(line), *words)[::2] == (0, "")
