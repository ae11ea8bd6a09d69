"""What the tests share: the scripts, in this process or in one of their own, and small files."""

import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as pictures

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before the standard library's own package `test`

import prepare
import test as upscale
import train
from models import SRCNN
from utils import run

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, ignores it
DATA = ROOT / "data"
Result = namedtuple("Result", "status out err")
needs_data = pytest.mark.skipif(
    not (DATA / "Set5").is_dir(), reason="data/ holds no Set5: prepare.py --download data"
)


@pytest.fixture(autouse=True)
def process_state():
    """Give back what main() changes for its whole process."""
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
    """call("prepare", "--scale", 3, ...): a script as its command line runs it, in this process."""

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
    """A python script of the repository in a process of its own, waited for."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **kwargs.pop("env", {})},
        **kwargs,
    )


# Runs a script as if the disk were full after 2,000 bytes of a file (torch 2.6 writes one itself
# when it is imported).
FULL_DISK = (
    "import resource, signal, sys, runpy, torch.distributed.nn; sys.argv = sys.argv[1:]; "
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def refused(result: Result, *words: str) -> bool:
    """Status 2 and one line on stderr that holds these words, nothing else."""
    assert result.status == 2, result
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err
    return True


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder and what they hold, to see that nothing changed."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random grey levels, float32, 0..255."""
    return np.random.default_rng(seed).uniform(0, 255, shape).astype(np.float32)


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A colour photograph of 120 x 90 pixels, H x W x 3, uint8 (NASA's, in scikit-image)."""
    image = Image.fromarray(pictures.astronaut()).resize((128, 128))
    return np.asarray(image)[:120, 20:110].copy()


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Weights of a small network that changes what it sees: 5-3-5, eight and four filters."""
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
    """(training file, evaluation file) of drawn pictures, x3, 64 patches of 33 pixels."""
    folder = tmp_path_factory.mktemp("h5")
    files = folder / "train_x3.h5", folder / "eval_x3.h5"
    for path, count, more in zip(files, (4, 2), (["--stride", "74"], ["--eval"])):
        argv = ["--synthetic", str(count), "--output-path", str(path), "--scale", "3"]
        args = prepare.get_args_parser().parse_args(argv + more)
        prepare.main(args)
    return files
