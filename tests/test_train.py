"""Training: the recipes, the files of a run, resuming, and input that is refused."""

import itertools
import math
import re
import shutil
import signal
import sys
import time
from argparse import Namespace

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, history, needs_data, noise, refused, same_run, tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from datasets import H5Patches
from models import SRCNN, load_srcnn, restore
from utils import InputError, Pair

LAYERS = {"filters": (8, 4), "kernel_sizes": (5, 3, 5)}  # of train_flags


@pytest.fixture
def folder(tmp_path):
    """Where a run of train_flags writes."""
    return tmp_path / "out" / "x3"


def equal(*models: SRCNN) -> bool:
    """Return whether two networks have equal weights."""
    return all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


def equal_files(a, b) -> bool:
    """Return whether two files contain equal weights."""
    return equal(load_srcnn(a), load_srcnn(b))


# --- a run and its files --------------------------------------------------------------------


def test_a_run_writes_weights_checkpoint_and_history(call, train_flags, folder):
    result = call("train", *train_flags, "--save-every", 2)
    assert (result.status, result.err) == (0, "")
    assert set(tree(folder)) == {"best.pth", "last.pth", "history.csv", "epoch_2.pth"}
    rows = history(folder)
    assert list(rows[0]) == ["epoch", "step", "loss", "psnr", "learning_rate", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    lines = [line for line in result.out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    best = max(float(row["psnr"]) for row in rows)
    assert f"x3/best.pth: {best:.2f} dB (bicubic " in result.out.splitlines()[-2]
    weights = f"--weights-file {folder / 'best.pth'}"
    assert result.out.splitlines()[-1] == f"try it: python test.py IMAGE {weights}"
    state = torch.load(folder / "best.pth", weights_only=True)
    assert list(state) == list(SRCNN().state_dict())


def test_last_pth_contains_the_run_at_its_top_level(call, train_flags, folder):
    call("train", *train_flags)
    state = torch.load(folder / "last.pth", weights_only=True)
    names = "version args data global_step seconds history best best_psnr model ema optimizers"
    names += " loss_sum max_lr evaluated_step next_evaluation"
    assert set(state) == set(names.split())
    assert (state["version"], state["global_step"], state["loss_sum"]) == (4, 12, 0)
    assert equal_files(folder / "last.pth", folder / "best.pth")  # both are the EMA
    assert not torch.equal(state["model"]["conv1.weight"], state["ema"]["conv1.weight"])


def test_the_reported_psnr_is_that_of_best_pth(call, train_flags, h5_files, folder):
    call("train", *train_flags, "--num-epochs", 40, "--lr", 0.002, "--ema", 0.9)
    model = load_srcnn(folder / "best.pth")
    scores = []
    with h5py.File(h5_files[1]) as file:
        for name in file["lr"]:
            lr, hr = np.asarray(file["lr"][name]), np.asarray(file["hr"][name])
            with torch.no_grad():
                y = model(torch.from_numpy(lr)[None, None] / 255)[0, 0].numpy() * 255
            error = (np.clip(np.floor(y + 0.5), 0, 255) - hr)[3:-3, 3:-3]
            scores.append(10 * np.log10(255**2 / np.mean(error.astype(float) ** 2)))
    reported = [float(row["psnr"]) for row in history(folder)]
    assert np.mean(scores) == pytest.approx(max(reported), abs=1e-4)
    assert max(reported) > reported[0] + 0.01  # these are not the initial weights


def test_evaluate_rounds_and_crops_the_border():
    torch.manual_seed(3)
    model = SRCNN(init="default", **LAYERS)
    ilr, hr = noise(30, 30), np.rint(noise(30, 30, seed=1))
    score = train.evaluate(model, [Pair(ilr, hr)], 4)
    expected = np.clip(np.floor(restore(model, ilr) + 0.5), 0, 255)
    mse = np.mean((expected - hr)[4:-4, 4:-4].astype(np.float64) ** 2)
    assert score == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-6)


def test_training_raises_the_psnr_above_that_of_bicubic(call, h5_files, tmp_path):
    files = ["--train-file", h5_files[0], "--eval-file", h5_files[1]]
    argv = [*files, "--outputs-dir", tmp_path, "--num-epochs", 12, "--warmup", 5]
    result = call("train", *argv, "--optimizer", "muon", "--lr", 0.01, "--ema", 0.9)
    bicubic = float(result.out.split(", bicubic ")[1].split()[0])
    assert max(float(row["psnr"]) for row in history(tmp_path / "x3")) > bicubic + 0.4


@pytest.mark.parametrize("optimizer", ["adam", "muon", "sgd"])
def test_equal_seeds_give_equal_weights(call, train_flags, tmp_path, optimizer):
    train_flags += ["--optimizer", optimizer]
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        argv = [*train_flags, "--seed", seed, "--outputs-dir", tmp_path / name]
        assert call("train", *argv).status == 0
    a, b, c = (load_srcnn(tmp_path / name / "x3/last.pth") for name in "abc")
    assert equal(a, b)
    assert not equal(a, c)


def test_streaming_gives_the_same_weights(call, train_flags, tmp_path):
    for flag in ("--stream", "--no-stream"):
        call("train", *train_flags, flag, "--num-workers", 1, "--outputs-dir", tmp_path / flag)
    assert same_run(tmp_path / "--stream/x3/last.pth", tmp_path / "--no-stream/x3/last.pth")


def test_several_files_train_as_one(call, train_flags, folder, h5_files, tmp_path):
    with h5py.File(h5_files[0]) as file:
        for name, rows in ("first.h5", slice(40)), ("second.h5", slice(40, None)):
            with h5py.File(tmp_path / name, "w") as part:
                for key in ("lr", "hr"):
                    part[key] = file[key][rows]
    call("train", *train_flags)
    parts = ["--train-file", tmp_path / "first.h5", tmp_path / "second.h5"]
    call("train", *train_flags, *parts, "--outputs-dir", tmp_path / "parts")
    assert same_run(folder / "last.pth", tmp_path / "parts/x3/last.pth")


def test_images_with_infinite_bicubic_psnr_are_ignored(
    call, train_flags, folder, h5_files, tmp_path
):
    path = tmp_path / "eval.h5"
    shutil.copy(h5_files[1], path)
    with h5py.File(path, "r+") as file:
        for name in ("lr", "hr"):
            file[name]["2"] = np.full((66, 66), 255, np.float32)
    assert "ignoring" not in call("train", *train_flags).out
    argv = [*train_flags, "--eval-file", path, "--outputs-dir"]
    result = call("train", *argv, tmp_path / "flat")
    assert result.status == 0
    assert "ignoring    1 image too small or with infinite bicubic PSNR" in result.out
    assert history(tmp_path / "flat/x3")[-1]["psnr"] == history(folder)[-1]["psnr"]
    with h5py.File(path, "r+") as file:
        for name in ("lr/0", "lr/1", "hr/0", "hr/1"):
            del file[name]
    assert refused(call("train", *argv, tmp_path / "no"), "--eval-file", "PSNR is infinite")
    assert not (tmp_path / "no").exists()


def test_tensorboard_receives_the_history(call, train_flags, folder):
    result = call("train", *train_flags, "--tensorboard")
    assert result.status == 0, result.err
    events, rows = EventAccumulator(str(folder / "tensorboard")).Reload(), history(folder)
    for name in ("loss", "psnr", "learning_rate", "seconds"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(int(row["step"]), float(row[name])) for row in rows]
        assert np.allclose(written, expected, rtol=1e-5)


def test_missing_tensorboard_is_refused_before_an_older_run_is_renamed(
    call, train_flags, tmp_path, monkeypatch
):
    assert call("train", *train_flags).status == 0
    before = tree(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    result = call("train", *train_flags, "--tensorboard")
    assert refused(result, "--tensorboard", "pip install tensorboard")
    assert tree(tmp_path) == before


@needs_data
def test_the_commands_of_yjn870s_readme_run_unchanged(call, tmp_path):
    data, images, outputs = ROOT / "data", tmp_path / "images", tmp_path / "outputs"
    images.mkdir()
    for name in ("t1.bmp", "t2.bmp", "t3.bmp", "t4.bmp"):
        (images / name).symlink_to(data.resolve() / "T91" / name)
    h5 = {name: tmp_path / f"{name}_x3.h5" for name in ("91-image", "Set5")}
    shutil.copy(data / "Set5" / "butterfly_GT.bmp", tmp_path / "butterfly.bmp")
    commands = [
        f"prepare --images-dir {images} --output-path {h5['91-image']}"
        " --patch-size 33 --stride 14 --scale 3",
        f"prepare --images-dir {data}/Set5 --output-path {h5['Set5']} --scale 3 --eval",
        f"train --train-file {h5['91-image']} --eval-file {h5['Set5']} --outputs-dir {outputs}"
        " --scale 3 --lr 1e-4 --batch-size 16 --num-epochs 1 --num-workers 8 --seed 123",
        f"test --weights-file {outputs}/x3/best.pth --image-file {tmp_path}/butterfly.bmp"
        " --scale 3",
    ]
    for command in commands:
        result = call(*command.split())
        assert (result.status, result.err) == (0, "")
    assert (tmp_path / "butterfly_srcnn_x3.png").is_file()


# --- length, schedule and recipes -----------------------------------------------------------


def test_cosine_falls_to_zero_and_constant_stays(call, train_flags, folder):
    call("train", *train_flags, "--lr", 0.01, "--warmup", 3)
    rates = [float(row["learning_rate"]) for row in history(folder)]
    used = [
        0.01 * min(1, (step + 1) / 4) * 0.5 * (1 + math.cos(math.pi * step / 12))
        for step in range(12)
    ]
    assert rates == pytest.approx([max(used[:4]), max(used[4:8]), max(used[8:])])
    call("train", *train_flags, "--lr", 0.01, "--schedule", "constant", "--warmup", 7)
    rates = [float(row["learning_rate"]) for row in history(folder)]
    assert rates == pytest.approx([0.005, 0.01, 0.01])


def test_evaluations_are_spread_over_a_short_run_and_follow_each_epoch(call, train_flags, folder):
    flags = train_flags[: train_flags.index("--eval-every")]
    call("train", *flags, "--steps", 100)  # 25 epochs of four steps
    assert [int(row["step"]) for row in history(folder)] == list(range(4, 101, 4))
    call("train", *flags, "--batch-size", 1, "--num-epochs", 2)  # 64 steps each
    steps = [int(row["step"]) for row in history(folder)]
    assert steps == sorted({*range(7, 129, 7), 64, 128})  # a 20th of 128 steps, rounded up
    call("train", *flags, "--batch-size", 1, "--num-epochs", 2, "--eval-every", 50)
    assert [int(row["step"]) for row in history(folder)] == [50, 100, 128]


def test_evaluations_take_at_most_a_twentieth_of_a_run_in_minutes(
    call, train_flags, folder, monkeypatch
):
    evaluate, seconds = train.evaluate, []

    def slow_evaluate(*args: object) -> float:
        time.sleep(0.15)
        seconds.append(0.15)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", slow_evaluate)
    flags = train_flags[: train_flags.index("--eval-every")]
    call("train", *flags, "--minutes", 0.15)
    # A twentieth of 9 seconds is 3 evaluations; another precedes the run, and one ends it.
    assert 3 <= len(seconds) <= 5
    assert len(history(folder)) == len(seconds) - 1


def test_the_evaluation_before_the_first_step_takes_none_of_the_minutes(
    call, train_flags, folder, monkeypatch
):
    evaluate, seconds = train.evaluate, [2, 0, 0]

    def slow_once(*args: object) -> float:
        time.sleep(seconds.pop(0))
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", slow_once)
    flags = train_flags[: train_flags.index("--eval-every")]
    assert call("train", *flags, "--minutes", 0.02).status == 0
    assert torch.load(folder / "last.pth", weights_only=True)["global_step"] > 5
    assert float(history(folder)[-1]["seconds"]) < 2


def test_an_exact_result_does_not_hide_the_scores_of_the_other_images():
    images = noise(2, 40, 40).round()
    exact, shifted = Pair(images[0], images[0]), Pair(images[1], np.roll(images[1], 1))
    alone = train.evaluate(SRCNN(), [shifted], 3)
    assert 5 < alone < 30
    assert train.evaluate(SRCNN(), [exact, shifted], 3) == pytest.approx((100 + alone) / 2)


def test_fewer_patches_than_processes_are_refused(train_flags):
    args, _ = train.parse_args([str(flag) for flag in train_flags])
    args.batch_size = 128
    with pytest.raises(InputError, match="--batch-size"):
        train.load_data(args, torch.device("cpu"), 0, 128)


def test_the_terminal_shows_what_will_be_trained_and_how_long_it_takes(call, train_flags):
    flags = train_flags[: train_flags.index("--eval-every")]
    result = call("train", *flags, "--num-epochs", 30, "--lr", 0.002)
    lines = result.out.splitlines()
    for start, words in (
        ("network", "5-3-5, filters 8-4, 601 parameters, x3"),
        ("training", "adam, learning rate 0.002, cosine schedule, 120 steps, 4 in an epoch of 16"),
        ("device", "cpu, "),
        ("patches", "64 of 1 x 33 x 33, 1 MB in memory"),
        ("evaluation", "2 images, bicubic "),
        ("estimated time", "to the end of the run: 0:0"),
    ):
        assert any(line.startswith(start) and words in line for line in lines), words
    pattern = r"epoch 3/30  step 12  loss 0\.\d{6}  PSNR \d\d\.\d\d dB \(best \d\d\.\d\d\)  "
    pattern += r"lr \d\.\de-0\d  \d+ s  ETA 0:0\d:\d\d"
    assert any(re.fullmatch(pattern, line) for line in lines), result.out


def test_a_finished_run_is_reported_as_finished(call, train_flags, folder):
    call("train", *train_flags)
    result = call("train", "--resume", folder / "last.pth")
    assert result.status == 0
    assert "this run is finished" in result.out


def test_several_evaluation_files_are_evaluated_as_one(
    call, train_flags, h5_files, folder, tmp_path
):
    with h5py.File(h5_files[1]) as file:
        for i in (0, 1):
            with h5py.File(tmp_path / f"{i}.h5", "w") as part:
                for key in ("lr", "hr"):
                    part[f"{key}/0"] = file[f"{key}/{i}"][...]
    call("train", *train_flags)
    files = ["--eval-file", tmp_path / "0.h5", tmp_path / "1.h5"]
    call("train", *train_flags, *files, "--outputs-dir", tmp_path / "parts")
    scores = [[row["psnr"] for row in history(f)] for f in (folder, tmp_path / "parts/x3")]
    assert scores[0] == scores[1]


def test_minutes_spread_the_schedule_over_the_time(call, train_flags, folder):
    call("train", *train_flags[:-2], "--minutes", 0.02, "--warmup", 0)
    assert 1.2 <= torch.load(folder / "last.pth", weights_only=True)["seconds"] < 4
    assert float(history(folder)[-1]["learning_rate"]) < 3e-4


@pytest.mark.parametrize("ticks", range(20, 28))
def test_a_run_whose_time_is_up_is_saved_as_finished(call, train_flags, folder, monkeypatch, ticks):
    clock = itertools.count()  # the time is up at different points of an epoch
    monkeypatch.setattr(train, "time", Namespace(perf_counter=lambda: next(clock)))
    assert call("train", *train_flags[:-2], "--minutes", ticks / 60).status == 0
    state = torch.load(folder / "last.pth", weights_only=True)
    assert state["seconds"] >= ticks
    before = tree(folder)
    assert call("train", "--resume", folder / "last.pth").status == 0
    assert tree(folder) == before


def test_the_default_length_is_400_epochs(train_flags):
    args, _ = train.parse_args([*train_flags[:-2], "--lr", 0.1])
    batches, _, data = train.load_data(args, torch.device("cpu"), 0, 1)
    state = train.TrainingState(args, batches, data, 0, 1)
    state.global_step = len(batches) * 100
    assert (len(batches), state.progress) == (4, 0.25)


def test_steps_end_a_run_in_mid_epoch_with_an_evaluation(call, train_flags, folder):
    assert call("train", *train_flags[:-2], "--steps", 6).status == 0
    assert torch.load(folder / "last.pth", weights_only=True)["global_step"] == 6
    assert [row["epoch"] for row in history(folder)] == ["1", "2"]


def test_a_recipe_sets_defaults_which_typed_flags_override(train_flags):
    args, _ = train.parse_args([*train_flags, "--recipe", "forks", "--ema", 0.5])
    assert (args.lr, args.init, args.augment, args.ema) == (1e-4, "default", False, 0.5)
    assert train.parse_args([*train_flags, "--recipe", "paper"])[0].optimizer == "sgd"
    assert train.parse_args(train_flags)[0].optimizer == "adam"


def test_bfloat16_is_used_and_its_absence_reported(call, train_flags, folder, monkeypatch):
    call("train", *train_flags)
    exact = load_srcnn(folder / "best.pth").conv1.weight
    for available in (True, False):
        monkeypatch.setattr(train, "bf16_is_faster", lambda device, available=available: available)
        result = call("train", *train_flags, "--bf16")
        assert result.status == 0
        weight = load_srcnn(folder / "best.pth").conv1.weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact) == (not available)
        assert ("bfloat16 is not faster" in result.out) == (not available)


# --- optimizers -----------------------------------------------------------------------------


def test_sgd_follows_the_papers_rule_with_a_tenth_in_the_last_layer():
    torch.manual_seed(0)
    model = SRCNN(filters=(4, 4), kernel_sizes=(3, 3, 3), init="default").double()
    args = Namespace(optimizer="sgd", lr=0.1, last_layer_lr=0.1)
    (optimizer,) = train.make_optimizers(model, args)
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


@pytest.mark.parametrize("factor", [None, 0.5, 2])
@pytest.mark.parametrize("optimizer", ["adam", "muon", "sgd"])
def test_last_layer_lr_is_a_factor_of_lr(train_flags, optimizer, factor):
    train_flags += ["--last-layer-lr", factor] if factor else []
    args, _ = train.parse_args([*train_flags, "--optimizer", optimizer, "--lr", 0.2])
    model = SRCNN(**LAYERS)
    rates = {}
    for group in train.make_optimizers(model, args)[0].param_groups:
        rates |= dict.fromkeys(group["params"], group["lr"])
    assert rates[model.conv1.weight] == rates[model.conv2.weight] == 0.2
    assert rates[model.conv3.weight] == pytest.approx(0.2 * (factor or 0.1))
    assert rates.get(model.conv3.bias) in (None, rates[model.conv3.weight])  # Muon leaves it out
    assert len(rates) == (3 if optimizer == "muon" else 6)


def test_last_layer_lr_of_zero_freezes_the_last_layer(call, train_flags, folder):
    train_flags += ["--init", "default", "--last-layer-lr", 0]
    assert call("train", *train_flags).status == 0
    torch.manual_seed(123)  # --seed
    start, model = SRCNN(init="default", **LAYERS), load_srcnn(folder / "last.pth")
    assert torch.equal(model.conv3.weight, start.conv3.weight)
    assert not torch.equal(model.conv2.weight, start.conv2.weight)


@pytest.mark.parametrize("shape", [(64, 81), (32, 1600), (40, 7)])
def test_orthogonalize_returns_a_nearly_orthogonal_matrix(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = train.orthogonalize(matrix)
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


@pytest.mark.parametrize(("optimizer", "frozen"), [("muon", True), ("adam", False)])
def test_muon_freezes_the_identity_filters(call, train_flags, folder, optimizer, frozen):
    argv = [*train_flags, "--optimizer", optimizer, "--num-epochs", 1]
    assert call("train", *argv).status == 0
    model, start = load_srcnn(folder / "last.pth"), SRCNN(**LAYERS)
    for ours, theirs in zip(model.layers[:-1], start.layers):
        assert torch.equal(ours.weight[0], theirs.weight[0]) == frozen
        assert torch.equal(ours.bias[:1], theirs.bias[:1]) == frozen
        assert not torch.equal(ours.weight[1:], theirs.weight[1:])
    assert torch.equal(model.conv3.weight[0, 0], start.conv3.weight[0, 0]) == frozen
    torch.manual_seed(123)  # --seed
    start = SRCNN(init="default", **LAYERS)  # has no identity filters
    assert call("train", *argv, "--init", "default").status == 0
    layers = zip(load_srcnn(folder / "last.pth").layers[:-1], start.layers)
    assert not all(torch.equal(ours.weight[0], theirs.weight[0]) for ours, theirs in layers)


def test_tied_filters_make_a_plain_file_that_commutes_with_rotations(call, h5_files, tmp_path):
    files = ["--train-file", h5_files[0], "--eval-file", h5_files[1], "--outputs-dir", tmp_path]
    flags = ["--filters", 20, 17, "--kernel-sizes", 5, 3, 5, "--optimizer", "muon"]
    flags += ["--warmup", 0, "--ema", 0.5, "--lr", 0.01, "--symmetry", 4]
    assert call("train", *files, *flags, "--num-epochs", 10).status == 0
    plain = torch.load(tmp_path / "x3/best.pth", weights_only=True)
    assert list(plain) == list(SRCNN().state_dict())
    model, x = load_srcnn(tmp_path / "x3/last.pth").double(), torch.rand(1, 1, 21, 21).double()
    assert (model(x) - x).abs().max() > 1e-2
    for k in range(4):
        rotated = torch.rot90(model(x), k, (2, 3))
        assert (model(torch.rot90(x, k, (2, 3))) - rotated).abs().max() < 1e-5
    assert (model(x.flip(3)) - model(x).flip(3)).abs().max() > 1e-5
    num_free = len(model.conv1.weight.flatten(1).norm(dim=1).mul(1e4).round().unique())
    assert num_free == 8 + (20 - 8) // 4
    # Fine-tuning can start from these weights, but not from weights of free filters.
    argv = [*files, *flags, "--num-epochs", 1, "--outputs-dir", tmp_path / "tuned", "--init"]
    assert call("train", *argv, tmp_path / "x3/last.pth").status == 0
    torch.save(SRCNN(1, (20, 17), (5, 3, 5), "default").state_dict(), tmp_path / "free.pth")
    result = call("train", *argv, tmp_path / "free.pth")
    assert refused(result, "free.pth", "not tied", "--symmetry 1")


# --- initial weights ------------------------------------------------------------------------


def test_fine_tuning_never_ends_below_its_initial_weights(call, train_flags, folder, tmp_path):
    call("train", *train_flags, "--seed", 5)
    start = tmp_path / "start.pth"
    (folder / "best.pth").rename(start)
    first = float(history(folder)[-1]["psnr"])
    result = call("train", *train_flags, "--init", start, "--num-epochs", 1, "--lr", 5)
    assert result.status == 0
    assert float(history(folder)[-1]["psnr"]) < first - 1  # the learning rate is far too high
    assert equal_files(folder / "best.pth", start)
    assert call("train", *train_flags, "--init", start, "--num-epochs", 1).status == 0
    start.unlink()  # a resumed run does not need it
    assert call("train", "--resume", folder / "last.pth", "--num-epochs", 2).status == 0


def test_unusable_initial_weights_are_refused(call, train_flags, tmp_path):
    assert refused(call("train", *train_flags, "--init", "gausian"), "gausian: no such")
    start = tmp_path / "start.pth"
    torch.save(SRCNN().state_dict(), start)  # 9-5-5, which train_flags does not ask for
    assert refused(call("train", *train_flags, "--init", start), str(start), "is 9-5-5; pass its")
    assert not (tmp_path / "out").exists()


# --- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "muon", "sgd"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    call, train_flags, folder, tmp_path, optimizer
):
    train_flags += ["--optimizer", optimizer, "--schedule", "constant"]
    call("train", *train_flags, "--num-epochs", 5, "--outputs-dir", tmp_path / "whole")
    call("train", *train_flags, "--num-epochs", 2)
    last = folder / "last.pth"
    result = call("train", "--resume", last, "--num-epochs", 5)
    assert (result.status, result.err) == (0, "")
    assert f"{last}: resuming after step 8" in result.out
    assert same_run(last, tmp_path / "whole/x3/last.pth")
    assert [row["epoch"] for row in history(folder)] == list("12345")


@pytest.mark.parametrize("flags", ["--optimizer adam", "--optimizer muon", "--symmetry 4"])
def test_a_resumed_fine_tuning_ends_like_an_uninterrupted_one(
    call, train_flags, folder, tmp_path, flags
):
    torch.manual_seed(1)
    model = SRCNN(init="default", **LAYERS)
    if "symmetry" in flags:
        train.tie_filters(model)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    train_flags += ["--init", tmp_path / "start.pth", "--schedule", "constant", *flags.split()]
    call("train", *train_flags, "--outputs-dir", tmp_path / "whole")
    call("train", *train_flags, "--num-epochs", 2)
    assert call("train", "--resume", folder / "last.pth", "--num-epochs", 3).status == 0
    assert same_run(folder / "last.pth", tmp_path / "whole/x3/last.pth")


def test_resuming_a_finished_run_changes_nothing(call, train_flags, folder):
    call("train", *train_flags)
    before = tree(folder)
    assert call("train", "--resume", folder / "last.pth").status == 0
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("length", "stop", "end"),
    [
        (["--steps", 6], 6, 6),
        (["--num-epochs", 3], 12, 12),
        (["--steps", 6, "--eval-every", 2], 2, 6),
    ],
)
def test_a_stop_at_a_step_that_is_evaluated_loses_nothing_and_adds_no_step(
    call, train_flags, folder, tmp_path, monkeypatch, length, stop, end
):
    argv = [*train_flags[:-2], *length]
    call("train", *argv, "--outputs-dir", tmp_path / "whole")
    loss_fn, steps = train.loss_fn, []

    def stop_at_the_step(sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        steps.append(len(steps) + 1)
        if len(steps) == stop:
            signal.raise_signal(signal.SIGTERM)
        return loss_fn(sr, hr)

    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_fn", stop_at_the_step)
        assert call("train", *argv).status == 143
    last = folder / "last.pth"
    stopped = torch.load(last, weights_only=True)
    assert (stopped["global_step"], len(stopped["history"])) == (stop, (stop - 1) // 4)
    assert call("train", "--resume", last).status == 0
    assert torch.load(last, weights_only=True)["global_step"] == end
    assert same_run(last, tmp_path / "whole/x3/last.pth")


@pytest.mark.parametrize("epoch", [2, 3])
def test_resuming_writes_an_epoch_file_that_a_kill_prevented(
    call, train_flags, folder, tmp_path, monkeypatch, epoch
):
    train_flags += ["--save-every", 1]
    call("train", *train_flags, "--outputs-dir", tmp_path / "whole")
    write_file = train.write_file

    def killed(path, content):
        if path.name == f"epoch_{epoch}.pth":
            raise SystemExit(137)
        write_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_file", killed)
        assert call("train", *train_flags).status == 137
    assert torch.load(folder / "last.pth", weights_only=True)["global_step"] == 4 * epoch
    assert not (folder / f"epoch_{epoch}.pth").exists()
    assert call("train", "--resume", folder / "last.pth").status == 0
    for i in (1, 2, 3):
        assert equal_files(folder / f"epoch_{i}.pth", tmp_path / f"whole/x3/epoch_{i}.pth")


def test_resume_without_a_value_continues_the_run_in_outputs_dir(call, train_flags, folder):
    call("train", *train_flags)
    result = call("train", "--outputs-dir", folder.parent, "--resume", "--num-epochs", 4)
    assert result.status == 0
    assert len(history(folder)) == 4


def test_auto_resume_continues_a_run_or_starts_a_new_one(call, train_flags, folder, tmp_path):
    train_flags += ["--auto-resume", "--schedule", "constant"]
    result = call("train", *train_flags)
    assert (result.status, result.err) == (0, "")
    assert "resuming" not in result.out
    assert refused(call("train", *train_flags, "--lr", 0.5), "--lr", "was trained with")
    result = call("train", *train_flags, "--num-epochs", 5)
    assert (result.status, result.err) == (0, "")
    assert f"{folder / 'last.pth'}: resuming after step 12" in result.out
    assert [path.name for path in folder.parent.iterdir()] == ["x3"]
    call("train", *train_flags, "--num-epochs", 5, "--outputs-dir", tmp_path / "whole")
    assert same_run(folder / "last.pth", tmp_path / "whole/x3/last.pth")


def test_a_resumed_run_is_not_written_elsewhere(call, train_flags, folder, tmp_path):
    call("train", *train_flags)
    before = tree(tmp_path)
    result = call("train", "--resume", folder / "last.pth", "--outputs-dir", tmp_path / "other")
    assert refused(result, "--outputs-dir", "beside its checkpoint")
    assert tree(tmp_path) == before


def test_contradictions_to_the_checkpoint_are_refused(call, train_flags, folder, h5_files):
    call("train", *train_flags)
    before = tree(folder.parent)
    contradictions = [
        ["--lr", 0.5],
        ["--last-layer-lr", 1],
        ["--batch-size", 4],
        ["--seed", 9],
        ["--ema", 0],
        ["--no-augment"],
        ["--recipe", "fast"],
        ["--filters", 8, 5],
    ]
    for flag, *value in contradictions:
        result = call("train", *train_flags, flag, *value, "--resume")
        assert refused(result, f"{flag}:", "was trained with", "drop the flag")
    assert call("train", *train_flags, "--lr", 0.001, "--resume").status == 0  # the same value
    assert tree(folder.parent) == before


def test_resuming_with_other_data_is_refused(call, train_flags, folder, h5_files, tmp_path):
    call("train", *train_flags)
    before = tree(folder)
    shutil.copy(h5_files[0], tmp_path / "moved.h5")
    shutil.copy(h5_files[1], tmp_path / "other.h5")
    with h5py.File(tmp_path / "other.h5", "r+") as file:
        del file["lr/1"], file["hr/1"]
    resume = ["--resume", folder / "last.pth"]
    result = call("train", *resume, "--eval-file", tmp_path / "other.h5")
    assert refused(result, "--eval-file", "differs")
    assert tree(folder) == before
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["lr"] = file["hr"] = np.zeros((50, 33, 33), np.float32)
    result = call("train", *resume, "--train-file", tmp_path / "other.h5")
    assert refused(result, "--train-file", "differs")
    assert tree(folder) == before
    assert call("train", *resume, "--train-file", tmp_path / "moved.h5").status == 0


def test_a_damaged_checkpoint_is_refused(call, train_flags, folder):
    call("train", *train_flags)
    last = folder / "last.pth"
    content = last.read_bytes()
    for damaged in (b"", content[:1000], (folder / "best.pth").read_bytes()):
        last.write_bytes(damaged)
        assert refused(call("train", "--resume", last), "last.pth")
    torch.save({"version": 2, "args": {}}, last)
    assert refused(call("train", "--resume", last), "last.pth", "another version", "--init")


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["step", "patches"])
def test_only_a_lost_worker_is_reported_as_one(call, train_flags, monkeypatch, place, workers):
    def failing(*args: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    if place == "step":
        monkeypatch.setattr(train, "loss_fn", failing)
    else:  # in the process of the run or in its workers
        monkeypatch.setattr(H5Patches, "__getitems__", failing)
    with pytest.raises(RuntimeError, match="CUDA error: out of memory"):
        call("train", *train_flags, "--stream", "--num-workers", workers)


@pytest.mark.parametrize(("steps", "lr"), [(12, 1e9), (1, 1e25)])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(
    call, train_flags, folder, steps, lr
):
    argv = [*train_flags[:-2], "--steps", steps, "--optimizer", "sgd", "--lr", lr]
    result = call("train", *argv, "--schedule", "constant", "--warmup", 0)
    assert refused(result, "not finite", "lower --lr")
    assert load_srcnn(folder / "best.pth")


def test_a_batch_size_that_the_processes_cannot_share_is_refused(train_flags):
    args, _ = train.parse_args([*train_flags, "--batch-size", 5])
    with pytest.raises(InputError, match="--batch-size: must be a multiple of the 2 processes"):
        train.load_data(args, torch.device("cpu"), 0, 2)


def test_a_missing_training_file_is_reported_in_argparses_words(call, h5_files, tmp_path):
    result = call("train", "--eval-file", h5_files[1], "--outputs-dir", tmp_path)
    assert refused(result, "the following arguments are required: --train-file")
    result = call("train", "--auto-resume", "--outputs-dir", tmp_path)
    assert refused(result, "the following arguments are required: --train-file")
    assert tree(tmp_path) == {}


def test_bad_arguments_are_one_line_and_write_nothing(call, train_flags, h5_files, tmp_path):
    bad = [
        (["--scale", 4], "made for --scale 3"),
        (["--scale", 1], "--scale"),
        (["--lr", -1], "--lr"),
        (["--lr", "fast"], "--lr"),
        (["--last-layer-lr", -1], "--last-layer-lr"),
        (["--batch-size", 0], "--batch-size"),
        (["--num-epochs", 0], "--num-epochs"),
        (["--minutes", 0], "--minutes"),
        (["--steps", 1, "--minutes", 1], "not allowed with"),
        (["--ema", 1], "--ema"),
        (["--symmetry", 8], "--symmetry"),
        (["--kernel-sizes", 9, 4, 5], "--kernel-sizes"),
        (["--kernel-sizes", 9, 5], "--kernel-sizes"),
        (["--device", "cuda:77"], "--device"),
        (["--device", "toaster"], "--device"),
        (["--optimizer", "adagrad"], "--optimizer"),
        (["--train-file", h5_files[1]], "not a training file"),
        (["--eval-file", h5_files[0]], "not an evaluation file"),
        (["--train-file", tmp_path / "no.h5"], "no.h5"),
        (["--tf32"], "--tf32"),
    ]
    for flags, words in bad:
        argv = [*train_flags[:4], "--outputs-dir", tmp_path, *flags]
        assert refused(call("train", *argv), words)
    assert refused(call("train", "--resume", tmp_path / "no.pth"), "no.pth", "no such checkpoint")
    assert tree(tmp_path) == {}
