"""Colour, resampling, metrics, finding and decoding images, atomic files."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, noise, resizing_matrix, tree
from PIL import Image
from skimage import color, metrics

from utils import (
    InputError,
    atomic_path,
    bicubic_pair,
    crop_to_multiple,
    decode,
    find_images,
    open_image,
    psnr,
    quantize,
    read_levels,
    resize,
    rgb_to_ycbcr,
    shave,
    ssim,
    write_file,
    ycbcr_to_rgb,
)

MATLAB = DATA.resolve().parent / "reference" / "Set5_matlab_lr"


# --- resampling -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (31, 45)])
def test_resize_matches_the_float64_formula(scale, size):
    lr = noise(*size)
    large = tuple(scale * side for side in size)
    up = [resizing_matrix(old, new) for old, new in zip(size, large)]
    assert np.abs(resize(lr, large) - up[0] @ lr @ up[1].T).max() < 1e-3
    hr = noise(*large, seed=1)
    down = [resizing_matrix(old, new) for old, new in zip(large, size)]
    assert np.abs(resize(hr, size) - down[0] @ hr @ down[1].T).max() < 1e-3


@pytest.mark.parametrize("size", [(15, 10), (10, 3), (0, 10)])
def test_resize_refuses_sides_that_are_no_multiple_and_no_divisor(size):
    with pytest.raises(ValueError, match="cannot resize 10 pixels"):
        resize(noise(10, 10), size)


@pytest.mark.skipif(not MATLAB.is_dir(), reason="MATLAB's images are not available")
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_resize_reproduces_matlab_bit_for_bit(scale):
    paths = find_images([MATLAB / f"x{scale}"])
    assert len(paths) == 5
    for path in paths:
        hr = np.asarray(Image.open(DATA / "Set5" / f"{path.stem}.bmp"))
        hr = crop_to_multiple(hr.transpose(2, 0, 1), scale)
        size = hr.shape[1] // scale, hr.shape[2] // scale
        matlab = np.asarray(Image.open(path)).transpose(2, 0, 1)
        rows = quantize(resize(hr, (size[0], hr.shape[2])))
        assert np.array_equal(quantize(resize(rows, size)), matlab), path


def test_bicubic_preserves_a_constant_image_and_its_size():
    flat = np.full((3, 12, 9), 77, np.float32)
    pair = bicubic_pair(flat, 3)
    assert np.allclose(pair.ilr, flat, atol=1e-4)
    assert (pair.lr.shape, pair.num_channels) == ((3, 4, 3), 3)


def test_shave_cuts_every_side():
    assert np.array_equal(shave(np.arange(25).reshape(5, 5), 2), [[12]])
    assert shave(noise(3, 9, 8), 3).shape == (3, 3, 2)


# --- colour ---------------------------------------------------------------------------------


def test_luma_has_the_weights_of_bt601():
    rgb = noise(3, 20, 30)
    r, g, b = rgb.astype(np.float64)
    y = 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255
    assert np.abs(rgb_to_ycbcr(rgb.astype(np.float64))[0] - y).max() < 1e-9
    expected = color.rgb2ycbcr(rgb.astype(np.float64).transpose(1, 2, 0) / 255)
    assert np.abs(rgb_to_ycbcr(rgb) - expected.transpose(2, 0, 1)).max() < 1e-3


def test_colour_round_trip_stays_within_half_a_grey_level():
    corners = np.stack(np.meshgrid(*[[0, 1, 127, 128, 254, 255]] * 3)).reshape(3, 8, 27)
    for rgb in (corners.astype(np.float32), noise(3, 64, 64)):
        assert np.abs(ycbcr_to_rgb(rgb_to_ycbcr(rgb)) - rgb).max() < 0.5
        assert np.array_equal(quantize(ycbcr_to_rgb(rgb_to_ycbcr(np.rint(rgb)))), np.rint(rgb))


def test_quantize_rounds_halves_up_and_clips():
    levels = np.array([-3.0, 0.49, 0.5, 1.5, 2.5, 254.6, 300.0])
    assert quantize(levels).tolist() == [0, 0, 1, 2, 3, 255, 255]
    assert quantize(np.array([0.2, 0.3, 254.9]), 0.5).tolist() == [0, 0.5, 255]
    assert quantize(levels, 0) is levels  # a floating-point image is not rounded


# --- metrics --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(11, 11), (40, 57)])
def test_psnr_and_ssim_agree_with_scikit_image(shape):
    a = noise(*shape)
    b = np.clip(a + noise(*shape, seed=1) / 8 - 16, 0, 255)
    expected = metrics.peak_signal_noise_ratio(
        a.astype(np.float64), b.astype(np.float64), data_range=255
    )
    assert abs(psnr(a, b) - expected) < 1e-9
    expected = metrics.structural_similarity(
        a.astype(np.float64),
        b.astype(np.float64),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert abs(ssim(a, b) - expected) < 1e-6


def test_psnr_of_equal_images_is_infinite_and_ssim_one():
    a = noise(20, 20)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError):
        ssim(noise(10, 30), noise(10, 30))


# --- images ---------------------------------------------------------------------------------


def test_luma_of_a_colour_image_is_rounded_and_a_greyscale_image_is_its_own_luma(tmp_path):
    rgb = noise(3, 9, 7).astype(np.uint8)
    Image.fromarray(rgb.transpose(1, 2, 0)).save(tmp_path / "colour.png")
    Image.fromarray(rgb[0]).save(tmp_path / "grey.png")
    r, g, b = rgb.astype(np.float64)
    y = np.floor(16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255 + 0.5)
    assert np.array_equal(read_levels(tmp_path / "colour.png")[0], y)
    assert np.array_equal(read_levels(tmp_path / "grey.png")[0], rgb[0])
    assert np.array_equal(read_levels(tmp_path / "colour.png", 3)[0], rgb)
    assert np.array_equal(read_levels(tmp_path / "grey.png", 3)[0], [rgb[0]] * 3)


def test_sixteen_bit_levels_are_fractions_of_a_grey_level(tmp_path):
    values = np.array([[0, 1, 257], [30000, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    levels, planes = read_levels(tmp_path / "deep.png")
    assert np.allclose(levels, values / 257, atol=1e-4)
    assert planes.quantum == pytest.approx(255 / 65535)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_decoded_planes_make_the_same_image_again(mode, photo):
    image = Image.fromarray(photo).convert(mode)
    planes = decode(image)
    levels = planes.levels()
    if planes.alpha is not None:
        levels = np.concatenate([levels, planes.alpha[None]])
    again = planes.to_image(levels)
    assert again.mode == planes.mode
    assert np.array_equal(np.asarray(again), np.asarray(image.convert(planes.mode)))


def test_exif_orientation_is_applied(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    Image.fromarray(photo).save(tmp_path / "rotated.png", exif=exif)
    upright = np.asarray(open_image(tmp_path / "rotated.png"))
    assert np.array_equal(upright, np.rot90(photo, -1))


def test_folders_are_searched_with_their_subfolders_but_without_results_and_hidden_files(tmp_path):
    names = "b.PNG", "sub/a.jpg", "sub/deep/c.tif", "c_srcnn_x3.png", ".hidden/d.png", "notes.txt"
    for name in names:
        write_file(tmp_path / name, b"")
    found = find_images([tmp_path / "sub", tmp_path])
    relative = {str(path.relative_to(tmp_path)): str(r) for path, r in found.items()}
    assert relative == {"sub/a.jpg": "a.jpg", "sub/deep/c.tif": "deep/c.tif", "b.PNG": "b.PNG"}
    with_results = find_images([tmp_path], include_results=True)
    assert set(with_results) - set(found) == {tmp_path / "c_srcnn_x3.png"}
    named = tmp_path / "c_srcnn_x3.png"
    assert find_images([named]) == {named: Path(named.name)}
    with pytest.raises(InputError, match=r"notes.txt: no such folder"):
        find_images([tmp_path / "notes.txt"], folders_only=True)


# --- atomic files ---------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_file(tmp_path / "file", b"old")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file") as partial:
        partial.write_bytes(b"half of the n")
        raise RuntimeError
    assert tree(tmp_path) == before
    write_file(tmp_path / "file", b"new")
    assert tree(tmp_path) == {"file": b"new"}


def test_a_write_follows_a_link_and_creates_the_folder(tmp_path):
    write_file(tmp_path / "folder" / "file", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        write_file(tmp_path, b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="file/below: cannot be written"):
        write_file(tmp_path / "file" / "below", b"")
