"""Data that users bring: LR/HR pairs, value ranges, hold-out, channels, other programs' results.

Scores are compared with float64 formulas of this file, not with functions of the scripts.
"""

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
    assert scores(*argv, "--results", "HR")[0]["result_psnr"] == np.inf


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
    assert (
        scores("--image-file", "HR", "--results", "out", "--scale", 3)[0]["result_psnr"] == np.inf
    )


@pytest.mark.parametrize(("hr", "result"), NO_MATCHES)
def test_images_of_other_subfolders_names_or_scales_do_not_match(call, hr, result):
    save(f"HR/{hr}", grey()), save(f"out/{result}", grey())
    argv = "--eval", "--image-file", "HR", "--results", "out", "--scale", 3
    assert refused(call("test", *argv), f"error: HR/{hr}: --results has no file of its subfolder")


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
    assert refused(call(*argv), f"error: HR/img.png: {lr_flag} has no file")
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
    reached = np.genfromtxt("x3/history.csv", delimiter=",", skip_header=1)[..., 2].max()
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
    assert "--eval-file" in call("train", "--train-file", h5_files[0], *SMALL, "--steps", 20).out
    assert call("train", "--outputs-dir", ".", "--resume", "--steps", 40).status == 0
    rows = Path("x3/history.csv").read_text().splitlines()[1:]
    assert {row.split(",")[2] for row in rows} == {""} and len(rows) > 1
    best, last = (torch.load(f"x3/{name}.pth", weights_only=True) for name in ("best", "last"))
    for name, value in best.items():
        assert torch.equal(value, last["ema"][name])
        assert not torch.equal(value, last["model"][name])


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
    for flag in "--results", "--save-images":  # these need images
        assert refused(call("test", "--eval", *argv, flag, "."), h5_files[1].name, flag)


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
def test_results_of_another_program_are_scored_on_luma(scores, photo, suffix):
    result = np.roll(photo[:, :87], 1, 0)
    save(f"out/baby{suffix}.bmp", result), save("out/baby2.bmp", photo)
    path = save("baby.png", photo[:, :89])  # cropped to 87 columns, a multiple of 3
    row = scores("--image-file", path, "--results", "out", "--scale", 3)[0]
    hr, sr = luma(photo[:, :87]), luma(result)
    assert row.dtype.names[2:] == ("bicubic_psnr", "bicubic_ssim", "result_psnr", "result_ssim")
    assert row["bicubic_psnr"] == approx_psnr(degraded(hr), hr)
    assert row["result_psnr"] == approx_psnr(sr, hr)
    assert row["result_ssim"] == approx_ssim(sr, hr)


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
    assert scores(*argv)[0]["result_psnr"] == pytest.approx(psnr, abs=1e-3)


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
