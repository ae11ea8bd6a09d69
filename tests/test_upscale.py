"""test.py: upscaling any image, the paper's evaluation, comparison images, export to ONNX."""

import csv
import io
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import DATA, FULL_DISK, ROOT, needs_data, noise, refused, spawn, tree
from PIL import Image, ImageCms
from skimage import metrics

from models import SRCNN, load_srcnn, restore, upscale
from utils import bicubic_pair, read_levels, resize, rgb_to_ycbcr, ycbcr_to_rgb


@pytest.fixture
def photo_path(tmp_path, photo) -> Path:
    """A colour photograph of 90 x 120 pixels, with a second dot in its name."""
    Image.fromarray(photo).save(tmp_path / "photo.v1.png")
    return tmp_path / "photo.v1.png"


def pixels(path: Path) -> np.ndarray:
    """Return the values of an image file, float64."""
    return np.asarray(Image.open(path)).astype(float)


def rounded(levels: np.ndarray) -> np.ndarray:
    """Round half up and clip to 0..255."""
    return np.clip(np.floor(np.asarray(levels, np.float64) + 0.5), 0, 255)


def read_scores(path: Path) -> list[dict]:
    """Return the rows of --csv."""
    with path.open() as file:
        return list(csv.DictReader(file))


# --- upscaling ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 5])
def test_network_restores_luma_and_bicubic_upscales_chroma(call, photo_path, weights, scale):
    argv = ["--image-file", photo_path, "--scale", scale, "--weights-file", weights]
    result = call("test", *argv, "--back-projection", 0)
    target = photo_path.with_name(f"photo.v1_srcnn_x{scale}.png")
    assert (result.status, result.out.strip()) == (0, str(target))
    rgb = pixels(photo_path).transpose(2, 0, 1)
    ycbcr = resize(rgb_to_ycbcr(rgb), (120 * scale, 90 * scale))
    ycbcr[0] = restore(load_srcnn(weights), ycbcr[0])
    expected = rounded(ycbcr_to_rgb(ycbcr))
    upscaled = pixels(target).transpose(2, 0, 1)
    assert np.abs(upscaled - expected).max() <= 1
    assert np.mean(upscaled == expected) > 0.999


def test_without_flags_the_bundled_image_is_upscaled(call, tmp_path):
    width, height = Image.open(ROOT / "assets" / "chart.png").size
    assert call("test", "--output", tmp_path / "chart.png").status == 0
    assert Image.open(tmp_path / "chart.png").size == (3 * width, 3 * height)


