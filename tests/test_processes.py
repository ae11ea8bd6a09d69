"""Scripts as processes: signals, kills, lost workers, full disks, nohup and torchrun."""

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
import pytest
import torch
from conftest import FULL_DISK, ROOT, Result, history, refused, same_run, tree
from PIL import Image

from models import SRCNN, load_srcnn

TRAIN = ROOT / "train.py"
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
STREAM = ["--stream", "--num-workers", 2]
needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")


@pytest.fixture
def last(tmp_path):
    """The checkpoint of a run of train_flags."""
    return tmp_path / "out" / "x3" / "last.pth"


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def status_of(number: signal.Signals) -> int:
    """Return the status of a process that a signal has stopped: SIGINT ends it directly."""
    return -number if number == signal.SIGINT else 128 + number


def start(*command: object, until: Path | None = None) -> subprocess.Popen:
    """Start Python in a process group of its own, and wait until a file exists."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, **pipes, env=os.environ | ENV, start_new_session=True)
    while until and not until.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def end(process: subprocess.Popen) -> Result:
    """Wait until a process ends; after a minute, end it and fail."""
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes, after 30 seconds by SIGKILL
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the process hangs: {process.communicate()}")
    return Result(process.returncode, out, err)


def call_script(*command: object) -> Result:
    """Run a script in another process until it ends."""
    return end(start(*command))


def write_probe(path: Path, script: str, *lines: str) -> Path:
    """Write a script that executes `lines`, which patch the module, and then the script's main."""
    imports = f"import io, os, signal, time, torch, torch.distributed as dist, {script}"
    parsed = (
        "*train.parse_args()" if script == "train" else f"{script}.get_args_parser().parse_args()"
    )
    main = f"if __name__ == '__main__':\n    {script}.run(lambda: {script}.main({parsed}))\n"
    path.write_text("\n".join([imports, *lines, main]))
    return path


