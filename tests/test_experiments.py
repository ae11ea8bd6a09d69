"""experiments/: one experiment of each kind at toy size, a killed run, the figures."""

import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, ROOT, Result, needs_data, refused, spawn, tree

import prepare

sys.path.append(str(ROOT / "experiments"))
import paper

COMMAND = ROOT / "experiments" / "paper.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of synthetic images to train on and to score."""
    folder = tmp_path_factory.mktemp("images")
    for name, seeds in ("train", range(2)), ("Set5", range(5, 7)):
        (folder / name).mkdir()
        for seed in seeds:
            prepare.dead_leaves(seed, 96).save(folder / name / f"{seed}.png")
    return folder


@pytest.fixture
def argv(folder, tmp_path) -> list:
    flags = ["--images-dir", folder / "train", "--sets", folder / "Set5", "--steps", 20]
    return flags + ["--work-dir", tmp_path / "work", "--results", tmp_path / "results.csv"]


def result_of(*words: object) -> Result:
    process = spawn(COMMAND, *words)
    return Result(process.returncode, process.stdout, process.stderr)


def rows_of(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_experiment_is_listed_with_the_papers_result():
    result = result_of("--list")
    assert (result.status, result.err) == (0, "")
    for words in (
        ("headline", "x2", "36.34"),
        ("headline", "x4", "30.09"),
        ("filters", "128-64", "32.6"),
        ("sizes", "11-1-7", "32.57"),
        ("depth", "9-3-3-3"),
        ("data", "an eighth of T91"),
        ("colour", "CbCr pre-train", "36.25"),
        ("convergence", "SGD"),
        ("seen", "filters"),
        ("initialisation", "gaussian"),
        ("speed", "128-64"),
    ):
        lines = [line for line in result.out.splitlines() if line.startswith(words[0])]
        assert any(all(word in line for word in words) for line in lines), words


def test_a_killed_run_is_resumed_and_its_histories_become_figures(argv, tmp_path):
    words = [sys.executable, COMMAND, "filters", *argv]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "work").glob("*/x3/last.pth"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = rows_of(tmp_path / "results.csv")
    assert [row["variant"] for row in before] == ["128-64"]
    result = result_of("filters", *argv)
    assert result.status == 0, result.err
    rows = rows_of(tmp_path / "results.csv")
    assert rows[0] == before[0]
    assert [row["variant"] for row in rows] == ["128-64", "64-32", "32-16"]
    assert [row["parameters"] for row in rows] == ["20160", "8032", "3504"]
    assert {row["set"] for row in rows} == {"Set5"}
    assert {(row["steps"], row["batch"], row["seed"]) for row in rows} == {("20", "16", "1")}
    assert result.out.count("resuming in epoch") == 1  # the third variant starts a new run
    assert result.out.count("$ python train.py --train-file") == 2
    table = result.out.splitlines()[-4:-1]
    assert [line.split()[0] for line in table] == ["128-64", "64-32", "32-16"]

    assert result_of("convergence", *argv).status == 0
    figures = tmp_path / "figures"
    flags = argv[4:] + ["--output-dir", figures]
    done = spawn(ROOT / "experiments" / "figures.py", *flags)
    assert done.returncode == 0, done.stderr
    names = "convergence", "features", "filters", "sizes"
    assert sorted(tree(figures)) == [f"{name}.png" for name in names]
    assert "run paper.py depth first" in done.stderr


def test_every_colour_strategy_has_a_row_for_each_plane(argv, tmp_path):
    result = result_of("colour", *argv)
    assert result.status == 0, result.err
    rows = rows_of(tmp_path / "results.csv")
    strategies = "bicubic", "Y only", "YCbCr", "Y pre-train", "CbCr pre-train", "RGB"
    expected = [(name, f"Set5 {plane}") for name in strategies for plane in paper.PLANES]
    assert [(row["variant"], row["set"]) for row in rows] == expected
    psnr = {(row["variant"], row["set"][5:]): float(row["psnr"]) for row in rows}
    for plane in "Cb", "Cr":
        assert psnr["Y only", plane] == psnr["bicubic", plane]
    for name in strategies[1:]:
        assert psnr[name, "joint"] > psnr["bicubic", "joint"] - 0.1
        assert psnr[name, "Y"] != psnr["bicubic", "Y"]


@needs_data
def test_the_colour_planes_are_the_papers():
    scores = [paper.score_planes(None, "bicubic", path) for path in sorted(DATA.glob("Set5/*"))]
    y, cb, cr, joint, rgb = np.mean(scores, axis=0).round(2)
    assert (y, joint, rgb) == (30.39, 34.57, 28.63)
    assert (cb, cr) == (45.45, 45.42)


def test_speed_is_measured_in_seconds_per_image(argv, tmp_path):
    assert result_of("speed", *argv).status == 0
    rows = rows_of(tmp_path / "results.csv")
    seconds = {row["variant"]: float(row["seconds"]) for row in rows}
    assert 0 < seconds["bicubic"] < min(seconds[name] for name in ("9-1-5", "9-5-5"))


def test_bad_input_is_one_line(argv, tmp_path):
    assert refused(result_of("sizess", *argv), "sizess", "sizes, depth")
    other = tmp_path / "results.csv"
    other.write_text("name,value\na,1\n")
    assert refused(result_of("speed", *argv), str(other), "columns")
    assert other.read_text() == "name,value\na,1\n"
    other.write_text("")
    assert refused(result_of("speed", *argv), str(other), "columns")
    other.unlink()
    for flag in "--images-dir", "--sets":
        missing = result_of("sizes", *argv, flag, tmp_path / "none")
        assert refused(missing, "none", "no such folder")
    assert not tree(tmp_path)


def test_stored_results_are_printed_without_images_and_say_where_they_are_from(tmp_path):
    result = spawn(ROOT / "experiments/paper.py", "data", "seen", cwd=tmp_path)
    assert (result.returncode, result.stderr, tree(tmp_path)) == (0, "", {})
    assert "an eighth of T91" in result.stdout
    assert "results.csv (commit b211040; seed 1); --results FILE trains again" in result.stdout
    assert re.search(r"^T91 +Set5 +32\.39 +32\.\d\d ", result.stdout, re.MULTILINE)
