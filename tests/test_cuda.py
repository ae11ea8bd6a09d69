"""Training and upscaling on a GPU; skipped where there is none."""

import numpy as np
import pytest
import torch
from conftest import ROOT, noise, spawn

from models import load_srcnn, restore
from utils import psnr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
TRAIN = ROOT / "train.py"
SMALL = ["--scale", 3, "--filters", 8, 4, "--batch-size", 16, "--seed", 5]


@pytest.fixture
def flags(h5_files) -> list:
    return ["--train-file", h5_files[0], "--eval-file", h5_files[1], *SMALL, "--device", "cuda"]


@pytest.mark.parametrize("recipe", ["adam", "fast"])
@pytest.mark.parametrize("data", ["--no-stream", "--stream"])
def test_training_raises_the_psnr(flags, tmp_path, recipe, data):
    flags += ["--recipe", recipe, data, "--num-workers", 2, "--num-epochs", 40]
    result = spawn(TRAIN, *flags, "--outputs-dir", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    state = torch.load(tmp_path / "x3" / "last.pth", weights_only=True)
    scores = [row["psnr"] for row in state["history"]]
    assert scores[-1] > scores[0]
    assert all(value.device.type == "cpu" for value in state["best"].values())


def test_a_resumed_run_ends_like_an_uninterrupted_one(flags, tmp_path):
    flags += ["--schedule", "constant"]  # does not depend on the length
    whole = spawn(TRAIN, *flags, "--num-epochs", 6, "--outputs-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    spawn(TRAIN, *flags, "--num-epochs", 3, "--outputs-dir", tmp_path)
    resumed = spawn(TRAIN, "--resume", tmp_path / "x3" / "last.pth", "--num-epochs", 6)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 12" in resumed.stdout
    models = [load_srcnn(folder / "x3" / "last.pth") for folder in (tmp_path, tmp_path / "whole")]
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_torchrun_with_one_process_trains_like_plain_python(flags, tmp_path):
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"
    for name, launcher in ("alone", ()), ("group", torchrun):
        command = [*launcher, TRAIN, *flags, "--num-epochs", 2]
        result = spawn(*command, "--outputs-dir", tmp_path / name)
        assert result.returncode == 0, result.stderr
    models = [load_srcnn(tmp_path / name / "x3" / "best.pth") for name in ("alone", "group")]
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("tile", [None, 50])
def test_the_gpu_restores_like_the_cpu(tile):
    path, ilr = ROOT / "weights" / "srcnn_x3.pth", noise(150, 170)
    expected = restore(load_srcnn(path), ilr)
    model = load_srcnn(path, "cuda").to(memory_format=torch.channels_last)
    assert np.abs(restore(model, ilr, tile) - expected).max() < 0.01


def test_half_precision_differs_little_from_float32(photo):
    path = ROOT / "weights" / "srcnn_x3.pth"
    ilr = photo[..., 1].astype(np.float32)
    model = load_srcnn(path, "cuda").to(memory_format=torch.channels_last)
    full, half = restore(model, ilr), restore(model.half(), ilr)
    assert psnr(half, full) > 60


def test_a_device_that_does_not_exist_is_refused(flags):
    count = torch.cuda.device_count()
    result = spawn(TRAIN, *flags[:-1], f"cuda:{count}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
