"""test.py: upscaling any image, names of results, evaluation, comparison images, ONNX."""

import csv
import io
import os
import re
import shutil
import sys
from pathlib import Path

import models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import test as test_script
from conftest import DATA, FULL_DISK, ROOT, needs_data, noise, refused, spawn, tree
from PIL import Image, ImageCms, features
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


def nearly_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether grey levels are equal but for a few that were rounded the other way."""
    return np.abs(a - b).max() <= 1 and np.mean(a == b) > 0.99


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
    sizes = f"90 x 120 -> {90 * scale} x {120 * scale}"
    applied = f"small.pth x{scale}, back-projection 0"
    assert re.fullmatch(re.escape(f"{target}  {sizes}  {applied}  ") + r"\d+\.\d s\n", result.out)
    assert (result.status, result.err) == (0, "")
    rgb = pixels(photo_path).transpose(2, 0, 1)
    ycbcr = resize(rgb_to_ycbcr(rgb), (120 * scale, 90 * scale))
    ycbcr[0] = restore(load_srcnn(weights), ycbcr[0])
    expected = rounded(ycbcr_to_rgb(ycbcr))
    upscaled = pixels(target).transpose(2, 0, 1)
    assert np.abs(upscaled - expected).max() <= 1
    assert np.mean(upscaled == expected) > 0.999


def test_without_flags_the_bundled_image_is_upscaled(call, tmp_path):
    width, height = Image.open(ROOT / "assets" / "astronaut.png").size
    assert call("test", "--output", tmp_path / "out.png").status == 0
    assert Image.open(tmp_path / "out.png").size == (3 * width, 3 * height)


def test_default_weights_are_found_from_any_folder(photo_path):
    result = spawn(ROOT / "test.py", "--image-file", photo_path.name, cwd=photo_path.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert (photo_path.parent / "photo.v1_srcnn_x3.png").is_file()


@pytest.mark.parametrize("tile", [5, 13, 64, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (33, 2), (22, 23)])
def test_tiles_and_bands_of_any_size_give_the_same_image(photo, tile, shape, monkeypatch):
    model = load_srcnn(ROOT / "weights" / "srcnn_x3.pth")
    colour = photo[40:, 30:][: shape[0], : shape[1]]
    alpha = noise(*shape, 1).astype(np.uint8)
    for values in colour, np.dstack([colour, alpha]), colour[..., 1]:
        image = Image.fromarray(values)
        whole = np.asarray(upscale(image, model, 3))
        assert whole.shape[:2] == (3 * shape[0], 3 * shape[1])
        with monkeypatch.context() as patch:
            patch.setattr(models, "CPU_TILE", tile)
            patch.setattr(models, "BAND", tile**2)
            tiled = np.asarray(upscale(image, model, 3))
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
    result = call("test", "--image-file", path, "--scale", 3, "--network", "9-5-5")
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
    argv = "--image-file", tmp_path / "in.jpg", "--output", output, "--network", "9-5-5"
    assert call("test", *argv).status == 0
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


SIZES = [
    (("--scale", 2), "x2"),
    (("--outscale", 1.5), "x1.5"),
    (("--width", 180), "w180"),
    (("--height", 130), "h130"),
]


@pytest.mark.parametrize(("flags", "suffix"), SIZES)
def test_results_in_a_folder_are_not_upscaled_again(call, photo_path, flags, suffix):
    folder = photo_path.parent
    argv = folder, *flags, "--ext", "bmp", "--save-images", folder / "seen"
    assert call("test", *argv).status == call("test", *argv).status == 0
    names = ["photo.v1.png", f"photo.v1_srcnn_{suffix}.bmp"]
    assert sorted(tree(folder)) == [*names, f"seen/photo.v1_comparison_{suffix}.png"]


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


# --- names of results -----------------------------------------------------------------------


@pytest.fixture
def batch(call, weights, tmp_path, monkeypatch):
    """Upscale with a small network at x2 in tmp_path; return the result and the new files."""
    monkeypatch.chdir(tmp_path)

    def batch(*argv: object, status: int = 0) -> tuple:
        before = tree(Path())
        result = call("test", "--weights-file", weights, "--scale", 2, *argv)
        assert result.status == status, result.err
        return result, sorted(tree(Path()).keys() - before.keys())

    return batch


def save_images(photo: np.ndarray, *names: str) -> None:
    """Write 12 x 9 pixels of a photograph; each file shows another part."""
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[7 * i : 7 * i + 9, 6 * i : 6 * i + 12]).save(name)


def shows(result: str | Path, image: str | Path) -> bool:
    """Return whether a result, downscaled to the image's size, has nearly its values."""
    original = Image.open(image).convert("RGB")
    downscaled = Image.open(result).convert("RGB").resize(original.size, Image.Resampling.BOX)
    return np.abs(np.asarray(downscaled).astype(int) - np.asarray(original)).mean() < 6