def test_default_weights_are_found_from_any_folder(photo_path):
    result = spawn(ROOT / "test.py", "--image-file", photo_path.name, cwd=photo_path.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert (photo_path.parent / "photo.v1_srcnn_x3.png").is_file()


@pytest.mark.parametrize("tile", [5, 13, 64, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (33, 2), (22, 23)])
def test_tiles_and_bands_of_any_size_give_the_same_image(photo, tile, shape):
    model = load_srcnn(ROOT / "weights" / "srcnn_x3.pth")
    colour = photo[40:, 30:][: shape[0], : shape[1]]
    alpha = noise(*shape, 1).astype(np.uint8)
    for values in colour, np.dstack([colour, alpha]), colour[..., 1]:
        image = Image.fromarray(values)
        whole = np.asarray(upscale(image, model, 3))
        assert whole.shape[:2] == (3 * shape[0], 3 * shape[1])
        tiled = np.asarray(upscale(image, model, 3, tile=tile, band=tile**2))
        assert np.array_equal(tiled, whole)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_greyscale_and_bilevel_images_become_greyscale(call, tmp_path, weights, photo, mode):
    path, output = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(photo).convert(mode).save(path)
    argv = ["--image-file", path, "--weights-file", weights, "--output", output]
    assert call("test", *argv, "--back-projection", 0).status == 0
    upscaled = Image.open(output)
    assert upscaled.mode == "L"
    ilr = resize(np.asarray(Image.open(path).convert("L")), (360, 270))
    expected = rounded(restore(load_srcnn(weights), ilr))
    assert np.abs(np.asarray(upscaled) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("P", ".png", "RGB"),
        ("CMYK", ".jpg", "RGB"),
        ("YCbCr", ".jpg", "RGB"),
        ("RGBA", ".png", "RGBA"),
        ("LA", ".png", "LA"),
        ("RGB", ".webp", "RGB"),
        ("RGB", ".gif", "RGB"),
    ],
)
def test_other_modes_look_like_the_input(call, tmp_path, photo, mode, suffix, expected):
    path = tmp_path / f"in{suffix}"
    image = Image.fromarray(photo)
    (image.quantize() if mode == "P" else image.convert(mode)).save(path)
    result = call("test", "--image-file", path, "--scale", 3)
    assert result.status == 0, result.err
    upscaled = Image.open(tmp_path / "in_srcnn_x3.png")
    assert upscaled.mode == expected
    downscaled = upscaled.convert("RGB").resize((90, 120), Image.Resampling.BOX)
    original = Image.open(path).convert("RGB")
    assert np.abs(np.asarray(downscaled).astype(int) - np.asarray(original)).mean() < 4


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_preserved(call, tmp_path, weights, suffix):
    x = np.linspace(1000, 60000, 40)
    values = (x[:, None] / 2 + x[None] / 2).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"in{suffix}")
    output = tmp_path / f"out{suffix}"
    argv = ["--image-file", tmp_path / f"in{suffix}", "--output", output]
    argv += ["--weights-file", weights, "--back-projection", 0]
    assert call("test", *argv).status == 0
    upscaled = pixels(output)
    assert len(np.unique(upscaled)) > 2000  # far more than 8 bits can represent
    ilr = resize(values.astype(np.float32) / 257, (120, 120))
    expected = restore(load_srcnn(weights), ilr) * 257
    assert np.abs(upscaled - expected).max() < 1


@pytest.mark.parametrize("output", [(), ("--output", "folder/")])
def test_floating_point_is_preserved(call, tmp_path, monkeypatch, photo, output):
    monkeypatch.chdir(tmp_path)
    values = photo[..., 1].astype(np.float32) / 255 * 3 - 1
    Image.fromarray(values).save("float.tif")
    result = call("test", "--image-file", "float.tif", *output)
    assert result.status == 0, result.err
    upscaled = Image.open(Path(*output[1:], "float_srcnn_x3.tif"))  # PNG has no such values
    assert upscaled.mode == "F"
    downscaled = np.asarray(upscaled.resize((90, 120), Image.Resampling.BOX))
    assert np.abs(downscaled - values).mean() < 0.05


def test_transparency_of_a_palette_is_preserved(call, tmp_path, photo):
    image = Image.fromarray(photo).quantize(16)
    image.save(tmp_path / "p.png", transparency=3)
    assert call("test", "--image-file", tmp_path / "p.png", "--scale", 2).status == 0
    upscaled = Image.open(tmp_path / "p_srcnn_x2.png")
    assert upscaled.mode == "RGBA"
    assert np.asarray(upscaled)[..., 3].min() == 0


def test_constant_alpha_is_preserved_and_changes_no_colour(call, tmp_path, photo, weights):
    argv = ["--weights-file", weights, "--output"]
    Image.fromarray(photo).save(tmp_path / "rgb.png")
    call("test", "--image-file", tmp_path / "rgb.png", *argv, tmp_path / "rgb_out.png")
    for alpha in (255, 200, 1):
        rgba = np.dstack([photo, np.full(photo.shape[:2], alpha, np.uint8)])
        Image.fromarray(rgba).save(tmp_path / "rgba.png")
        call("test", "--image-file", tmp_path / "rgba.png", *argv, tmp_path / "out.png")
        upscaled = pixels(tmp_path / "out.png")
        assert (upscaled[..., 3] == alpha).all()
        assert np.abs(upscaled[..., :3] - pixels(tmp_path / "rgb_out.png")).max() <= 1


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255), (0, 255, 0)])
def test_colours_of_transparent_pixels_leave_no_fringe(call, tmp_path, hidden):
    yy, xx = np.mgrid[:60, :60]
    inside = np.hypot(yy - 30, xx - 30) < 18
    rgba = np.zeros((60, 60, 4), np.uint8)
    rgba[...] = (*hidden, 0)
    rgba[inside] = (200, 40, 60, 255)
    Image.fromarray(rgba).save(tmp_path / "disc.png")
    assert call("test", "--image-file", tmp_path / "disc.png").status == 0
    upscaled = pixels(tmp_path / "disc_srcnn_x3.png")
    visible = upscaled[..., 3] > 0
    assert visible.mean() == pytest.approx(inside.mean(), abs=0.05)
    assert np.abs(upscaled[visible][:, :3] - (200, 40, 60)).max() <= 2


