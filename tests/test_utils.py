"""Colour, resampling, metrics, reading pictures, and writing files."""

import math

import numpy as np
import pytest
from conftest import DATA, noise, tree
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
    read_levels,
    resize,
    rgb_to_ycbcr,
    shave,
    ssim,
    to_8bit,
    write_whole,
    ycbcr_to_rgb,
)

MATLAB = DATA.resolve().parent / "reference" / "Set5_matlab_lr"


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel, a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resizing_matrix(old: int, new: int) -> np.ndarray:
    """MATLAB's imresize of one axis as a matrix, in float64; edge pixels repeated."""
    stretch = max(1, old / new)
    matrix = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        reach = math.ceil(2 * stretch) + 1
        taps = np.arange(math.floor(centre) - reach, math.floor(centre) + reach + 1)
        weights = cubic((taps - centre) / stretch)
        weights /= weights.sum()
        np.add.at(matrix[row], np.clip(taps, 0, old - 1), weights)
    return matrix


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (31, 45)])
def test_resize_agrees_with_the_float64_formula(scale, size):
    low = noise(*size)
    large = tuple(scale * side for side in size)
    up = [resizing_matrix(old, new) for old, new in zip(size, large)]
    assert np.abs(resize(low, large) - up[0] @ low @ up[1].T).max() < 1e-3
    high = noise(*large, seed=1)
    down = [resizing_matrix(old, new) for old, new in zip(large, size)]
    assert np.abs(resize(high, size) - down[0] @ high @ down[1].T).max() < 1e-3


def test_resize_refuses_a_ratio_that_is_not_whole():
    with pytest.raises(ValueError):
        resize(noise(10, 10), (15, 10))


@pytest.mark.skipif(not MATLAB.is_dir(), reason="MATLAB's images are not at hand")
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_resize_reproduces_matlab_bit_for_bit(scale):
    paths = find_images([MATLAB / f"x{scale}"])
    assert len(paths) == 5
    for path in paths:
        hr = np.asarray(Image.open(DATA / "Set5" / f"{path.stem}.bmp"))
        hr = crop_to_multiple(hr.transpose(2, 0, 1), scale)
        size = hr.shape[1] // scale, hr.shape[2] // scale
        matlab = np.asarray(Image.open(path)).transpose(2, 0, 1)
        rows = to_8bit(resize(hr, (size[0], hr.shape[2])))
        assert np.array_equal(to_8bit(resize(rows, size)), matlab), path


def test_degrade_keeps_a_constant_picture_and_its_size():
    flat = np.full((3, 12, 9), 77, np.float32)
    assert np.allclose(bicubic_pair(flat, 1, 3).ilr, flat, atol=1e-4)


def test_luma_has_the_weights_of_bt601():
    rgb = noise(3, 20, 30)
    r, g, b = rgb.astype(np.float64)
    y = 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255
    assert np.abs(rgb_to_ycbcr(rgb.astype(np.float64))[0] - y).max() < 1e-9
    theirs = color.rgb2ycbcr(rgb.astype(np.float64).transpose(1, 2, 0) / 255)
    assert np.abs(rgb_to_ycbcr(rgb) - theirs.transpose(2, 0, 1)).max() < 1e-3


def test_colour_round_trip_stays_within_half_a_grey_level():
    corners = np.stack(np.meshgrid(*[[0, 1, 127, 128, 254, 255]] * 3)).reshape(3, 8, 27)
    for rgb in (corners.astype(np.float32), noise(3, 64, 64)):
        assert np.abs(ycbcr_to_rgb(rgb_to_ycbcr(rgb)) - rgb).max() < 0.5
        assert np.array_equal(to_8bit(ycbcr_to_rgb(rgb_to_ycbcr(np.rint(rgb)))), np.rint(rgb))


def test_to_8bit_rounds_halves_up_and_clips():
    levels = np.array([-3.0, 0.49, 0.5, 1.5, 2.5, 254.6, 300.0])
    assert to_8bit(levels).tolist() == [0, 0, 1, 2, 3, 255, 255]


@pytest.mark.parametrize("shape", [(11, 11), (40, 57)])
def test_psnr_and_ssim_agree_with_scikit_image(shape):
    a = noise(*shape)
    b = np.clip(a + noise(*shape, seed=1) / 8 - 16, 0, 255)
    theirs = metrics.peak_signal_noise_ratio(
        a.astype(np.float64), b.astype(np.float64), data_range=255
    )
    assert abs(psnr(a, b) - theirs) < 1e-9
    theirs = metrics.structural_similarity(
        a.astype(np.float64),
        b.astype(np.float64),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert abs(ssim(a, b) - theirs) < 1e-6


def test_psnr_of_equal_pictures_is_infinite_and_ssim_one():
    a = noise(20, 20)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError):
        ssim(noise(10, 30), noise(10, 30))


def test_shave_cuts_every_side():
    assert np.array_equal(shave(np.arange(25).reshape(5, 5), 2), [[12]])
    assert shave(noise(3, 9, 8), 3).shape == (3, 3, 2)


def test_luma_of_a_colour_file_is_rounded_and_a_grey_file_is_used_as_it_is(tmp_path):
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
    assert np.allclose(read_levels(tmp_path / "deep.png")[0], values / 257, atol=1e-4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_decoded_planes_become_the_same_picture_again(mode, photo):
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
    exif[0x0112] = 6  # turned right by a quarter
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(open_image(tmp_path / "turned.png"))
    assert np.array_equal(upright, np.rot90(photo, -1))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "file", b"old")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file") as partial:
        partial.write_bytes(b"half of the n")
        raise RuntimeError
    assert tree(tmp_path) == before
    write_whole(tmp_path / "file", b"new")
    assert tree(tmp_path) == {"file": b"new"}


def test_a_write_follows_a_link_and_makes_the_folder(tmp_path):
    write_whole(tmp_path / "folder" / "file", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"


def test_what_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        write_whole(tmp_path, b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        write_whole(tmp_path / "file" / "below", b"")
