"""Data that people bring: pairs, value ranges, held-out pictures, channels, other methods."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
from conftest import noise, refused
from PIL import Image
from skimage import data as pictures
from skimage.metrics import structural_similarity
from torch.nn.functional import conv2d, interpolate, pad

SMALL = ("--filters", 8, 4, "--kernel-sizes", 5, 3, 5, "--batch-size", 4, "--outputs-dir", ".")
U8, U16, F32 = np.uint8, np.uint16, np.float32


@pytest.fixture(autouse=True)
def scores(call, weights, tmp_path, monkeypatch):
    """scores("--image-file", ...): the rows of test.py --eval; all runs in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def scores(*argv: object) -> np.ndarray:
        more = "--csv", "scores.csv", "--weights-file", weights  # unless argv names others
        result = call("test", "--eval", *more, *argv)
        assert result.status == 0, result.err
        return np.atleast_1d(np.genfromtxt("scores.csv", delimiter=",", names=True))

    return scores


def save(path: str, values: np.ndarray) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def grey(i: int = 0, height: int = 49, width: int = 50, white: float = 255, kind: type = U8):
    values = pictures.camera()[40 * i :: 2, 120::2][:height, :width] * (white / 255)
    return (values if kind is F32 else values.round()).astype(kind)


GREY, DEEP = grey(), grey(0, 48, 48, 60000, U16)
RESULTS = [(DEEP, DEEP, 4095, np.inf), (DEEP, DEEP + U16(1), 65535, 96.3295)]
RESULTS += [(GREY, np.stack([GREY] * 3, -1), 255, np.inf)]  # as most programs write it


def bicubic(planes: np.ndarray, height: int, width: int, back: bool = False) -> np.ndarray:
    """imresize in float64 by torch, where a = -0.5 if antialiased; edge pixels are repeated."""
    h, w = planes.shape[-2:]
    planes = bicubic(planes, height, width) if back else planes
    height, width, h, w = (h, w, height, width) if back else (height, width, h, w)
    x = pad(torch.from_numpy(np.float64(planes)).view(1, -1, h, w), [w, w, h, h], "replicate")
    x = interpolate(x, (3 * height, 3 * width), mode="bicubic", antialias=True).numpy()
    return x[0, :, height:-height, width:-width].reshape(*planes.shape[:-2], height, width)


def network(path: str, values: np.ndarray, white: float = 255) -> np.ndarray:
    """What the weights make of values of which `white` is the peak, in float64."""
    state = {name: w.double() for name, w in torch.load(path, weights_only=True).items()}
    x = torch.from_numpy(np.float64(values)).reshape(1, -1, *values.shape[-2:]) / white
    x = pad(x, [5, 5, 5, 5], mode="replicate")  # 2 + 1 + 2
    for i in (1, 2, 3):
        x = conv2d(x.relu() if i > 1 else x, state[f"conv{i}.weight"], state[f"conv{i}.bias"])
    return white * x.numpy().reshape(values.shape)


def decibels(a, b, cut: int = 3, white: float = 255, rounded: bool = True):
    a = np.clip(np.floor(a + 0.5), 0, white) if rounded else a
    error = (a - np.float64(b))[..., cut : b.shape[-2] - cut, cut : b.shape[-1] - cut]
    return pytest.approx(10 * np.log10(white**2 / np.mean(error**2)), abs=2e-3)


def similarity(a: np.ndarray, b: np.ndarray, cut: int, **axis: int):
    a, b = (np.float64(x)[..., cut:-cut, cut:-cut] for x in (a, b))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return pytest.approx(structural_similarity(a, b, data_range=255, **window, **axis), abs=1e-5)


def luma(rgb: np.ndarray) -> np.ndarray:
    return np.floor(16.5 + rgb @ [65.481, 128.553, 24.966] / 255)


