"""Training: the loop, its files, resuming, killing, several processes."""

import csv
import io
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from conftest import FULL_DISK, ROOT, needs_data, noise, refused, spawn, tree

import train
from models import SRCNN, load_srcnn, restore
from utils import Pair

SMALL = ["--filters", 8, 4, "--kernel-sizes", 5, 3, 5]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def base(h5_files, tmp_path) -> list:
    """The arguments of a short run of a small network: 64 patches, four steps an epoch."""
    files = ["--train-file", h5_files[0], "--eval-file", h5_files[1]]
    return [*files, *SMALL, "--outputs-dir", tmp_path / "out", "--num-epochs", 3]


def history(folder: Path) -> list[dict]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_srcnn(path).state_dict()


def equal(a: Path, b: Path) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))


def everything(path: Path) -> list:
    """All that a last.pth holds of a run but its clock and the places it writes to."""
    state = torch.load(path, weights_only=True)
    rows = [{**row, "seconds": 0} for row in state["counters"]["history"]]
    counters = {**state["counters"], "seconds": 0, "history": 0}
    return [rows, counters, *tensors(state)]


def tensors(value: object) -> list:
    if isinstance(value, torch.Tensor):
        return [value.tolist()]
    if isinstance(value, dict):
        value = list(value.values())
    value = value if isinstance(value, (list, tuple)) else []
    return [tensor for item in value for tensor in tensors(item)]