def test_orientation_is_applied_and_profile_and_resolution_are_copied(call, tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    properties = {"dpi": (300, 300), "icc_profile": profile}
    Image.fromarray(photo).save(tmp_path / "in.jpg", exif=exif, **properties)
    output = tmp_path / "out.jpg"
    assert call("test", "--image-file", tmp_path / "in.jpg", "--output", output).status == 0
    upscaled = Image.open(output)
    assert upscaled.size == (360, 270)  # rotated by 90 degrees
    assert upscaled.getexif().get(0x0112, 1) == 1
    assert upscaled.info["dpi"] == (300, 300)
    assert upscaled.info["icc_profile"] == profile


def test_jpeg_is_written_without_chroma_subsampling(call, photo_path, tmp_path):
    output = tmp_path / "out.jpg"
    call("test", "--image-file", photo_path, "--output", output)
    image = Image.open(output)
    assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    assert max(image.quantization[0]) <= 12  # quality 95


def test_first_of_several_frames_is_used_with_a_line_on_stderr(call, tmp_path, photo):
    frames = [Image.fromarray(photo[:, i * 30 :][:, :30]) for i in range(3)]
    path = tmp_path / "film.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    result = call("test", "--image-file", path, "--scale", 2)
    assert result.status == 0
    assert result.err == f"{path}: 3 frames, only the first is used\n"
    assert Image.open(tmp_path / "film_srcnn_x2.png").size == (60, 240)


def test_rgb_network_restores_all_three_channels(call, photo_path, tmp_path, rgb_weights):
    output = tmp_path / "out.png"
    argv = ["--image-file", photo_path, "--weights-file", rgb_weights, "--output", output]
    assert call("test", *argv, "--back-projection", 0).status == 0
    ilr = resize(pixels(photo_path).transpose(2, 0, 1), (360, 270))
    expected = rounded(restore(load_srcnn(rgb_weights), ilr)).transpose(1, 2, 0)
    assert np.abs(pixels(output) - expected).max() <= 1


@pytest.mark.parametrize("alpha", [False, True])
def test_rgb_network_upscales_greyscale_to_greyscale(photo, alpha):
    torch.manual_seed(9)
    model = SRCNN(3, (8, 6), (5, 3, 5))
    model.conv3.weight.data += 0.05 * torch.randn(model.conv3.weight.shape)
    grey = Image.fromarray(photo[..., 1])
    if alpha:
        grey = Image.merge("LA", [grey, Image.new("L", grey.size, 255)])
    upscaled = upscale(grey, model, 3, back_projection=0)
    assert upscaled.mode == grey.mode
    ilr = resize(photo[..., 1], (360, 270))
    channels = restore(model, np.stack([ilr] * 3)).astype(np.float64)
    assert np.ptp(channels, axis=0).max() > 2  # three different results, of which the mean is used
    values = np.atleast_3d(np.asarray(upscaled))[..., 0]
    assert np.abs(values - rounded(channels.mean(axis=0))).max() <= 1
    assert np.mean(values == rounded(channels.mean(axis=0))) > 0.999


def test_files_and_folders_are_upscaled_and_bad_files_reported(call, photo_path, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(photo_path.read_bytes())
    (folder / "b.png").write_bytes(b"not an image")
    (folder / "c.bmp").write_bytes(photo_path.read_bytes())
    argv = ["--image-file", folder, photo_path, "--scale", 2]
    assert refused(call("test", *argv, "--output", tmp_path / "out"), str(folder / "b.png"))
    names = ["a_srcnn_x2.png", "c_srcnn_x2.png", "photo.v1_srcnn_x2.png"]
    assert sorted(tree(tmp_path / "out")) == names


def test_results_in_a_folder_are_not_upscaled_again(call, photo_path):
    argv = "--image-file", photo_path.parent, "--scale", 2
    assert call("test", *argv).status == call("test", *argv).status == 0
    assert sorted(tree(photo_path.parent)) == ["photo.v1.png", "photo.v1_srcnn_x2.png"]


def test_inputs_are_not_overwritten(call, photo_path, tmp_path):
    (tmp_path / "link.png").symlink_to(photo_path)
    before = tree(tmp_path)
    for output in photo_path, tmp_path / "link.png":
        result = call("test", "--image-file", photo_path, "--output", output)
        assert refused(result, str(output), "would overwrite")
    assert tree(tmp_path) == before


def test_floating_point_inputs_are_not_overwritten(call, tmp_path):
    paths = tmp_path / "a.tif", tmp_path / "a_srcnn_x3.tif"  # the second is the result's name
    for i, path in enumerate(paths):
        Image.fromarray(noise(20, 20, seed=i)).save(path)
    before = tree(tmp_path)
    assert refused(call("test", "--image-file", *paths), "a_srcnn_x3.tif", "would overwrite")
    assert tree(tmp_path) == before


def test_two_images_with_the_same_result_are_refused(call, photo_path, tmp_path):
    twin = tmp_path / "photo.v1.bmp"
    Image.open(photo_path).save(twin)
    result = call("test", "--image-file", photo_path, twin, "--scale", 2)
    assert refused(result, str(twin), "would overwrite")


# --- bad input ------------------------------------------------------------------------------


def test_bad_images_are_one_line_and_nothing_is_written(call, tmp_path, photo):
    encoded = {}
    for suffix, image_format in ("png", "PNG"), ("jpg", "JPEG"):
        buffer = io.BytesIO()
        Image.fromarray(photo).save(buffer, image_format)
        encoded[suffix] = buffer.getvalue()
    files = {
        "empty.png": b"",
        "text.png": b"not an image\n",
        "truncated.png": encoded["png"][: len(encoded["png"]) // 2],
        "truncated.jpg": encoded["jpg"][: len(encoded["jpg"]) // 2],
        "header.png": encoded["png"][:30],
        "zero.pgm": b"P5 0 0 255\n",
        "zero.bmp": b"BM" + bytes(60),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    for flags in ([], ["--eval"]):
        for name in (*files, "missing.png"):
            result = call("test", "--image-file", tmp_path / name, *flags)
            assert refused(result, str(tmp_path / name))
        assert refused(call("test", "--image-file", tmp_path / "folder", *flags), "no image")
    assert tree(tmp_path) == before


def test_decompression_bomb_needs_a_flag(call, photo_path):
    result = call("test", "--image-file", photo_path, "--max-pixels", 90 * 120 - 1)
    assert refused(result, str(photo_path), "--max-pixels")
    assert call("test", "--image-file", photo_path, "--max-pixels", 90 * 120).status == 0


@pytest.mark.parametrize("name", ["x.xyz", "x.svg"])
def test_extension_that_cannot_be_written_is_refused(call, photo_path, tmp_path, name):
    result = call("test", "--image-file", photo_path, "--output", tmp_path / name)
    assert refused(result, name, "use .png")
    assert sorted(tree(tmp_path)) == [photo_path.name]


def test_output_without_extension_is_a_folder(call, photo_path, tmp_path):
    output = tmp_path / "folder" / "x"
    result = call("test", "--image-file", photo_path, "--output", output)
    assert (result.status, Path(result.out.strip()).parent) == (0, output)
    assert sorted(tree(output)) == ["photo.v1_srcnn_x3.png"]


def test_format_that_cannot_store_the_mode_is_refused(call, tmp_path):
    Image.new("RGBA", (20, 20)).save(tmp_path / "rgba.png")
    Image.fromarray(noise(20, 20)).save(tmp_path / "float.tif")
    for source, target, suffix in (
        ("rgba.png", "out.jpg", ".png"),
        ("float.tif", "out.png", ".tif"),
    ):
        argv = ["--image-file", tmp_path / source, "--output", tmp_path / target]
        assert refused(call("test", *argv), target, f"use {suffix}")
        assert not (tmp_path / target).exists()


@pytest.mark.parametrize("scale", [0, 1, -3, 2.5, "three"])
def test_invalid_scale_is_refused(call, photo_path, scale):
    assert refused(call("test", "--image-file", photo_path, "--scale", scale), "--scale")


@pytest.mark.parametrize("network", ["9-5-5", "9-1-5", "rgb"])
def test_scale_without_weights_lists_the_available_scales(call, photo_path, network):
    argv = "--image-file", photo_path, "--network", network, "--scale", 7
    assert refused(call("test", *argv), "--scale 7", "there are weights for 2, 3, 4")


def test_bad_weights_are_one_line_and_nothing_is_written(call, photo_path, tmp_path):
    state = SRCNN().state_dict()
    torch.save(state | {"conv1.bias": torch.full((64,), torch.inf)}, tmp_path / "inf.pth")
    torch.save(SRCNN(2, (4,), (3, 3)).state_dict(), tmp_path / "two_channels.pth")
    torch.save({"a": 1}, tmp_path / "other.pth")
    (tmp_path / "empty.pth").write_bytes(b"")

    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"conv1.weight": Payload()}, tmp_path / "payload.pth")
    before = tree(tmp_path)
    for name in ("inf", "other", "empty", "payload", "missing"):
        argv = ["--image-file", photo_path, "--weights-file", tmp_path / f"{name}.pth"]
        assert refused(call("test", *argv), f"{name}.pth")
    argv = ["--image-file", photo_path, "--weights-file", tmp_path / "two_channels.pth"]
    assert refused(call("test", *argv), "2 channels")
    assert tree(tmp_path) == before


def test_output_that_cannot_be_written_is_refused(call, photo_path, tmp_path):
    result = call("test", "--image-file", photo_path, "--output", photo_path / "folder" / "x.png")
    assert refused(result, "cannot be written")
    assert sorted(tree(tmp_path)) == [photo_path.name]


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.jp2"])
def test_full_disk_is_one_line_and_the_old_file_remains(photo_path, tmp_path, name):
    output = tmp_path / name
    Image.new("L", (3, 3)).save(output)
    before = tree(tmp_path)
    script = "-c", FULL_DISK, ROOT / "test.py"
    result = spawn(*script, "--image-file", photo_path, "--output", output)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"{output}: cannot be written" in result.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--csv", "x.csv"], ["--csv", "--eval"]),
        (["--lr-dir", "LR"], ["--lr-dir", "--eval"]),
        (["--results", "out"], ["--results", "--eval"]),
        (["--save-images", "out"], ["--save-images", "--eval"]),
        (["--eval", "--results", "out", "--save-images", "x"], ["--save-images", "--results"]),
        (["--eval", "--outscale", "2.5"], ["--outscale", "--eval"]),
        (["--scale", "2", "--outscale", "2.5"], ["--outscale 2.5", "scale 2"]),
        (["--network", "rgb", "--weights-file", "x.pth"], ["--network", "--weights-file"]),
        (["--half", "--device", "cpu"], ["--half"]),
    ],
)
def test_contradicting_flags_are_refused(call, photo_path, flags, names):
    assert refused(call("test", "--image-file", photo_path, *flags), *names)


@pytest.mark.parametrize("image", ["a.png", Path("a.png"), None, np.zeros((9, 9), np.uint8)])
def test_upscale_refuses_an_image_of_another_type(image):
    with pytest.raises(TypeError, match=r"^image: "):
        upscale(image, SRCNN(), 3)


@pytest.mark.parametrize("model", ["weights.pth", Path("weights.pth"), None, {}])
def test_upscale_refuses_a_model_of_another_type(model):
    with pytest.raises(TypeError, match=r"^model: "):
        upscale(Image.new("L", (9, 9)), model, 3)


def test_upscale_refuses_a_model_for_two_channels():
    with pytest.raises(ValueError, match=r"^model: .*2 channels"):
        upscale(Image.new("L", (9, 9)), SRCNN(2), 3)


@pytest.mark.parametrize("scale", [2.5, 0, -1, float("nan"), float("inf"), "3", None])
def test_upscale_refuses_a_scale_that_is_not_a_whole_number(scale):
    with pytest.raises((TypeError, ValueError), match=r"^scale: "):
        upscale(Image.new("L", (9, 9)), SRCNN(1, (4,), (3, 3)), scale)


@pytest.mark.parametrize("scale", [np.int64(3), 3.0])
def test_upscale_accepts_whole_numbers_of_other_types(photo, scale):
    model, image = SRCNN(1, (4,), (3, 3)), Image.fromarray(photo)
    assert upscale(image, model, scale) == upscale(image, model, 3)


# --- evaluation -----------------------------------------------------------------------------


def test_scores_are_those_of_scikit_image(call, photo_path, tmp_path, weights):
    argv = ["--eval", "--image-file", photo_path, "--scale", 4, "--weights-file", weights]
    result = call("test", *argv, "--csv", tmp_path / "scores.csv")
    assert result.status == 0
    (row,) = read_scores(tmp_path / "scores.csv")
    hr = read_levels(photo_path)[0][:120, :88]
    ilr = bicubic_pair(hr, 4).ilr
    for method, levels in ("bicubic", ilr), ("srcnn", restore(load_srcnn(weights), ilr)):
        sr, truth = rounded(levels)[4:-4, 4:-4], hr[4:-4, 4:-4].astype(float)
        psnr = metrics.peak_signal_noise_ratio(truth, sr, data_range=255)
        assert float(row[f"{method}_psnr"]) == pytest.approx(psnr, abs=1e-6)
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim = metrics.structural_similarity(truth, sr, data_range=255, **window)
        assert float(row[f"{method}_ssim"]) == pytest.approx(ssim, abs=1e-6)
        assert f"{psnr:.2f}" in result.out
    assert (row["image"], row["scale"]) == (photo_path.name, "4")


def test_rgb_network_is_scored_on_luma_and_on_rgb(call, photo_path, tmp_path):
    model = SRCNN(3, (8, 6), (5, 3, 5))
    model.conv3.weight.data += 0.01  # not the identity
    torch.save(model.state_dict(), tmp_path / "rgb.pth")
    argv = ["--eval", "--image-file", photo_path, "--weights-file", tmp_path / "rgb.pth"]
    assert call("test", *argv, "--csv", tmp_path / "scores.csv").status == 0
    (row,) = read_scores(tmp_path / "scores.csv")
    assert list(row)[2:5] == ["bicubic_psnr", "bicubic_ssim", "bicubic_rgb_psnr"]
    hr = pixels(photo_path).transpose(2, 0, 1)  # 120 and 90 divide by 3
    sr = restore(model, bicubic_pair(hr.astype(np.float32), 3).ilr)
    truth, sr = (rounded(levels)[:, 3:-3, 3:-3] for levels in (hr, sr))
    rgb = metrics.peak_signal_noise_ratio(truth, sr, data_range=255)
    assert float(row["srcnn_rgb_psnr"]) == pytest.approx(rgb, abs=1e-6)
    bt601 = np.array([65.481, 128.553, 24.966]) / 255
    truth, sr = (np.floor(np.tensordot(bt601, levels, 1) + 16.5) for levels in (truth, sr))
    luma = metrics.peak_signal_noise_ratio(truth, sr, data_range=255)
    assert float(row["srcnn_psnr"]) == pytest.approx(luma, abs=1e-6)


def test_folder_gives_a_row_for_each_image_and_their_mean(call, photo_path, tmp_path, weights):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, angle in ("a.png", 0), ("b.png", 90):
        Image.open(photo_path).rotate(angle, expand=True).save(folder / name)
    argv = ["--eval", "--image-file", folder, "--scale", 2, "--weights-file", weights]
    result = call("test", *argv, "--csv", tmp_path / "scores.csv")
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == ["x2", "a.png", "b.png", "mean"]
    table = [[float(cell) for cell in line.split()[1:]] for line in lines[1:]]
    assert np.allclose(np.mean(table[:2], axis=0), table[2], atol=0.011)
    assert [row["image"] for row in read_scores(tmp_path / "scores.csv")] == ["a.png", "b.png"]


def test_image_too_small_to_measure_is_refused(call, tmp_path):
    Image.new("L", (16, 40)).save(tmp_path / "small.png")
    argv = "test", "--eval", "--image-file", tmp_path / "small.png"
    assert refused(call(*argv), "small.png", "17 pixels")


BICUBIC = {  # PSNR and SSIM as in the paper
    ("Set5", 2): ("33.66", "0.9299"),
    ("Set5", 3): ("30.39", "0.8682"),
    ("Set5", 4): ("28.42", "0.8104"),
    ("Set14", 2): ("30.23", "0.8687"),
    ("Set14", 3): ("27.54", "0.7736"),
    ("Set14", 4): ("26.00", "0.7019"),
}
SRCNN_SCORES = {  # PSNR and SSIM of our weights as in README.md
    ("Set5", 2): (37.07, 0.9564),
    ("Set5", 3): (33.02, 0.9136),
    ("Set5", 4): (30.69, 0.8684),
    ("Set14", 2): (32.64, 0.9088),
    ("Set14", 3): (29.43, 0.8241),
    ("Set14", 4): (27.60, 0.7554),
}


@needs_data
@pytest.mark.parametrize(("name", "scale"), BICUBIC)
def test_bicubic_scores_are_the_papers_and_ours_the_readmes(call, name, scale):
    result = call("test", "--eval", "--image-file", DATA / name, "--scale", scale)
    assert result.status == 0
    bicubic_psnr, bicubic_ssim, psnr, ssim = result.out.splitlines()[-1].split()[1:5]
    assert (bicubic_psnr, bicubic_ssim) == BICUBIC[name, scale]
    assert float(psnr) == pytest.approx(SRCNN_SCORES[name, scale][0], abs=0.011)
    assert float(ssim) == pytest.approx(SRCNN_SCORES[name, scale][1], abs=0.0002)


@needs_data
def test_rgb_network_scores_the_greyscale_image_of_set14_as_luma_networks_do(call, tmp_path):
    argv = "test", "--eval", "--scale", 3, "--csv", tmp_path / "scores.csv", "--image-file"
    result = call(*argv, DATA / "Set14", "--network", "rgb")
    rows = {row["image"]: row for row in read_scores(tmp_path / "scores.csv")}
    assert call(*argv, DATA / "Set14" / "bridge.bmp").status == 0
    (luma_row,) = read_scores(tmp_path / "scores.csv")
    for column in "bicubic_psnr", "bicubic_ssim":
        assert rows["bridge.bmp"][column] == luma_row[column]
    # The paper's 27.54 (27.543) upscales luma. RGB that is upscaled, rounded and clipped has
    # 27.5495: clipping removes overshoot from the text of ppt3. A float64 formula agrees.
    assert result.out.splitlines()[-1].split()[1] == "27.55"


# --- comparison images ----------------------------------------------------------------------


def test_comparison_shows_original_bicubic_and_srcnn(call, photo_path, tmp_path, weights):
    argv = ["--eval", "--image-file", photo_path, "--scale", 2, "--weights-file", weights]
    folder = tmp_path / "images"
    assert call("test", *argv, "--save-images", folder).status == 0
    bicubic, comparison, srcnn = (
        pixels(folder / f"photo.v1_{method}_x2.png")
        for method in ("bicubic", "comparison", "srcnn")
    )
    assert len(tree(folder)) == 3
    assert bicubic.shape == srcnn.shape == (120, 90, 3) and comparison.shape == (136, 270, 3)
    original = pixels(photo_path)
    assert np.abs(comparison[-120:, :90] - original).max() <= 1
    assert np.array_equal(comparison[-120:, 90:180], bicubic)
    assert np.array_equal(comparison[-120:, 180:], srcnn)
    assert 0.5 < np.abs(bicubic - original).mean() < 12


@pytest.mark.parametrize("num_channels", [1, 3])
def test_comparison_images_of_greyscale_are_greyscale(call, photo_path, tmp_path, num_channels):
    torch.manual_seed(9)
    model = SRCNN(num_channels, (8, 6), (5, 3, 5))
    model.conv3.weight.data += 0.05 * torch.randn(model.conv3.weight.shape)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    grey = Image.open(photo_path).convert("L")
    grey.save(tmp_path / "grey.png")
    argv = ["--eval", "--image-file", tmp_path / "grey.png", "--weights-file", tmp_path / "w.pth"]
    assert call("test", *argv, "--save-images", tmp_path / "out").status == 0
    comparison = np.asarray(Image.open(tmp_path / "out" / "grey_comparison_x3.png"))
    assert np.array_equal(comparison[-120:, :90], np.dstack([np.asarray(grey)] * 3))
    assert not np.ptp(comparison, axis=2).any()


# --- ONNX -----------------------------------------------------------------------------------


@pytest.fixture(params=[(1, (9, 5, 5)), (3, (5, 3, 1, 5))], ids=["9-5-5", "rgb 5-3-1-5"])
def exported(request, call, tmp_path) -> tuple[SRCNN, Path]:
    """A network with random weights, and the ONNX file that test.py makes of it."""
    channels, kernel_sizes = request.param
    torch.manual_seed(3)
    model = SRCNN(channels, (8, 6, 4)[: len(kernel_sizes) - 1], kernel_sizes, init="default")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    argv = "--scale", 2, "--weights-file", tmp_path / "w.pth"
    result = call("test", "--export", tmp_path / "x.onnx", *argv)
    assert result == (0, f"{tmp_path / 'x.onnx'}\n", "")
    return model, tmp_path / "x.onnx"


def onnx_metadata(path: Path) -> dict:
    """Return the metadata of an ONNX file."""
    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map


def test_onnxruntime_gives_the_output_of_the_network(exported):
    model, path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 1), (5, 37), (64, 33):
        x = torch.rand(2, model.num_channels, *size)
        output = torch.from_numpy(session.run(["sr"], {"ilr": x.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(output, model(x), atol=1e-5, rtol=0)


def test_opencv_gives_the_output_of_the_network(exported):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: opencv-python-headless")
    model, path = exported
    x = torch.rand(1, model.num_channels, 40, 33)
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(x.numpy())
    with torch.no_grad():
        output = torch.from_numpy(network.forward())
        torch.testing.assert_close(output, model(x), atol=1e-4, rtol=0)


def test_onnx_convolutions_have_a_kernel_shape(exported):
    """OpenCV 4.10 to 4.12 cannot load a Conv node without this attribute."""
    model, path = exported
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    attributes = [{a.name: list(a.ints) for a in node.attribute} for node in nodes]
    shapes = [attribute.get("kernel_shape") for attribute in attributes]
    assert shapes == [list(layer.kernel_size) for layer in model.layers]


@pytest.mark.parametrize(
    ("network", "kernel_sizes", "channels", "content"),
    [("9-5-5", "9-5-5", 1, "luma"), ("9-1-5", "9-1-5", 1, "luma"), ("rgb", "9-5-5", 3, "RGB")],
)
def test_onnx_file_describes_itself(call, tmp_path, network, kernel_sizes, channels, content):
    path = tmp_path / "x.onnx"
    assert call("test", "--export", path, "--network", network, "--scale", 4).status == 0
    metadata = onnx_metadata(path)
    assert (metadata["names"], metadata["scale"]) == ("ilr, sr", "4")
    assert (metadata["kernel_sizes"], metadata["channels"]) == (kernel_sizes, str(channels))
    assert content in metadata["input"] and "bicubic" in metadata["input"]
    session = onnxruntime.InferenceSession(path)
    for value in session.get_inputs()[0], session.get_outputs()[0]:
        assert value.shape == ["N", channels, "H", "W"]


def test_export_without_the_package_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = call("test", "--export", tmp_path / "x.onnx", "--scale", 3)
    assert refused(result, "--export", "pip install onnx")
    assert not tree(tmp_path)


@pytest.mark.parametrize("flag", ["--eval", "--half", "--self-ensemble"])
def test_export_refuses_flags_that_it_would_ignore(call, tmp_path, flag):
    assert refused(call("test", "--export", tmp_path / "x.onnx", flag), flag, "--export")
    assert not tree(tmp_path)


def test_export_does_not_overwrite_the_weights(call):
    path = ROOT / "weights" / "srcnn_x3.pth"
    before = path.read_bytes()
    assert refused(call("test", "--export", path, "--scale", 3), "would overwrite")
    assert path.read_bytes() == before