def test_pairs_of_div2k_names_are_enlarged_by_bicubic(call, scores, weights):
    for i in (1, 10):  # 080 and 0801 would be confused by their beginnings
        save(f"HR/08{i}.png", grey(i))
        for s in (2, 3):
            small = noise(49 // s, 50 // s, seed=i).astype(U8)
            save(f"LR/X{s}/08{i}x{s}.png", small)
    pair, more = ("--lr-dir", "LR", "--scale", 3), ("--output-path", "a.h5", "--eval")
    assert call("prepare", *pair, "--images-dir", "HR", *more).status == 0
    ilr, truth = bicubic(small, 48, 48), grey(10)[:48, :48]
    with h5py.File("a.h5") as file:
        assert np.allclose(file["lr/1"], ilr, atol=1e-3) and np.array_equal(file["hr/1"], truth)
    row = scores(*pair, "--image-file", "HR/0810.png")[0]
    assert row["bicubic_psnr"] == decibels(ilr, truth)
    assert row["srcnn_psnr"] == decibels(network(weights, ilr), truth)


@pytest.mark.parametrize("scale", [1, 3])
def test_pairs_of_equal_size_are_used_as_they_are(call, scores, weights, scale):
    truth = np.stack([grey(i) for i in range(3)], -1)
    given = np.clip(truth + noise(49, 50, 3) / 10, 0, 255).astype(U8)
    save("HR/a.png", truth), save("LR/a.tif", given)
    noisy, pair = (luma(given), luma(truth)), ("--lr-dir", "LR", "--scale", scale)
    for name, more in ("train", ["--stride", 8]), ("eval", ["--eval"]):
        argv = "--images-dir", "HR", "--output-path", f"{name}.h5"
        assert call("prepare", *pair, *argv, *more).status == 0
    with h5py.File("eval.h5") as file:
        assert np.array_equal([file["lr/0"], file["hr/0"]], noisy)
    files = "--train-file", "train.h5", "--eval-file", "eval.h5", "--scale", scale
    assert call("train", *files, *SMALL, "--steps", 3).status == 0
    pair, cut = (*pair, "--image-file", "HR"), scale if scale > 1 else 0
    row = scores(*pair, "--save-images", ".")[0]
    assert row["bicubic_psnr"] == decibels(*noisy, cut)
    assert row["srcnn_psnr"] == decibels(network(weights, noisy[0]), noisy[1], cut)
    assert scores(*pair, "--results", "HR")[0]["result_psnr"] == np.inf  # 50 x 49 do not divide
    assert Image.open(f"a_bicubic_x{scale}.png").size == (50, 49)


@pytest.mark.parametrize("flags", ["images-dir lr-dir", "image-file lr-dir", "image-file results"])
def test_partner_missing_ambiguous_or_of_another_size_is_one_line(call, flags):
    first, second = (f"--{flag}" for flag in flags.split())
    name = ["prepare", "--output-path", "a.h5"] if first == "--images-dir" else ["test", "--eval"]
    argv = *name, first, "HR", second, "LR", "--scale", 3
    for path in ("HR/img.png", "HR/img_2.png", "LR/img_2.png"):  # that one is another's
        save(path, grey(0, 48, 48))
    assert refused(call(*argv), "HR/img.png", "LR")
    save("LR/img_ours.png", GREY), save("LR/img_theirs.png", GREY)
    assert refused(call(*argv), "HR/img.png", "LR")
    save("LR/img.png", grey(0, 17, 16))
    assert refused(call(*argv), "HR/img.png", "LR/img.png")
    save("LR/img.png", grey(0, 16, 16))
    save("HR/more/img.png", grey(0, 48, 48))  # to which of them does the partner belong?
    assert "error: HR/img.png: no picture of its name or folder in" in call(*argv).err
    Path("LR/img.png").unlink(), Path("HR/img_2.png").unlink()
    for folder in "HR", "more":
        save(f"LR/{folder}/img.png", grey(0, *[48 if second == "--results" else 16] * 2))
    assert call(*argv).status == 0


def test_pictures_and_evaluation_files_are_measured_in_one_call(scores, h5_files):
    assert len(scores("--image-file", save("a.png", GREY), h5_files[1], "--scale", 3)) == 3


@pytest.mark.parametrize("case", [("png", U16, 4095), ("tif", U16, 4095), ("tif", F32, 1.0)])
def test_series_is_trained_on_scored_and_enlarged(call, scores, case):
    end, kind, white = case
    paths = [save(f"in/{i}.{end}", grey(i, 49, 50, white, kind)) for i in range(4)]
    span, whole = ("--range", 0, white), kind is U16
    argv = "--images-dir", "in", "--output-path", "t.h5", "--stride", 5, "--scale", 3
    assert call("prepare", *argv, *span, "--hold-out", 0.5).status == 0
    files, best = ("--train-file", "t.h5", "--eval-file", "t_eval.h5"), "x3/best.pth"
    assert call("train", *files, *SMALL, "--steps", 30).status == 0
    with h5py.File("t_eval.h5") as file:
        pairs = [[file[f"{k}/{i}"][:] * (white / 255) for k in ("lr", "hr")] for i in (0, 1)]
    made = [decibels(network(best, a, white), b, 3, white, whole).expected for a, b in pairs]
    reached = np.genfromtxt("x3/history.csv", delimiter=",", skip_header=1)[..., 2].max()
    assert reached == pytest.approx(np.mean(made), abs=2e-3)
    for path, row in zip(paths, scores("--image-file", "in", *span, "--weights-file", best)):
        ilr = bicubic(truth := np.asarray(Image.open(path))[:48, :48], 16, 16, True)
        assert row["bicubic_psnr"] == decibels(ilr, truth, 3, white, whole)
        assert row["srcnn_psnr"] == decibels(network(best, ilr, white), truth, 3, white, whole)
    argv = "--image-file", paths[0], "--output", f"out.{end}", "--back-projection", 0
    assert call("test", *argv, *span, "--weights-file", best).status == 0
    large = np.asarray(Image.open(f"out.{end}"))
    expected = network(best, bicubic(grey(0, 49, 50, white, kind), 147, 150), white)
    expected = np.clip(expected, 0, white).round() if whole else expected
    assert large.dtype == kind and np.abs(large - expected).max() <= (1 if whole else 1e-4)


def test_floating_point_needs_a_range_to_be_measured_but_not_to_be_enlarged(call, scores):
    save("in/a.tif", grey(0, 49, 50, 1, F32))
    argv = "--images-dir", "in", "--output-path", "a.h5", "--scale", 3
    assert refused(call("prepare", *argv), "in/a.tif", "--range LOW HIGH")
    assert refused(call("test", "--eval", "--image-file", "in"), "in/a.tif", "--range LOW HIGH")
    scores("--image-file", "in", "--range", 0, 1, "--save-images", "shown")
    save("a.tif", np.full((20, 20), 3e7, F32))  # so large that a small difference is none
    assert call("test", "--image-file", "a.tif").status == 0
    assert np.allclose(Image.open("a_srcnn_x3.tif"), 3e7, rtol=1e-3)


@pytest.mark.parametrize("case", [(U16, 5000, 0, 4095), (U16, 4000, -9, 5000), (U8, 255, 0, 999)])
def test_enlarged_values_never_wrap(call, weights, case):
    kind, peak, *span = case
    path = save("a.png", np.repeat([[0] * 12 + [peak] * 12], 24, 0).astype(kind))
    result = call("test", "--image-file", path, "--range", *span, "--weights-file", weights)
    if result.status:  # a range that the type cannot hold may be refused
        return refused(result, "--range")
    large = np.asarray(Image.open("a_srcnn_x3.png"))
    assert large[:, :33].max() < 0.3 * peak and large[:, 39:].min() > 0.7 * peak


def test_colour_of_eight_bits_with_range(call, scores, weights, photo):
    studio = (16 + photo * (219 / 255)).round().astype(U8)
    argv = "--image-file", save("a.png", studio), "--range", 16, 235
    truth = luma((studio - 16.0) * (255 / 219))
    expected = decibels(bicubic(truth, 40, 30, True), truth).expected
    assert abs(scores(*argv)[0]["bicubic_psnr"] - expected) < 0.05
    assert call("test", *argv, "--weights-file", weights).status == 0
    large = np.asarray(Image.open("a_srcnn_x3.png"))
    assert np.array_equal(large, large.clip(16, 235))
    assert np.abs(large.reshape(120, 3, 90, 3, 3).mean((1, 3)) - studio).mean() < 3


def test_colour_of_sixteen_bits_is_read_whole_or_refused(call):
    values = np.stack([grey(0, 48, 48, 4095, U16)] * 3, -1)
    tifffile.imwrite("a.tif", values, photometric="rgb")
    argv = "--images-dir", ".", "--scale", 3, "--output-path", "a.h5", "--range", 0, 4095
    result = call("prepare", *argv, "--eval")
    if result.status:  # Pillow gives the upper bytes only: of 12 bits sixteen levels are left
        assert refused(result, "a.tif")
        return
    with h5py.File("a.h5") as file:
        assert np.allclose(file["hr/0"], 16 + values[..., 0] / 4095 * 219, atol=0.1)


def test_held_out_pictures_are_no_training_pictures(call):
    for i in range(20):  # each of one patch, of one grey level
        save(f"a/sub/{i}.png" if i % 2 else f"b/{i}.png", np.full((33, 33), i, U8))
    splits = []
    for seed, folders in enumerate(5 * ["ab"] + 4 * [("a", "a/sub")], -1):
        argv = "--images-dir", *folders, "--output-path", "t.h5", "--hold-out", 0.1, "--scale", 3
        assert call("prepare", *argv, "--seed", max(0, seed)).status == 0
        with h5py.File("t.h5") as train, h5py.File("t_eval.h5") as file:
            held = [int(file["hr"][name][0, 0]) for name in file["lr"]]
            splits.append(([int(patch[0, 0]) for patch in train["hr"]], held))
    for kept, held in splits[:5]:
        assert len(held) == 2 and sorted(kept + held) == list(range(20))
    assert splits[0] == splits[1] and len({tuple(held) for _, held in splits}) > 1
    # A folder that is named with its subfolder holds no picture twice.
    assert all(not set(kept) & set(held) for kept, held in splits[5:])


def test_training_without_evaluation_file_keeps_the_average(call, h5_files):
    assert "--eval-file" in call("train", "--train-file", h5_files[0], *SMALL, "--steps", 20).out
    assert call("train", "--outputs-dir", ".", "--resume", "--steps", 40).status == 0
    rows = Path("x3/history.csv").read_text().splitlines()[1:]
    assert {row.split(",")[2] for row in rows} == {""} and len(rows) > 1
    best, last = (torch.load(f"x3/{n}.pth", weights_only=True) for n in ("best", "last"))
    for name, value in best.items():
        assert torch.equal(value, last["average"][name])
        assert not torch.equal(value, last["model"][name])


def test_four_channels_are_trained_and_scored(call, scores, weights):
    truth = np.stack([grey(i, 48) for i in range(4)]).astype(F32)
    with h5py.File("train.h5", "w") as file, h5py.File("set.h5", "w") as other:
        for name, planes in ("lr", ilr := F32(bicubic(truth, 24, 25, True))), ("hr", truth):
            file[name] = np.stack([planes[:, i : i + 25, i : i + 25] for i in range(0, 23, 5)])
            other[f"{name}/0"] = planes
    files = "--train-file", "train.h5", "--eval-file", "set.h5", "--scale", 2
    assert call("train", *files, *SMALL, "--steps", 8).status == 0
    row = scores("--image-file", "set.h5", "--weights-file", "x2/best.pth")[0]
    assert row["srcnn_psnr"] == decibels(made := network("x2/best.pth", ilr), truth, 2)
    assert row["srcnn_ssim"] == similarity(made.round().clip(0, 255), truth, 2, channel_axis=0)
    argv = "--eval", "--image-file", "set.h5", "--scale", 2, "--weights-file", weights
    assert refused(call("test", *argv), "set.h5", "channels")


@pytest.mark.parametrize("suffix", ["", "_x3", "x3", "_SRF_3_srcnn", "_srcnn_x3"])
def test_results_of_another_program_are_scored_on_luma(scores, photo, suffix):
    other = np.roll(photo[:, :87], 1, 0)
    save(f"out/baby{suffix}.bmp", other), save("out/baby2.bmp", photo)
    mine, theirs, path = luma(photo[:, :87]), luma(other), save("baby.png", photo[:, :89])
    row = scores("--image-file", path, "--results", "out", "--scale", 3)[0]
    assert row.dtype.names[2:] == ("bicubic_psnr", "bicubic_ssim", "result_psnr", "result_ssim")
    assert row["bicubic_psnr"] == decibels(bicubic(mine, 40, 29, True), mine)
    assert row["result_psnr"] == decibels(theirs, mine)
    assert row["result_ssim"] == similarity(theirs, mine, 3)


@pytest.mark.parametrize("case", RESULTS)
def test_result_like_the_picture_has_the_score_it_deserves(scores, case):
    truth, result, white, psnr = case
    argv = "--image-file", save("a.png", truth), "--results", "out", "--range", 0, white
    save("out/a.png", result)
    assert scores(*argv)[0]["result_psnr"] == pytest.approx(psnr, abs=1e-3)


@pytest.mark.parametrize("name", ["x2/best.pth", "srcnn_x2.pth"])
def test_name_of_the_weights_implies_the_scale(call, weights, name):
    Path("x2").mkdir()
    Path(name).write_bytes(weights.read_bytes())
    argv = "--image-file", save("a.png", GREY), "--weights-file", name, "--output", "out.png"
    assert call("test", *argv)[::2] == (0, "") and Image.open("out.png").size == (100, 98)
    result = call("test", *argv, "--scale", 3)
    assert Image.open("out.png").size == (150, 147)
    assert result.err.count("\n") == 1 and f"--scale 3: {name}" in result.err


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_outscale_reduces_the_next_whole_scale(call, weights, photo, mode):
    image = Image.fromarray(photo[:24, :30]).convert("L" if mode == "I;16" else mode)
    white, values = 255, np.asarray(image)
    if mode == "I;16":  # bicubic shoots over an edge
        white, values = 4095, (values > 128) * U16(4095)
    argv = "--image-file", save("a.png", values), "--range", 0, white, "--weights-file", weights
    assert call("test", *argv).status == call("test", *argv, "--outscale", 2.5).status == 0
    whole, image = Image.open("a_srcnn_x3.png"), Image.open("a_srcnn_x2.5.png")
    assert image.size == (75, 60) and image.mode == mode
    expected = bicubic(np.atleast_3d(whole).transpose(2, 0, 1), 60, 75).transpose(1, 2, 0)
    error = np.abs(np.clip(np.atleast_3d(image), 0, white) - np.clip(expected, 0, white))
    # At the border Pillow cuts its kernel. It rounds after the rows and after the columns.
    assert error[4:-4, 4:-4].max() <= 1.5 and np.max(image) <= white
