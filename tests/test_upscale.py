"""test.py: enlarging any picture, and measuring as the paper does."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, FULL_DISK, ROOT, needs_data, noise, refused, spawn, tree
from PIL import Image, ImageCms
from skimage import metrics

from models import SRCNN, enlarge, load_srcnn, restore
from utils import bicubic_pair, read_levels, resize, rgb_to_ycbcr, ycbcr_to_rgb


@pytest.fixture
def low(tmp_path, photo) -> Path:
    """A colour photograph of 90 x 120 pixels."""
    Image.fromarray(photo).save(tmp_path / "low.v1.png")
    return tmp_path / "low.v1.png"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(float)


# --- enlarging ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 5])
def test_luma_goes_through_the_network_and_chroma_through_bicubic(call, low, weights, scale):
    argv = ["--image-file", low, "--scale", scale, "--weights-file", weights]
    result = call("test", *argv, "--back-projection", 0)
    target = low.with_name(f"low.v1_srcnn_x{scale}.png")
    assert (result.status, result.out.strip()) == (0, str(target))
    rgb = pixels(low).transpose(2, 0, 1)
    ycbcr = resize(rgb_to_ycbcr(rgb), (120 * scale, 90 * scale))
    ycbcr[0] = restore(load_srcnn(weights), ycbcr[0])
    expected = np.clip(np.floor(ycbcr_to_rgb(ycbcr) + 0.5), 0, 255)
    assert np.abs(pixels(target).transpose(2, 0, 1) - expected).max() <= 1
    assert np.mean(pixels(target).transpose(2, 0, 1) == expected) > 0.999


def test_without_any_flag_the_bundled_picture_is_enlarged(call, tmp_path):
    size = Image.open(ROOT / "assets" / "chart.png").size
    result = call("test", "--output", tmp_path / "chart.png")
    assert result.status == 0
    assert Image.open(tmp_path / "chart.png").size == (3 * size[0], 3 * size[1])


def test_the_default_weights_are_found_from_any_folder(low):
    result = spawn(ROOT / "test.py", "--image-file", low.name, cwd=low.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert (low.parent / "low.v1_srcnn_x3.png").is_file()


@pytest.mark.parametrize("tile", [5, 13, 64, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (33, 2), (31, 37)])
def test_every_tile_size_gives_the_same_picture(photo, tile, shape):
    model = load_srcnn(ROOT / "weights" / "srcnn_x3.pth")
    colour = photo[40:, 30:][: shape[0], : shape[1]]
    alpha = noise(*shape, 1).astype(np.uint8)
    for values in colour, np.dstack([colour, alpha]), colour[..., 1]:
        picture = Image.fromarray(values)
        whole = np.asarray(enlarge(picture, model, 3))
        assert whole.shape[:2] == (3 * shape[0], 3 * shape[1])
        tiled = np.asarray(enlarge(picture, model, 3, tile=tile, band=tile**2))
        assert np.array_equal(tiled, whole)


def test_grey_and_black_and_white_stay_grey(call, tmp_path, weights, photo):
    for mode in ("L", "1"):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(photo).convert(mode).save(path)
        argv = ["--image-file", path, "--weights-file", weights]
        argv += ["--back-projection", 0, "--output"]
        assert call("test", *argv, tmp_path / "out.png").status == 0
        enlarged = Image.open(tmp_path / "out.png")
        assert enlarged.mode == "L"
        y = resize(np.asarray(Image.open(path).convert("L")), (360, 270))
        expected = restore(load_srcnn(weights), y)
        expected = np.clip(np.floor(expected + 0.5), 0, 255)
        assert np.abs(np.asarray(enlarged) - expected).max() <= 1


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
def test_other_modes_come_out_looking_like_the_input(call, tmp_path, photo, mode, suffix, expected):
    path = tmp_path / f"in{suffix}"
    image = Image.fromarray(photo)
    (image.quantize() if mode == "P" else image.convert(mode)).save(path)
    result = call("test", "--image-file", path, "--scale", 3)
    assert result.status == 0, result.err
    enlarged = Image.open(tmp_path / "in_srcnn_x3.png")
    assert enlarged.mode == expected
    again = enlarged.convert("RGB").resize((90, 120), Image.Resampling.BOX)
    original = Image.open(path).convert("RGB")
    assert np.abs(np.asarray(again).astype(int) - np.asarray(original)).mean() < 4


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_stay_sixteen_bits(call, tmp_path, weights, suffix):
    x = np.linspace(1000, 60000, 40)
    values = (x[:, None] / 2 + x[None] / 2).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep{suffix}")
    output = tmp_path / f"out{suffix}"
    argv = ["--image-file", tmp_path / f"deep{suffix}", "--output", output]
    argv += ["--weights-file", weights, "--back-projection", 0]
    assert call("test", *argv).status == 0
    enlarged = np.asarray(Image.open(output)).astype(float)
    assert len(np.unique(enlarged)) > 2000  # far more than 8 bits could hold
    y = resize(values.astype(np.float32) / 257, (120, 120))
    expected = restore(load_srcnn(weights), y) * 257
    assert np.abs(enlarged - expected).max() < 1


def test_floating_point_stays_floating_point(call, tmp_path, photo):
    values = photo[..., 1].astype(np.float32) / 255 * 3 - 1
    Image.fromarray(values).save(tmp_path / "float.tif")
    result = call("test", "--image-file", tmp_path / "float.tif")
    assert result.status == 0, result.err
    enlarged = Image.open(tmp_path / "float_srcnn_x3.tif")
    assert enlarged.mode == "F"
    again = np.asarray(enlarged.resize((90, 120), Image.Resampling.BOX))
    assert np.abs(again - values).mean() < 0.05


def test_a_palette_with_transparency_keeps_it(call, tmp_path, photo):
    image = Image.fromarray(photo).quantize(16)
    image.save(tmp_path / "p.png", transparency=3)
    assert call("test", "--image-file", tmp_path / "p.png", "--scale", 2).status == 0
    enlarged = Image.open(tmp_path / "p_srcnn_x2.png")
    assert enlarged.mode == "RGBA"
    assert np.asarray(enlarged)[..., 3].min() == 0


def test_a_constant_alpha_stays_and_changes_no_colour(call, tmp_path, photo, weights):
    argv = ["--weights-file", weights, "--output"]
    Image.fromarray(photo).save(tmp_path / "rgb.png")
    call("test", "--image-file", tmp_path / "rgb.png", *argv, tmp_path / "rgb_out.png")
    for alpha in (255, 200, 1):
        rgba = np.dstack([photo, np.full(photo.shape[:2], alpha, np.uint8)])
        Image.fromarray(rgba).save(tmp_path / "rgba.png")
        call("test", "--image-file", tmp_path / "rgba.png", *argv, tmp_path / "out.png")
        enlarged = pixels(tmp_path / "out.png")
        assert (enlarged[..., 3] == alpha).all()
        assert np.abs(enlarged[..., :3] - pixels(tmp_path / "rgb_out.png")).max() <= 1


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255), (0, 255, 0)])
def test_hidden_colours_leave_no_fringe(call, tmp_path, hidden):
    yy, xx = np.mgrid[:60, :60]
    inside = np.hypot(yy - 30, xx - 30) < 18
    rgba = np.zeros((60, 60, 4), np.uint8)
    rgba[...] = (*hidden, 0)
    rgba[inside] = (200, 40, 60, 255)
    Image.fromarray(rgba).save(tmp_path / "disc.png")
    assert call("test", "--image-file", tmp_path / "disc.png").status == 0
    enlarged = pixels(tmp_path / "disc_srcnn_x3.png")
    visible = enlarged[..., 3] > 0
    assert visible.mean() == pytest.approx(inside.mean(), abs=0.05)
    assert np.abs(enlarged[visible][:, :3] - (200, 40, 60)).max() <= 2


def test_orientation_profile_and_resolution_are_carried_over(call, tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kept = {"dpi": (300, 300), "icc_profile": profile}
    Image.fromarray(photo).save(tmp_path / "in.jpg", exif=exif, **kept)
    output = tmp_path / "out.jpg"
    assert call("test", "--image-file", tmp_path / "in.jpg", "--output", output).status == 0
    enlarged = Image.open(output)
    assert enlarged.size == (360, 270)  # lies on its side now
    assert enlarged.getexif().get(0x0112, 1) == 1
    assert enlarged.info["dpi"] == (300, 300)
    assert enlarged.info["icc_profile"] == kept["icc_profile"]


def test_a_jpeg_is_written_without_subsampling(call, low, tmp_path):
    output = tmp_path / "out.jpg"
    call("test", "--image-file", low, "--output", output)
    image = Image.open(output)
    assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    assert max(image.quantization[0]) <= 12  # quality 95


def test_of_several_frames_the_first_is_used_and_a_line_says_so(call, tmp_path, photo):
    frames = [Image.fromarray(photo[:, i * 30 :][:, :30]) for i in range(3)]
    path = tmp_path / "film.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    result = call("test", "--image-file", path, "--scale", 2)
    assert result.status == 0
    assert result.err == f"{path}: 3 frames, only the first is used\n"
    assert Image.open(tmp_path / "film_srcnn_x2.png").size == (60, 240)


def test_a_network_of_three_channels_gets_all_colours(call, low, tmp_path, rgb_weights):
    output = tmp_path / "out.png"
    argv = ["--image-file", low, "--weights-file", rgb_weights, "--output", output]
    argv += ["--back-projection", 0]
    assert call("test", *argv).status == 0
    rgb = resize(pixels(low).transpose(2, 0, 1), (360, 270))
    expected = restore(load_srcnn(rgb_weights), rgb)
    expected = np.clip(np.floor(expected + 0.5), 0, 255).transpose(1, 2, 0)
    assert np.abs(pixels(output) - expected).max() <= 1
    Image.fromarray(pixels(low)[..., 0].astype(np.uint8)).save(tmp_path / "grey.png")
    before = tree(tmp_path)
    argv[1] = tmp_path / "grey.png"
    assert refused(call("test", *argv), "grey.png", "weights are for RGB")
    assert tree(tmp_path) == before


def test_files_and_folders_are_done_and_bad_ones_reported(call, low, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(low.read_bytes())
    (folder / "b.png").write_bytes(b"no picture")
    (folder / "c.bmp").write_bytes(low.read_bytes())
    argv = ["--image-file", folder, low, "--scale", 2]
    result = call("test", *argv, "--output", tmp_path / "out")
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert str(folder / "b.png") in result.err
    names = ["a_srcnn_x2.png", "c_srcnn_x2.png", "low.v1_srcnn_x2.png"]
    assert sorted(tree(tmp_path / "out")) == names
    call("test", "--image-file", folder, "--scale", 2)  # beside the inputs, twice
    once = sorted(tree(folder))
    call("test", "--image-file", folder, "--scale", 2)
    assert sorted(tree(folder)) == once


def test_no_input_is_overwritten(call, low, tmp_path):
    before = tree(tmp_path)
    assert refused(call("test", "--image-file", low, "--output", low), str(low))
    (tmp_path / "link.png").symlink_to(low)
    result = call("test", "--image-file", low, "--output", tmp_path / "link.png")
    assert refused(result, "would overwrite")
    (tmp_path / "link.png").unlink()
    assert tree(tmp_path) == before


def test_two_inputs_of_one_name_do_not_overwrite_each_other(call, low, tmp_path):
    twins = tmp_path / "low.v1.bmp"
    Image.open(low).save(twins)
    result = call("test", "--image-file", low, twins, "--scale", 2)
    assert refused(result, str(twins), "would overwrite")


# --- bad input ----------------------------------------------------------------------


def bad_files(tmp_path: Path, photo: np.ndarray) -> dict[str, bytes]:
    image = Image.fromarray(photo)
    whole = {}
    for suffix in ("png", "jpg"):
        buffer = io.BytesIO()
        image.save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
        whole[suffix] = buffer.getvalue()
    return {
        "empty.png": b"",
        "text.png": b"no picture at all\n",
        "truncated.png": whole["png"][: len(whole["png"]) // 2],
        "truncated.jpg": whole["jpg"][: len(whole["jpg"]) // 2],
        "headers.png": whole["png"][:30],
        "zero.pgm": b"P5 0 0 255\n",
        "zero.bmp": image.tobytes()[:0] + b"BM" + bytes(60),
    }


def test_bad_pictures_are_one_line_and_write_nothing(call, tmp_path, photo):
    for name, content in bad_files(tmp_path, photo).items():
        (tmp_path / name).write_bytes(content)
        before = tree(tmp_path)
        for more in ([], ["--eval"]):
            result = call("test", "--image-file", tmp_path / name, *more)
            assert refused(result, str(tmp_path / name))
        assert tree(tmp_path) == before
    assert refused(call("test", "--image-file", tmp_path / "no.png"), "no.png")
    (tmp_path / "void").mkdir()
    assert refused(call("test", "--image-file", tmp_path / "void"), "no image")


def test_a_decompression_bomb_needs_a_flag(call, low, tmp_path):
    limit = ["--max-pixels", 90 * 120 - 1]
    result = call("test", "--image-file", low, *limit)
    assert refused(result, str(low), "--max-pixels")
    assert call("test", "--image-file", low, "--max-pixels", 90 * 120).status == 0


@pytest.mark.parametrize("name", ["x.xyz", "x.svg", "folder/x"])
def test_extensions_that_cannot_be_written_are_refused(call, low, tmp_path, name):
    result = call("test", "--image-file", low, "--output", tmp_path / name)
    if "." in name:
        assert refused(result, name, "use .png")
        assert sorted(tree(tmp_path)) == [low.name]
    else:  # without an extension it is a folder
        assert Path(result.out.strip()).parent == tmp_path / name


def test_formats_that_cannot_hold_the_mode_are_refused(call, tmp_path):
    Image.new("RGBA", (20, 20)).save(tmp_path / "rgba.png")
    Image.fromarray(noise(20, 20)).save(tmp_path / "float.tif")
    for source, target, cure in (("rgba.png", "o.jpg", "png"), ("float.tif", "o.png", "tif")):
        argv = ["--image-file", tmp_path / source, "--output", tmp_path / target]
        assert refused(call("test", *argv), target, f"use .{cure}")
        assert not (tmp_path / target).exists()


@pytest.mark.parametrize("scale", [0, 1, -3, 2.5, "three"])
def test_a_scale_that_makes_no_sense_is_refused(call, low, scale):
    assert refused(call("test", "--image-file", low, "--scale", scale), "--scale")


def test_a_scale_without_weights_lists_those_there_are(call, low):
    assert refused(call("test", "--image-file", low, "--scale", 7), "--scale 7", "3")


def test_bad_weights_are_one_line_and_write_nothing(call, low, tmp_path):
    state = SRCNN().state_dict()
    torch.save(dict(state, **{"conv1.bias": torch.full((64,), torch.inf)}), tmp_path / "inf.pth")
    torch.save({"a": 1}, tmp_path / "other.pth")
    (tmp_path / "empty.pth").write_bytes(b"")

    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"conv1.weight": Payload()}, tmp_path / "evil.pth")
    before = tree(tmp_path)
    for name in ("inf", "other", "empty", "evil", "missing"):
        argv = ["--image-file", low, "--weights-file", tmp_path / f"{name}.pth"]
        assert refused(call("test", *argv), f"{name}.pth")
    assert tree(tmp_path) == before


def test_output_that_cannot_be_written_is_refused(call, low, tmp_path):
    result = call("test", "--image-file", low, "--output", low / "below" / "x.png")
    assert refused(result, "cannot be written")
    assert sorted(tree(tmp_path)) == [low.name]


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.jp2"])
def test_a_full_disk_is_refused_and_leaves_the_old_file(low, tmp_path, name):
    old = tmp_path / name
    Image.new("L", (3, 3)).save(old)
    before = tree(tmp_path)
    result = spawn("-c", FULL_DISK, ROOT / "test.py", "--image-file", low, "--output", old)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"{old}: cannot be written" in result.stderr
    assert tree(tmp_path) == before


def test_flags_that_do_not_go_together_are_refused(call, low, tmp_path):
    assert refused(call("test", "--image-file", low, "--csv", "x.csv"), "--csv", "--eval")
    assert refused(call("test", "--image-file", low, "--half", "--device", "cpu"), "--half")


# --- measuring ----------------------------------------------------------------------


def test_scores_are_against_the_ground_truth(call, low, tmp_path, weights):
    argv = ["--eval", "--image-file", low, "--scale", 4, "--weights-file", weights]
    result = call("test", *argv, "--csv", tmp_path / "scores.csv")
    assert result.status == 0
    (row,) = csv.DictReader((tmp_path / "scores.csv").open())
    hr = read_levels(low)[0][:120, :88]
    ilr = bicubic_pair(hr, 1, 4).ilr
    pictures = {"bicubic": ilr, "srcnn": restore(load_srcnn(weights), ilr)}
    for name, picture in pictures.items():
        ours = np.clip(np.floor(picture.astype(float) + 0.5), 0, 255)[4:-4, 4:-4]
        truth = hr[4:-4, 4:-4].astype(float)
        psnr = metrics.peak_signal_noise_ratio(truth, ours, data_range=255)
        assert float(row[f"{name}_psnr"]) == pytest.approx(psnr, abs=1e-6)
        ssim = metrics.structural_similarity(
            truth,
            ours,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(row[f"{name}_ssim"]) == pytest.approx(ssim, abs=1e-6)
        assert f"{psnr:.2f}" in result.out
    assert (row["image"], row["scale"]) == (low.name, "4")


def test_a_network_of_three_channels_is_scored_by_luma_and_by_rgb(call, low, tmp_path):
    model = SRCNN(3, (8, 6), (5, 3, 5))
    model.conv3.weight.data += 0.01  # not the identity
    torch.save(model.state_dict(), tmp_path / "rgb.pth")
    argv = ["--eval", "--image-file", low, "--scale", 3, "--weights-file", tmp_path / "rgb.pth"]
    result = call("test", *argv, "--csv", tmp_path / "scores.csv")
    assert result.status == 0
    (row,) = csv.DictReader((tmp_path / "scores.csv").open())
    assert list(row)[2:5] == ["bicubic_psnr", "bicubic_ssim", "bicubic_rgb_psnr"]
    hr = pixels(low).transpose(2, 0, 1)  # 120 and 90 divide by 3
    restored = restore(model, bicubic_pair(hr.astype(np.float32), 1, 3).ilr).astype(float)
    truth, ours = (np.clip(np.floor(p + 0.5), 0, 255)[:, 3:-3, 3:-3] for p in (hr, restored))
    rgb = metrics.peak_signal_noise_ratio(truth, ours, data_range=255)
    assert float(row["srcnn_rgb_psnr"]) == pytest.approx(rgb, abs=1e-6)
    weights = np.array([65.481, 128.553, 24.966]) / 255
    truth, ours = (np.floor(np.tensordot(weights, p, 1) + 16.5) for p in (truth, ours))
    luma = metrics.peak_signal_noise_ratio(truth, ours, data_range=255)
    assert float(row["srcnn_psnr"]) == pytest.approx(luma, abs=1e-6)


def test_a_folder_gives_a_row_for_each_image_and_the_mean(call, low, tmp_path, weights):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, turn in ("a.png", 0), ("b.png", 90):
        Image.open(low).rotate(turn, expand=True).save(folder / name)
    argv = ["--eval", "--image-file", folder, "--scale", 2, "--weights-file", weights]
    images, scores = tmp_path / "images", tmp_path / "scores.csv"
    result = call("test", *argv, "--csv", scores, "--save-images", images)
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == ["x2", "a.png", "b.png", "mean"]
    table = [[float(cell) for cell in line.split()[1:]] for line in lines[1:]]
    assert np.allclose(np.mean(table[:2], axis=0), table[2], atol=0.011)
    assert [row["image"] for row in csv.DictReader(scores.open())] == ["a.png", "b.png"]
    names = [f"{n}_{m}_x2.png" for n in "ab" for m in ("bicubic", "comparison", "srcnn")]
    assert sorted(tree(images)) == names
    assert Image.open(images / "a_srcnn_x2.png").size == (90, 120)
    strip = np.asarray(Image.open(images / "a_comparison_x2.png")).astype(int)
    assert strip.shape[1] == 270
    assert np.abs(strip[-120:, :90] - pixels(low)).max() <= 1  # the original
    bicubic = pixels(images / "a_bicubic_x2.png")
    assert np.array_equal(strip[-120:, 90:180], bicubic)
    assert 0.5 < np.abs(bicubic - pixels(low)).mean() < 12


def test_comparisons_of_grey_pictures_are_grey(call, low, tmp_path, weights):
    grey = np.asarray(Image.open(low).convert("L"))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    argv = ["--eval", "--image-file", tmp_path / "grey.png", "--weights-file", weights]
    assert call("test", *argv, "--save-images", tmp_path / "out").status == 0
    strip = np.asarray(Image.open(tmp_path / "out" / "grey_comparison_x3.png"))
    assert np.array_equal(strip[-120:, :90], np.dstack([grey] * 3))


def test_a_picture_too_small_to_measure_is_refused(call, tmp_path):
    Image.new("L", (16, 40)).save(tmp_path / "small.png")
    assert refused(call("test", "--eval", "--image-file", tmp_path / "small.png"), "small.png")


BICUBIC = {  # the paper's
    ("Set5", 2): ("33.66", "0.9299"),
    ("Set5", 3): ("30.39", "0.8682"),
    ("Set5", 4): ("28.42", "0.8104"),
    ("Set14", 2): ("30.23", "0.8687"),
    ("Set14", 3): ("27.54", "0.7736"),
    ("Set14", 4): ("26.00", "0.7019"),
}
OURS = {  # as the README has them
    ("Set5", 2): (37.07, 0.9564),
    ("Set5", 3): (33.02, 0.9136),
    ("Set14", 2): (32.64, 0.9088),
    ("Set14", 3): (29.43, 0.8241),
    ("Set5", 4): (30.69, 0.8684),
    ("Set14", 4): (27.60, 0.7554),
}


@needs_data
@pytest.mark.parametrize(("name", "scale"), BICUBIC)
def test_bicubic_is_the_papers_and_our_weights_do_what_the_readme_says(call, name, scale):
    result = call("test", "--eval", "--image-file", DATA / name, "--scale", scale)
    assert result.status == 0
    psnr, ssim, *ours = result.out.splitlines()[-1].split()[1:5]
    assert (psnr, ssim) == BICUBIC[name, scale]
    assert float(ours[0]) == pytest.approx(OURS[name, scale][0], abs=0.011)
    assert float(ours[1]) == pytest.approx(OURS[name, scale][1], abs=0.0002)
