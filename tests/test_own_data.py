"""Data that users bring: LR/HR pairs, value ranges, hold-out, channels, other programs' results.

Scores are compared with float64 formulas of this file, not with functions of the scripts.
"""

import io
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
from conftest import noise, refused
from PIL import Image
from skimage.data import camera
from skimage.metrics import structural_similarity
from torch.nn.functional import conv2d, interpolate, pad

from models import SRCNN

SMALL = ("--filters", 8, 4, "--kernel-sizes", 5, 3, 5, "--batch-size", 4, "--outputs-dir", ".")
U8, U16, F32 = np.uint8, np.uint16, np.float32


@pytest.fixture(autouse=True)
def scores(call, weights, tmp_path, monkeypatch):
    """Return the rows of test.py --eval: scores("--image-file", ...). All runs in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def scores(*argv: object) -> np.ndarray:
        result = call("test", "--eval", "--csv", "scores.csv", "--weights-file", weights, *argv)
        assert result.status == 0, result.err
        return np.atleast_1d(np.genfromtxt("scores.csv", delimiter=",", names=True))

    return scores


def save(path: str, values: np.ndarray) -> str:
    """Write an image and the folders above it; return its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def save_network(path: str, num_channels: int) -> str:
    """Write the weights of a 5-3-5 network that changes each channel differently."""
    torch.manual_seed(num_channels)
    model = SRCNN(num_channels, (8, 6), (5, 3, 5))
    for parameter in model.conv3.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    torch.save(model.state_dict(), path)
    return path


def without_metadata(path: str) -> str:
    """Write weights without what they know about their training; return the path."""
    torch.save(dict(torch.load(path, weights_only=True)), "plain.pth")
    return "plain.pth"


def grey(i: int = 0, height: int = 49, width: int = 50, white: float = 255, dtype: type = U8):
    """Return a part of a greyscale photograph in 0..white; each `i` gives another part."""
    values = camera()[40 * i :: 2, 120::2][:height, :width] * (white / 255)
    return (values if dtype is F32 else values.round()).astype(dtype)


