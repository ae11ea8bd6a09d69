"""experiments/: an experiment of each kind at toy size, a killed run, protocol, figures, curves."""

import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, Result, history, needs_data, refused, resizing_matrix, spawn, tree
from PIL import Image
from skimage import metrics

import prepare
from models import load_srcnn
from utils import run

sys.path.append(str(ROOT / "experiments"))
import curves
import paper
import protocol

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
    assert result.out.count("resuming after step") == 1  # the third variant starts a new run
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
    assert "run paper.py depth --results FILE first" in done.stderr


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


# --- protocol -------------------------------------------------------------------------------


@pytest.fixture
def image_path(tmp_path, photo) -> Path:
    """A colour photograph of 90 x 119 pixels, of which 90 x 117 divide by 3."""
    Image.fromarray(photo[:119]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def matlab_ilr(hr: np.ndarray) -> np.ndarray:
    """Return H x W, downscaled and upscaled by 3 with MATLAB's bicubic in float64."""
    rows, columns = (resizing_matrix(n // 3, n) @ resizing_matrix(n, n // 3) for n in hr.shape)
    return rows @ hr @ columns.T


def srcnn(ilr: np.ndarray) -> np.ndarray:
    """Return the output of the shipped network at x3, in float64."""
    model = load_srcnn(ROOT / "weights" / "srcnn_x3.pth").double()
    with torch.no_grad():
        return 255 * model(torch.from_numpy(np.float64(ilr))[None, None] / 255)[0, 0].numpy()


def rounded(levels: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(levels + 0.5), 0, 255)


def skimage_psnr(hr: np.ndarray, sr: np.ndarray, border: int = 3) -> float:
    """Return the PSNR in dB without the border."""
    hr, sr = (x[border : x.shape[0] - border, border : x.shape[1] - border] for x in (hr, sr))
    return metrics.peak_signal_noise_ratio(np.float64(hr), np.float64(sr), data_range=255)


def measured(name: str, *paths: Path) -> list[float]:
    """Return the PSNR of bicubic and of the network in a row of paper.py protocol."""
    (row,) = [row for row in protocol.PROTOCOLS if row.name == name]
    model = load_srcnn(ROOT / "weights" / "srcnn_x3.pth")
    return list(protocol.measure(row, list(paths), model))


def studio_luma(path: Path) -> np.ndarray:
    """Return the rounded luma (BT.601, 16..235) of 117 x 90 pixels."""
    rgb = np.asarray(Image.open(path), np.float64)[:117]
    return np.floor(16.5 + rgb @ [65.481, 128.553, 24.966] / 255)


def test_the_first_row_is_the_protocol_of_test_py(call, image_path, tmp_path):
    argv = "--eval", image_path, "--scale", 3, "--csv", tmp_path / "scores.csv"
    assert call("test", *argv).status == 0
    (row,) = rows_of(tmp_path / "scores.csv")
    expected = [float(row["bicubic_psnr"]), float(row["srcnn_psnr"])]
    assert measured("the paper's protocol", image_path) == pytest.approx(expected, abs=1e-6)
    hr = studio_luma(image_path)
    ilr = matlab_ilr(hr)
    expected = [skimage_psnr(hr, rounded(sr)) for sr in (ilr, srcnn(ilr))]
    assert measured("the paper's protocol", image_path) == pytest.approx(expected, abs=2e-3)


def test_bicubic_without_antialiasing_is_that_of_opencv(image_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: opencv-python-headless")
    hr = studio_luma(image_path).astype(np.float32)
    lr = cv2.resize(hr, (30, 39), interpolation=cv2.INTER_CUBIC)
    ilr = cv2.resize(lr, (90, 117), interpolation=cv2.INTER_CUBIC)
    expected = [skimage_psnr(hr, rounded(sr)) for sr in (ilr, srcnn(ilr))]
    row = measured("bicubic without antialiasing (OpenCV, torch)", image_path)
    assert row == pytest.approx(expected, abs=2e-3)
    assert row[0] < measured("the paper's protocol", image_path)[0] - 0.3


def test_luma_of_full_range_is_that_of_opencv(image_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: opencv-python-headless")
    rgb = np.asarray(Image.open(image_path), np.float32)[:117]
    hr = rounded(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., 0].astype(np.float64))
    ilr = matlab_ilr(hr)
    expected = [skimage_psnr(hr, rounded(sr)) for sr in (ilr, srcnn(ilr))]
    row = measured("luma of full range (JPEG's YCbCr)", image_path)
    assert row == pytest.approx(expected, abs=2e-3)
    assert row[0] < measured("the paper's protocol", image_path)[0] - 1  # 255 / 219 is 1.3 dB


def test_border_and_rounding_are_measured_as_by_scikit_image(image_path):
    hr = studio_luma(image_path)
    ilr = matlab_ilr(hr)
    images = ilr, srcnn(ilr)
    whole = [skimage_psnr(hr, rounded(sr), border=0) for sr in images]
    assert measured("no border shaved off", image_path) == pytest.approx(whole, abs=2e-3)
    floating = [skimage_psnr(hr, sr) for sr in images]
    assert measured("output not rounded", image_path) == pytest.approx(floating, abs=2e-3)
    standard = measured("the paper's protocol", image_path)
    assert min(abs(a - b) for a, b in zip(whole, standard)) > 0.01
    assert min(abs(a - b) for a, b in zip(floating, standard)) > 1e-5


def test_psnr_of_the_mean_error_differs_from_the_mean_psnr(image_path, tmp_path, photo):
    flat = tmp_path / "flat.png"
    Image.fromarray(photo[:119] // 4 + 90).save(flat)
    errors, scores = [], []
    for path in image_path, flat:
        hr = studio_luma(path)
        ilr = rounded(matlab_ilr(hr))
        errors.append(metrics.mean_squared_error(hr[3:-3, 3:-3], ilr[3:-3, 3:-3]))
        scores.append(skimage_psnr(hr, ilr))
    pooled = measured("PSNR of the MSE over all images", image_path, flat)[0]
    assert pooled == pytest.approx(10 * np.log10(255**2 / np.mean(errors)), abs=2e-3)
    mean = measured("the paper's protocol", image_path, flat)[0]
    assert mean == pytest.approx(np.mean(scores), abs=2e-3) and mean > pooled + 1


def test_the_table_of_protocols_shows_the_differences_to_the_papers(image_path, tmp_path):
    folder = tmp_path / "Set1"
    folder.mkdir()
    image_path.rename(folder / "photo.png")
    result = result_of("protocol", "--sets", folder)
    assert (result.status, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert header.startswith("Set1 x3, PSNR in dB") and header.split()[-2:] == ["bicubic", "9-5-5"]
    assert len(lines) == len(protocol.PROTOCOLS)
    table = {}
    for line, row in zip(lines, protocol.PROTOCOLS, strict=True):
        assert line.startswith(f"{row.name}  ")
        table[row.name] = [float(cell) for cell in line.removeprefix(row.name).split()]
    first = table["the paper's protocol"]
    assert first[1::2] == [0, 0]
    for name, (bicubic, bicubic_difference, network, network_difference) in table.items():
        expected = measured(name, folder / "photo.png")
        assert [bicubic, network] == pytest.approx(expected, abs=0.0051), name
        if name != "PSNR against bicubic, not the ground truth":  # which is infinite for bicubic
            differences = [bicubic - first[0], network - first[2]]
            assert [bicubic_difference, network_difference] == pytest.approx(differences, abs=0.011)


@needs_data
def test_the_protocol_scores_bicubic_on_set5_as_the_paper_does():
    row = measured("the paper's protocol", *sorted((DATA / "Set5").iterdir()))
    assert [f"{score:.2f}" for score in row] == ["30.39", "33.02"]


# --- curves ---------------------------------------------------------------------------------


@pytest.fixture
def histories(call, train_flags, tmp_path) -> list[Path]:
    """Return the history.csv of a run with evaluation file, and of one without."""
    paths = []
    for name, flags in ("a", train_flags), ("b", train_flags[:2] + train_flags[4:]):
        assert call("train", *flags, "--outputs-dir", tmp_path / name).status == 0
        paths.append(tmp_path / name / "x3" / "history.csv")
    return paths


@pytest.fixture
def figure_of(monkeypatch):
    """Return the figure that curves.py draws, before it becomes a file."""

    def figure_of(*argv: object) -> object:
        figures = []
        monkeypatch.setattr(curves, "save", lambda figure, path: figures.append(figure))
        curves.main(curves.get_args_parser().parse_args(argv))
        (figure,) = figures
        return figure

    return figure_of


def lines_of(axes: object) -> dict[str, np.ndarray]:
    """Return x and y of the labelled curves."""
    labelled = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): np.array(line.get_data(), float) for line in labelled}


def test_curves_are_the_values_of_the_histories(histories, figure_of):
    for x, column, factor in ("steps", "step", 1), ("minutes", "seconds", 1 / 60):
        psnr_axes, loss_axes = figure_of(*histories, "--x", x).axes
        psnr_lines, loss_lines = lines_of(psnr_axes), lines_of(loss_axes)
        assert list(loss_lines) == ["a/x3", "b/x3"] and list(psnr_lines) == ["a/x3"]
        for label, path in zip(loss_lines, histories, strict=True):
            rows = history(path.parent)
            assert len(rows) > 2
            positions = [float(row[column]) * factor for row in rows]
            losses = [float(row["loss"]) for row in rows]
            assert np.allclose(loss_lines[label], [positions, losses])
            if label == "a/x3":
                scores = [float(row["psnr"]) for row in rows]
                assert np.allclose(psnr_lines[label], [positions, scores])
        assert loss_axes.get_xlabel() == x
        labels = [text.get_text() for text in loss_axes.get_legend().get_texts()]
        assert labels == ["a/x3", "b/x3"]


DASHED = [
    ((), {"bicubic": 30.39, "paper 9-1-5": 32.39, "paper 9-5-5": 32.75}),
    (("--scale", 2), {"bicubic": 33.66, "paper 9-1-5": 36.34, "paper 9-5-5": 36.66}),
    (("--scale", 4), {"bicubic": 28.42, "paper 9-1-5": 30.09, "paper 9-5-5": 30.49}),
    (("--lines", "A+=32.59", "a=b=33"), {"A+": 32.59, "a=b": 33}),
    (("--lines",), {}),
]


def test_dashed_lines_are_the_papers_or_the_named_ones(histories, figure_of):
    for flags, expected in DASHED:
        axes = figure_of(histories[0], *flags).axes[0]
        values = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        labels = [text.get_text() for text in axes.texts]
        assert values == list(expected.values()), flags
        assert labels == [f"{name} {value:.2f}" for name, value in expected.items()], flags


def test_curves_become_a_png(histories, tmp_path):
    output = tmp_path / "folder" / "curves.png"
    process = spawn(ROOT / "experiments" / "curves.py", *histories, "--output", output)
    assert (process.returncode, process.stdout, process.stderr) == (0, f"{output}\n", "")
    image = Image.open(output)
    assert image.format == "PNG" and min(image.size) > 300
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20


OTHER_FILES = {
    "of paper.py": ROOT / "experiments" / "results.csv",
    "without rows": "epoch,step,loss,psnr,learning_rate,seconds\n",
    "with other columns": "name,value\na,1\n",
    "with words": "epoch,step,loss,psnr,learning_rate,seconds\n1,two,0.1,30,0.1,2\n",
    "with short rows": "epoch,step,loss,psnr,learning_rate,seconds\n1,2\n",
    "empty": "",
    "binary": ROOT / "weights" / "srcnn_x3.pth",
    "missing": None,
}


def test_curves_refuse_another_file(histories, tmp_path, capfd, monkeypatch):
    output = tmp_path / "curves.png"
    for kind, content in OTHER_FILES.items():
        other = content if isinstance(content, Path) else tmp_path / f"{kind}.csv"
        if isinstance(content, str):
            other.write_text(content)
        argv = [*map(str, histories), str(other), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["curves.py", *argv])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(lambda: curves.main(curves.get_args_parser().parse_args()))
        assert refused(Result(stop.value.code, *capfd.readouterr()), str(other), "history.csv")
        assert not output.exists()