# --- signals --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(h5_files, tmp_path_factory):
    """The checkpoint of an uninterrupted run of 20 epochs, and its flags but --outputs-dir."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--train-file", h5_files[0], "--eval-file", h5_files[1], "--num-epochs", 20]
    flags += ["--filters", 8, 4, "--kernel-sizes", 5, 3, 5]
    assert call_script(TRAIN, *flags, "--outputs-dir", folder).status == 0
    return folder / "x3" / "last.pth", flags


@pytest.mark.parametrize(
    ("number", "data"), [(signal.SIGINT, STREAM), (signal.SIGTERM, STREAM), (signal.SIGHUP, [])]
)
def test_a_signal_saves_the_run_which_resumes_bit_for_bit(whole, tmp_path, last, data, number):
    flags = [*whole[1], *data, "--outputs-dir", tmp_path / "out"]
    process = start(TRAIN, *flags, until=last.with_name("history.csv"))
    os.killpg(process.pid, number)  # as a terminal does: the workers receive it, too
    result = end(process)
    assert (result.status, result.err) == (status_of(number), "")
    assert f"--resume {last}" in result.out.splitlines()[-1]
    assert 4 <= load(last)["global_step"] < 80
    resumed = call_script(TRAIN, "--resume", last, "--no-stream")
    assert (resumed.status, resumed.err) == (0, "")
    assert same_run(last, whole[0])
    assert [row["epoch"] for row in history(last.parent)] == [str(i) for i in range(1, 21)]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ctrl_c_ends_a_shell_loop_over_runs(train_flags, tmp_path, last):
    words = " ".join(f"'{word}'" for word in [sys.executable, TRAIN, *train_flags])
    loop = f"for i in 1 2; do {words} --num-epochs 2000; echo next; done; echo after"
    process = subprocess.Popen(
        ["bash", "-c", loop],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENV,
        start_new_session=True,
    )
    while not last.with_name("history.csv").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    status, out, _ = end(process)
    assert status == -signal.SIGINT
    assert f"--resume {last}" in out.splitlines()[-1]
    assert [path.name for path in last.parents[1].iterdir()] == ["x3"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("name", ["prepare", "test"])
def test_a_signal_leaves_no_partial_file(tmp_path, weights, name, number):
    images, outputs = tmp_path / "in", tmp_path / "out"
    images.mkdir()
    outputs.mkdir()
    for i in range(40):
        Image.new("RGB", (64, 64), (i, 9, 9)).save(images / f"{i}.png")
    flags = ["--weights-file", weights, "--image-file", images, "--self-ensemble"]
    flags += ["--output", outputs]
    if name == "prepare":
        flags = ["--synthetic", 400, "--scale", 3, "--output-path", outputs / "a.h5"]
    process = start(ROOT / f"{name}.py", *flags)
    while not list(outputs.iterdir()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    status, out, err = end(process)
    files = sorted(outputs.iterdir())
    assert (status, err) == (status_of(number), "")
    assert all(Image.open(path).size == (192, 192) for path in files)
    assert len(files) - len(out.splitlines()) in (0, 1)  # the last line may not be printed yet


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_hdf5_writes_ends_the_program_cleanly(tmp_path, number):
    probe = write_probe(
        tmp_path / "probe.py",
        "prepare",
        "classes = [value for value in vars(prepare).values() if isinstance(value, type)]",
        "(file_class,) = [c for c in classes if issubclass(c, io.FileIO)]  # for HDF5",
        "write, calls = file_class.write, []",
        "def interrupted(*args):",
        "    calls.append(args)",
        "    if len(calls) == 5:",
        f"        signal.raise_signal({int(number)})",
        "    return write(*args)",
        "file_class.write = interrupted",
    )
    (tmp_path / "out").mkdir()
    flags = ["--synthetic", 2, "--scale", 3, "--output-path", tmp_path / "out" / "a.h5"]
    assert call_script(probe, *flags) == (status_of(number), "", "")
    assert tree(tmp_path / "out") == {}


def test_a_second_ctrl_c_ends_the_run_at_once(train_flags, tmp_path, last):
    probe = write_probe(
        tmp_path / "probe.py",
        "train",
        "def loss_fn(sr, hr):",
        "    print('step', flush=True)",
        "    time.sleep(300)",
        "train.loss_fn = loss_fn",
    )
    process = start(probe, *train_flags)
    while process.stdout.readline() not in ("step\n", ""):
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, process.communicate()  # the first one waits for the step
    process.send_signal(signal.SIGINT)
    result = end(process)
    assert (result.status, result.err) == (-signal.SIGINT, "")
    assert load(last)["global_step"] == 0


@pytest.mark.parametrize("delay", [0.15, 0.6, 1.5])
def test_a_signal_during_start_up_ends_the_program_cleanly(train_flags, tmp_path, delay):
    process = start(TRAIN, *train_flags, *STREAM, "--num-epochs", 10_000)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    status, _, err = end(process)
    assert status in (143, -signal.SIGTERM)  # the latter before the script's first line
    assert (err, list(tmp_path.rglob(".part-*"))) == ("", [])


@pytest.mark.skipif(shutil.which("nohup") is None, reason="needs nohup")
def test_a_run_under_nohup_outlives_its_terminal(train_flags, last):
    command = ["nohup", sys.executable, TRAIN, *train_flags, "--num-epochs", 20]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), env=os.environ | ENV, **silent)
    while not last.with_name("history.csv").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=180) == 0
    assert len(history(last.parent)) == 20


# --- kills, closed pipes and full disks -----------------------------------------------------


def test_kills_at_random_moments_lose_nothing(whole, tmp_path, last):
    argv = [*whole[1], "--outputs-dir", tmp_path / "out"]
    epochs = []
    for _ in range(4):
        process = start(TRAIN, *argv, until=last)
        saved = last.stat().st_mtime_ns
        while last.stat().st_mtime_ns == saved and process.poll() is None:
            time.sleep(0.002)  # until it trains
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.communicate()
        epochs.append(load(last)["global_step"] // 4)
        load_srcnn(last.with_name("best.pth"))
        argv = ["--resume", last]
    assert epochs == sorted(epochs)
    assert epochs[0] < 20
    assert call_script(TRAIN, "--resume", last).status == 0
    assert same_run(last, whole[0])
    for a, b in zip(*(load(p.with_name("best.pth")).values() for p in (last, whole[0]))):
        assert torch.equal(a, b)
    assert [row["epoch"] for row in history(last.parent)] == [str(i) for i in range(1, 21)]


def test_a_run_whose_pipe_is_closed_ends_after_it_has_saved(train_flags, last):
    process = start(TRAIN, *train_flags, "--num-epochs", 100_000, "--save-every", 1)
    while not process.stdout.readline().startswith("evaluation"):
        pass  # the summary
    process.stdout.close()  # as `| head -5` does
    assert (process.wait(timeout=180), process.stderr.read()) == (141, "")
    assert len(history(last.parent)) == 1
    assert last.with_name("epoch_1.pth").is_file()


@pytest.mark.parametrize("resumed", [True, False])
def test_a_full_disk_is_one_line_and_leaves_the_saved_run_intact(
    call, train_flags, last, tmp_path, resumed
):
    assert call("train", *train_flags).status == 0
    before = tree(last.parent)
    argv = ["--resume", last, "--num-epochs", 4] if resumed else train_flags
    result = call_script("-c", FULL_DISK, TRAIN, *argv)
    assert refused(result, "cannot be written", ".pth")
    folders = {path.name: tree(path) for path in (tmp_path / "out").iterdir()}
    assert folders.pop("x3" if resumed else "x3-1") == before
    assert not any(folders.values())


# --- streaming ------------------------------------------------------------------------------


@needs_proc
def test_a_lost_worker_is_one_line_and_a_saved_checkpoint(call, train_flags, last):
    argv = [*train_flags, *STREAM, "--batch-size", 4, "--num-epochs", 10_000]
    process = start(TRAIN, *argv, until=last.with_name("history.csv"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:  # a worker that has delivered its last batch is not missed: then the next one
            os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
            time.sleep(0.05)
        except (OSError, IndexError):
            continue
    assert refused(end(process), "--num-workers", "--resume")
    epoch = load(last)["global_step"] // 4 + 1
    assert call("train", "--resume", last, "--num-workers", 0, "--num-epochs", epoch).status == 0


@pytest.mark.parametrize("name", ["Batches._transform", "loss_fn", "H5Patches.__getitems__"])
def test_an_error_beside_workers_is_not_reported_as_a_lost_worker(train_flags, tmp_path, name):
    probe = write_probe(
        tmp_path / "probe.py",
        "train",
        "def failing(*args):",
        "    raise RuntimeError('CUDA error: out of memory')",
        f"train.{name} = failing",
    )
    result = call_script(probe, *train_flags, *STREAM)
    assert (result.status, "--num-workers" in result.err) == (1, False)
    assert result.err.strip().splitlines()[-1] == "RuntimeError: CUDA error: out of memory"


def test_a_damaged_patch_ends_a_streaming_run_with_one_line(train_flags, h5_files, tmp_path):
    shutil.copy(h5_files[0], tmp_path / "damaged.h5")
    with h5py.File(tmp_path / "damaged.h5", "r+") as file:
        file["lr"][10] = math.nan
    result = call_script(TRAIN, *train_flags, "--train-file", tmp_path / "damaged.h5", *STREAM)
    assert refused(result, "damaged.h5", "NaN")


def resident_bytes(pid: int) -> int:
    """Return the memory of a process and its workers; pages that they share count once."""
    total, children = 0, Path(f"/proc/{pid}/task/{pid}/children")
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        pss = [int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")]
        total = 1024 * pss[0] + sum(map(resident_bytes, map(int, children.read_text().split())))
    except (OSError, IndexError):
        pass  # it has just ended
    return total


@needs_proc
def test_six_gigabytes_are_streamed_in_bounded_memory(train_flags, tmp_path):
    path = tmp_path / "large.h5"  # sparse: unwritten chunks take no disk space and contain 0
    count = 6_000_000_000 // (2 * 4 * 33 * 33)
    with h5py.File(path, "w") as file:
        for name in ("lr", "hr"):
            file.create_dataset(name, (count, 33, 33), "float32", chunks=(15, 33, 33))
    argv = [*train_flags[:-2], "--train-file", path, "--minutes", 0.05, "--num-workers", 2]
    process = start(TRAIN, *argv)  # without --stream: that is the default for 6 GB
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.02)
    status, out, err = end(process)
    assert (status, err) == (0, "")
    assert f"{count:,} of 1 x 33 x 33, 6,000 MB from disk" in out
    assert 0.1e9 < peak < 1.5e9


# --- several processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(h5_files, tmp_path_factory):
    """The checkpoint of an uninterrupted run of two processes, and its flags."""
    folder = tmp_path_factory.mktemp("pair")
    flags = ["--train-file", h5_files[0], "--eval-file", h5_files[1], "--num-epochs", 5]
    flags += ["--filters", 8, 4, "--kernel-sizes", 5, 3, 5, "--eval-every", 4]
    result = call_script(*TORCHRUN, TRAIN, *flags, "--outputs-dir", folder)
    assert result.status == 0, result.err
    return folder / "x3" / "last.pth", flags


def test_two_processes_train_as_one(train_flags, tmp_path):
    argv = [*train_flags[:-2], "--steps", 6, "--batch-size", 8]
    assert call_script(TRAIN, *argv, "--outputs-dir", tmp_path / "one").status == 0
    probe = write_probe(
        tmp_path / "probe.py",
        "train",
        "models, initial_model, main = [], train.initial_model, train.main",
        "train.initial_model = lambda *args: models.append(initial_model(*args)) or models[0]",
        "def main_and_checks(*args):",
        "    status = main(*args)",
        "    tasks = os.listdir('/proc/self/task') if os.path.exists('/proc/self/task') else []",
        "    threads = [open(f'/proc/self/task/{task}/comm').read() for task in tasks]",
        "    assert not [name for name in threads if 'gloo' in name], threads",
        f"    path = {str(tmp_path)!r} + '/rank' + os.environ['RANK']",
        "    torch.save(models[0].state_dict(), path)",
        "    return status",
        "train.main = main_and_checks",
    )
    result = call_script(*TORCHRUN, probe, *argv, "--outputs-dir", tmp_path / "two")
    assert result.status == 0, result.err
    assert result.out.count("  step 4  ") == 1  # only one rank prints
    ranks = [load(tmp_path / f"rank{rank}") for rank in (0, 1)]
    one, two = (load(tmp_path / name / "x3/last.pth") for name in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 6
    assert list(ranks[0]) == list(SRCNN().state_dict())
    for name, weight in one["model"].items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert (ranks[0][name] - weight).abs().max() < 1e-5
    psnr = [float(history(tmp_path / name / "x3")[0]["psnr"]) for name in ("one", "two")]
    assert psnr[0] == pytest.approx(psnr[1], abs=1e-3)


def assert_same_weights(a: Path, b: Path) -> None:
    """Compare all but the losses: a stop changes the order in which ranks add them."""
    for name in ("global_step", "model", "ema", "optimizers", "best"):
        torch.testing.assert_close(load(a)[name], load(b)[name], rtol=0, atol=0)


def test_a_signal_on_one_rank_while_ranks_synchronise_is_not_lost(pair, tmp_path, last):
    probe = write_probe(
        tmp_path / "probe.py",
        "train",
        "all_reduce, calls = dist.all_reduce, []",
        "def interrupted(*args):",
        "    calls.append(args)",
        "    if os.environ['RANK'] == '1' and len(calls) == 3:  # the clock after four steps",
        "        signal.raise_signal(signal.SIGTERM)",
        "    return all_reduce(*args)",
        "dist.all_reduce = interrupted",
    )
    result = call_script(*TORCHRUN, probe, *pair[1], "--outputs-dir", tmp_path / "out")
    assert result.status != 0
    assert f"stopped; continue with: python train.py --resume {last}" in result.out
    assert 4 <= load(last)["global_step"] < 20
    result = call_script(*TORCHRUN, TRAIN, "--resume", last)
    assert result.status == 0, result.err
    assert_same_weights(last, pair[0])


def test_a_signal_to_torchrun_saves_the_run(train_flags, last):
    argv = [*train_flags, "--num-epochs", 10_000]
    process = start(*TORCHRUN, TRAIN, *argv, until=last.with_name("history.csv"))
    process.send_signal(signal.SIGTERM)  # which torchrun sends to its processes
    result = end(process)
    assert result.status != 0
    assert f"stopped; continue with: python train.py --resume {last}" in result.out
    state = load(last)
    assert len(state["history"]) == state["evaluated_step"] // 4


def test_a_killed_process_ends_the_job_which_resumes(call, train_flags, last):
    argv = [*train_flags, "--num-epochs", 10_000]
    process = start(*TORCHRUN, TRAIN, *argv, until=last.with_name("history.csv"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert end(process).status != 0
    epoch = load(last)["global_step"] // 4 + 1
    assert call("train", "--resume", last, "--num-epochs", epoch).status == 0
    assert len(history(last.parent)) == epoch


def test_torchrun_restarts_a_killed_process_from_the_checkpoint(pair, tmp_path, last):
    probe = write_probe(
        tmp_path / "probe.py",
        "train",
        "loss_fn, steps = train.loss_fn, []",
        "def killed(*args):",
        "    steps.append(args)",
        "    first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'",
        "    if first and os.environ['RANK'] == '1' and len(steps) == 10:",
        "        os.kill(os.getpid(), signal.SIGKILL)",
        "    return loss_fn(*args)",
        "train.loss_fn = killed",
    )
    flags = [*pair[1], "--outputs-dir", tmp_path / "out", "--auto-resume"]
    result = call_script(*TORCHRUN, "--max-restarts=1", probe, *flags)
    assert result.status == 0, result.err
    assert f"{last}: resuming after step 8" in result.out
    assert [row["epoch"] for row in history(last.parent)] == list("12345")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x3"]
    assert_same_weights(last, pair[0])


def test_two_processes_stop_together_when_the_time_is_up(train_flags, last):
    argv = [*train_flags[:-2], "--minutes", 0.03]
    result = call_script(*TORCHRUN, TRAIN, *argv)
    assert result.status == 0, result.err
    assert load(last)["seconds"] >= 1.8