def test_a_run_writes_weights_checkpoint_and_history(call, base, tmp_path):
    result = call("train", *base, "--save-every", 2)
    assert result.status == 0, result.err
    folder = tmp_path / "out" / "x3"
    names = {"best.pth", "last.pth", "history.csv", "epoch_2.pth"}
    assert set(tree(folder)) == names
    rows = history(folder)
    assert list(rows[0]) == ["epoch", "loss", "psnr", "learning_rate", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert result.out.count("epoch") == 3
    best = max(float(row["psnr"]) for row in rows)
    assert f"{best:.3f} dB" in result.out.splitlines()[-1]
    state = torch.load(folder / "best.pth", weights_only=True)
    assert list(state) == list(SRCNN().state_dict())


def test_reported_psnr_is_that_of_the_weights_kept(call, base, h5_files, tmp_path):
    call("train", *base, "--num-epochs", 40, "--lr", 0.002, "--ema", 0.9)
    model = load_srcnn(tmp_path / "out" / "x3" / "best.pth")
    scores = []
    with h5py.File(h5_files[1]) as file:
        for name in file["lr"]:
            lr, hr = np.asarray(file["lr"][name]), np.asarray(file["hr"][name])
            with torch.no_grad():
                y = model(torch.from_numpy(lr)[None, None] / 255)[0, 0].numpy() * 255
            error = (np.clip(np.floor(y + 0.5), 0, 255) - hr)[3:-3, 3:-3]
            scores.append(10 * np.log10(255**2 / np.mean(error.astype(float) ** 2)))
    reported = [float(row["psnr"]) for row in history(tmp_path / "out" / "x3")]
    assert np.mean(scores) == pytest.approx(max(reported), abs=1e-4)
    assert max(reported) > reported[0] + 0.01  # not the weights that it started with


def test_the_network_learns(call, h5_files, tmp_path):
    files = ["--train-file", h5_files[0], "--eval-file", h5_files[1]]
    argv = [*files, "--outputs-dir", tmp_path, "--num-epochs", 12, "--warmup", 5]
    result = call("train", *argv, "--optimizer", "muon", "--lr", 0.01, "--ema", 0.9)
    bicubic = float(result.out.split("bicubic has ")[1].split()[0])
    best = max(float(row["psnr"]) for row in history(tmp_path / "x3"))
    assert best > bicubic + 0.4


@pytest.mark.parametrize("optimizer", ["adam", "muon", "sgd"])
def test_a_seed_decides_a_run_bit_for_bit(call, base, tmp_path, optimizer):
    base += ["--optimizer", optimizer]
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        assert call("train", *base, "--seed", seed, "--outputs-dir", tmp_path / name).status == 0
    assert equal(tmp_path / "a/x3/last.pth", tmp_path / "b/x3/last.pth")
    assert not equal(tmp_path / "a/x3/last.pth", tmp_path / "c/x3/last.pth")


def test_streaming_gives_the_same_weights(call, base, tmp_path):
    for flag in ("--stream", "--no-stream"):
        call("train", *base, flag, "--num-workers", 1, "--outputs-dir", tmp_path / flag)
    assert equal(tmp_path / "--stream/x3/last.pth", tmp_path / "--no-stream/x3/last.pth")


def test_several_files_train_as_one(call, base, h5_files, tmp_path):
    with h5py.File(h5_files[0]) as file:
        for name, rows in ("first.h5", slice(40)), ("second.h5", slice(40, None)):
            with h5py.File(tmp_path / name, "w") as part:
                for key in ("lr", "hr"):
                    part[key] = file[key][rows]
    call("train", *base)
    parts = ["--train-file", tmp_path / "first.h5", tmp_path / "second.h5"]
    call("train", *base, *parts, "--outputs-dir", tmp_path / "parts")
    assert equal(tmp_path / "out/x3/last.pth", tmp_path / "parts/x3/last.pth")


def test_cosine_falls_to_zero_and_constant_stays(call, base, tmp_path):
    call("train", *base, "--lr", 0.01, "--warmup", 3)
    rates = [float(row["learning_rate"]) for row in history(tmp_path / "out/x3")]
    steps = 3 * 4
    expected = [0.005 * (1 + math.cos(math.pi * (4 * e - 1) / steps)) for e in (1, 2, 3)]
    assert rates == pytest.approx(expected)
    call("train", *base, "--lr", 0.01, "--schedule", "constant", "--warmup", 7)
    rates = [float(row["learning_rate"]) for row in history(tmp_path / "out/x3")]
    assert rates == pytest.approx([0.005, 0.01, 0.01])


def test_minutes_plan_the_schedule_over_the_time(call, base, tmp_path):
    at = base.index("--num-epochs")
    call("train", *base[:at], "--minutes", 0.04, "--warmup", 0)
    last = history(tmp_path / "out/x3")[-1]
    assert 2.4 <= float(last["seconds"]) < 5
    assert float(last["learning_rate"]) < 1e-4


def test_without_a_length_a_run_is_planned_for_400_epochs(base):
    args, _ = train.parse_args([str(x) for x in base[: base.index("--num-epochs")]])
    assert train.planned(args, train.Counters(steps=4 * 100), steps_per_epoch=4) == 0.25


def test_the_last_layer_learns_at_a_tenth_by_the_papers_rule():
    torch.manual_seed(0)
    model = SRCNN(filters=(4, 4), kernel_sizes=(3, 3, 3), init="default").double()
    (optimizer,) = train.make_optimizers(model, "sgd", 0.1)
    x, y = torch.rand(2, 1, 9, 9).double(), torch.rand(2, 1, 3, 3).double()
    state = {n: (p.detach().clone(), torch.zeros_like(p)) for n, p in model.named_parameters()}
    for _ in range(4):
        optimizer.zero_grad()
        ((model(x, valid=True) - y) ** 2).mean().backward()
        for name, p in model.named_parameters():
            w, delta = state[name]
            delta = 0.9 * delta - (0.01 if name.startswith("conv3") else 0.1) * p.grad
            state[name] = w + delta, delta
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, state[name][0], atol=1e-12), name
    groups = train.make_optimizers(model, "adam", 0.1)[0].param_groups
    assert [group["lr"] for group in groups] == [0.1, pytest.approx(0.01)]
    assert [len(group["params"]) for group in groups] == [4, 2]


