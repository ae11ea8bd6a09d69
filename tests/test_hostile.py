"""Hostile input, full disks, signals, and what other systems lack, for all three commands."""

import copy
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import FULL_DISK, ROOT, Result, noise, refused, spawn, tree
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from models import SRCNN

ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
TEST = "test --weights-file small.pth --image-file "
TRAIN = "train --train-file train.h5 --eval-file eval.h5 --batch-size 4 --outputs-dir out "
TRAIN += "--filters 8 4 --kernel-sizes 5 3 5 --num-epochs 1 "
STREAM = TRAIN + "--num-epochs 10000 --stream --num-workers 2"
LAST = Path("out/x3/last.pth")
# Starts a script after lines of python that change the system it finds.
AFTER = (
    "import sys, runpy; sys.argv = sys.argv[1:]\n{}\nrunpy.run_path(sys.argv[0], {{}}, '__main__')"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, photo, weights, h5_files) -> Path:
    """The working folder: small weights, h5 files, in/a.png."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    for path, name in zip((weights, *h5_files), ("small.pth", "train.h5", "eval.h5")):
        shutil.copy(path, name)
    Path("in").mkdir()
    Image.fromarray(photo[:36, :40]).save("in/a.png")
    return tmp_path


@pytest.fixture
def do(call):
    """do("test --scale 3", ...): a command line, its words split, and further words as they are."""
    return lambda line, *more: call(*shlex.split(line), *more)


def snapshot() -> tuple:
    """All names in the working folder, and what the files hold."""
    return sorted(map(str, Path().rglob("*"))), tree(Path())


def script(line: str) -> list:
    name, *argv = line.split()
    return [ROOT / f"{name}.py", *argv]


def ended(*command: object, **env: str) -> Result:
    done = spawn(*command, env=ENV | env)
    return Result(done.returncode, done.stdout, done.stderr)


def start(*command: object, until: str = "") -> subprocess.Popen:
    """A process in a group of its own, once a file of this pattern is there."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, **pipes, env=os.environ | ENV, start_new_session=True)
    while until and not list(Path().glob(until)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def end(process: subprocess.Popen) -> Result:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Result(process.returncode, out, err)


# --- pictures come out true -----------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_one_colour_stays_one_colour(do, scale):
    low = {}
    for i, colour in enumerate([0, 16, 128, 255, (255, 0, 40), (0, 0, 255)]):
        rgb = np.full((7, 9, 3), colour, np.uint8)
        low |= {f"rgb{i}": rgb, f"rgba{i}": np.dstack([rgb, rgb[..., :1] // 2 + 90])}
        if i < 4:
            low |= {f"l{i}": rgb[..., 0], f"deep{i}": rgb[..., 0].astype(np.uint16) * 257}
    for name, values in low.items():
        Image.fromarray(values).save(f"in/{name}.png")
    assert do(f"test --image-file in --scale {scale} --output out").status == 0
    for name, values in low.items():
        high = np.asarray(Image.open(f"out/{name}_srcnn_x{scale}.png")).astype(int)
        assert high.shape == (7 * scale, 9 * scale, *values.shape[2:])
        assert np.abs(high - values[0, 0]).max() <= (257 if name.startswith("deep") else 1), name


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_text_keeps_its_black_and_its_white(do, scale):
    page = Image.new("L", (120, 60), 255)
    ImageDraw.Draw(page).text((2, 0), "Solid", 0, ImageFont.load_default(24))
    ImageDraw.Draw(page).rectangle((20, 36, 100, 54), 0)
    page.save("page.png")
    assert do(f"test --image-file page.png --output o.png --scale {scale}").status == 0
    high = np.asarray(Image.open("o.png"))
    assert high[41 * scale : 50 * scale, 25 * scale : 96 * scale].max() <= 1
    assert high[:, 106 * scale :].min() >= 254
    assert high[: 30 * scale].min() <= 1  # the letters are black, too


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "lzw.tif"])
def test_a_resolution_turns_with_the_picture(do, suffix):
    exif, values = Image.Exif(), np.arange(0, 256, 4, np.uint8).reshape(4, 16).repeat(2, 0)
    exif[0x0112] = 6
    more = {"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}
    Image.fromarray(values).save(f"a.{suffix}", dpi=(75, 150), exif=exif, **more)
    assert do(TEST + f"a.{suffix} --output o.png")[::2] == (0, "")
    made = Image.open("o.png")
    assert made.info["dpi"] == pytest.approx((150, 75), abs=0.1)
    reduced = np.asarray(made.reduce(3)).astype(float)
    assert np.abs(reduced - np.rot90(values, -1)).mean() < 8


@pytest.mark.parametrize("rational", [(0, 0), (0, 1), (2**32 - 1, 1), (1, 2**32 - 1)])
def test_a_resolution_that_makes_no_sense_is_dropped(do, rational):
    Image.new("L", (9, 5), 7).save("a.tif", dpi=(77, 77))
    old, new = struct.pack("<II", 77, 1), struct.pack("<II", *rational)
    Path("a.tif").write_bytes(Path("a.tif").read_bytes().replace(old, new))
    assert do(TEST + "a.tif --output o.png")[::2] == (0, "")
    assert "dpi" not in Image.open("o.png").info


@pytest.mark.parametrize("key", ["dpi", "icc_profile", "transparency", "exif"])
def test_a_text_that_is_called_like_a_property_does_no_harm(do, key):
    texts = PngImagePlugin.PngInfo()
    texts.add_text(key, "12, <>")
    Image.new("RGB", (9, 9)).save("a.png", pnginfo=texts)
    assert do(TEST + "a.png --output o.png")[::2] == (0, "")
    made = Image.open("o.png")
    assert (made.mode, {"dpi", "icc_profile"} & set(made.info)) == ("RGB", set())


# --- files of the user are safe -------------------------------------------------------------


def test_a_foreign_file_of_a_partial_files_name_is_safe(do):
    LAST.parent.mkdir(parents=True)
    Path("mine").write_text("mine")
    outs = [LAST.with_name(name) for name in ("last.pth", "best.pth", "history.csv")]
    outs += map(Path, ("o.png", "o.h5", "o.csv"))
    links = [path.with_name(f".part-{path.name}") for path in outs]
    for link in links:
        link.symlink_to(Path("mine").resolve())
    for line in TEST + "in/a.png --output o.png", TEST + "in/a.png --eval --csv o.csv", TRAIN:
        assert do(line).status == 0
    assert do("prepare --images-dir in --scale 3 --output-path o.h5").status == 0
    assert all(path.is_file() and not path.is_symlink() for path in outs)
    assert all(link.is_symlink() and link.read_text() == "mine" for link in links)


def test_an_older_run_is_moved_aside_as_a_whole_by_a_run_that_starts(do):
    assert do(TRAIN).status == 0
    Path("out/x3/notes.txt").write_text("mine")
    old, before = tree(Path("out/x3")), snapshot()
    bad = "--scale 2", "--train-file no.h5", "--init no.pth", "--device cuda:9", "--filters 0"
    for more in bad:
        assert refused(do(TRAIN + more))
        assert snapshot() == before
    result = do(TRAIN + "--seed 5")
    assert (result.status, "x3-1" in result.out) == (0, True)
    assert sorted(tree(Path("out/x3"))) == ["best.pth", "history.csv", "last.pth"]
    assert do(f"train --resume {LAST} --num-epochs 2").status == 0
    assert sorted(os.listdir("out")) == ["x3", "x3-1"]
    assert do(TRAIN).status == 0
    assert (tree(Path("out/x3-1")), Path("out/x3-2/last.pth").is_file()) == (old, True)


def test_resuming_mends_what_does_not_agree_with_the_checkpoint(do):
    assert do(TRAIN).status == 0
    before = tree(LAST.parent)
    for damage in (Path.unlink, lambda path: path.write_bytes(b"other")):
        damage(LAST.with_name("best.pth"))
        damage(LAST.with_name("history.csv"))
        assert do(f"train --resume {LAST}").status == 0
        assert tree(LAST.parent) | {"last.pth": b""} == before | {"last.pth": b""}


@pytest.mark.parametrize("more", ["", "--eval"])
@pytest.mark.parametrize("limit", [0, 2000, 300_000])
def test_prepare_survives_a_full_disk(more, limit):
    Path("o.h5").write_bytes(b"old")
    before, line = snapshot(), f"prepare --synthetic 1 --scale 3 --output-path o.h5 {more}"
    result = ended("-c", FULL_DISK.replace("2000", str(limit)), *script(line))
    assert refused(result, "cannot be written", "o.h5")
    assert snapshot() == before


# --- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("name", ["prepare", "test"])
def test_a_signal_leaves_no_partial_file_and_loses_no_line(name, number):
    for i in range(40):
        Image.new("RGB", (64, 64), (i, 9, 9)).save(f"in/{i}.png")
    Path("o").mkdir()
    line = TEST + "in --self-ensemble --output o"
    if name == "prepare":
        line = "prepare --synthetic 400 --scale 3 --output-path o/a.h5"
    process = start(*script(line), until="o/*")
    process.send_signal(number)
    status, out, err = end(process)
    made = sorted(map(str, Path("o").iterdir()))
    assert (status, err) == (128 + number, "")
    assert all(Image.open(path).size[0] in (192, 120) for path in made)  # none is partial
    assert len(made) - len(out.splitlines()) in (0, 1)  # the last may not have been told yet


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_all_processes_of_a_streaming_run_saves_it(number):
    process = start(*script(STREAM), until="out/x3/history.csv")
    time.sleep(0.1 * STOPS.index(number))
    os.killpg(process.pid, number)
    result = end(process)
    assert result[::2] == (128 + number, "")
    assert f"--resume {LAST}" in result.out.splitlines()[-1]
    assert torch.load(LAST)["counters"]["steps"] > 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux only")
def test_a_lost_worker_is_one_line_and_a_saved_checkpoint(do):
    process, stop = start(*script(STREAM), until="out/x3/history.csv"), time.monotonic() + 30
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and time.monotonic() < stop:
        try:  # a worker that has handed in its last batch is not missed: then the next one
            os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
            time.sleep(0.05)
        except (OSError, IndexError):
            continue
    assert refused(end(process), "--num-workers", "--resume")
    epoch = torch.load(LAST)["counters"]["epoch"]
    assert do(f"train --resume {LAST} --num-workers 0 --num-epochs {epoch}").status == 0


def test_a_second_ctrl_c_ends_at_once():
    slow = "import time, torch.nn.functional as F\ndef loss(*_): print('step', flush=True); "
    slow += "time.sleep(300)\nF.mse_loss = loss"
    process = start("-c", AFTER.format(slow), *script(TRAIN))
    while process.stdout.readline() not in ("step\n", ""):
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, process.communicate()  # the first one waits for the step
    process.send_signal(signal.SIGINT)
    assert end(process)[::2] == (130, "")
    assert torch.load(LAST)["counters"]["steps"] == 0


@pytest.mark.parametrize("delay", [0.15, 0.6, 1.5])
def test_a_signal_during_start_up_ends_the_program_cleanly(delay):
    process = start(*script(STREAM))
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    status, _, err = end(process)
    assert status in (143, -signal.SIGTERM)  # the latter before the script's first line
    assert (err, list(Path().rglob(".part-*"))) == ("", [])


# --- input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loop", "fifo", "socket", "folder"])
def test_what_is_no_file_is_refused_at_once(do, kind):
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
    result = do(TEST + "in")  # the good one is done
    signal.alarm(0)
    assert Path("in/a_srcnn_x3.png").is_file()
    assert result.status == 0 if kind == "folder" else refused(result, str(odd))


def test_a_bad_file_among_several_is_reported_and_the_others_are_scored(do):
    Path("in/bad.png").write_bytes(b"no")
    shutil.copy("in/a.png", "in/c.png")
    assert refused(do(TEST + "in --eval --csv s.csv"), "bad.png")
    rows = [line.split(",") for line in Path("s.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["image", "a.png", "c.png"]
    assert {"srcnn_psnr", "enlarged_psnr", "enlarged_ssim"} <= set(rows[0])
    Path("made").mkdir()
    shutil.copy("in/a.png", "made/a_srcnn_x3.png")
    assert refused(do(TEST + "made --eval"), "made", "results")


@pytest.mark.parametrize(
    "stem", ["a  b", "new\nline", os.fsdecode(b"\xff"), "[1]*", "-x", "\u2603"]
)
def test_names_are_quoted_exactly_and_do_no_harm(do, folder, stem):
    if stem == "\u2603":  # which this terminal cannot print

        def do(line, *more):
            return ended(*script(line), *more, PYTHONIOENCODING="ascii")

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
    for line, *more in lines[: 3 if stem == "\u2603" else 5]:  # processes are slow
        assert do(line, *more)[::2] == (0, ""), line
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
    result = do(TRAIN + "--device cpu")
    assert result.status == 0 if name == "LOCAL_RANK" else refused(result, "RANK")


def test_a_damaged_or_foreign_checkpoint_is_refused(do):
    assert do(TRAIN).status == 0
    good, zero, wrong = torch.load(LAST), torch.zeros(3), []
    changes = [(key, value) for key in good if key != "ran" for value in ("del", [1], {})]
    changes += [(f"counters/{name}", v) for name in ("epoch", "step", "best") for v in ("x", None)]
    changes += [("counters/history", [1]), ("counters/other", 1), ("counters/step", -5)]
    changes += [("best/conv1.weight", zero), ("model/conv1.weight", zero)]
    changes += [("optimizers/0/state/0/exp_avg", zero), ("args/optimizer", "other")]
    for name in "batch_size", "filters", "kernel_sizes", "seed", "scale", "other":
        changes += [(f"args/{name}", value) for value in ("x", None, ["a"])]
    for path, value in changes:
        state = place = copy.deepcopy(good)
        *keys, key = (int(k) if k.isdigit() else k for k in path.split("/"))
        for k in keys:
            place = place[k]
        place[key] = value
        if value == "del":
            del place[key]
        torch.save(state, LAST)
        before = snapshot()
        try:
            assert refused(do(f"train --resume {LAST} --num-epochs 2"))
            assert snapshot() == before, "files have changed"
        except Exception as error:
            wrong.append(f"{path} = {value}: {type(error).__name__} {error}"[:150])
    assert not wrong, "\n".join(wrong)


def test_drawn_pictures_are_shrunk_and_h5_files_among_pictures_left_alone(do):
    counts = []
    for more in "--synthetic 1", "--synthetic 1 --shrink 0.5", "--images-dir in", "--images-dir in":
        assert do("prepare --scale 3 --output-path in/a.h5 " + more)[::2] == (0, "")
        with h5py.File("in/a.h5") as file:
            counts.append(len(file["lr"]))
    assert counts[1] > counts[0] > counts[2] == counts[3]


# --- whatever is refused, for all three commands: one line, and nothing changes --------------

REFUSED = """\
overwrite in/a.png: test --image-file in/a.png --output link.png
overwrite in/a.png: test --image-file in/a.png --output by/a.png
two.png: test --image-file in/a.png more/b.png --output two.png
new: test --image-file in/a.png by/a.png --output new/
w.pth: test --image-file in/a.png --weights-file w.pth --output ./w.pth
overwrite in/a.png: test --image-file in --eval --csv link.png
w.pth: test --image-file in --eval --weights-file w.pth --csv w.pth
new: test --image-file in --eval --csv new/a_srcnn_x3.png --save-images new
more/b.png: test --image-file in/a.png --eval --lr-dir more --csv more/b.png
overwrite in/a.png: prepare --images-dir in --scale 2 --output-path link.png
bad.png: prepare --images-dir spoilt --scale 3 --output-path new/x/a.h5
bad.png: test --image-file spoilt/bad.png --output new/x/a.png
bad.png: test --image-file spoilt/bad.png --eval --save-images new/x
nan.tif: prepare --images-dir nan --scale 3 --output-path new/x/a.h5 --range 0 1
larger pictures: prepare --images-dir in --scale 64 --degradation pillow --eval --output-path n.h5
a.png: prepare --images-dir in/a.png --scale 3 --output-path new/x/a.h5
bad.zip: prepare --download new --archive bad.zip
--max-pixels: prepare --images-dir in --scale 3 --output-path new/x/a.h5 --max-pixels 100
bad.png: prepare --images-dir spoilt more --scale 3 --output-path new/x/a.h5 --hold-out 0.5
bad.png: prepare --images-dir spoilt more --scale 3 --output-path a.h5 --hold-out 0.5 --seed 2
small.png: test --image-file small.png --eval --csv new/x/a.csv
--outscale 4.1: test --image-file in/a.png --outscale 4.1
no such folder: test --image-file in --eval --results none
no such folder: test --image-file in --eval --lr-dir none
no such folder: prepare --images-dir in --lr-dir none --scale 3 --output-path new/x/a.h5
is a folder: test --image-file in --eval --csv new/
is a folder: test --export new/
is a folder: prepare --images-dir in --scale 3 --output-path new/
in/a.png/: test --image-file in more --eval --save-images in/a.png
in/a.png/: test --image-file in more --output in/a.png/
in/a.png/: train --train-file train.h5 --outputs-dir in/a.png
empty: test --image-file ''
empty: test --image-file in/a.png --eval --lr-dir ''
empty: test --image-file in/a.png --eval --results ''
eval.h5: test --image-file eval.h5 --eval --scale 3 --results in
--csv: test --image-file in/a.png --eval --csv ''
--save-images: test --image-file in/a.png --eval --save-images ''
--output: test --image-file in/a.png --output ''
weights: test --image-file in/a.png --weights-file ''
empty: prepare --scale 2 --output-path a.h5 --images-dir ''
: prepare --synthetic 1 --scale 2 --output-path ''
empty: train --train-file ''
no*.x: test --image-file no*.x
no*.x: train --train-file no*.x
no*.x: prepare --scale 2 --output-path a.h5 --images-dir no*.x
"""
KINDS = "huge", "complex", "oblong", "missing", "numbers", "list", "two"
ABSURD = """\
test --weights-file w.pth --image-file wide.png
scale 64, scale 999999, tile 999999, tile 0, outscale 1e300, outscale nan, back-projection -1
back-projection 999999, output new/x/a.jpg, output new/x/a.webp, device cuda, device cuda:99
prepare --synthetic 1 --scale 2 --output-path new/x/a.h5
scale 999999, patch-size 999999, patch-size 500, stride 999999, stride 0, synthetic 9999999999
shrink nan, seed 100, range nan 1, range 0 1e-40, hold-out 0.5
TRAIN
scale 999999, filters 9999999999 9999999999, filters 99999999999999999999 4, warmup nan
seed 9999999999999, minutes inf, ema nan, batch-size 0, device cuda, device meta, lr -1
"""


def cases() -> list:
    """(a word of the message, command line)."""
    found, command = [line.split(": ", 1) for line in REFUSED.splitlines()], ""
    for kind in KINDS:
        word, name = "weights" if kind == "huge" else kind, f"--weights-file {kind}.pth"
        found.append((word, f"test --image-file in/a.png --output new/x/a.png {name}"))
        found.append((word, f"test --image-file in/a.png --eval --csv new/x/a.csv {name}"))
        found += [(kind, TRAIN + f"--init {kind}.pth")] * (kind != "huge")
    for line in ABSURD.replace("TRAIN", TRAIN).splitlines():
        if " --" in line:
            command = line
            continue
        for flag in line.split(", "):
            word = flag.split()["output" in flag]
            found.append((word, f"{command} --{flag}"))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory, weights, h5_files) -> Path:
    """A folder with all files that the cases name; none of them changes it."""
    world = tmp_path_factory.mktemp("world")
    for path, name in zip((weights, *h5_files), ("w.pth", "train.h5", "eval.h5")):
        shutil.copy(path, world / name)
    for name in "in", "more", "spoilt", "nan":
        (world / name).mkdir()
    Image.fromarray(noise(40, 36, 3).astype(np.uint8)).save(world / "in/a.png")
    shutil.copy(world / "in/a.png", world / "more/b.png")
    (world / "spoilt/bad.png").write_bytes((world / "in/a.png").read_bytes()[:200])
    (world / "link.png").symlink_to("in/a.png")
    (world / "by").symlink_to("in")
    Image.new("RGB", (2, 5)).save(world / "small.png")
    Image.fromarray(np.full((40, 40), np.nan, np.float32)).save(world / "nan/nan.tif")
    Image.new("1", (25_000, 3000)).save(world / "wide.png")
    with zipfile.ZipFile(world / "bad.zip", "w") as file:
        file.writestr("\u00fcx.png", b"no picture")
    content = (world / "bad.zip").read_bytes().replace("\u00fcx".encode(), b"\xff\xfex")
    (world / "bad.zip").write_bytes(content)
    state = SRCNN(1, (4, 4), (3, 1, 3)).state_dict()
    spoilt = [
        {name: torch.full_like(w, 3e38) for name, w in state.items()},  # makes infinity of pictures
        {name: w + 1j for name, w in state.items()},
        state | {"conv2.weight": torch.zeros(4, 4, 1, 3)},
        {name: w for name, w in state.items() if name != "conv3.weight"},
        dict.fromkeys(state, 1),
        [state],
        SRCNN(2, (4, 4), (3, 1, 3)).state_dict(),
    ]
    for kind, content in zip(KINDS, spoilt, strict=True):
        torch.save(content, world / f"{kind}.pth")
    return world


@pytest.mark.parametrize("line", ["prepare --help", "test --help", TEST + "in --output new/"])
def test_a_reader_who_goes_away_gets_no_traceback(line):
    process = start(*script(line))
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (141, "")


@pytest.mark.parametrize(("word", "line"), cases())
def test_a_refused_call_is_one_line_and_changes_nothing(do, world, monkeypatch, word, line):
    monkeypatch.chdir(world)
    before, result = snapshot(), do(line)
    last = result.err.splitlines()[-1]
    assert (result.status, word in last, "None" in last) == (2, True, False), result
    assert "patch" in line or "pillow" in line or refused(result)  # skipped pictures are named
    assert snapshot() == before


# --- other systems --------------------------------------------------------------------------


def test_the_scripts_expand_patterns(do):
    shutil.copy("train.h5", "train2.h5")
    shutil.copytree("in", "in2")
    assert do(TRAIN + "--train-file train*.h5").out.split()[0] == "128"
    made = "prepare --scale 3 --eval --output-path o.h5 --images-dir "
    assert do(made + "in*").out.split()[1] == "2"
    assert do(TEST + "in2/?.png --output new/").out.split() == ["new/a_srcnn_x3.png"]


LACKS = {
    "/proc": "import pathlib as p; r = p.Path.read_text; p.Path.read_text = lambda self, *a, **k: "
    "r(p.Path('/none') if str(self).startswith(('/proc', '/sys')) else self, *a, **k)",
    "signals of Unix": "import signal; del signal.SIGHUP, signal.SIGCHLD",
    "torch.distributed": "import torch.distributed as d; d.is_available = lambda: False",
    "fork": "import multiprocessing as m; m.set_start_method('spawn')",
}


@pytest.mark.parametrize("lack", LACKS)
def test_training_needs_nothing_that_other_systems_lack(lack):
    line = TRAIN + "--stream --num-workers 2" * (lack == "fork")
    assert ended("-c", AFTER.format(LACKS[lack]), *script(line))[::2] == (0, "")
    assert sorted(tree(LAST.parent)) == ["best.pth", "history.csv", "last.pth"]


@pytest.mark.parametrize("line", [TEST, "prepare --scale 3 --output-path a.h5 --images-dir", TRAIN])
def test_nothing_is_left_open(line):
    more = ["in"] * (line != TRAIN)
    strict = ["-X", "dev", "-W", "error::ResourceWarning"]
    strict += ["-W", "ignore:Implicitly cleaning up"]  # torch 2.6 leaves that to the end
    assert ended(*strict, *script(line), *more)[::2] == (0, "")