def bicubic(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize as MATLAB's imresize in float64: torch has a = -0.5 if antialiased; edges repeat."""
    h, w = planes.shape[-2:]
    x = pad(torch.from_numpy(np.float64(planes)).view(1, -1, h, w), [w, w, h, h], "replicate")
    x = interpolate(x, (3 * height, 3 * width), mode="bicubic", antialias=True).numpy()
    return x[0, :, height:-height, width:-width].reshape(*planes.shape[:-2], height, width)


def degraded(hr: np.ndarray, scale: int = 3) -> np.ndarray:
    """Return the input of the network for an HR image: downscaled, then upscaled by bicubic."""
    height, width = hr.shape[-2:]
    return bicubic(bicubic(hr, height // scale, width // scale), height, width)


def restored(path: str, ilr: np.ndarray, white: float = 255) -> np.ndarray:
    """Return the output of a 5-3-5 network in float64 for an input in 0..white."""
    state = {name: w.double() for name, w in torch.load(path, weights_only=True).items()}
    x = torch.from_numpy(np.float64(ilr)).reshape(1, -1, *ilr.shape[-2:]) / white
    x = pad(x, [5, 5, 5, 5], mode="replicate")  # 2 + 1 + 2
    for i in (1, 2, 3):
        x = conv2d(x.relu() if i > 1 else x, state[f"conv{i}.weight"], state[f"conv{i}.bias"])
    return white * x.numpy().reshape(ilr.shape)


def approx_psnr(sr, hr, border: int = 3, white: float = 255, rounded: bool = True):
    """Return the PSNR in dB without the border, to compare with `==`."""
    sr = np.clip(np.floor(sr + 0.5), 0, white) if rounded else sr
    error = (sr - np.float64(hr))[
        ..., border : hr.shape[-2] - border, border : hr.shape[-1] - border
    ]
    return pytest.approx(10 * np.log10(white**2 / np.mean(error**2)), abs=2e-3)


def approx_ssim(sr: np.ndarray, hr: np.ndarray, border: int = 3, **axis: int):
    """Return the SSIM of rounded levels without the border, to compare with `==`."""
    sr = np.clip(np.floor(sr + 0.5), 0, 255)
    sr, hr = (np.float64(x)[..., border:-border, border:-border] for x in (sr, hr))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return pytest.approx(structural_similarity(sr, hr, data_range=255, **window, **axis), abs=1e-5)


def plural(number: int, noun: str) -> str:
    """Return "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def luma(rgb: np.ndarray) -> np.ndarray:
    """Return the rounded luma of H x W x 3."""
    return np.floor(16.5 + rgb @ [65.481, 128.553, 24.966] / 255)


# --- LR/HR pairs ----------------------------------------------------------------------------


def test_lr_images_of_div2k_are_upscaled_by_bicubic(call, scores, weights):
    for i in (1, 10):  # 081.png and 0810.png, of which one name is the beginning of the other
        save(f"HR/08{i}.png", grey(i))
        for scale in (2, 3):
            lr = noise(49 // scale, 50 // scale, seed=i).astype(U8)
            save(f"LR/X{scale}/08{i}x{scale}.png", lr)
    pairs, output = ("--lr-dir", "LR", "--scale", 3), ("--output-path", "a.h5", "--eval")
    assert call("prepare", *pairs, "--images-dir", "HR", *output).status == 0
    ilr, hr = bicubic(lr, 48, 48), grey(10)[:48, :48]
    with h5py.File("a.h5") as file:
        assert np.allclose(file["lr/1"], ilr, atol=1e-3) and np.array_equal(file["hr/1"], hr)
        assert file.attrs["degradation"] == "pairs"
    row = scores(*pairs, "--image-file", "HR/0810.png")[0]
    assert row["bicubic_psnr"] == approx_psnr(ilr, hr)
    assert row["srcnn_psnr"] == approx_psnr(restored(weights, ilr), hr)


@pytest.mark.parametrize("scale", [1, 3])
def test_lr_images_of_equal_size_are_used_directly(call, scores, weights, scale):
    hr = np.stack([grey(i) for i in range(3)], -1)
    noisy = np.clip(hr + noise(49, 50, 3) / 10, 0, 255).astype(U8)
    save("HR/a.png", hr), save("LR/a.tif", noisy)
    ilr, hr, pairs = luma(noisy), luma(hr), ("--lr-dir", "LR", "--scale", scale)
    for name, flags in ("train", ["--stride", 8]), ("eval", ["--eval"]):
        argv = "--images-dir", "HR", "--output-path", f"{name}.h5"
        assert call("prepare", *pairs, *argv, *flags).status == 0
    with h5py.File("eval.h5") as file:
        assert np.array_equal([file["lr/0"], file["hr/0"]], [ilr, hr])
    files = "--train-file", "train.h5", "--eval-file", "eval.h5", "--scale", scale
    assert call("train", *files, *SMALL, "--steps", 3).status == 0
    argv, border = (*pairs, "--image-file", "HR"), scale if scale > 1 else 0
    row = scores(*argv, "--save-images", ".")[0]
    assert row["bicubic_psnr"] == approx_psnr(ilr, hr, border)
    assert row["srcnn_psnr"] == approx_psnr(restored(weights, ilr), hr, border)
    assert Image.open(f"a_bicubic_x{scale}.png").size == (50, 49)
    # The ground truth is not cropped, although 50 and 49 do not divide by 3.
    shutil.copytree("HR", "copy")
    assert scores(*argv, "--results", "copy")[0]["copy_psnr"] == np.inf


MATCHES = [  # an HR image and its LR image or result at scale 3
    ("img.png", "img.bmp"),
    ("Img.PNG", "IMG.png"),
    ("img.png", "imgx3.png"),
    ("img.png", "IMG-X3.png"),
    ("img.png", "img_3x.png"),
    ("img_HR.png", "img_LR.png"),
    ("img_GT.bmp", "img_SR.png"),
    ("img_SRF_3_HR.png", "img_SRF_3_LR.png"),
    ("img.png", "img_SRF_3_bicubic.png"),
    ("img.png", "img_srcnn_x3.png"),
    ("img_x2.png", "img_x2_x3.png"),
    ("img.png", "X3/imgx3.png"),
    ("a/img.png", "A/img.png"),
    ("a/HR/img.png", "a/LR/x3/img.png"),
    ("a_HR/img.png", "a_LR_x3/img.png"),
]
NO_MATCHES = [
    ("img.png", "imgx2.png"),
    ("img.png", "img_SRF_2_LR.png"),
    ("img.png", "img_x33.png"),
    ("img.png", "X2/img.png"),
    ("img.png", "img2.png"),
    ("img.png", "img_ours.png"),
    ("img.png", "lrimg.png"),
    ("img_2.png", "img.png"),
    ("a/img.png", "img.png"),
    ("img.png", "a/img.png"),
    ("a/img.png", "b/img.png"),
]


@pytest.mark.parametrize(("hr", "result"), MATCHES)
def test_images_of_the_same_subfolder_and_name_match(scores, hr, result):
    save(f"HR/{hr}", grey()), save(f"out/{result}", grey())
    save("out/img_other.png", grey(1)), save("out/other/img.png", grey(1))
    row = scores("--image-file", "HR", "--results", "out", "--scale", 3)[0]
    assert row["out_psnr"] == np.inf


@pytest.mark.parametrize(("hr", "result"), NO_MATCHES)
def test_images_of_other_subfolders_names_or_scales_do_not_match(call, hr, result):
    save(f"HR/{hr}", grey()), save(f"out/{result}", grey())
    argv = "--eval", "--image-file", "HR", "--results", "out", "--scale", 3
    assert refused(
        call("test", *argv), f"error: HR/{hr}: --results out has no file of its subfolder"
    )


@pytest.mark.parametrize("name", ["img.png", "img_LR.png"])
@pytest.mark.parametrize("flag", ["--lr-dir", "--results"])
def test_no_image_is_its_own_lr_image_or_result(call, flag, name):
    save(f"D/{name}", grey(0, 48, 48))
    refused(call("test", "--eval", "--image-file", "D", flag, "D", "--scale", 3), "D")


@pytest.mark.parametrize("flags", ["images-dir lr-dir", "image-file lr-dir", "image-file results"])
def test_missing_ambiguous_or_wrong_size_of_a_match_is_one_line(call, flags):
    hr_flag, lr_flag = (f"--{flag}" for flag in flags.split())
    if hr_flag == "--images-dir":
        name = "prepare", "--output-path", "a.h5", "--eval"
    else:
        name = "test", "--eval", "--csv", "a.csv"
    output = Path(name[-2 if hr_flag == "--images-dir" else -1])
    argv = *name, hr_flag, "HR", lr_flag, "LR", "--scale", 3
    good = grey(0, *[48 if lr_flag == "--results" else 16] * 2)
    save("HR/img.png", grey(0, 48, 48)), save("LR/img_2.png", good)
    flag = "--results LR" if lr_flag == "--results" else lr_flag
    assert refused(call(*argv), f"error: HR/img.png: {flag} has no file")
    save("LR/img.png", good), save("LR/x3/img.bmp", good)
    assert refused(call(*argv), "error: HR/img.png: ", "LR/img.png and LR/x3/img.bmp")
    Path("LR/x3/img.bmp").unlink()
    save("LR/img.png", grey(0, 17, 16))
    assert refused(call(*argv), "error: HR/img.png", "LR/img.png")
    assert not output.exists()
    save("HR/img_2.png", grey(0, 48, 48))  # which has an LR image
    assert refused(call(*argv), "error: HR/img.png", "LR/img.png")
    assert output.exists()
    save("LR/img.png", good)
    assert call(*argv)[::2] == (0, "")


LAYOUTS = {  # pairs of files, and what --images-dir and --lr-dir name
    "two folders each, in order": (
        [("A/1.png", "C/1.png"), ("A/2.png", "C/2.png"), ("B/1.png", "D/1.png")],
        ["A", "B"],
        ["C", "D"],
    ),
    "two folders each, in another order": (
        [("A/1.png", "D/1.png"), ("B/1.png", "C/1.png")],
        ["A", "B"],
        ["D", "C"],
    ),
    "days below one root": (
        [
            (f"root/{day}/HR/{i}.png", f"root/{day}/LR/{i}.png")
            for day in ("day1", "day2")
            for i in "ab"
        ],
        ["root"],
        ["root"],
    ),
    "days below two roots": (
        [(f"{root}/day/HR/1.png", f"{root}/day/LR/1x3.png") for root in ("r", "s")],
        ["r", "s"],
        ["r", "s"],
    ),
    "folders of days": (
        [("day1/HR/1.png", "day1/LR/1.png"), ("day2/HR/1.png", "day2/LR/1.png")],
        ["day1/HR", "day2/HR"],
        ["day1/LR", "day2/LR"],
    ),
    "HR and LR in one folder": (
        [(f"set/img_00{i}_SRF_3_HR.png", f"set/img_00{i}_SRF_3_LR.png") for i in (1, 2)],
        ["set"],
        ["set"],
    ),
    "GT and lr in one folder": ([("set/1_GT.bmp", "set/1_lr.png")], ["set"], ["set"]),
    "only LR marked in one folder": (
        [("set/1.png", "set/1_LR.png"), ("set/b/1.png", "set/b/1_LR_x3.png")],
        ["set"],
        ["set"],
    ),
    "HR in a subfolder": (
        [("set/HR/1.png", "set/LR/1.png"), ("set/HR/2.png", "set/LR/2_LR.png")],
        ["set/HR"],
        ["set"],
    ),
    "only HR marked in one folder": (
        [("set/1_HR.png", "set/1.png"), ("set/b/1_GT.png", "set/b/1_x3.png")],
        ["set"],
        ["set"],
    ),
    "LR in a subfolder": (
        [("set/1.png", "set/LR/1.png"), ("set/2.png", "set/LR/2.png")],
        ["set"],
        ["set"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_hr_image_is_paired_with_its_lr_image(call, scores, layout):
    files, hr_folders, lr_folders = LAYOUTS[layout]
    expected = []
    for i, (hr_path, lr_path) in enumerate(files):
        hr, lr = grey(i, 48, 48), noise(16, 16, seed=i).astype(U8)
        save(hr_path, hr), save(lr_path, lr)
        expected.append((bicubic(lr, 48, 48), hr))
    if layout == "HR and LR in one folder":  # the results of other programs lie there, too
        for method in "bicubic", "glasner", "SRCNN":
            save(f"set/img_001_SRF_3_{method}.png", grey(9, 48, 48))
    pairs = "--lr-dir", *lr_folders, "--scale", 3
    argv = *pairs, "--images-dir", *hr_folders, "--output-path", "a.h5", "--eval"
    assert call("prepare", *argv) == (0, f"a.h5: {plural(len(files), 'image')} for x3\n", "")
    with h5py.File("a.h5") as file:
        for i, (ilr, hr) in enumerate(expected):
            assert np.allclose(file[f"lr/{i}"], ilr, atol=1e-3), files[i]
            assert np.array_equal(file[f"hr/{i}"], hr), files[i]
    rows = scores("--image-file", *hr_folders, *pairs)
    for row, (ilr, hr) in zip(rows, expected, strict=True):
        assert row["bicubic_psnr"] == approx_psnr(ilr, hr)


@pytest.mark.parametrize(
    "names", [("1.png", "1.bmp"), ("1_HR.png", "1.png"), ("HR/1.png", "1.png")]
)
def test_two_hr_images_with_one_lr_image_are_refused(call, names):
    for i, name in enumerate((*names, "2.png")):
        save(f"in/{name}", grey(i, 48, 48))
    save("LR/1.png", grey(3, 16, 16)), save("LR/2.png", grey(4, 16, 16))
    commands = [
        ("prepare", "--output-path", "a.h5", "--eval", "--images-dir", "in"),
        ("test", "--eval", "--csv", "a.csv", "--image-file", "in", "--back-projection", 0),
    ]
    for command in commands:
        result = call(*command, "--lr-dir", "LR", "--scale", 3)
        lines = result.err.splitlines()
        assert (result.status, len(lines)) == (2, 2), result
        for name, line in zip(sorted(f"in/{name}" for name in names), lines, strict=True):
            assert f"error: {name}: " in line and "LR/1.png" in line
            assert "LR/1.png and LR/1.png" not in line  # one file is not ambiguous
    with h5py.File("a.h5") as file:  # of the third image
        assert np.array_equal(file["hr/0"], grey(2, 48, 48)) and len(file["hr"]) == 1
    assert len(Path("a.csv").read_text().splitlines()) == 2


def test_linked_folders_of_pairs_are_followed(call):
    for i in range(2):
        save(f"disk/high/{i}.png", grey(i, 48, 48)), save(f"disk/low/{i}.png", grey(i, 16, 16))
    Path("HR").mkdir(), Path("LR").mkdir()
    Path("HR/day1").symlink_to("../disk/high"), Path("LR/day1").symlink_to("../disk/low")
    Path("HR/day1/loop").symlink_to(".")
    argv = "--images-dir", "HR", "--lr-dir", "LR", "--output-path", "a.h5", "--eval", "--scale", 3
    assert call("prepare", *argv) == (0, "a.h5: 2 images for x3\n", "")


def train_on_pairs(call, *argv: object, steps: int = 40) -> str:
    """Train a small network on what prepare.py makes of these flags; return its weights."""
    assert call("prepare", *argv, "--output-path", "t.h5", "--stride", 7, "--scale", 3).status == 0
    assert call("train", "--train-file", "t.h5", *SMALL, "--steps", steps).status == 0
    return "x3/best.pth"


def save_noisy_pairs() -> None:
    """Write HR/0.png, ... and LR images with noise, three times smaller."""
    for i in range(4):
        hr = grey(i, 48, 48)
        lr = bicubic(hr, 16, 16) + 40 * (noise(16, 16, seed=i) / 255 - 0.5)
        save(f"HR/{i}.png", hr), save(f"LR/{i}.png", np.clip(lr.round(), 0, 255).astype(U8))


def test_networks_trained_on_pairs_run_without_back_projection(call, scores):
    save_noisy_pairs()
    pairs = "--lr-dir", "LR"
    best = "--weights-file", train_on_pairs(call, "--images-dir", "HR", *pairs)
    images = {}
    for steps in None, 0, 1:
        argv = "LR/0.png", *best, "--output", f"{steps}.png"
        result = call("test", *argv, *(() if steps is None else ("--back-projection", steps)))
        assert f"  best.pth x3, back-projection {steps or 0}  " in result.out
        images[steps] = np.asarray(Image.open(f"{steps}.png"))
    assert np.array_equal(images[None], images[0])
    assert not np.array_equal(images[None], images[1])
    rows = scores("--image-file", "HR", *pairs, "--scale", 3, *best)
    assert "upscaled_psnr" not in rows.dtype.names and "srcnn_psnr" in rows.dtype.names
    rows = scores("--image-file", "HR", *pairs, "--scale", 3, *best, "--back-projection", 1)
    assert (rows["upscaled_psnr"] != rows["srcnn_psnr"]).all()


def test_networks_trained_on_bicubic_run_with_back_projection(call):
    for i in range(4):
        save(f"in/{i}.png", grey(i))
    best = train_on_pairs(call, "--images-dir", "in")
    result = call("test", "in/0.png", "--weights-file", best)
    assert "  best.pth x3, back-projection 1  " in result.out


def test_evaluation_warns_where_back_projection_lowers_the_score(call, scores):
    save_noisy_pairs()
    best = train_on_pairs(call, "--images-dir", "HR", "--lr-dir", "LR", steps=300)
    argv = "--weights-file", without_metadata(best), "--image-file", "HR", "--scale", 3
    pairs = *argv, "--lr-dir", "LR"
    result = call("test", "--eval", *pairs)
    assert result.status == 0 and result.err.count("\n") == 1
    rows = scores(*pairs)
    loss = np.mean(rows["srcnn_psnr"]) - np.mean(rows["upscaled_psnr"])
    assert loss > 0.1
    assert f"lowers the PSNR by {loss:.2f} dB" in result.err
    assert "--back-projection 0" in result.err
    assert call("test", "--eval", *pairs, "--back-projection", 0)[::2] == (0, "")
    assert call("test", "--eval", *argv)[::2] == (0, "")  # it raises that of bicubic's LR images
    rows = scores(*argv)
    assert np.mean(rows["upscaled_psnr"]) > np.mean(rows["srcnn_psnr"])


# --- value ranges ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "dtype", "white"), [("png", U16, 4095), ("tif", U16, 4095), ("tif", F32, 1.0)]
)
def test_images_with_a_range_are_trained_on_scored_and_upscaled(call, scores, suffix, dtype, white):
    paths = [save(f"in/{i}.{suffix}", grey(i, 49, 50, white, dtype)) for i in range(4)]
    value_range, integer = ("--range", 0, white), dtype is U16
    argv = "--images-dir", "in", "--output-path", "t.h5", "--stride", 5, "--scale", 3
    assert call("prepare", *argv, *value_range, "--hold-out", 0.5).status == 0
    files, best = ("--train-file", "t.h5", "--eval-file", "t_eval.h5"), "x3/best.pth"
    assert call("train", *files, *SMALL, "--steps", 30).status == 0
    with h5py.File("t_eval.h5") as file:
        pairs = [[file[f"{k}/{i}"][:] * (white / 255) for k in ("lr", "hr")] for i in (0, 1)]
    outputs = [(restored(best, ilr, white), hr) for ilr, hr in pairs]
    expected = [approx_psnr(sr, hr, 3, white, integer).expected for sr, hr in outputs]
    reached = np.genfromtxt("x3/history.csv", delimiter=",", names=True)["psnr"].max()
    assert reached == pytest.approx(np.mean(expected), abs=2e-3)
    rows = scores("--image-file", "in", *value_range, "--weights-file", best)
    for path, row in zip(paths, rows, strict=True):
        hr = np.asarray(Image.open(path))[:48, :48]
        ilr = degraded(hr)
        assert row["bicubic_psnr"] == approx_psnr(ilr, hr, 3, white, integer)
        assert row["srcnn_psnr"] == approx_psnr(restored(best, ilr, white), hr, 3, white, integer)
    argv = "--image-file", paths[0], "--output", f"out.{suffix}", "--back-projection", 0
    assert call("test", *argv, *value_range, "--weights-file", best).status == 0
    upscaled = np.asarray(Image.open(f"out.{suffix}"))
    expected = restored(best, bicubic(grey(0, 49, 50, white, dtype), 147, 150), white)
    expected = np.clip(expected, 0, white).round() if integer else expected
    assert upscaled.dtype == dtype
    assert np.abs(upscaled - expected).max() <= (1 if integer else 1e-4)


def test_floating_point_needs_a_range_for_training_and_scores_only(call, scores):
    save("in/a.tif", grey(0, 49, 50, 1, F32))
    argv = "--images-dir", "in", "--output-path", "a.h5", "--scale", 3
    assert refused(call("prepare", *argv), "in/a.tif", "--range LOW HIGH")
    assert refused(call("test", "--eval", "--image-file", "in"), "in/a.tif", "--range LOW HIGH")
    assert len(scores("--image-file", "in", "--range", 0, 1, "--save-images", "images")) == 1
    save("a.tif", np.full((20, 20), 3e7, F32))  # float32 cannot represent 3e7 + 1
    assert call("test", "--image-file", "a.tif").status == 0
    assert np.allclose(Image.open("a_srcnn_x3.tif"), 3e7, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "peak", "low", "high"),
    [(U16, 5000, 0, 4095), (U16, 4000, -9, 5000), (U8, 255, 0, 999)],
)
def test_upscaled_values_never_wrap_around(call, weights, dtype, peak, low, high):
    path = save("a.png", np.repeat([[0] * 12 + [peak] * 12], 24, 0).astype(dtype))
    result = call("test", "--image-file", path, "--range", low, high, "--weights-file", weights)
    assert result[::2] == (0, "")
    upscaled = np.asarray(Image.open("a_srcnn_x3.png"))
    assert upscaled[:, :33].max() < 0.3 * peak and upscaled[:, 39:].min() > 0.7 * peak


def test_range_of_8_bit_colour_is_applied(call, scores, weights, photo):
    studio = (16 + photo * (219 / 255)).round().astype(U8)
    argv = "--image-file", save("a.png", studio), "--range", 16, 235
    hr = luma((studio - 16.0) * (255 / 219))
    expected = approx_psnr(degraded(hr), hr).expected
    assert abs(scores(*argv)[0]["bicubic_psnr"] - expected) < 0.05
    assert call("test", *argv, "--weights-file", weights).status == 0
    upscaled = np.asarray(Image.open("a_srcnn_x3.png"))
    assert np.array_equal(upscaled, upscaled.clip(16, 235))
    assert np.abs(upscaled.reshape(120, 3, 90, 3, 3).mean((1, 3)) - studio).mean() < 3


def test_range_of_16_bit_colour_is_refused(call):
    """Pillow reads the upper bytes only, so that 16 levels of 12-bit images remain."""
    values = np.stack([grey(0, 48, 48, 4095, U16)] * 3, -1)
    tifffile.imwrite("a.tif", values, photometric="rgb")
    argv = "--images-dir", ".", "--scale", 3, "--output-path", "a.h5", "--range", 0, 4095
    assert refused(call("prepare", *argv, "--eval"), "a.tif", "--range", "16-bit colour")
    assert not Path("a.h5").exists()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two tables have equal scores."""
    columns = list(a.dtype.names[1:])
    return a.dtype.names == b.dtype.names and np.array_equal(a[columns], b[columns])


def test_the_range_of_the_weights_is_that_of_images_of_their_bit_depth(call, scores):
    for i in range(4):
        save(f"in/{i}.png", grey(i, 49, 50, 4095, U16)), save(f"small/{i}.png", grey(i))
    best = train_on_pairs(call, "--images-dir", "in", "--range", 0, 4095)
    trained, other = ("--weights-file", best), ("--weights-file", without_metadata(best))
    explicit = "--range", 0, 4095
    argv = "--image-file", "in", "--scale", 3
    result = call("test", "--eval", *argv, *trained)
    assert result[::2] == (0, "")  # no line suggests a range
    rows = scores(*argv, *trained)
    assert same(rows, scores(*argv, *other, *explicit))
    whole = scores(*argv, *trained, "--range", 0, 65535)  # the flag overrides
    assert same(whole, scores(*argv, *other))
    assert (whole["bicubic_psnr"] > rows["bicubic_psnr"] + 20).all()
    argv = "--image-file", "small", "--scale", 3
    assert same(scores(*argv, *trained), scores(*argv, *other))
    for name, flags in ("in", explicit), ("small", ()):
        assert call("test", f"{name}/0.png", *trained, "--output", "a.png")[::2] == (0, "")
        assert call("test", f"{name}/0.png", *other, *flags, "--output", "b.png").status == 0
        assert Image.open("a.png").size == (150, 147)
        assert np.array_equal(Image.open("a.png"), Image.open("b.png")), name


def test_the_range_of_the_weights_is_that_of_pairs_and_results(call, scores):
    for i in range(3):
        hr = grey(i, 48, 48, 4095, U16)
        lr = np.clip(bicubic(hr, 16, 16).round(), 0, 4095).astype(U16)
        ours = np.where(hr > 2000, hr - U16(1), hr + U16(1))
        save(f"HR/{i}.png", hr), save(f"LR/{i}.png", lr), save(f"ours/{i}.png", ours)
    argv = "--images-dir", "HR", "--lr-dir", "LR", "--range", 0, 4095
    weights = "--weights-file", train_on_pairs(call, *argv)
    argv = "--image-file", "HR", "--lr-dir", "LR", "--results", "ours", "--scale", 3, *weights
    rows = scores(*argv)
    assert same(rows, scores(*argv, "--range", 0, 4095))
    assert rows[0]["ours_psnr"] == pytest.approx(20 * np.log10(4095), abs=1e-3)


def test_the_range_of_16_bit_weights_does_not_hold_for_floating_point(call):
    for i in range(3):
        save(f"in/{i}.png", grey(i, 49, 50, 4095, U16))
    best = train_on_pairs(call, "--images-dir", "in", "--range", 0, 4095)
    save("a.tif", grey(0, 49, 50, 1, F32))
    argv = "test", "--eval", "a.tif", "--scale", 3, "--weights-file", best
    assert refused(call(*argv), "a.tif", "--range LOW HIGH")
    assert call(*argv, "--range", 0, 1).status == 0


# --- hold-out -------------------------------------------------------------------------------


def test_held_out_images_are_not_trained_on(call):
    for i in range(20):  # each has one patch of one grey level
        save(f"a/sub/{i}.png" if i % 2 else f"b/{i}.png", np.full((33, 33), i, U8))

    def split(seed: int, *folders: str) -> tuple[list[int], list[int]]:
        argv = "--images-dir", *folders, "--output-path", "t.h5", "--hold-out", 0.1, "--scale", 3
        assert call("prepare", *argv, "--seed", seed).status == 0
        with h5py.File("t.h5") as train, h5py.File("t_eval.h5") as file:
            held_out = [int(file["hr"][name][0, 0]) for name in file["lr"]]
            return [int(patch[0, 0]) for patch in train["hr"]], held_out

    splits = [split(seed, "a", "b") for seed in (0, 1, 2, 3)]
    for train_images, held_out in splits:
        assert len(held_out) == 2 and sorted(train_images + held_out) == list(range(20))
    assert split(0, "a", "b") == splits[0]
    assert len({tuple(held_out) for _, held_out in splits}) > 1
    for seed in range(4):  # images of a folder that is named twice are used once
        train_images, held_out = split(seed, "a", "a/sub")
        assert sorted(train_images + held_out) == list(range(1, 20, 2))


def test_training_without_evaluation_file_saves_the_ema(call, h5_files):
    out = call("train", "--train-file", h5_files[0], *SMALL, "--steps", 20).out
    assert "best.pth will have the last weights" in out
    assert call("train", "--outputs-dir", ".", "--resume", "--steps", 40).status == 0
    rows = np.genfromtxt("x3/history.csv", delimiter=",", names=True)
    assert np.isnan(rows["psnr"]).all() and len(rows) > 1
    best, last = (torch.load(f"x3/{name}.pth", weights_only=True) for name in ("best", "last"))
    for name, value in best.items():
        assert torch.equal(value, last["ema"][name])
        assert not torch.equal(value, last["model"][name])


def image_names(call, *argv: object) -> list[str]:
    """Return the names of the images in the table of test.py --eval, and check those of --csv."""
    result = call("test", "--eval", "--csv", "names.csv", *argv)
    assert result.status == 0, result.err
    header, *rows = Path("names.csv").read_text().splitlines()
    names = [row.split(",")[0] for row in rows]
    assert header.split(",")[0] == "image"
    printed = result.out.splitlines()[1:-1]
    assert [line.split("  ")[0] for line in printed] == names
    return names


def test_scores_of_an_evaluation_file_show_the_names_of_its_images(call, weights):
    for name in "day1/img_07.png", "day2/img_07.png", "day2/b/img_08.v2.png":
        save(f"in/{name}", grey())
    argv = "--output-path", "a.h5", "--scale", 3, "--eval", "--images-dir"
    test = "a.h5", "--scale", 3, "--weights-file", weights
    assert call("prepare", *argv, "in").status == 0
    names = ["day1/img_07", "day2/b/img_08.v2", "day2/img_07"]
    assert sorted(image_names(call, *test)) == names
    assert call("prepare", *argv, "in/day1", "in/day2").status == 0
    assert sorted(image_names(call, *test)) == names
    assert call("prepare", *argv, "in/day1").status == 0
    assert image_names(call, *test) == ["img_07"]
    with h5py.File("fork.h5", "w") as file:  # yjn870's files have no names
        for i in range(2):
            file[f"lr/{i}"] = file[f"hr/{i}"] = grey(i).astype(F32)
    assert image_names(call, "fork.h5", *test[1:]) == ["fork.h5/0", "fork.h5/1"]


def test_the_names_of_held_out_images_are_printed_and_stored(call, weights):
    for i in range(10):
        save(f"in/day{i % 2}/{i}.png", grey(i % 5))
    argv = "--images-dir", "in", "--output-path", "t.h5", "--scale", 3, "--hold-out", 0.3
    result = call("prepare", *argv)
    (line,) = [line for line in result.out.splitlines() if line.startswith("held out: ")]
    names = line.removeprefix("held out: ").split(", ")
    assert len(names) == 3 and set(names) <= {f"day{i % 2}/{i}" for i in range(10)}
    assert image_names(call, "t_eval.h5", "--scale", 3, "--weights-file", weights) == names


# --- channels -------------------------------------------------------------------------------


def test_greyscale_is_its_own_luma_for_an_rgb_network(scores):
    path, rgb_network = save("a.png", grey()), save_network("rgb.pth", 3)
    luma_row = scores("--image-file", path)[0]
    rgb_row = scores("--image-file", path, "--weights-file", rgb_network)[0]
    for column in "bicubic_psnr", "bicubic_ssim":
        assert rgb_row[column] == luma_row[column]
    hr = grey()[:48, :48]
    lr = bicubic(hr, 16, 16)
    channels = restored(rgb_network, np.stack([bicubic(lr, 48, 48)] * 3))
    assert np.ptp(channels, axis=0).max() > 2
    srcnn = channels.mean(axis=0)
    back_projected = srcnn + bicubic(lr - bicubic(srcnn, 16, 16), 48, 48)
    for method, sr in ("srcnn", srcnn), ("upscaled", back_projected):
        assert rgb_row[f"{method}_psnr"] == approx_psnr(sr, hr)
        assert rgb_row[f"{method}_ssim"] == approx_ssim(sr, hr)


def test_evaluation_file_of_a_greyscale_image_has_the_scores_of_the_image(call, scores):
    path, network = save("in/a.png", grey()), save_network("rgb.pth", 3)
    argv = "--images-dir", "in", "--output-path", "a.h5", "--eval", "--scale", 3
    assert call("prepare", *argv, "--num-channels", 3).status == 0
    image_row, file_row = (
        scores("--image-file", p, "--weights-file", network) for p in (path, "a.h5")
    )
    for column in "bicubic_psnr", "srcnn_psnr", "srcnn_ssim", "srcnn_rgb_psnr":
        assert file_row[column] == pytest.approx(image_row[column], abs=1e-6)


def test_images_and_evaluation_files_are_measured_in_one_call(call, scores, h5_files):
    argv = "--image-file", save("a.png", grey()), h5_files[1], "--scale", 3
    assert len(scores(*argv)) == 3
    save("out/a.png", grey())
    for flag in "--results", "--save-images":  # these need images
        assert refused(call("test", "--eval", *argv, flag, "out"), h5_files[1].name, flag)


def test_four_channels_are_trained_on_and_scored(call, scores, weights):
    hr = np.stack([grey(i, 48) for i in range(4)]).astype(F32)
    ilr = degraded(hr, 2).astype(F32)
    with h5py.File("train.h5", "w") as train, h5py.File("set.h5", "w") as file:
        for name, planes in ("lr", ilr), ("hr", hr):
            train[name] = np.stack([planes[:, i : i + 25, i : i + 25] for i in range(0, 23, 5)])
            file[f"{name}/0"] = planes
    files = "--train-file", "train.h5", "--eval-file", "set.h5", "--scale", 2
    assert call("train", *files, *SMALL, "--steps", 8).status == 0
    row = scores("--image-file", "set.h5", "--weights-file", "x2/best.pth")[0]
    sr = restored("x2/best.pth", ilr)
    assert row["srcnn_psnr"] == approx_psnr(sr, hr, 2)
    assert row["srcnn_ssim"] == approx_ssim(sr, hr, 2, channel_axis=0)
    argv = "--eval", "--image-file", "set.h5", "--scale", 2, "--weights-file", weights
    assert refused(call("test", *argv), "set.h5", "channels")


# --- results of other programs --------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "_x3", "_SRF_3_srcnn"])
def test_results_of_another_program_are_scored_on_luma(scores, photo, weights, suffix):
    result = np.roll(photo[:, :87], 1, 0)
    save(f"out/baby{suffix}.bmp", result), save("out/baby2.bmp", photo)
    path = save("baby.png", photo[:, :89])  # cropped to 87 columns, a multiple of 3
    row = scores("--image-file", path, "--results", "out", "--scale", 3)[0]
    hr, sr = luma(photo[:, :87]), luma(result)
    methods = "bicubic", "srcnn", "upscaled", "out"
    columns = tuple(f"{method}_{score}" for method in methods for score in ("psnr", "ssim"))
    assert row.dtype.names[2:] == columns
    assert row["bicubic_psnr"] == approx_psnr(degraded(hr), hr)
    assert row["srcnn_psnr"] == approx_psnr(restored(weights, degraded(hr)), hr)
    assert row["out_psnr"] == approx_psnr(sr, hr)
    assert row["out_ssim"] == approx_ssim(sr, hr)


DEEP = grey(0, 48, 48, 60000, U16)
RESULTS = [
    (DEEP, DEEP, 4095, np.inf),
    (DEEP, DEEP + U16(1), 65535, 96.3295),  # 20 log10(65535)
    (grey(), np.stack([grey()] * 3, -1), 255, np.inf),  # many programs write greyscale as RGB
]


@pytest.mark.parametrize(("hr", "result", "white", "psnr"), RESULTS)
def test_result_close_to_the_ground_truth_has_a_high_score(scores, hr, result, white, psnr):
    argv = "--image-file", save("a.png", hr), "--results", "out", "--range", 0, white
    save("out/a.png", result)
    assert scores(*argv)[0]["out_psnr"] == pytest.approx(psnr, abs=1e-3)


def save_methods(shift: int = 1) -> tuple[list, list]:
    """Write HR, A and B: two images and the results of two methods; return HR and LR images."""
    hr = [grey(i, 48, 48) for i in range(2)]
    for i, values in enumerate(hr):
        save(f"HR/{i}.png", values)
        save(f"out/A/{i}_SRF_3_A.png", np.roll(values, shift, 0))
        save(f"out/A/{i}.png", np.roll(values, shift, 0))
        save(f"out/B/{i}_x3.bmp", np.roll(values, shift, 1))
        save(f"LR/{i}.png", noise(16, 16, seed=i).astype(U8))
    return hr, [noise(16, 16, seed=i).astype(U8) for i in range(2)]


@pytest.mark.parametrize("pairs", [False, True])
def test_several_methods_are_scored_in_one_table(call, scores, weights, pairs):
    hr, lr = save_methods()
    argv = "--image-file", "HR", "--results", "out/A", "out/B", "--scale", 3
    argv = (*argv, "--lr-dir", "LR") if pairs else argv
    rows = scores(*argv, "--back-projection", 0)
    methods = "bicubic", "srcnn", "A", "B"
    columns = tuple(f"{method}_{score}" for method in methods for score in ("psnr", "ssim"))
    assert rows.dtype.names == ("image", "scale", *columns)
    for row, truth, small in zip(rows, hr, lr, strict=True):
        ilr = bicubic(small, 48, 48) if pairs else degraded(truth)
        images = [ilr, restored(weights, ilr), np.roll(truth, 1, 0), np.roll(truth, 1, 1)]
        for method, image in zip(methods, images, strict=True):
            assert row[f"{method}_psnr"] == approx_psnr(image, truth)
            assert row[f"{method}_ssim"] == approx_ssim(image, truth)
    out = call("test", "--eval", *argv, "--weights-file", weights, "--back-projection", 0).out
    header, *_, mean = out.splitlines()
    assert " ".join(header.split()) == "x3 bicubic dB SSIM srcnn dB SSIM A dB SSIM B dB SSIM"
    expected = [np.mean(rows[name]) for name in columns]
    assert np.allclose([float(cell) for cell in mean.split()[1:]], expected, atol=0.006)


def test_results_of_test_py_among_lr_images_are_ignored(call, scores):
    save("HR/a.png", grey(0, 48, 48)), save("LR/a.png", noise(16, 16).astype(U8))
    assert call("test", "LR", "--scale", 3).status == 0
    assert Path("LR/a_srcnn_x3.png").is_file()
    (row,) = scores("--image-file", "HR", "--lr-dir", "LR", "--scale", 3)
    assert row["bicubic_psnr"] < 20  # of noise
    argv = "--images-dir", "HR", "--lr-dir", "LR", "--scale", 3, "--output-path", "a.h5", "--eval"
    assert call("prepare", *argv) == (0, "a.h5: 1 image for x3\n", "")


@pytest.mark.parametrize("other", ["absolute", "link"])
def test_one_folder_under_two_names_has_no_lr_images(call, tmp_path, other):
    save("D/a.png", grey(0, 48, 48))
    Path("link").symlink_to("D")
    folder = {"absolute": tmp_path / "D", "link": "link"}[other]
    argv = "--images-dir", "D", "--lr-dir", folder, "--scale", 3, "--output-path", "a.h5"
    assert refused(call("prepare", *argv), "D/a.png: --lr-dir has no file")


def test_results_of_test_py_beside_the_images_are_scored(scores):
    hr = grey(0, 48, 48)
    save("D/a.png", hr), save("D/a_srcnn_x3.png", np.roll(hr, 1, 0))
    for image in "D", "D/a.png":
        (row,) = scores("--image-file", image, "--results", "D", "--scale", 3)
        assert row["D_psnr"] == approx_psnr(np.roll(hr, 1, 0), hr)


def test_results_in_a_subfolder_of_the_images_are_scored(scores):
    hr = grey(0, 48, 48)
    save("D/GT/a.png", hr), save("D/ours/a.png", np.roll(hr, 1, 0))
    rows = scores("--image-file", "D", "--results", "D/ours", "--scale", 3)
    assert len(rows) == 1
    assert rows[0]["ours_psnr"] == approx_psnr(np.roll(hr, 1, 0), hr)


def test_results_for_hr_images_that_share_a_folder_with_lr_images_are_scored(scores):
    hr = grey(0, 48, 48)
    save("D/HR/a.png", hr), save("D/LR/a.png", noise(16, 16).astype(U8))
    save("R/a.png", np.roll(hr, 1, 0))
    rows = scores("--image-file", "D", "--lr-dir", "D", "--results", "R", "--scale", 3)
    assert len(rows) == 1
    assert rows[0]["R_psnr"] == approx_psnr(np.roll(hr, 1, 0), hr)


def test_results_that_share_a_folder_with_their_hr_and_lr_images_are_scored(scores):
    hr = grey(0, 48, 48)
    save("D/1_SRF_3_HR.png", hr), save("D/1_SRF_3_LR.png", noise(16, 16).astype(U8))
    save("D/1_SRF_3_SRCNN.png", np.roll(hr, 1, 0))
    (row,) = scores("--image-file", "D", "--lr-dir", "D", "--results", "D", "--scale", 3)
    assert row["D_psnr"] == approx_psnr(np.roll(hr, 1, 0), hr)


def test_a_missing_result_of_one_method_is_one_line_and_the_other_rows_are_written(call, weights):
    save_methods()
    Path("out/B/1_x3.bmp").unlink()
    argv = "--eval", "--image-file", "HR", "--results", "out/A", "out/B", "--scale", 3
    result = call("test", *argv, "--weights-file", weights, "--csv", "a.csv")
    assert refused(result, "error: HR/1.png: --results out/B has no file")
    assert [row.split(",")[0] for row in Path("a.csv").read_text().splitlines()] == [
        "image",
        "0.png",
    ]


@pytest.mark.parametrize("folders", [("out/A", "other/A"), ("out/srcnn",), ("out/bicubic",)])
def test_no_method_takes_the_column_of_another(call, scores, weights, folders):
    hr, _ = save_methods()
    for folder in folders:
        for i, values in enumerate(hr):
            save(f"{folder}/{i}.png", np.roll(values, 2 + len(folder), 0))
    argv = "--image-file", "HR", "--scale", 3, "--results", *folders
    result = call("test", "--eval", *argv, "--weights-file", weights)
    if result.status == 2:
        assert refused(result, "--results")
        return
    row, ilr = scores(*argv)[0], degraded(hr[0])
    assert row["bicubic_psnr"] == approx_psnr(ilr, hr[0])
    assert row["srcnn_psnr"] == approx_psnr(restored(weights, ilr), hr[0])
    assert len(row.dtype.names) == 2 + 2 * (3 + len(folders))


def test_a_comparison_shows_the_results_of_all_methods(call, scores):
    hr, _ = save_methods()
    scores("--image-file", "HR", "--results", "out/A", "out/B", "--scale", 3, "--save-images", "s")
    strip = np.asarray(Image.open("s/0_comparison_x3.png"))
    assert strip.shape == (16 + 2 * 48, 5 * 48, 3)
    images = np.split(strip[16:64, ..., 0], 5, axis=1)
    assert np.array_equal(images[0], hr[0])
    assert np.array_equal(images[1], np.asarray(Image.open("s/0_bicubic_x3.png"))[..., 0])
    assert np.array_equal(images[2], np.asarray(Image.open("s/0_srcnn_x3.png"))[..., 0])
    assert np.array_equal(images[3], np.roll(hr[0], 1, 0))
    assert np.array_equal(images[4], np.roll(hr[0], 1, 1))


# --- LR images that were saved as JPEG ------------------------------------------------------


def jpeg(values: np.ndarray, quality: int) -> np.ndarray:
    """Encode H x W or H x W x 3 by Pillow's default JPEG (4:2:0) and decode."""
    encoded = io.BytesIO()
    Image.fromarray(values).save(encoded, "JPEG", quality=quality)
    return np.asarray(Image.open(encoded))


@pytest.mark.parametrize("quality", [1, 20, 75, 98, 100])
@pytest.mark.parametrize("kind", ["luma of RGB", "greyscale", "RGB", "RGBA"])
def test_jpeg_scores_equal_those_of_a_float64_formula_and_pillow(
    scores, photo, weights, quality, kind
):
    values = photo[:50, :49]  # cropped to 48 x 48
    if kind == "greyscale":
        values = values[..., 1].copy()
    elif kind == "RGBA":
        values = np.dstack([values, np.full((50, 49), 200, U8)])
    network = save_network("rgb.pth", 3) if kind == "RGB" else weights
    argv = "--image-file", save("a.png", values), "--scale", 3, "--weights-file", network
    row = scores(*argv, "--jpeg", quality)[0]
    planes = np.atleast_3d(values)[:48, :48, :3].transpose(2, 0, 1)
    lr = np.clip(np.floor(bicubic(planes, 16, 16) + 0.5), 0, 255).astype(U8)
    decoded = jpeg(lr.transpose(1, 2, 0).squeeze(), quality)
    if kind == "RGB":
        ilr, hr = bicubic(decoded.transpose(2, 0, 1), 48, 48), planes
        for method, sr in ("bicubic", ilr), ("srcnn", restored(network, ilr)):
            assert row[f"{method}_rgb_psnr"] == approx_psnr(sr, hr)
            rounded = np.clip(np.floor(sr + 0.5), 0, 255).transpose(1, 2, 0)
            assert row[f"{method}_psnr"] == approx_psnr(luma(rounded), luma(hr.transpose(1, 2, 0)))
        return
    if kind == "greyscale":
        hr, lr = planes[0], decoded
    else:
        hr, lr = luma(planes.transpose(1, 2, 0)), luma(decoded)
    ilr = bicubic(lr, 48, 48)
    for method, sr in ("bicubic", ilr), ("srcnn", restored(weights, ilr)):
        assert row[f"{method}_psnr"] == approx_psnr(sr, hr)
        assert row[f"{method}_ssim"] == approx_ssim(sr, hr)


def test_jpeg_lowers_the_scores_and_names_no_other_network(call, scores, photo):
    path = save("a.png", photo)
    psnr = [scores("--image-file", path, "--jpeg", q)[0]["bicubic_psnr"] for q in (5, 30, 95)]
    assert psnr[0] < psnr[1] < psnr[2] < scores("--image-file", path)[0]["bicubic_psnr"]


@pytest.mark.parametrize("quality", [0, 101, 2.5, "low"])
def test_a_jpeg_quality_out_of_range_is_refused(call, quality):
    argv = "test", "--eval", save("a.png", grey()), "--jpeg", quality
    assert refused(call(*argv), "--jpeg")


def test_networks_trained_on_jpeg_images_run_without_back_projection(call, scores):
    for i in range(4):
        save(f"in/{i}.png", grey(i))
    best = train_on_pairs(call, "--images-dir", "in", "--jpeg", 20, 60)
    argv = "--weights-file", best, "--scale", 3
    assert "  best.pth x3, back-projection 0  " in call("test", "in/0.png", *argv).out
    row = scores("--image-file", "in/0.png", "--jpeg", 40, *argv)[0]
    assert "upscaled_psnr" not in row.dtype.names


# --- scale ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x2/best.pth", "srcnn_x2.pth"])
def test_name_of_the_weights_implies_the_scale(call, weights, name):
    Path("x2").mkdir()
    Path(name).write_bytes(weights.read_bytes())
    argv = "--image-file", save("a.png", grey()), "--weights-file", name, "--output", "out.png"
    assert call("test", *argv)[::2] == (0, "") and Image.open("out.png").size == (100, 98)
    result = call("test", *argv, "--scale", 3)
    assert Image.open("out.png").size == (150, 147)
    assert result.err.count("\n") == 1 and f"--scale 3: {name}" in result.err


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_outscale_downscales_from_the_next_whole_scale(call, weights, photo, mode):
    image = Image.fromarray(photo[:24, :30]).convert("L" if mode == "I;16" else mode)
    white, values = 255, np.asarray(image)
    if mode == "I;16":  # bicubic overshoots at edges
        white, values = 4095, (values > 128) * U16(4095)
    argv = "--image-file", save("a.png", values), "--range", 0, white, "--weights-file", weights
    assert call("test", *argv).status == call("test", *argv, "--outscale", 2.5).status == 0
    whole, image = Image.open("a_srcnn_x3.png"), Image.open("a_srcnn_x2.5.png")
    assert image.size == (75, 60) and image.mode == mode
    expected = bicubic(np.atleast_3d(whole).transpose(2, 0, 1), 60, 75).transpose(1, 2, 0)
    error = np.abs(np.clip(np.atleast_3d(image), 0, white) - np.clip(expected, 0, white))
    # Pillow cuts its kernel off at the border, and rounds after the rows and after the columns.
    assert error[4:-4, 4:-4].max() <= 1.5 and np.max(image) <= white