@pytest.mark.parametrize("shape", [(64, 81), (32, 1600), (40, 7)])
def test_muons_step_is_nearly_orthogonal(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = train.orthogonal(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5
    assert values.max() < 1.3
    ours = torch.diag(u.T @ result @ v.T)  # the same directions, only stretched
    assert ours.min() > 0.5
    assert (result - u @ torch.diag(ours) @ v).norm() < 1e-3 * result.norm()


@pytest.mark.parametrize("shape", [(8, 1, 5, 5), (4, 8, 3, 3), (1, 4, 5, 5), (3, 32, 5, 5)])
def test_muon_moves_every_direction_of_a_layer_equally_far(shape):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape) * torch.logspace(0, -1, 5 if shape[2] == 5 else 3)
    train.Muon([weight], 0.1).step()
    ways = weight.detach().reshape(shape[0], -1), weight.detach().movedim(1, 0).flatten(1)
    values = torch.linalg.svdvals(max(ways, key=len)) / 0.1
    assert len(values) == max(shape[:2])
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert (weight * weight.grad).sum() < 0  # downhill


@pytest.mark.parametrize(("optimizer", "held"), [("muon", True), ("adam", False)])
def test_muon_learns_what_is_to_be_added_to_the_picture(call, base, tmp_path, optimizer, held):
    argv = [*base, "--optimizer", optimizer, "--num-epochs", 1]
    assert call("train", *argv).status == 0
    model = load_srcnn(tmp_path / "out/x3/last.pth")
    start = SRCNN(filters=(8, 4), kernel_sizes=(5, 3, 5))
    for ours, theirs in zip(model.layers[:-1], start.layers):
        assert torch.equal(ours.weight[0], theirs.weight[0]) == held
        assert torch.equal(ours.bias[:1], theirs.bias[:1]) == held
        assert not torch.equal(ours.weight[1:], theirs.weight[1:])
    assert torch.equal(model.conv3.weight[0, 0], start.conv3.weight[0, 0]) == held
    torch.manual_seed(123)
    start = SRCNN(filters=(8, 4), kernel_sizes=(5, 3, 5), init="default")  # has no such filters
    assert call("train", *argv, "--init", "default").status == 0
    model = load_srcnn(tmp_path / "out/x3/last.pth")
    moved = zip(model.layers[:-1], start.layers)
    assert not all(torch.equal(ours.weight[0], theirs.weight[0]) for ours, theirs in moved)


def test_bfloat16_is_used_and_a_line_says_where_it_is_not(call, base, tmp_path, monkeypatch):
    best = tmp_path / "out/x3/best.pth"
    call("train", *base)
    exact = weights(best)["conv1.weight"]
    for fast in (True, False):
        monkeypatch.setattr(train, "has_bf16", lambda device, fast=fast: fast)
        result = call("train", *base, "--bf16")
        assert result.status == 0
        assert weights(best)["conv1.weight"].dtype == torch.float32
        assert torch.equal(weights(best)["conv1.weight"], exact) == (not fast)
        assert ("--bf16: this device has no instructions" in result.out) == (not fast)


def test_training_starts_from_a_weights_file_and_never_ends_below_it(call, base, tmp_path):
    call("train", *base, "--seed", 5)
    start = tmp_path / "start.pth"
    (tmp_path / "out/x3/best.pth").rename(start)
    first = float(history(tmp_path / "out/x3")[-1]["psnr"])
    result = call("train", *base, "--init", start, "--num-epochs", 1, "--lr", 5)
    best, last = (tmp_path / "out/x3" / name for name in ("best.pth", "last.pth"))
    assert result.status == 0
    assert float(history(tmp_path / "out/x3")[-1]["psnr"]) < first - 1  # ruined
    assert equal(best, start)
    assert call("train", *base, "--init", start, "--num-epochs", 1).status == 0
    start.unlink()  # a resume does not need it
    assert call("train", "--resume", last, "--num-epochs", 2).status == 0


def test_an_unusable_start_is_refused(call, base, tmp_path):
    assert refused(call("train", *base, "--init", "gausian"), "--init gausian", "nor")
    start = tmp_path / "start.pth"
    torch.save(SRCNN().state_dict(), start)  # 9-5-5, not what `base` asks for
    assert refused(call("train", *base, "--init", start), str(start), "other layers")
    assert not (tmp_path / "out").exists()


def resident_bytes(pid: int) -> int:
    """Memory of a process and its workers, pages that they share counted once."""
    total, children = 0, Path(f"/proc/{pid}/task/{pid}/children")
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = next(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss:"))
        total = 1024 * total + sum(map(resident_bytes, map(int, children.read_text().split())))
    except (OSError, StopIteration):
        pass  # it has just ended
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_a_file_of_six_gigabytes_trains_in_bounded_memory(h5_files, tmp_path):
    path = tmp_path / "large.h5"  # sparse: what is not written takes no disk and reads 0
    count = 6_000_000_000 // (2 * 4 * 33 * 33)
    with h5py.File(path, "w") as file:
        for name in ("lr", "hr"):
            file.create_dataset(name, (count, 33, 33), "float32", chunks=(15, 33, 33))
    argv = ["--train-file", path, "--eval-file", h5_files[1], *SMALL, "--stream"]
    argv += ["--outputs-dir", tmp_path, "--minutes", 0.05, "--num-workers", 2]
    process = start(ROOT / "train.py", *argv)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.02)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{count} patches streamed" in out
    assert 0.1e9 < peak < 1.5e9


def test_steps_end_a_run_in_the_middle_of_an_epoch_with_an_evaluation(call, base, tmp_path):
    at = base.index("--num-epochs")
    assert call("train", *base[:at], "--steps", 6).status == 0
    assert torch.load(tmp_path / "out/x3/last.pth", weights_only=True)["counters"]["steps"] == 6
    assert [row["epoch"] for row in history(tmp_path / "out/x3")] == ["1", "2"]


@pytest.mark.parametrize("order", [4, 8])
def test_symmetric_training_makes_a_plain_file_that_commutes_with_turns(
    call, h5_files, tmp_path, order
):
    files = ["--train-file", h5_files[0], "--eval-file", h5_files[1], "--outputs-dir", tmp_path]
    layers = ["--filters", 20, 17, "--kernel-sizes", 5, 3, 5, "--optimizer", "muon"]
    layers += ["--warmup", 0, "--ema", 0.5, "--lr", 0.01, "--symmetry", order]
    assert call("train", *files, *layers, "--num-epochs", 10).status == 0
    plain = torch.load(tmp_path / "x3/best.pth", weights_only=True)
    assert list(plain) == list(SRCNN().state_dict())
    model, x = load_srcnn(tmp_path / "x3/last.pth").double(), torch.rand(1, 1, 21, 21).double()
    assert (model(x) - x).abs().max() > 1e-2
    flips = (lambda t: t, lambda t: t.flip(3)) if order == 8 else (lambda t: t,)
    for turns in range(4):
        for flip in flips:
            turned = torch.rot90(flip(model(x)), turns, (2, 3))
            assert (model(torch.rot90(flip(x), turns, (2, 3))) - turned).abs().max() < 1e-5
    if order == 4:
        assert (model(x.flip(3)) - model(x).flip(3)).abs().max() > 1e-5
    copies = len(model.conv1.weight.flatten(1).norm(dim=1).mul(1e4).round().unique())
    assert copies == 8 + (20 - 8) // order + (20 - 8) % order
    # Its weights may be gone on from; those of free filters would be spoiled.
    goes_on = [*files, *layers, "--num-epochs", 1, "--init", tmp_path / "x3/last.pth"]
    assert call("train", *goes_on, "--outputs-dir", tmp_path / "further").status == 0
    torch.save(SRCNN(1, (20, 17), (5, 3, 5), "default").state_dict(), tmp_path / "free.pth")
    refusal = call("train", *goes_on[:-1], tmp_path / "free.pth")
    assert refused(refusal, "free.pth", "turned copies", "--symmetry 1")


def test_a_recipe_sets_defaults_which_typed_flags_override(base):
    words = [str(x) for x in base] + ["--recipe", "forks"]
    args, _ = train.parse_args([*words, "--ema", "0.5"])
    assert (args.lr, args.init, args.augment, args.ema) == (1e-4, "default", False, 0.5)
    assert train.parse_args([*words[:-1], "paper"])[0].optimizer == "sgd"
    assert train.parse_args(words[:-2])[0].optimizer == "adam"


# --- resuming -----------------------------------------------------------------------


def test_a_picture_that_bicubic_restores_does_not_hide_the_others(call, base, h5_files, tmp_path):
    file = tmp_path / "eval.h5"
    shutil.copy(h5_files[1], file)
    with h5py.File(file, "r+") as opened:
        for name in "lr", "hr":
            opened[name]["2"] = np.full((66, 66), 255, np.float32)
    for name, more in ("out", []), ("flat", ["--eval-file", file]):
        result = call("train", *base, *more, "--outputs-dir", tmp_path / name)
        assert (result.status, "1 pictures that bicubic" in result.out) == (0, name == "flat")
    with h5py.File(file, "r+") as opened:
        for name in "lr/0", "lr/1", "hr/0", "hr/1":
            del opened[name]
    result = call("train", *base, "--eval-file", file, "--outputs-dir", tmp_path / "none")
    assert refused(result, str(file), "bicubic restores all")
    assert history(tmp_path / "flat/x3")[-1]["psnr"] == history(tmp_path / "out/x3")[-1]["psnr"]


def test_a_second_run_in_the_same_folder_is_left_alone(call, base, tmp_path, monkeypatch):
    evaluate, second = train.evaluate, {}

    def interrupted(*args):  # in the first epoch of the first run a second one begins and ends
        monkeypatch.setattr(train, "evaluate", evaluate)
        if (tmp_path / "out").exists():
            assert call("train", *base, "--num-epochs", 1, "--seed", 4).status == 0
            second.update(tree(tmp_path / "out/x3"))
        else:
            monkeypatch.setattr(train, "evaluate", interrupted)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", interrupted)
    assert refused(call("train", *base), "out/x3", "another train.py")
    assert tree(tmp_path / "out/x3") == second != {}
    assert call("train", "--resume", tmp_path / "out/x3-1/last.pth").status == 0


@pytest.mark.parametrize("name", ["best.pth", "last.pth"])
def test_a_resumed_run_overwrites_no_other(call, base, tmp_path, name):
    call("train", *base)
    other = tmp_path / "other/x3" / name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"another's")
    before, last = tree(tmp_path), tmp_path / "out/x3/last.pth"
    result = call("train", "--resume", last, "--outputs-dir", tmp_path / "other")
    assert refused(result, "other", "another run")
    assert tree(tmp_path) == before


