"""Fixtures and helpers: the scripts, called in this process or in another one, and small files."""

import csv
import math
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; before torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before the standard library's own package `test`

import prepare
import test as upscale
import train
from models import SRCNN
from utils import run

# The tests may run under nohup or in a script's background, where these signals are ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
DATA = ROOT / "data"
Result = namedtuple("Result", "status out err")
needs_data = pytest.mark.skipif(
    not (DATA / "Set5").is_dir(), reason="data/ has no Set5: prepare.py --download data"
)


@pytest.fixture(autouse=True)
def process_state():
    """Restore what main() changes for its whole process."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers}
    threads, pixels = torch.get_num_threads(), Image.MAX_IMAGE_PIXELS
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    Image.MAX_IMAGE_PIXELS = pixels


@pytest.fixture
def call(capfd, monkeypatch):
    """Run a script with a command line in this process: call("prepare", "--scale", 3, ...)."""

    def call(name: str, *argv: object) -> Result:
        module = {"prepare": prepare, "train": train, "test": upscale}[name]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            if name == "train":
                run(lambda: train.main(*train.parse_args()))
            else:
                run(lambda: module.main(module.get_args_parser().parse_args()))
        out, err = capfd.readouterr()
        return Result(stop.value.code or 0, out, err)

    return call


def spawn(*command: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run Python with these arguments in another process, and wait until it ends."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **kwargs.pop("env", {})},
        **kwargs,
    )


# Runs a script on a disk that is full after 2,000 bytes of each file. torch 2.6 writes a file when
# torch.distributed.nn is imported, so that is imported before.
FULL_DISK = (
    "import resource, signal, sys, runpy, torch.distributed.nn; sys.argv = sys.argv[1:]; "
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def refused(result: Result, *words: str) -> bool:
    """Assert status 2 and a single line on stderr that contains these words."""
    assert result.status == 2, result
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err
    return True


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, to compare it before and after."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random grey levels, float32, 0..255."""
    return np.random.default_rng(seed).uniform(0, 255, shape).astype(np.float32)


def cubic(x: np.ndarray) -> np.ndarray:
    """Return Keys' cubic convolution kernel, a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resizing_matrix(old: int, new: int) -> np.ndarray:
    """Return MATLAB's imresize of one axis as a matrix, in float64; edge pixels are repeated."""
    stretch = max(1, old / new)
    matrix = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        reach = math.ceil(2 * stretch) + 1
        taps = np.arange(math.floor(centre) - reach, math.floor(centre) + reach + 1)
        weights = cubic((taps - centre) / stretch)
        weights /= weights.sum()
        np.add.at(matrix[row], np.clip(taps, 0, old - 1), weights)
    return matrix


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A colour photograph of 120 x 90 pixels, H x W x 3, uint8 (NASA's, in scikit-image)."""
    image = Image.fromarray(astronaut()).resize((128, 128))
    return np.asarray(image)[:120, 20:110].copy()


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Weights of a small network that changes its input: 5-3-5, eight and four filters."""
    torch.manual_seed(7)
    model = SRCNN(filters=(8, 4), kernel_sizes=(5, 3, 5))
    with torch.no_grad():
        model.conv3.weight += 0.02 * torch.randn(model.conv3.weight.shape)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def rgb_weights(tmp_path_factory) -> Path:
    """Weights of a small network of three channels."""
    torch.manual_seed(8)
    path = tmp_path_factory.mktemp("weights") / "rgb.pth"
    torch.save(SRCNN(3, (8, 6), (5, 3, 5)).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def h5_files(tmp_path_factory) -> tuple[Path, Path]:
    """(training file, evaluation file) of synthetic images, x3, 64 patches of 33 pixels."""
    folder = tmp_path_factory.mktemp("h5")
    files = folder / "train_x3.h5", folder / "eval_x3.h5"
    for path, count, flags in zip(files, (4, 2), (["--stride", "74"], ["--eval"])):
        argv = ["--synthetic", str(count), "--output-path", str(path), "--scale", "3"]
        prepare.main(prepare.get_args_parser().parse_args(argv + flags))
    return files


# --- runs of train.py, for test_train.py and test_processes.py ------------------------------


@pytest.fixture
def train_flags(h5_files, tmp_path) -> list:
    """The flags of a short run of a small network: 64 patches, an evaluation after each epoch."""
    files = ["--train-file", h5_files[0], "--eval-file", h5_files[1]]
    network = ["--filters", 8, 4, "--kernel-sizes", 5, 3, 5]
    length = ["--eval-every", 4, "--num-epochs", 3]  # four steps per epoch
    return [*files, *network, "--outputs-dir", tmp_path / "out", *length]


def history(folder: Path) -> list[dict]:
    """Return the rows of a run's history.csv."""
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def same_run(a: Path, b: Path) -> bool:
    """Assert that two last.pth have the same content, apart from clocks, flags and file names."""
    states = [torch.load(path, weights_only=True) for path in (a, b)]
    for state in states:
        for row in [state, *state["history"]]:
            del row["seconds"]
        for name in ("args", "data", "next_evaluation"):
            del state[name]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    return True