NAMES = {  # images: what is named on the command line, and the results
    "one file": (["a/1.png"], ["a/1.png"], ["out/1_srcnn_x2.png"]),
    "a folder": (["a/1.png", "a/2.png"], ["a"], ["out/1_srcnn_x2.png", "out/2_srcnn_x2.png"]),
    "subfolders": (
        ["a/1.png", "a/b/1.png", "a/b/c/1.png"],
        ["a"],
        ["out/1_srcnn_x2.png", "out/b/1_srcnn_x2.png", "out/b/c/1_srcnn_x2.png"],
    ),
    "two folders with equal names": (
        ["ch1/001.png", "ch2/001.png"],
        ["ch1", "ch2"],
        ["out/ch1/001_srcnn_x2.png", "out/ch2/001_srcnn_x2.png"],
    ),
    "two files with equal names": (
        ["ch1/001.png", "ch2/001.png"],
        ["ch1/001.png", "ch2/001.png"],
        ["out/ch1/001_srcnn_x2.png", "out/ch2/001_srcnn_x2.png"],
    ),
    "two folders with equal subfolders": (
        ["a/sub/1.png", "b/sub/1.png"],
        ["a", "b"],
        ["out/a/sub/1_srcnn_x2.png", "out/b/sub/1_srcnn_x2.png"],
    ),
    "equal names with different extensions": (
        ["a/brick.tga", "a/brick.bmp", "a/wall.bmp"],
        ["a"],
        ["out/brick.tga_srcnn_x2.png", "out/brick.bmp_srcnn_x2.png", "out/wall_srcnn_x2.png"],
    ),
    "equal names in two folders and with different extensions": (
        ["a/1.png", "b/1.png", "b/1.bmp"],
        ["a", "b"],
        ["out/a/1_srcnn_x2.png", "out/b/1.png_srcnn_x2.png", "out/b/1.bmp_srcnn_x2.png"],
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_subfolders_are_mirrored_and_no_two_results_have_one_name(batch, photo, case):
    images, named, results = NAMES[case]
    save_images(photo, *images)
    result, new = batch(*named, "--output", "out", "--save-images", "seen")
    comparisons = [r.replace("out/", "seen/").replace("_srcnn_", "_comparison_") for r in results]
    assert (result.err, new) == ("", sorted([*results, *comparisons]))
    for image, upscaled, comparison in zip(images, results, comparisons, strict=True):
        assert shows(upscaled, image)
        _, (_, height) = (Image.open(comparison).size, Image.open(upscaled).size)
        srcnn = Image.open(comparison).crop((24, 16, 48, 16 + height))
        assert np.array_equal(np.asarray(srcnn), pixels(Path(upscaled)))


def test_comparisons_of_an_evaluation_are_named_as_results_are(batch, photo):
    images = ["a/b/1.png", "a/brick.tga", "a/brick.bmp"]
    for i, name in enumerate(images):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[8 * i : 8 * i + 30, :40]).save(name)
    result, new = batch("--eval", "a", "--save-images", "seen")
    methods = "bicubic", "comparison", "srcnn"
    stems = "b/1", "brick.bmp", "brick.tga"
    assert new == [f"seen/{stem}_{method}_x2.png" for stem in stems for method in methods]
    assert [line.split()[0] for line in result.out.splitlines()[1:-1]] == sorted(
        name.removeprefix("a/") for name in images
    )


def test_results_beside_images_of_equal_names_keep_the_extension(batch, photo):
    save_images(photo, "a/brick.tga", "a/brick.bmp", "b/brick.bmp")
    _, new = batch("a", "b")
    names = ["a/brick.bmp_srcnn_x2.png", "a/brick.tga_srcnn_x2.png", "b/brick_srcnn_x2.png"]
    assert new == names
    for name, image in zip(names, ["a/brick.bmp", "a/brick.tga", "b/brick.bmp"], strict=True):
        assert shows(name, image)


def test_linked_folders_are_followed_once_and_a_loop_ends(batch, photo):
    save_images(photo, "elsewhere/1.png", "a/2.png", "a/sub/3.png")
    Path("a/linked").symlink_to("../elsewhere")
    Path("a/sub/loop").symlink_to("..")
    Path("a/self").symlink_to(".")
    Path("elsewhere/back").symlink_to("../a")
    _, new = batch("a", "--output", "out")
    assert new == [f"out/{stem}_srcnn_x2.png" for stem in ("2", "linked/1", "sub/3")]


@pytest.mark.parametrize("ext", ["png", "jpg", "jpeg", "webp", "tif", "bmp", "avif", "JPG"])
def test_ext_is_the_format_of_all_results(batch, photo, ext):
    if ext == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for name, values in ("a/1.bmp", photo), ("a/b/2.png", photo[..., 0]):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(name)
    batch("a", "--output", "out")
    _, new = batch("a", "--output", "other", "--ext", ext)
    assert new == [f"other/1_srcnn_x2.{ext}", f"other/b/2_srcnn_x2.{ext}"]
    for name in new:
        image = Image.open(name)
        assert image.format == Image.registered_extensions()[f".{ext.lower()}"]
        exact = Image.open(name.replace("other", "out").replace(ext, "png"))
        error = pixels(Path(name)) - np.asarray(exact.convert(image.mode)).astype(float)
        if ext in ("png", "tif", "bmp", "webp"):
            assert not error.any()
        assert np.mean(error**2) < 255**2 / 10**4.4  # 44 dB
    assert sorted(tree(Path("a"))) == ["1.bmp", "b/2.png"]
    _, new = batch("a", "--ext", ext)  # beside the images
    assert new == [f"a/1_srcnn_x2.{ext}", f"a/b/2_srcnn_x2.{ext}"]


def test_ext_that_cannot_be_written_or_cannot_store_an_image_is_refused(batch, photo):
    save_images(photo, "a/1.png")
    result, new = batch("a", "--ext", "xyz", status=2)
    assert refused(result, "a/1_srcnn_x2.xyz", "use .png") and not new
    Image.fromarray(np.dstack([photo, photo])[..., :4]).save("a/1.png")
    result, new = batch("a", "--ext", "jpg", status=2)
    assert refused(result, "a/1_srcnn_x2.jpg", "use .png") and not new
    Image.fromarray(noise(20, 20)).save("float.tif")
    result, new = batch("float.tif", "--ext", "png", status=2)
    assert refused(result, "float_srcnn_x2.png", "use .tif") and not new
    _, new = batch("float.tif", "--ext", "tif")
    assert new == ["float_srcnn_x2.tif"]


@pytest.mark.parametrize("ext", ["webp", "gif"])
def test_formats_of_8_bits_are_refused_for_16_bits(batch, ext):
    Image.fromarray(noise(20, 20).astype(np.uint16) * 257).save("deep.png")
    result, new = batch("deep.png", "--ext", ext, status=2)
    assert refused(result, f"deep_srcnn_x2.{ext}", "8 bits", "use .tif") and not new


def test_an_output_of_another_format_than_ext_is_refused(batch, photo):
    save_images(photo, "1.png")
    result, new = batch("1.png", "--output", "z.png", "--ext", "jpg", status=2)
    assert refused(result, "--output z.png", "name a folder") and not new


def test_a_leading_dot_of_ext_is_ignored(batch, photo):
    save_images(photo, "1.png")
    _, new = batch("1.png", "--ext", ".bmp")
    assert new == ["1_srcnn_x2.bmp"]


def test_skip_existing_writes_only_missing_results(batch, photo):
    save_images(photo, "a/1.png", "a/b/2.png", "a/3.bmp", "a/4.png")
    Image.fromarray(noise(20, 20)).save("a/float.tif")  # its result is no PNG
    argv = "a", "--output", "out", "--skip-existing"
    result, new = batch(*argv)
    assert result.out.splitlines()[-1] == "5 written, 0 skipped, 0 failed; 0 other files ignored"
    stamps = {}
    for name in new:
        os.utime(name, (10, 10))
        stamps[name] = Path(name).stat().st_ino, 10, Path(name).read_bytes()
    Path("out/4_srcnn_x2.png").unlink()
    save_images(photo[::-1], "a/1.png")  # an existing result is not compared with its image
    result, again = batch(*argv)
    assert again == ["out/4_srcnn_x2.png"]
    assert result.out.splitlines()[-1] == "1 written, 4 skipped, 0 failed; 0 other files ignored"
    assert len(result.out.splitlines()) == 2
    for name in new:
        if name != "out/4_srcnn_x2.png":
            stat = Path(name).stat()
            assert (stat.st_ino, stat.st_mtime, Path(name).read_bytes()) == stamps[name], name
    Path("a/4.png").write_bytes(b"an image that is skipped is not read")
    result, new = batch(*argv)
    assert (result.err, new) == ("", [])
    assert result.out == "0 written, 5 skipped, 0 failed; 0 other files ignored\n"
    result, _ = batch("a", "--output", "out", status=2)  # without the flag all are written
    assert result.out.splitlines()[-1].startswith("4 written, 0 skipped, 1 failed")


def test_the_summary_counts_written_failed_and_ignored_files(batch, photo):
    save_images(photo, "a/1.png", "a/2.png", "a/3.png", "a/b/4.png", "a/.hidden.png")
    for name in "a/bad.png", "a/b/bad.jpg", "a/notes.txt", "a/b/table.csv", "a/4_srcnn_x2.png":
        Path(name).write_bytes(b"not an image")
    result, new = batch("a", "--output", "out", status=2)
    assert len(new) == 4
    first, second = result.err.splitlines()
    assert "error: a/b/bad.jpg: " in first and "error: a/bad.png: " in second
    *lines, summary = result.out.splitlines()
    assert len(lines) == 4
    assert summary == "4 written, 0 skipped, 2 failed; 4 other files ignored"
    result, _ = batch("a/1.png", "--output", "out/")
    assert len(result.out.splitlines()) == 1  # one image needs no summary


def test_images_are_positional_or_follow_a_flag(batch, photo):
    save_images(photo, "1.png", "2.png", "3.png", "4.png")
    spellings = [
        ("1.png", "2.png", "--scale", 2, "--output", "out"),
        ("-s", 2, "-o", "out", "1.png", "2.png"),
        ("-i", "1.png", "2.png", "-s", 2, "-o", "out"),
        ("--input", "1.png", "2.png", "-o", "out"),
        ("--image-file", "1.png", "2.png", "--output", "out"),
        ("1.png", "-o", "out", "-i", "2.png"),
    ]
    contents = []
    for argv in spellings:
        _, new = batch(*argv)
        assert new == ["out/1_srcnn_x2.png", "out/2_srcnn_x2.png"], argv
        contents.append(tree(Path("out")))
        shutil.rmtree("out")
    assert all(content == contents[0] for content in contents)


# --- size of results ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "size", "scale"),
    [
        ("--width", 180, (180, 240), 2),
        ("--width", 200, (200, 267), 3),
        ("--height", 200, (150, 200), 2),
        ("--height", 480, (360, 480), 4),
        ("--width", 91, (91, 121), 2),
        ("--width", 45, (45, 60), 2),
        ("--height", 1, (1, 1), 2),
    ],
)
def test_width_or_height_is_that_of_the_result(call, photo_path, flag, value, size, scale):
    result = call("test", photo_path, flag, value)
    assert (result.status, result.err) == (0, "")
    name = f"photo.v1_srcnn_{flag[2]}{value}.png"
    assert sorted(tree(photo_path.parent)) == ["photo.v1.png", name]
    upscaled = Image.open(photo_path.with_name(name))
    assert upscaled.size == size
    words = f"  90 x 120 -> {size[0]} x {size[1]}  9-5-5 x{scale}, back-projection 1  "
    assert words in result.out
    model = load_srcnn(ROOT / "weights" / f"srcnn_x{scale}.pth")
    whole = upscale(Image.open(photo_path), model, scale)
    if whole.size != size:
        whole = whole.resize(size, Image.Resampling.BICUBIC)
    assert nearly_equal(np.asarray(upscaled, np.float64), np.asarray(whole))