def test_a_run_whose_reader_has_gone_ends_after_it_has_saved(base, tmp_path):
    process = start(ROOT / "train.py", *base, "--num-epochs", 100_000, "--save-every", 1)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1`
    assert (process.wait(timeout=60), process.stderr.read()) == (141, "")
    assert len(history(tmp_path / "out/x3")) == 1
    assert (tmp_path / "out/x3/epoch_1.pth").is_file()


def test_a_resumed_run_may_be_longer_and_doubles_no_row(call, base, tmp_path):
    constant = [*base, "--schedule", "constant"]
    call("train", *constant, "--num-epochs", 5, "--outputs-dir", tmp_path / "whole")
    call("train", *constant, "--num-epochs", 2)
    last = tmp_path / "out/x3/last.pth"
    result = call("train", "--resume", last, "--num-epochs", 5)
    assert result.status == 0, result.err
    assert everything(last) == everything(tmp_path / "whole/x3/last.pth")
    assert [row["epoch"] for row in history(last.parent)] == list("12345")
    before = tree(last.parent)
    assert call("train", "--resume", last).status == 0  # nothing left to do
    assert tree(last.parent) == before


def test_a_run_of_an_earlier_train_py_without_an_average_goes_on(call, base, tmp_path):
    plain = [*base, "--ema", 0, "--schedule", "constant"]
    call("train", *plain, "--num-epochs", 3, "--outputs-dir", tmp_path / "whole")
    call("train", *plain, "--num-epochs", 2)
    last = tmp_path / "out/x3/last.pth"
    torch.save(torch.load(last, weights_only=True) | {"average": None}, last)
    assert call("train", "--resume", last, "--num-epochs", 3).status == 0
    assert everything(last) == everything(tmp_path / "whole/x3/last.pth")


def test_a_stop_at_the_very_last_step_still_ends_with_an_evaluation(
    call, base, tmp_path, monkeypatch
):
    call("train", *base, "--outputs-dir", tmp_path / "whole")
    plain = train.set_learning_rate

    def stop_at_the_last_step(optimizers: list, args: object, steps: int, progress: float) -> None:
        plain(optimizers, args, steps, progress)
        if steps == 11:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, "set_learning_rate", stop_at_the_last_step)
        assert call("train", *base).status == 143
    last = tmp_path / "out/x3/last.pth"
    assert call("train", "--resume", last).status == 0
    assert everything(last) == everything(tmp_path / "whole/x3/last.pth")


def test_resume_without_a_value_takes_the_file_in_outputs_dir(call, base, tmp_path):
    call("train", *base)
    result = call("train", "--outputs-dir", tmp_path / "out", "--resume", "--num-epochs", 4)
    assert result.status == 0
    assert len(history(tmp_path / "out/x3")) == 4


def test_contradictions_to_the_checkpoint_are_named(call, base, tmp_path):
    call("train", *base)
    before = tree(tmp_path / "out")
    for flag, value in ("--lr", 0.5), ("--batch-size", 4), ("--seed", 9), ("--ema", 0):
        result = call("train", *base, flag, value, "--resume")
        assert refused(result, flag, "was trained with")
    assert tree(tmp_path / "out") == before


def start(*argv: object, **kwargs: object) -> subprocess.Popen:
    command = [sys.executable, *map(str, argv)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD},
        **kwargs,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_the_run_goes_on_bit_for_bit(base, tmp_path, number):
    base += ["--num-epochs", 60]
    spawn(ROOT / "train.py", *base, "--outputs-dir", tmp_path / "whole", env=ONE_THREAD)
    process = start(ROOT / "train.py", *base)
    last = tmp_path / "out/x3/last.pth"
    wait_for(last.with_name("history.csv"), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"--resume {last}" in out.splitlines()[-1]
    assert err == ""
    assert torch.load(last, weights_only=True)["counters"]["epoch"] < 60
    assert spawn(ROOT / "train.py", "--resume", last, env=ONE_THREAD).returncode == 0
    assert everything(last) == everything(tmp_path / "whole/x3/last.pth")
    assert equal(last.with_name("best.pth"), tmp_path / "whole/x3/best.pth")


@pytest.mark.skipif(shutil.which("nohup") is None, reason="needs nohup")
def test_a_run_under_nohup_outlives_its_terminal(base, tmp_path):
    command = ["nohup", sys.executable, ROOT / "train.py", *base, "--num-epochs", 60]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), env=os.environ | ONE_THREAD, **silent)
    wait_for(tmp_path / "out/x3/history.csv", process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert len(history(tmp_path / "out/x3")) == 60


def test_ten_kills_at_random_moments_lose_nothing(base, tmp_path):
    base += ["--num-epochs", 80]
    spawn(ROOT / "train.py", *base, "--outputs-dir", tmp_path / "whole", env=ONE_THREAD)
    last = tmp_path / "out/x3/last.pth"
    argv = base
    epochs = []
    for _ in range(10):
        process = start(ROOT / "train.py", *argv)
        wait_for(last, process)
        changed = last.stat().st_mtime_ns
        while last.stat().st_mtime_ns == changed and process.poll() is None:
            time.sleep(0.002)  # until it trains
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        process.communicate()
        epochs.append(torch.load(last, weights_only=True)["counters"]["epoch"])
        load_srcnn(last.with_name("best.pth"))
        argv = ["--resume", last]
    assert epochs == sorted(epochs)
    assert epochs[0] < 80
    assert spawn(ROOT / "train.py", "--resume", last, env=ONE_THREAD).returncode == 0
    assert everything(last) == everything(tmp_path / "whole/x3/last.pth")
    assert equal(last.with_name("best.pth"), tmp_path / "whole/x3/best.pth")
    assert [row["epoch"] for row in history(last.parent)] == [str(i) for i in range(1, 81)]


def test_a_full_disk_is_an_error_and_keeps_the_old_files(base, tmp_path):
    assert spawn(ROOT / "train.py", *base, env=ONE_THREAD).returncode == 0
    before = tree(tmp_path / "out")
    result = spawn("-c", FULL_DISK, ROOT / "train.py", *base, env=ONE_THREAD)
    assert refused(
        (type("R", (), {"status": result.returncode, "err": result.stderr})),
        "cannot be written",
        "pth",
    )
    assert tree(tmp_path / "out") == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(call, base, tmp_path):
    reckless = ["--optimizer", "sgd", "--lr", 1e9, "--schedule", "constant"]
    result = call("train", *base, *reckless, "--warmup", 0)
    assert refused(result, "--lr", "epoch 1", "learning rate of 1e+09", "--warmup")
    assert load_srcnn(tmp_path / "out/x3/best.pth")


# --- bad input ----------------------------------------------------------------------


def test_bad_arguments_are_one_line_and_write_nothing(call, base, h5_files, tmp_path):
    files = [*base[:4]]
    bad = [
        (["--scale", 4], "made for --scale 3"),
        (["--scale", 1], "--scale"),
        (["--lr", -1], "--lr"),
        (["--lr", "fast"], "--lr"),
        (["--batch-size", 0], "--batch-size"),
        (["--num-epochs", 0], "--num-epochs"),
        (["--minutes", 0], "--minutes"),
        (["--ema", 1], "--ema"),
        (["--kernel-sizes", 9, 4, 5], "--kernel-sizes"),
        (["--kernel-sizes", 9, 5], "--kernel-sizes"),
        (["--device", "cuda:77"], "--device"),
        (["--device", "toaster"], "--device"),
        (["--optimizer", "adagrad"], "--optimizer"),
        (["--resume", tmp_path / "no.pth"], "no.pth"),
        (["--train-file", h5_files[1]], "no training file"),
        (["--eval-file", h5_files[0]], "no evaluation file"),
        (["--train-file", tmp_path / "no.h5"], "no.h5"),
    ]
    for more, words in bad:
        assert refused(call("train", *files, "--outputs-dir", tmp_path, *more), words)
    assert refused(call("train", "--eval-file", h5_files[1]), "--train-file")
    assert tree(tmp_path) == {}


def test_a_damaged_checkpoint_is_refused(call, base, tmp_path):
    call("train", *base)
    last = tmp_path / "out/x3/last.pth"
    content = last.read_bytes()
    for damaged in (b"", content[:1000], (last.parent / "best.pth").read_bytes()):
        last.write_bytes(damaged)
        assert refused(call("train", "--resume", last), "last.pth")


def test_tensorboard_gets_the_history_and_a_picture(call, base, h5_files, tmp_path):
    result = call("train", *base, "--tensorboard")
    assert result.status == 0, result.err
    events = EventAccumulator(str(tmp_path / "out/x3/tensorboard")).Reload()
    rows = history(tmp_path / "out/x3")
    for name in ("loss", "psnr", "learning_rate", "seconds"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(int(row["epoch"]), float(row[name])) for row in rows]
        assert np.allclose(written, expected, rtol=1e-5)
    (title,) = events.Tags()["images"]
    picture = Image.open(io.BytesIO(events.Images(title)[-1].encoded_image_string))
    with h5py.File(h5_files[1]) as file:
        hr = np.asarray(file["hr/0"])
    assert picture.size == (3 * hr.shape[1], hr.shape[0])
    original = np.asarray(picture.convert("L"))[:, -hr.shape[1] :]
    assert np.abs(original - hr).max() <= 1


def test_tensorboard_says_how_to_install_it_where_it_is_not(call, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    result = call("train", *base, "--tensorboard")
    assert refused(result, "--tensorboard", "pip install tensorboard")


# --- several processes --------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_two_processes_train_as_one(base, tmp_path):
    base = [*base[: base.index("--num-epochs")], "--steps", 6, "--batch-size", 8]
    spawn(ROOT / "train.py", *base, "--outputs-dir", tmp_path / "one", env=ONE_THREAD)
    probe = tmp_path / "probe.py"  # train.py, and then what each rank holds
    probe.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train\n"
        "models, initial_model = [], train.initial_model\n"
        "train.initial_model = lambda *args: models.append(initial_model(*args)) or models[0]\n"
        "status = train.main(*train.parse_args())\n"
        "tasks = os.listdir('/proc/self/task')\n"
        "threads = [open(f'/proc/self/task/{task}/comm').read() for task in tasks]\n"
        "assert not [name for name in threads if 'gloo' in name], threads\n"
        f"path = {str(tmp_path)!r} + '/rank' + os.environ['RANK']\n"
        "torch.save(models[0].state_dict(), path)\n"
        "sys.exit(status)\n"
    )
    result = spawn(*TORCHRUN, probe, *base, "--outputs-dir", tmp_path / "two", env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1 ") == 1  # only one rank prints
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1)]
    alone, shared = (
        torch.load(tmp_path / name / "x3/last.pth", weights_only=True) for name in ("one", "two")
    )
    assert alone["counters"]["steps"] == shared["counters"]["steps"] == 6
    alone, untrained = alone["model"], SRCNN(1, (8, 4), (5, 3, 5))
    assert list(ranks[0]) == list(untrained.state_dict())
    for name in alone:
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert (ranks[0][name] - alone[name]).abs().max() < 1e-5
    psnr = [float(history(tmp_path / d / "x3")[0]["psnr"]) for d in ("one", "two")]
    assert psnr[0] == pytest.approx(psnr[1], abs=1e-3)


def test_a_killed_worker_ends_the_job_and_a_resume_goes_on(base, tmp_path):
    base += ["--num-epochs", 2000]
    process = start(*TORCHRUN, ROOT / "train.py", *base)
    last = tmp_path / "out/x3/last.pth"
    wait_for(last.with_name("history.csv"), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    done = torch.load(last, weights_only=True)["counters"]["epoch"]
    argv = ["--resume", last, "--num-epochs", done + 1]
    result = spawn(*TORCHRUN, ROOT / "train.py", *argv, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    assert len(history(last.parent)) == done + 1


def test_two_processes_agree_on_when_the_time_is_up(base, tmp_path):
    at = base.index("--num-epochs")
    argv = [*base[:at], "--minutes", 0.03]
    result = spawn(*TORCHRUN, ROOT / "train.py", *argv, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    assert float(history(tmp_path / "out/x3")[-1]["seconds"]) >= 1.8


def test_a_batch_that_cannot_be_shared_out_is_refused(base, tmp_path):
    result = spawn(*TORCHRUN, ROOT / "train.py", *base, "--batch-size", 5, env=ONE_THREAD)
    assert result.returncode != 0
    assert "--batch-size: must be a multiple of the 2 processes" in result.stderr
    assert not (tmp_path / "out").exists()


# --- the real images ----------------------------------------------------------------


def test_the_kept_score_is_rounded_and_shaved():
    torch.manual_seed(3)
    model = SRCNN(filters=(8, 4), kernel_sizes=(5, 3, 5), init="default")
    ilr, hr = noise(30, 30), np.rint(noise(30, 30, seed=1))
    score = train.evaluate(model, [Pair(ilr, hr)], 4)
    expected = np.clip(np.floor(restore(model, ilr) + 0.5), 0, 255)
    mse = np.mean((expected - hr)[4:-4, 4:-4].astype(np.float64) ** 2)
    assert score == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-6)


@needs_data
def test_the_commands_of_the_forks_readme_run_unchanged(tmp_path):
    data = ROOT / "data"
    h5 = {name: tmp_path / f"{name}_x3.h5" for name in ("91-image", "Set5")}
    prepare = ["prepare.py", "--scale", 3, "--output-path"]
    train = [
        "--lr",
        "1e-4",
        "--batch-size",
        "16",
        "--num-epochs",
        "1",
        "--num-workers",
        "8",
        "--seed",
        "123",
    ]
    (tmp_path / "some").mkdir()
    for i in range(1, 5):
        (tmp_path / "some" / f"t{i}.bmp").symlink_to(data.resolve() / "T91" / f"t{i}.bmp")
    train = [*train, "--train-file", h5["91-image"], "--eval-file", h5["Set5"]]
    train = ["train.py", "--outputs-dir", tmp_path / "outputs", "--scale", 3, *train]
    best = tmp_path / "outputs" / "x3" / "best.pth"
    (tmp_path / "butterfly.bmp").write_bytes((data / "Set5/butterfly_GT.bmp").read_bytes())
    commands = [
        [
            *prepare,
            h5["91-image"],
            "--images-dir",
            tmp_path / "some",
            "--patch-size",
            33,
            "--stride",
            14,
        ],
        [*prepare, h5["Set5"], "--images-dir", data / "Set5", "--eval"],
        train,
        [
            "test.py",
            "--weights-file",
            best,
            "--image-file",
            tmp_path / "butterfly.bmp",
            "--scale",
            3,
        ],
    ]
    for script, *argv in commands:
        result = spawn(ROOT / script, *argv)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "butterfly_srcnn_x3.png").is_file()