def test_images_of_different_sizes_get_one_width_or_height(call, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, width, height in ("a", 90, 60), ("b", 45, 80), ("c", 30, 20):
        Image.fromarray(photo[:height, :width]).save(f"{name}.png")
    result = call("test", *"abc", "--width", 90, "--output", "none")  # no such files
    assert result.status == 2 and not Path("none").exists()
    result = call("test", "a.png", "b.png", "c.png", "--width", 90, "--output", "out")
    assert (result.status, result.err) == (0, "")
    sizes = [Image.open(f"out/{name}_srcnn_w90.png").size for name in "abc"]
    assert sizes == [(90, 60), (90, 160), (90, 60)]
    scales = [line.split()[8:10] for line in result.out.splitlines()[:-1]]
    assert scales == [["9-5-5", "x2,"], ["9-5-5", "x2,"], ["9-5-5", "x3,"]]
    result = call("test", "a.png", "b.png", "c.png", "--height", 120, "--output", "high")
    assert refused(result, "error: c.png: ")  # the others are upscaled
    sizes = [Image.open(f"high/{name}_srcnn_h120.png").size for name in "ab"]
    assert sizes == [(180, 120), (68, 120)]
    assert len(tree(Path("high"))) == 2


@pytest.mark.parametrize("flag", ["--width", "--height"])
def test_a_size_beyond_the_networks_is_one_line(call, photo_path, weights, flag):
    side = {"--width": 90, "--height": 120}[flag]
    before = tree(photo_path.parent)
    assert refused(call("test", photo_path, flag, 4 * side + 1), str(photo_path), flag)
    assert refused(call("test", photo_path, flag, 2 * side + 1, "--scale", 2), "--scale 2")
    for value in 0, -5, 2.5, "many":
        assert refused(call("test", photo_path, flag, value), flag)
    assert tree(photo_path.parent) == before
    assert call("test", photo_path, flag, 4 * side).status == 0


def test_a_fraction_is_an_outscale(call, photo_path):
    assert refused(call("test", photo_path, "--scale", 2.5), "--scale")
    assert call("test", photo_path, "--outscale", 2.5).status == 0
    assert Image.open(photo_path.with_name("photo.v1_srcnn_x2.5.png")).size == (225, 300)


# --- seamless textures ----------------------------------------------------------------------


def periodic(height: int, width: int, channels: int) -> np.ndarray:
    """Return a texture of waves whose left and right, top and bottom edges fit, with contrast."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(5)
    planes = []
    for _ in range(channels):
        waves = sum(
            np.sin(2 * np.pi * (i * y / height + j * x / width) + rng.uniform(0, 6)) / (i + j)
            for i, j in ((1, 2), (3, 1), (2, 5), (6, 3), (0, 7))
        )
        planes.append(np.where(waves > 0, 200 + 20 * waves, 60 + 20 * waves))
    values = np.stack(planes, -1).clip(0, 255).astype(np.uint8)
    return values if channels > 1 else values[..., 0]


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "I;16"])
def test_wrapped_edges_keep_a_texture_seamless(scale, kind):
    model = load_srcnn(ROOT / "weights" / f"srcnn_x{scale}.pth")
    texture = periodic(24, 31, {"L": 1, "I;16": 1}.get(kind, len(kind)))
    level = 257 if kind == "I;16" else 1
    if kind == "I;16":
        texture = texture.astype(np.uint16) * 257
    repeats = (2, 2, 1)[: texture.ndim]
    periods = np.tile(texture, repeats)
    whole = np.asarray(upscale(Image.fromarray(texture), model, scale, edges="wrap")).astype(int)
    both = np.asarray(upscale(Image.fromarray(periods), model, scale, edges="wrap")).astype(int)
    assert np.abs(both - np.tile(whole, repeats)).max() <= level
    # Without wrapping, the middle of many periods has the same values.
    many = np.tile(texture, (3, 3, 1)[: texture.ndim])
    middle = np.asarray(upscale(Image.fromarray(many), model, scale)).astype(int)
    height, width = 24 * scale, 31 * scale
    assert np.abs(middle[height:-height, width:-width] - whole).max() <= level
    plain = np.asarray(upscale(Image.fromarray(texture), model, scale)).astype(int)
    assert np.abs(plain - whole).max() > 10 * level  # the default repeats the edge


@pytest.mark.parametrize("flags", [(), ("--outscale", 2.5), ("--width", 78), ("--self-ensemble",)])
def test_tile_edges_wrap_gives_a_seamless_file(call, tmp_path, flags):
    texture = periodic(24, 36, 3)
    Image.fromarray(texture).save(tmp_path / "one.png")
    Image.fromarray(np.tile(texture, (1, 2, 1))).save(tmp_path / "two.png")
    argv = "test", "--tile-edges", "wrap", "--output"
    assert call(*argv, tmp_path / "1.png", tmp_path / "one.png", *flags).status == 0
    flags = ("--width", 156) if flags[:1] == ("--width",) else flags
    assert call(*argv, tmp_path / "2.png", tmp_path / "two.png", *flags).status == 0
    one, two = pixels(tmp_path / "1.png"), pixels(tmp_path / "2.png")
    assert np.abs(two - np.tile(one, (1, 2, 1))).max() <= 1


def test_an_image_smaller_than_the_networks_halo_is_wrapped(weights):
    model = load_srcnn(ROOT / "weights" / "srcnn_x2.pth")
    texture = periodic(24, 31, 1)[:2, :3]
    one = np.asarray(upscale(Image.fromarray(texture), model, 2, edges="wrap")).astype(int)
    many = np.asarray(upscale(Image.fromarray(np.tile(texture, (12, 10))), model, 2, edges="wrap"))
    assert one.shape == (4, 6)
    assert np.abs(many - np.tile(one, (12, 10))).max() <= 1


# --- the network for each image -------------------------------------------------------------


@pytest.fixture
def photo_network(tmp_path, monkeypatch) -> Path:
    """A folder weights/ with 9-5-5, 9-1-5 and small weights for JPEG images at x2 and x3."""
    folder = tmp_path / "root" / "weights"
    folder.mkdir(parents=True)
    torch.manual_seed(4)
    for scale in 2, 3:
        for name in "srcnn", "srcnn_9-1-5":
            shutil.copy(ROOT / "weights" / f"{name}_x{scale}.pth", folder)
        for name, num_channels in (
            ("photo", 3),
            ("photo-hq", 3),
            ("photo-luma", 1),
            ("photo-luma-hq", 1),
        ):
            model = SRCNN(num_channels, (8, 6), (5, 3, 5))
            model.conv3.weight.data += 0.02 * torch.randn(model.conv3.weight.shape)
            state = model.state_dict()
            state._metadata["srcnn"] = {"degradation": "jpeg", "jpeg": [25, 95], "scale": scale}
            torch.save(state, folder / f"srcnn_{name}_x{scale}.pth")
    monkeypatch.setattr(test_script, "ROOT", tmp_path / "root")
    return folder


CHOICES = [  # how an image is saved, flags, and what the line names
    ("a.jpg", {"quality": 60}, (), "photo x2 for JPEG of quality 60, back-projection 0"),
    ("a.jpg", {"quality": 15}, (), "photo x2 for JPEG of quality 15, back-projection 0"),
    ("a.jpg", {"quality": 64}, (), "photo x2 for JPEG of quality 64, back-projection 0"),
    ("a.jpg", {"quality": 65}, (), "photo-hq x2 for JPEG of quality 65, back-projection 0"),
    ("a.jpeg", {"quality": 94}, (), "photo-hq x2 for JPEG of quality 94, back-projection 0"),
    (
        "a.jpg",
        {"quality": 75, "subsampling": 0, "progressive": True},
        (),
        "photo-hq x2 for JPEG of quality 75, back-projection 0",
    ),
    (
        "a.png",  # a JPEG with a wrong extension
        {"quality": 60, "format": "JPEG"},
        (),
        "photo x2 for JPEG of quality 60, back-projection 0",
    ),
    ("a.jpg", {"quality": 95}, (), "9-5-5 x2, back-projection 1"),
    ("a.jpg", {"quality": 98}, (), "9-5-5 x2, back-projection 1"),
    ("a.jpg", {"quality": 100}, (), "9-5-5 x2, back-projection 1"),
    ("a.png", {}, (), "9-5-5 x2, back-projection 1"),
    ("a.webp", {"quality": 60}, (), "9-5-5 x2, back-projection 1"),
    ("a.tif", {}, (), "9-5-5 x2, back-projection 1"),
    ("a.jpg", {"quality": 60}, ("--network", "9-5-5"), "9-5-5 x2, back-projection 1"),
    ("a.jpg", {"quality": 60}, ("--network", "9-1-5"), "9-1-5 x2, back-projection 1"),
    ("a.jpg", {"quality": 60}, ("--network", "photo"), "photo x2, back-projection 0"),
    ("a.jpg", {"quality": 98}, ("--network", "photo"), "photo-hq x2, back-projection 0"),
    ("a.png", {}, ("--network", "photo-luma"), "photo-luma-hq x2, back-projection 0"),
    (
        "a.jpg",
        {"quality": 60},
        ("--back-projection", 2),
        "photo x2 for JPEG of quality 60, back-projection 2",
    ),
]


@pytest.mark.parametrize(("name", "options", "flags", "line"), CHOICES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_compressed_jpeg_images_get_the_photo_network(
    call, photo, photo_network, tmp_path, name, options, flags, line, mode
):
    Image.fromarray(photo).convert(mode).save(tmp_path / name, **options)
    if mode == "L" or options.get("subsampling") == 0:  # no chroma of half the resolution
        line = re.sub(r"photo(-hq)? x2 for", r"photo-luma\1 x2 for", line)
    output = tmp_path / "out.png"
    result = call("test", tmp_path / name, "--scale", 2, "--output", output, *flags)
    assert (result.status, result.err) == (0, "")
    assert f"{output}  90 x 120 -> 180 x 240  {line}  " in result.out
    network, steps = line.split()[0], int(line.split()[-1])
    file = "srcnn" if network == "9-5-5" else f"srcnn_{network}"
    model = load_srcnn(photo_network / f"{file}_x2.pth")
    expected = upscale(Image.open(tmp_path / name), model, 2, back_projection=steps)
    assert nearly_equal(pixels(output), np.asarray(expected))


def test_each_image_of_a_folder_gets_its_network(call, photo, photo_network, tmp_path):
    for name, quality in ("a.jpg", 50), ("b.jpg", 97), ("c.jpg", 80), ("d.png", None):
        options = {"quality": quality} if quality else {}
        Image.fromarray(photo).save(tmp_path / name, **options)
    result = call("test", *sorted(tmp_path.glob("?.*")), "--output", tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()[:-1]
    networks = [re.search(r"  (\S+ x3.*), back", line)[1] for line in lines]
    photo, photo_hq = "photo x3 for JPEG of quality 50", "photo-hq x3 for JPEG of quality 80"
    assert networks == [photo, "9-5-5 x3", photo_hq, "9-5-5 x3"]


@pytest.mark.parametrize(
    ("flags", "file"), [((), "-hq"), (("--jpeg", 64), ""), (("--jpeg", 65), "-hq")]
)
def test_an_evaluation_uses_the_photo_weights_of_its_quality(
    call, photo, photo_network, tmp_path, flags, file
):
    Image.fromarray(photo).save(tmp_path / "a.png")
    weights = photo_network / f"srcnn_photo-luma{file}_x2.pth"
    rows = []
    for network in ("--network", "photo-luma"), ("--weights-file", weights):
        argv = tmp_path / "a.png", "--scale", 2, "--csv", tmp_path / "s.csv", *flags, *network
        assert call("test", "--eval", *argv).status == 0
        rows.append(read_scores(tmp_path / "s.csv"))
    assert rows[0] == rows[1]


def test_weights_of_a_file_and_an_evaluation_choose_no_network(
    call, photo, photo_network, tmp_path, weights
):
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=40)
    result = call("test", tmp_path / "a.jpg", "--scale", 2, "--weights-file", weights)
    assert (result.status, result.err) == (0, "")
    assert "  small.pth x2, back-projection 1  " in result.out
    argv = "test", "--eval", tmp_path / "a.jpg", "--scale", 2, "--csv", tmp_path / "s.csv"
    assert call(*argv).status == 0
    (default,) = read_scores(tmp_path / "s.csv")
    assert call(*argv, "--network", "9-5-5").status == 0
    assert read_scores(tmp_path / "s.csv") == [default]
    assert call(*argv, "--network", "photo").status == 0
    assert read_scores(tmp_path / "s.csv") != [default]


def test_a_scale_without_photo_weights_is_refused(call, photo, photo_network, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=40)
    result = call("test", tmp_path / "a.jpg", "--scale", 4)
    assert refused(result, "a.jpg", "--scale 4", "srcnn_photo_x4.pth")


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
    assert (result.status, Path(result.out.split()[0]).parent) == (0, output)
    assert sorted(tree(output)) == ["photo.v1_srcnn_x3.png"]


@pytest.mark.parametrize("ext", ["bmp", "ppm", "ico", "jpg"])
def test_format_that_would_lose_transparency_or_the_size_is_refused(call, tmp_path, photo, ext):
    rgba = np.dstack([photo[:40, :50], np.full((40, 50), 128, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    result = call("test", tmp_path / "a.png", "--ext", ext, "--output", tmp_path / "out")
    assert refused(result, f"a_srcnn_x3.{ext}", "cannot store", "use .png")
    assert not (tmp_path / "out").exists()


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
    assert refused(call("test", *argv), "--scale 7", "use 2, 3 or 4")


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
        (["--jpeg", "40"], ["--jpeg", "--eval"]),
        (["--eval", "--outscale", "2.5"], ["--outscale", "--eval"]),
        (["--eval", "--width", "250"], ["--width", "--eval"]),
        (["--eval", "--height", "250"], ["--height", "--eval"]),
        (["--width", "250", "--height", "250"], ["--width", "--height"]),
        (["--width", "250", "--outscale", "2.5"], ["--width", "--outscale"]),
        (["--scale", "2", "--outscale", "2.5"], ["--outscale 2.5", "scale 2"]),
        (["--network", "rgb", "--weights-file", "x.pth"], ["--network", "--weights-file"]),
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
    assert refused(call(*argv), "small.png", "11 x 11 pixels")


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
def test_bicubic_scores_do_not_depend_on_the_network(call, tmp_path, weights, rgb_weights):
    argv = "test", "--eval", "--image-file", DATA / "Set14", "--csv", tmp_path / "scores.csv"
    tables = []
    for path in weights, rgb_weights:  # bridge.bmp is greyscale
        result = call(*argv, "--weights-file", path)
        assert (result.status, result.out.splitlines()[-1].split()[1]) == (0, "27.54")
        tables.append(read_scores(tmp_path / "scores.csv"))
    for column in "image", "bicubic_psnr", "bicubic_ssim":
        luma_column, rgb_column = ([row[column] for row in table] for table in tables)
        assert rgb_column == luma_column


# --- comparison images ----------------------------------------------------------------------


def tiles(comparison: np.ndarray, width: int, height: int) -> tuple[list, list]:
    """Return the images of a comparison, and the magnified details below them."""
    assert comparison.shape[0] == 16 + 2 * height and comparison.shape[1] % width == 0
    upper, lower = comparison[16 : 16 + height], comparison[16 + height :]
    count = comparison.shape[1] // width
    return np.split(upper, count, axis=1), np.split(lower, count, axis=1)


def detail_positions(image: np.ndarray, detail: np.ndarray) -> set[tuple[int, int]]:
    """Return where in an image lies what is magnified: a fourth of its width and height."""
    height, width = image.shape[0] // 4, image.shape[1] // 4
    rows = ((np.arange(image.shape[0]) + 0.5) * height / image.shape[0]).astype(int)
    columns = ((np.arange(image.shape[1]) + 0.5) * width / image.shape[1]).astype(int)
    corners = np.argwhere((image == detail[0, 0]).all(axis=-1)).tolist()
    windows = {(y, x): image[y : y + height, x : x + width] for y, x in corners}
    return {
        place
        for place, window in windows.items()
        if window.shape[:2] == (height, width) and np.array_equal(window[rows][:, columns], detail)
    }


def test_comparison_shows_original_bicubic_and_srcnn(call, photo_path, tmp_path, weights):
    argv = ["--eval", "--image-file", photo_path, "--scale", 2, "--weights-file", weights]
    folder = tmp_path / "images"
    assert call("test", *argv, "--save-images", folder).status == 0
    bicubic, comparison, srcnn = (
        pixels(folder / f"photo.v1_{method}_x2.png")
        for method in ("bicubic", "comparison", "srcnn")
    )
    assert len(tree(folder)) == 3
    assert bicubic.shape == srcnn.shape == (120, 90, 3)
    images, details = tiles(comparison, 90, 120)
    original = pixels(photo_path)
    assert np.abs(images[0] - original).max() <= 1
    assert np.array_equal(images[1], bicubic)
    assert np.array_equal(images[2], srcnn)
    assert 0.5 < np.abs(bicubic - original).mean() < 12
    positions = [detail_positions(*pair) for pair in zip(images, details, strict=True)]
    assert len(set.intersection(*positions)) == 1  # the same detail of all three


def test_comparison_of_an_upscaled_image_shows_bicubic_and_the_result(call, photo_path, tmp_path):
    argv = "--scale", 2, "--output", tmp_path / "out.png", "--save-images", tmp_path / "images"
    assert call("test", photo_path, *argv).status == 0
    assert list(tree(tmp_path / "images")) == ["photo.v1_comparison_x2.png"]
    comparison = pixels(tmp_path / "images" / "photo.v1_comparison_x2.png")
    (bicubic, srcnn), details = tiles(comparison, 180, 240)
    assert np.array_equal(srcnn, pixels(tmp_path / "out.png"))
    expected = Image.open(photo_path).resize((180, 240), Image.Resampling.BICUBIC)
    assert np.array_equal(bicubic, np.asarray(expected))
    positions = [detail_positions(*pair) for pair in zip((bicubic, srcnn), details, strict=True)]
    assert len(set.intersection(*positions)) == 1


def test_a_comparison_shows_invisible_pixels_as_white(call, photo, tmp_path):
    alpha = np.zeros((120, 90, 1), np.uint8)
    alpha[:, 60:] = 255
    hidden = np.where(alpha, photo, noise(120, 90, 3).astype(np.uint8))
    Image.fromarray(np.dstack([hidden, alpha])).save(tmp_path / "a.png")
    argv = "--scale", 2, "--output", tmp_path / "out.png", "--save-images", tmp_path / "images"
    assert call("test", tmp_path / "a.png", *argv).status == 0
    images, details = tiles(pixels(tmp_path / "images" / "a_comparison_x2.png"), 180, 240)
    for image, detail in zip(images, details, strict=True):
        assert np.all(image[:, :110] == 255)
        assert np.mean(detail == 255) < 0.9  # the magnified part is a visible one


def test_a_report_shows_a_detail_of_a_long_strip(call, tmp_path):
    Image.fromarray(noise(10, 9000).astype(np.uint8)).save(tmp_path / "a.png")
    argv = "--scale", 2, "--output", tmp_path / "out.png", "--report", tmp_path / "r.html"
    result = call("test", tmp_path / "a.png", *argv)
    assert (result.status, result.err) == (0, "")
    assert "detail of 18000 x 20 pixels" in (tmp_path / "r.html").read_text()


def test_a_line_about_an_image_is_printed_once(call, photo, tmp_path):
    frames = [Image.fromarray(photo[:, i * 30 :][:, :30]) for i in range(2)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    argv = "test", "--eval", tmp_path / "film.gif", "--save-images", tmp_path / "out"
    result = call(*argv, "--report", tmp_path / "r.html")
    assert (result.status, result.err.count("\n")) == (0, 1)
    assert "only the first is used" in result.err


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
    assert np.array_equal(tiles(comparison, 90, 120)[0][0], np.dstack([np.asarray(grey)] * 3))
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


@pytest.mark.parametrize("flag", ["--eval", "--self-ensemble"])
def test_export_refuses_flags_that_it_would_ignore(call, tmp_path, flag):
    assert refused(call("test", "--export", tmp_path / "x.onnx", flag), flag, "--export")
    assert not tree(tmp_path)


def test_export_does_not_overwrite_the_weights(call):
    path = ROOT / "weights" / "srcnn_x3.pth"
    before = path.read_bytes()
    assert refused(call("test", "--export", path, "--scale", 3), "would overwrite")
    assert path.read_bytes() == before
